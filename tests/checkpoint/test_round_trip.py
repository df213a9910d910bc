"""What goes into a checkpoint comes out, to the last bit, and nothing else goes in."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowrl.checkpoint import store
from flowrl.errors import UserError
from tests.checkpoint.state import adamw_state, nasty_state, same


def test_a_nasty_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = nasty_state()
    info = {"config_hash": "ab12", "versions": {"torch": torch.__version__}, "note": "größe", "list": [1, 2.5, None]}
    path = store.save(tmp_path, 12, state, info=info)
    assert path == tmp_path / "iteration-00000012"
    loaded = store.load(tmp_path)
    assert same(loaded.state, state)
    assert (loaded.iteration, loaded.info, loaded.path, loaded.warnings) == (12, info, path, ())


def test_the_comparison_of_these_tests_sees_one_bit() -> None:
    state, other = nasty_state(), nasty_state()
    assert same(state, other)
    other["shapes"]["bits"] = other["shapes"]["bits"].clone()
    other["shapes"]["bits"].view(torch.int32)[0] ^= 1
    assert not same(state, other)
    assert not same({1: 0.0}, {"1": 0.0})
    assert not same([0.0], [-0.0])
    assert not same([1], [1.0])
    assert not same((1,), [1])


def test_a_loaded_optimizer_steps_as_the_saved_one(tmp_path: Path) -> None:
    weights, optimizer_state = adamw_state()
    store.save(tmp_path, 1, {"policy": weights, "optimizer": optimizer_state}, info={})
    loaded = store.load(tmp_path).state

    def step(values: dict[str, torch.Tensor], state: dict[str, Any]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(value.clone()) for value in values.values()]
        optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
        optimizer.load_state_dict(state)
        sum((parameter**2).sum() for parameter in parameters).backward()
        optimizer.step()
        return [parameter.detach() for parameter in parameters]

    straight, resumed = step(weights, optimizer_state), step(loaded["policy"], loaded["optimizer"])
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not torch.equal(straight[0], weights["blocks.0.lora_A.weight"])


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    base = torch.ones(4)
    path = store.save(tmp_path, 1, {"a": {"whole": base, "part": base[:2]}}, info={})
    state = store.load(tmp_path).state
    state["a"]["whole"].zero_()
    assert state["a"]["part"].tolist() == [1, 1]
    assert same(store.load(tmp_path).state, {"a": {"whole": base, "part": base[:2]}})
    assert store.load(tmp_path).path == path


def test_files_are_plain_safetensors_one_a_top_level_key(tmp_path: Path) -> None:
    state = nasty_state()
    path = store.save(tmp_path, 1, state, info={})
    names = {item.name for item in path.iterdir()}
    with_tensors = {"policy", "optimizer", "ema", "shapes", "names", "other"}
    assert names == {f"{key}.safetensors" for key in with_tensors} | {"state.json", "manifest.json"}
    other_reader = load_file(path / "policy.safetensors")
    assert same(dict(sorted(other_reader.items())), dict(sorted(state["policy"].items())))
    save_file(other_reader, tmp_path / "again.safetensors")
    assert len((tmp_path / "again.safetensors").read_bytes()) == len((path / "policy.safetensors").read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert (tmp_path / "LATEST").read_text() == "iteration-00000001\n"


def test_mappings_and_parameters_come_back_plain(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    store.save(tmp_path, 1, {"policy": collections.OrderedDict(weight=weight)}, info={})
    policy = store.load(tmp_path).state["policy"]
    assert type(policy) is dict
    assert type(policy["weight"]) is torch.Tensor
    assert not policy["weight"].requires_grad


class _Opaque:
    pass


_SELF: dict[str, Any] = {}
_SELF["again"] = _SELF


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3), "state['a']['b'][1]: a checkpoint cannot hold a numpy.ndarray"),
        (np.float64(0.5), "state['a']['b'][1]: a checkpoint cannot hold a numpy.float64"),
        (_Opaque(), "_Opaque"),
        ({1, 2}, "builtins.set"),
        (b"x", "builtins.bytes"),
        (torch.Size([1]), "torch.Size"),
        (torch.float32, "torch.dtype"),
        ({1.5: 1}, "key 1.5 must be text or a whole number"),
        ({True: 1}, "key True must be text or a whole number"),
        (torch.zeros(1, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (_SELF, "does it hold itself"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_and_nothing_is_written(
    tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(TypeError) as caught:
        store.save(tmp_path / "root", 1, {"a": {"b": [0, value]}}, info={})
    assert message in str(caught.value)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("info", [{"a": (1,)}, {1: "a"}, {"a": float("nan")}, {"a": torch.zeros(1)}])
def test_info_that_json_would_change_is_refused(tmp_path: Path, info: Any) -> None:
    with pytest.raises(TypeError, match="info must be plain JSON"):
        store.save(tmp_path / "root", 1, {}, info=info)
    assert not (tmp_path / "root").exists()


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 1; at least 2"):
        store.save(tmp_path, 1, {}, info={}, keep=1)
    with pytest.raises(ValueError, match="iteration is -1"):
        store.save(tmp_path, -1, {}, info={})
    assert not list(tmp_path.iterdir())


def test_nothing_there_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint in .*missing"):
        store.load(tmp_path / "missing")
    store.save(tmp_path, 3, {}, info={})
    with pytest.raises(UserError, match=r"no checkpoint of iteration 4 in .*; there are: 3"):
        store.load(tmp_path, 4)
    assert store.load(tmp_path, 3).state == {}


def test_a_run_that_went_back_goes_on_from_its_last_save(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 4, 5):
        store.save(tmp_path, iteration, {"n": iteration}, info={}, keep=5)
    store.save(tmp_path, 3, {"n": 33}, info={}, keep=5)
    assert [entry.iteration for entry in store.list_checkpoints(tmp_path)] == [3, 2, 1, 5, 4]
    assert store.load(tmp_path).state == {"n": 33}
    (tmp_path / "iteration-00000003" / "state.json").unlink()
    assert store.load(tmp_path, 2).state == {"n": 2}
    store.save(tmp_path, 3, {"n": 333}, info={}, keep=3)
    assert [entry.iteration for entry in store.list_checkpoints(tmp_path)] == [3, 2, 1]
    assert store.load(tmp_path).state == {"n": 333}
