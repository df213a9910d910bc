"""R4 and R22: a save that fails takes nothing with it, and pruning never goes too far."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.checkpoint import manifest, retention, store


def _state(iteration: int) -> dict[str, Any]:
    return {"policy": {"w": torch.full((64,), float(iteration))}, "optimizer": {"m": torch.zeros(64)}, "n": iteration}


def _save(root: Path, iteration: int, **settings: Any) -> Path:
    return store.save(root, iteration, _state(iteration), info={}, **settings)


def _iterations(root: Path) -> list[int]:
    return sorted(entry.iteration for entry in store.list_checkpoints(root) if entry.problem is None)


def _verified(root: Path) -> int:
    count = 0
    for entry in store.list_checkpoints(root):
        if entry.manifest is not None:
            manifest.check_hashes(entry.path, entry.manifest)
            count += 1
    return count


def _snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("keep", [2, 5])
def test_thirty_saves_keep_the_newest_and_the_protected(tmp_path: Path, keep: int) -> None:
    for iteration in range(1, 31):
        protected = {4, 17} if iteration > 10 else {4}
        _save(tmp_path, iteration, keep=keep, protected=protected)
        newest = set(range(max(1, iteration - keep + 1), iteration + 1))
        assert set(_iterations(tmp_path)) == newest | {number for number in protected if number <= iteration}
        assert _verified(tmp_path) >= min(2, iteration)
        assert (tmp_path / "LATEST").read_text() == f"iteration-{iteration:08d}\n"
        assert store.load(tmp_path).state["n"] == iteration
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("failing", ["policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_leaves_the_old_ones_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    before = _snapshot(tmp_path)
    write = manifest.write_file

    def full(path: Path, chunks: Iterable[bytes | memoryview]) -> manifest.FileRecord:
        if path.name != failing:
            return write(path, chunks)
        path.write_bytes(bytes(next(iter(chunks)))[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write_file", full)
    with pytest.raises(store.CheckpointWriteError) as caught:
        _save(tmp_path, 3)
    text = str(caught.value)
    assert text.startswith(f"cannot write the checkpoint of iteration 3 in {tmp_path}: [Errno 28] No space left")
    assert "It needs about 0.0 MB, " in text
    assert "MB are free" in text
    assert "Free some space" in text
    assert _snapshot(tmp_path) == before
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.undo()
    _save(tmp_path, 4)
    assert _iterations(tmp_path) == [2, 4]


def test_a_disk_that_is_plainly_too_small_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    before = _snapshot(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    big = {"policy": {"w": torch.zeros(5_000_000)}}
    with pytest.raises(store.CheckpointWriteError, match=r"No space left.*needs about 20\.0 MB, 0\.1 MB are free"):
        store.save(tmp_path, 2, big, info={})
    assert _snapshot(tmp_path) == before
    _save(tmp_path, 2)


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                store.save(tmp_path, 2, {"policy": {"w": torch.zeros(100_000)}}, info={})
            except store.CheckpointWriteError as error:
                _save(tmp_path, 3)
                code = 7 if "File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert _iterations(tmp_path) == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "iteration-00000001", "iteration-00000003"]


def test_what_reads_back_differently_is_never_named_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)
    write = manifest.write_file

    def silently_wrong(path: Path, chunks: Iterable[bytes | memoryview]) -> manifest.FileRecord:
        record = write(path, chunks)
        if path.name == "policy.safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return record

    monkeypatch.setattr(store, "write_file", silently_wrong)
    with pytest.raises(store.CheckpointWriteError, match=r"policy.safetensors: was altered or damaged"):
        _save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "iteration-00000001"]


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(store.CheckpointWriteError, match=r"cannot write the checkpoint of iteration 1 in .*Not a dir"):
        _save(tmp_path / "file" / "checkpoints", 1)


def test_failing_deletes_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stuck(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "denied", str(path))

    for iteration in (1, 2):
        _save(tmp_path, iteration)
    monkeypatch.setattr(shutil, "rmtree", stuck)
    with caplog.at_level(logging.WARNING):
        for iteration in (3, 4, 5):
            _save(tmp_path, iteration)
            assert store.load(tmp_path).state["n"] == iteration
    assert "cannot delete" in caplog.text
    assert "iteration-00000001" in caplog.text
    monkeypatch.undo()
    _save(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "iteration-00000005", "iteration-00000006"]


def test_a_delete_cut_short_leaves_no_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2):
        _save(tmp_path, iteration)

    def cut_short(path: Path, *_: Any, **__: Any) -> None:
        (Path(path) / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 3)
    monkeypatch.undo()
    assert [(entry.iteration, entry.problem) for entry in store.list_checkpoints(tmp_path)] == [(3, None), (2, None)]
    _save(tmp_path, 4)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_crash_between_rename_and_pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for iteration in (1, 2):
        _save(tmp_path, iteration)

    def crash(root: Path, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_point", crash)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 3)
    assert retention.pointed(tmp_path) == tmp_path / "iteration-00000002"
    assert _iterations(tmp_path) == [1, 2, 3]
    assert store.load(tmp_path).state["n"] == 3
    monkeypatch.undo()
    _save(tmp_path, 4)
    assert retention.pointed(tmp_path) == tmp_path / "iteration-00000004"
    assert _iterations(tmp_path) == [3, 4]


def test_a_pointer_that_cannot_move_stops_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for iteration in (1, 2):
        _save(tmp_path, iteration)

    def full(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for iteration in (3, 4, 5):
        assert _save(tmp_path, iteration).name == f"iteration-{iteration:08d}"
        assert retention.pointed(tmp_path) == tmp_path / "iteration-00000002"
    assert "cannot move the pointer LATEST" in caplog.text
    assert _iterations(tmp_path) == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob(".tmp-*"))
    assert store.load(tmp_path).state["n"] == 5


def test_what_the_pointer_names_is_not_pruned(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4):
        _save(tmp_path, iteration, keep=4)
    (tmp_path / "LATEST").write_text("iteration-00000001\n")
    assert [path.name for path in retention.prune(tmp_path, 2, ())] == ["iteration-00000002"]
    assert _iterations(tmp_path) == [1, 3, 4]


def test_nothing_is_pruned_while_fewer_than_two_verify(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for iteration in (1, 2, 3):
        _save(tmp_path, iteration, keep=4)
    for iteration in (2, 3):  # same size, so that only the hashes tell
        path = tmp_path / f"iteration-{iteration:08d}" / "policy.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    _save(tmp_path, 4, keep=2)
    assert _iterations(tmp_path) == [1, 2, 3, 4]
    assert "older ones are kept" in caplog.text
    _save(tmp_path, 5, keep=2)
    assert _iterations(tmp_path) == [4, 5]


def test_damaged_ones_do_not_count_and_foreign_ones_stay(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        _save(tmp_path, iteration, keep=3)
    (tmp_path / "iteration-00000003" / "state.json").unlink()
    foreign = tmp_path / "iteration-00000000"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep me")
    _save(tmp_path, 4, keep=2)
    assert _iterations(tmp_path) == [2, 4]
    assert (foreign / "mine.txt").exists()


def test_stale_leftovers_go_but_not_those_of_a_living_writer(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".tmp-00000001-dead", tmp_path / ".tmp-00000001-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "policy.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-pointer-dead").write_text("iteration-")
    held = os.open(alive, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    _save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob(".tmp-*")) == [alive.name]
    os.close(held)
    _save(tmp_path, 3)
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_iteration_saved_again_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    rename = os.rename
    moments = []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        loaded = store.load(tmp_path)
        moments.append((loaded.iteration, loaded.state["n"]))
        assert retention.pointed(tmp_path) is not None

    monkeypatch.setattr(os, "rename", watched)
    store.save(tmp_path, 1, {**_state(1), "n": 11}, info={})
    assert moments == [(1, 1), (1, 11)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "iteration-00000001"]


def test_after_a_crash_between_its_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if Path(target).name == "iteration-00000001":
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(store.CheckpointWriteError):
        store.save(tmp_path, 1, {"n": 11}, info={})
    assert store.load(tmp_path).state["n"] == 1
    monkeypatch.undo()
    store.save(tmp_path, 1, {"n": 11}, info={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "iteration-00000001"]
    assert store.load(tmp_path).state["n"] == 11
