"""Checkpoints and exports of a network in shards are those of a whole one: any number of processes goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowrl.checkpoint import store
from flowrl.distributed.backend import Backend
from flowrl.distributed.checksums import ReplicaMismatch
from flowrl.tracking.progress import Progress
from flowrl.training.build import build
from flowrl.training.run import Run
from tests.distributed.processes import run
from tests.distributed.toys import signs
from tests.training.helpers import small_config, tensors
from tests.training.toy import LatentReward

FULL: dict[str, Any] = {"model.train": "full", "objective.name": "nft", "forward.old_rate": 0.3,
                        "rollout.window.kind": "full", "rollout.window.last": 0}  # fmt: skip
LORA: dict[str, Any] = {"objective.kl.form": "velocity", "objective.kl.weight": 0.05}
KINDS = {"lora": LORA, "full": FULL}


def open_run(model: Path, folder: Path, kind: str) -> Run:
    changes = KINDS[kind] | {
        "distributed.sharding": "fsdp2", "tracking.pictures.enabled": False, "optimizer.lr": 1e-3, "optimizer.eps": 0.01,
        "ema.decay": 0.5, "run_dir": str(folder),
    }  # fmt: skip
    config = small_config(model, **changes)
    parts = build(config, Backend())
    parts.trainer.rewards = parts.trainer.collector.rewards = LatentReward(signs)  # type: ignore[assignment]
    return Run(config, parts, folder, "test", lambda text: None)


def save(model: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Two iterations, a checkpoint, an export of that moment, and the state after a third iteration."""
    one = open_run(model, folder / kind, kind)
    if one.leads:
        (folder / kind).mkdir()
    for _ in range(2):
        one.trainer.iterate()
    with Progress(6, write=one.write, start=0, enabled=False) as progress:
        one.save(progress, must=True)
    one.export()
    one.trainer.iterate()
    return one.trainer.state()


def go_on(model: Path, folder: Path, kind: str) -> dict[str, Any]:
    one = open_run(model, folder / kind, kind)
    one.restore(store.load(folder / kind / "checkpoints"))
    one.trainer.iterate()
    return one.trainer.state()


def save_all(model: Path, folder: Path) -> dict[str, Any]:
    return {kind: save(model, folder, kind) for kind in KINDS}


def go_on_all(model: Path, *folders: Path) -> dict[str, Any]:
    return {(folder.name, kind): go_on(model, folder, kind) for folder in folders for kind in KINDS}


@pytest.fixture(scope="module")
def saved(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("saved")
    folders = {world: root / str(world) for world in (1, 2)}
    for folder in folders.values():
        folder.mkdir()
    after = {world: run(world, save_all, tiny_sd3, folder)[0] for world, folder in folders.items()}
    resumed = {world: run(world, go_on_all, tiny_sd3, *folders.values())[0] for world in (1, 2)}
    return {"root": root, "after": after, "resumed": resumed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind: str, saved: dict[str, Any]) -> None:
    found, wanted = tensors(saved["resumed"][2]["2", kind]), tensors(saved["after"][2][kind])
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(kind: str, before: int, now: int, saved: dict[str, Any]) -> None:
    found, wanted = tensors(saved["resumed"][now][str(before), kind]), tensors(saved["after"][before][kind])
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_that_of_one_process(kind: str, saved: dict[str, Any]) -> None:
    one, two = (saved["root"] / world / kind / "export" for world in ("1", "2"))
    files = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    for name in files:
        if name.endswith(".safetensors"):
            wanted, found = load_file(one / name), load_file(two / name)
            assert list(wanted) == list(found)
            assert all(torch.allclose(wanted[key], found[key], rtol=1e-3, atol=1e-5) for key in wanted)
    if kind == "full":
        assert json.loads((two / "transformer" / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"


def spoil(model: Path, folder: Path) -> str:
    """What the check says once process 1 computes with another value than its shards say."""
    one = open_run(model, folder, "full")
    sharded = one.trainer.backend.sharded
    assert sharded is not None and sharded.gathered
    sharded.check()
    if one.trainer.backend.rank == 1:
        with torch.no_grad():
            sharded.held[0][0].current.view(-1)[0] += 1
    try:
        sharded.check()
    except ReplicaMismatch as error:
        return f"{sharded.held[0][0].name}: {error}"
    return ""


def test_processes_that_compute_with_different_weights_stop(tiny_sd3: Path, tmp_path: Path) -> None:
    for said in run(2, spoil, tiny_sd3, tmp_path):
        name = said.partition(":")[0]
        assert f"process 1 of 2 computes with other values of {name} than process 0" in said
