"""A network under DeepSpeed's ZeRO trains, is saved and goes on as one whole process does (gloo on the CPU)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowrl.checkpoint import store
from flowrl.distributed.backend import Backend
from flowrl.tracking.progress import Progress
from flowrl.training.build import build
from flowrl.training.run import Run
from tests.distributed.processes import run
from tests.distributed.toys import signs
from tests.training.helpers import small_config, tensors
from tests.training.toy import LatentReward

KL: dict[str, Any] = {"objective.kl.form": "velocity", "objective.kl.weight": 0.05}
BASE: dict[str, Any] = {
    "tracking.pictures.enabled": False, "optimizer.lr": 1e-3, "ema.decay": 0.5, "optimizer.eps": 0.01, "iterations": 4,
    "optimizer.schedule": "linear",
}  # fmt: skip
FULL: dict[str, Any] = BASE | {"model.train": "full"}
UNEVEN: dict[str, Any] = {"batch.groups": 3, "batch.micro_batch": 3}
"""On two processes 8 samples in 3 calls, and 4 samples in 2."""
NFT: dict[str, Any] = {"objective.name": "nft", "rollout.window.kind": "full", "rollout.window.last": 0}
CASES: dict[str, dict[str, Any]] = {
    "lora": BASE | KL,
    "full_uneven": FULL | KL | UNEVEN | {"optimizer.max_grad_norm": 0.01, "rollout.guidance": 2.0},
    "joint_uneven": FULL | UNEVEN | {"objective.loss": "gspo", "model.activation_checkpointing": True},
    "forward_uneven": BASE | UNEVEN | NFT,
}
STAGES = ("zero1", "zero2", "zero3")
RUNS = [(stage, case) for stage in STAGES for case in ("lora", "full_uneven")]
SHORT = ("forward_uneven", "joint_uneven")
MORE = [("zero2", "forward_uneven"), ("zero3", "joint_uneven")]


def open_run(model: Path, folder: Path, case: str, sharding: str) -> Run:
    config = small_config(model, **CASES[case], **{"distributed.sharding": sharding, "run_dir": str(folder)})
    parts = build(config, Backend(sharding=sharding))
    parts.trainer.rewards = parts.trainer.collector.rewards = LatentReward(signs)  # type: ignore[assignment]
    return Run(config, parts, folder, "test", lambda text: None)


def follow(model: Path, root: Path, sharding: str, case: str) -> dict[str, Any]:
    """Two iterations, a checkpoint and an export of that moment; a third iteration here and in a run that goes on from it."""
    folder = root / sharding / case
    one = open_run(model, folder, case, sharding)
    if one.leads:
        folder.mkdir(parents=True)
    rows = [one.trainer.iterate() for _ in range(2)]
    split = one.trainer.backend.sharded
    if case in SHORT:
        return {"rows": rows, "after": one.trainer.state(), "memory": {} if split is None else split.memory()}
    with Progress(6, write=one.write, start=0, enabled=False) as progress:
        one.save(progress, must=True)
    one.export()
    rows.append(one.trainer.iterate())
    after = one.trainer.state()
    another = open_run(model, folder, case, sharding)
    another.restore(store.load(folder / "checkpoints"))
    another.trainer.iterate()
    return {
        "rows": rows, "after": after, "resumed": another.trainer.state(),
        "memory": {} if split is None else split.memory(),
    }  # fmt: skip


def follow_all(model: Path, root: Path, runs: list[tuple[str, str]]) -> dict[Any, Any]:
    return {which: follow(model, root, *which) for which in runs}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def alone(tiny_sd3: Path, root: Path) -> dict[Any, Any]:
    """What one process without shards does, by case."""
    return run(1, follow_all, tiny_sd3, root, [("none", case) for case in CASES])[0]


@pytest.fixture(scope="module")
def trained(tiny_sd3: Path, root: Path, alone: dict[Any, Any]) -> list[dict[Any, Any]]:
    """What each of two processes did, by stage and case."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'flowrl[deepspeed]'")
    return run(2, follow_all, tiny_sd3, root, RUNS + MORE)


@pytest.mark.parametrize(("sharding", "case"), RUNS + MORE)
def test_two_processes_agree_with_one(
    sharding: str, case: str, alone: dict[Any, Any], trained: list[dict[Any, Any]]
) -> None:
    one, two = alone["none", case], trained[0][sharding, case]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["update/count"] == b["update/count"] > 0
        for name in ("policy/loss", "optimizer/grad_norm", "policy/kl", "score/mean", "optimizer/lr"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    wanted, found = tensors(one["after"]), tensors(two["after"])
    assert list(wanted) == list(found)
    for name, tensor in wanted.items():
        # Elements of the optimizer's state near zero are sums that cancel.
        near = 1e-3 * float(tensor.abs().max()) if "exp_avg" in name else 1e-5
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-3, atol=near), name
    memory = two["memory"]
    if case != "lora" or sharding != "zero3":  # there every parameter of so small a network stays whole
        assert memory["held"] == pytest.approx(memory["whole"] / 2, rel=0.01)


@pytest.mark.parametrize(("sharding", "case"), RUNS)
def test_a_run_goes_on_bit_for_bit(sharding: str, case: str, trained: list[dict[Any, Any]]) -> None:
    found, wanted = (tensors(trained[0][sharding, case][which]) for which in ("resumed", "after"))
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("sharding", STAGES)
def test_the_reference_is_the_model_without_lora(sharding: str, trained: list[dict[Any, Any]]) -> None:
    first, second, _ = trained[1][sharding, "lora"]["rows"]
    assert first["policy/kl"] == 0 and second["policy/kl"] > 0


@pytest.mark.parametrize(("sharding", "case"), RUNS)
def test_an_export_is_that_of_one_process(sharding: str, case: str, root: Path, trained: list[dict[Any, Any]]) -> None:
    one, two = (root / which / case / "export" for which in ("none", sharding))
    files = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert files == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    compared = 0
    for name in files:
        if name.endswith(".safetensors"):
            wanted, found = load_file(one / name), load_file(two / name)
            assert list(wanted) == list(found)
            assert all(torch.allclose(wanted[key], found[key], rtol=1e-3, atol=1e-5) for key in wanted)
            compared += len(wanted)
        elif name.endswith(".json"):
            assert json.loads((two / name).read_text()) == json.loads((one / name).read_text())
    assert compared
