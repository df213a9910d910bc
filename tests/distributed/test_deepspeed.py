"""A network under DeepSpeed's ZeRO trains, is saved and goes on as one whole process does (gloo on the CPU)."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowrl import api, cli
from flowrl.checkpoint import store
from flowrl.config import check, load
from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.tracking.progress import Progress
from flowrl.training.build import build
from flowrl.training.run import Run
from flowrl.training.trainer import Trainer
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
    "full_uneven": FULL | KL | UNEVEN | {"optimizer.max_grad_norm": 0.5},
    "joint_uneven": FULL
    | UNEVEN
    | {"objective.loss": "gspo", "model.activation_checkpointing": True, "rollout.guidance": 2.0},
    "forward_uneven": BASE | UNEVEN | NFT,
}
STAGES = ("zero1", "zero2", "zero3")
RUNS = [*((stage, "full_uneven") for stage in STAGES), ("zero1", "lora"), ("zero2", "lora")]
SHORT = ("forward_uneven", "joint_uneven")
POISONED = [("zero1", "lora"), ("zero2", "lora"), ("zero3", "full_uneven")]
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
    resumed = deepcopy(another.trainer.state())  # else of weights that train on
    crossed = {}
    if sharding != "none" and case == "full_uneven":
        another.trainer.load_state(store.load(root / "none" / case / "checkpoints").state)
        another.trainer.iterate()
        crossed = deepcopy(another.trainer.state())
    return {
        "rows": rows, "after": after, "resumed": resumed, "crossed": crossed,
        "poisoned": poison(another.trainer) if (sharding, case) in POISONED else [],
        "memory": {} if split is None else split.memory(),
    }  # fmt: skip


def poison(trainer: Trainer) -> list[tuple[int, int, bool]]:
    """(skipped, updates, weights unchanged) after an iteration with NaN in process 1's gradients alone, and one without."""
    backward, found = trainer.backend.backward, []
    for factor in (torch.nan if trainer.backend.rank == 1 else 1.0, 1.0):
        before = [p.detach().clone() for p in trainer.weights.parameters]
        trainer.backend.backward = lambda loss, factor=factor: backward(loss * factor)  # type: ignore[misc, method-assign]
        trainer.iterate()
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
        found.append((trainer.skipped.total, trainer.updates, same))
    return found


def follow_all(model: Path, root: Path, runs: list[tuple[str, str]]) -> dict[Any, Any]:
    return {which: follow(model, root, *which) for which in runs}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def alone(tiny_sd3: Path, root: Path) -> dict[Any, Any]:
    """What one process without shards does, by case."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'flowrl[deepspeed]'")
    return run(1, follow_all, tiny_sd3, root, [("none", case) for case in CASES])[0]


@pytest.fixture(scope="module")
def trained(tiny_sd3: Path, root: Path, alone: dict[Any, Any]) -> list[dict[Any, Any]]:
    """What each of two processes did, by stage and case."""
    return run(2, follow_all, tiny_sd3, root, RUNS + MORE)


def agree(one: Any, two: Any) -> None:
    """States are close: weights, average, optimizer, all that is a tensor."""
    wanted, found = tensors(one), tensors(two)
    assert list(wanted) == list(found)
    for name, tensor in wanted.items():
        # Elements of the optimizer's state near zero are sums that cancel.
        near = 1e-3 * float(tensor.abs().max()) if "exp_avg" in name else 1e-5
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-3, atol=near), name


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
    agree(one["after"], two["after"])
    assert two["memory"]["held"] == pytest.approx(two["memory"]["whole"] / 2, rel=0.01)


@pytest.mark.parametrize(("sharding", "case"), RUNS)
def test_a_run_goes_on_bit_for_bit(sharding: str, case: str, trained: list[dict[Any, Any]]) -> None:
    found, wanted = (tensors(trained[0][sharding, case][which]) for which in ("resumed", "after"))
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("sharding", STAGES)
def test_a_checkpoint_of_one_process_without_deepspeed_is_taken(
    sharding: str, alone: dict[Any, Any], trained: list[dict[Any, Any]]
) -> None:
    agree(alone["none", "full_uneven"]["after"], trained[0][sharding, "full_uneven"]["crossed"])


def go_on(model: Path, root: Path, sharding: str) -> dict[str, Any]:
    """From each stage's checkpoint, one iteration under ``sharding``."""
    found = {}
    for stage in STAGES:
        one = open_run(model, root / stage / "full_uneven", "full_uneven", sharding)
        one.restore(store.load(root / stage / "full_uneven" / "checkpoints"))
        one.trainer.iterate()
        found[stage] = deepcopy(one.trainer.state())
    return found


@pytest.mark.parametrize(("sharding", "world"), [("none", 1), ("fsdp2", 2)])
def test_its_checkpoints_are_taken_without_it(
    sharding: str, world: int, tiny_sd3: Path, root: Path, trained: list[dict[Any, Any]]
) -> None:
    found = run(world, go_on, tiny_sd3, root, sharding)[0]
    for stage in STAGES:
        agree(trained[0][stage, "full_uneven"]["after"], found[stage])


@pytest.mark.parametrize(("sharding", "case"), POISONED)
def test_all_skip_an_update_that_is_not_finite_in_one(sharding: str, case: str, trained: list[dict[Any, Any]]) -> None:
    first, second = (part[sharding, case]["poisoned"] for part in trained)
    assert first == second == [(1, 3, True), (1, 4, False)]


@pytest.mark.parametrize(("sharding", "case"), RUNS)
def test_the_reference_is_the_model_of_the_start(sharding: str, case: str, trained: list[dict[Any, Any]]) -> None:
    first, second, _ = trained[1][sharding, case]["rows"]
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


@pytest.mark.parametrize(("version", "said"), [("", "which is not installed"), ("0.18.9", "0.18.9 is installed")])
def test_without_deepspeed_a_run_and_its_plan_stop_before_a_model_is_loaded(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(package: str, real: Any = metadata.version) -> str:
        if package != "deepspeed":
            return str(real(package))
        if not version:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", found)
    words = rf"zero2 needs DeepSpeed 0.19 or newer, {said}; pip install -U 'flowrl\[deepspeed\]', or set fsdp2"
    config = small_config(tmp_path / "none", run_dir=str(tmp_path / "run"), **{"distributed.sharding": "zero2"})
    with pytest.raises(UserError, match=words):
        api.train(config)
    assert cli.main(["plan", "demo", "distributed.sharding=zero2"]) != 0
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distributed.sharding=zero1", "objective.name=refl"], "whole copies only; set none"),
        (["distributed.sharding=zero1", "model.dtype=fp16"], "use bf16"),
        (["distributed.sharding=zero2", "rollout.guidance_low=2"], "zero2 meets in the network's layers in one order"),
        (["distributed.sharding=zero3", "model.compile=regional"], "model.compile: regional was not tried"),
        (
            ["distributed.sharding=zero3", "tracking.pictures.enabled=true"],
            "in the first process alone, which zero3 cannot do",
        ),
        (["distributed.sharding=zero3"], "model.train=lora could wait for ever"),
        (["distributed.sharding=zero4"], "distributed.sharding"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(load("demo", overrides), 2)
