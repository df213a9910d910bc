"""R3 and R17: whatever is damaged, hostile or missing is seen before anything is returned."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowrl.checkpoint import manifest, store
from flowrl.errors import UserError
from tests.checkpoint.state import nasty_state, same


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("intact")
    store.save(root, 1, {**nasty_state(), "n": 1}, info={"hash": "x"})
    store.save(root, 2, {**nasty_state(), "n": 2}, info={"hash": "x"})
    return root


@pytest.fixture
def root(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "root")


def _flip(path: Path, draws: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, draws: random.Random) -> None:
    os.truncate(path, draws.randrange(path.stat().st_size))


def _append(path: Path, draws: random.Random) -> None:
    with path.open("ab") as handle:
        handle.write(bytes([draws.randrange(256)]))


def _swap(path: Path, draws: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = next(i for i in range(draws.randrange(len(data) - 1), -1, -1) if data[i] != data[i + 1])
    data[place], data[place + 1] = data[place + 1], data[place]
    path.write_bytes(data)


def _remove(path: Path, draws: random.Random) -> None:
    path.unlink()


def test_every_random_damage_is_seen_and_the_one_before_is_used(root: Path) -> None:
    draws = random.Random(20)
    folder = root / "iteration-00000002"
    kept = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    before = store.load(root, 1).state
    seen = 0
    for round_number in range(18):
        for harm in (_flip, _flip, _truncate, _append, _swap, _remove):
            path = draws.choice(list(kept)) if round_number >= len(kept) else list(kept)[round_number]
            harm(path, draws)
            loaded = store.load(root)
            assert loaded.iteration == 1, (round_number, harm.__name__, path.name)
            assert len(loaded.warnings) == 1
            assert "iteration-00000002 was refused, iteration-00000001 is used" in loaded.warnings[0]
            assert path.name in loaded.warnings[0]
            with pytest.raises(UserError):
                store.load(root, 2)
            path.write_bytes(kept[path])
            seen += 1
    assert seen == 108
    assert same(loaded.state, before)
    assert store.load(root).iteration == 2


def test_nothing_good_lists_what_is_wrong_with_each(root: Path) -> None:
    os.truncate(root / "iteration-00000002" / "policy.safetensors", 10)
    (root / "iteration-00000001" / "state.json").unlink()
    with pytest.raises(UserError) as caught:
        store.load(root)
    text = str(caught.value)
    assert "iteration-00000002: policy.safetensors: has 10 bytes, the manifest says" in text
    assert "iteration-00000001: state.json: is missing" in text


def test_listing_says_what_is_wrong(root: Path) -> None:
    (root / "iteration-00000002" / "manifest.json").unlink()
    (root / "notes").mkdir()
    found = store.list_checkpoints(root)
    assert [(entry.iteration, entry.problem is None) for entry in found] == [(1, True), (2, False)]
    os.truncate(root / "iteration-00000001" / "ema.safetensors", 7)
    assert "ema.safetensors: has 7 bytes" in str(store.list_checkpoints(root)[1].problem)


def _forge(root: Path, edit: Callable[[dict[str, Any], Path], None]) -> None:
    """Alter checkpoint 2 as one who knows the format would: every digest is right again afterwards."""
    folder = root / "iteration-00000002"
    body = json.loads((folder / "manifest.json").read_text())
    del body["digest"]
    edit(body, folder)
    body["digest"] = hashlib.sha256(manifest._spell(body)).hexdigest()
    (folder / "manifest.json").write_bytes(manifest._spell(body))


def _list(body: dict[str, Any], name: str, data: bytes) -> None:
    body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _refused(root: Path) -> str:
    loaded = store.load(root)
    assert loaded.iteration == 1
    return loaded.warnings[0]


def test_the_forger_of_these_tests_is_believed_where_nothing_is_wrong(root: Path) -> None:
    _forge(root, lambda body, folder: body["info"].update(hash="y"))
    loaded = store.load(root)
    assert (loaded.iteration, loaded.info, loaded.warnings) == (2, {"hash": "y"}, ())


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._path), "w"))


@pytest.mark.parametrize(
    ("name", "listed", "reason"),
    [
        ("payload.pkl", True, "refused file name 'payload.pkl'"),
        ("payload.pt", False, "'payload.pt': is not listed"),
        ("policy.safetensors", True, "policy.safetensors: is not a safetensors file"),
        ("payload.safetensors", True, "payload.safetensors: is not a safetensors file"),
        ("state.json", True, "state.json: cannot be understood"),
    ],
)
def test_a_pickle_in_any_disguise_is_refused_and_never_runs(
    root: Path, tmp_path: Path, name: str, listed: bool, reason: str
) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(_Canary(canary))

    def edit(body: dict[str, Any], folder: Path) -> None:
        (folder / name).write_bytes(data)
        if listed:
            _list(body, name, data)

    _forge(root, edit)
    assert reason in _refused(root)
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists()  # the payload would have worked


@pytest.mark.parametrize("name", ["../x", "../iteration-00000001/policy.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_a_name_that_leaves_the_directory_is_refused(root: Path, name: str) -> None:
    outside = root / "x"
    outside.write_bytes(b"secret")
    _forge(root, lambda body, folder: _list(body, name, b"secret"))
    assert f"refused file name {name!r}" in _refused(root)
    assert outside.read_bytes() == b"secret"


def test_links_are_refused(root: Path, tmp_path: Path) -> None:
    policy = root / "iteration-00000002" / "policy.safetensors"
    target = shutil.copy(policy, tmp_path / "elsewhere")
    policy.unlink()
    policy.symlink_to(target)
    assert "policy.safetensors: is not a plain file" in _refused(root)


def test_a_linked_directory_is_refused(root: Path, tmp_path: Path) -> None:
    folder = (root / "iteration-00000002").rename(tmp_path / "elsewhere")
    (root / "iteration-00000002").symlink_to(folder)
    assert "is not a directory" in _refused(root)


def test_a_directory_cannot_pose_as_another_iteration(root: Path) -> None:
    (root / "iteration-00000002").rename(root / "iteration-00000009")
    assert "is of iteration 2, not 9" in _refused(root)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "schema 2 was written by another version; this one reads schema 1"),
        ({"kind": "other"}, "kind is 'other'"),
        ({"iteration": "2"}, "iteration is '2'"),
        ({"sequence": -1}, "sequence is -1"),
        ({"files": {}}, "state.json is not listed"),
        ({"files": {"state.json": {"size": "9", "sha256": "00"}}}, "no proper size and sha256"),
        ({"extra": 1}, "digest does not match"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(root: Path, change: dict[str, Any], reason: str) -> None:
    _forge(root, lambda body, folder: body.update(change))
    assert reason in _refused(root)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"policy": {"$": "tensor", "file": "policy.safetensors", "name": "absent"}}, "cannot be understood"),
        ({"policy": {"$": "tensor", "file": "../x", "name": "a"}}, "cannot be understood"),
        ({"policy": {"$": "call", "name": "os.system"}}, "unknown mark 'call'"),
        ({}, "which state.json does not name"),
    ],
)
def test_a_state_that_does_not_fit_its_tensors_is_refused(root: Path, document: Any, reason: str) -> None:
    def edit(body: dict[str, Any], folder: Path) -> None:
        data = json.dumps({"state": document}).encode()
        (folder / "state.json").write_bytes(data)
        _list(body, "state.json", data)

    _forge(root, edit)
    assert reason in _refused(root)


def test_a_bottomless_state_is_refused(root: Path) -> None:
    def edit(body: dict[str, Any], folder: Path) -> None:
        data = b'{"state":{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}}"
        (folder / "state.json").write_bytes(data)
        _list(body, "state.json", data)

    _forge(root, edit)
    assert "state.json: cannot be understood (RecursionError" in _refused(root)
