"""A network in shards (FSDP2 on gloo) trains as one whole process does, whatever is gathered and for how long."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from flowrl.pipelines import execution
from torch._dynamo.utils import counters
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

from flowrl import fit
from flowrl.config.schema import Config
from flowrl.distributed.backend import Backend
from flowrl.performance.memory import Division, ModelSize
from flowrl.training.build import build
from tests.distributed.processes import run
from tests.distributed.toys import signs, together
from tests.training.helpers import small_config
from tests.training.toy import LatentReward

KL: dict[str, Any] = {"objective.kl.form": "velocity", "objective.kl.weight": 0.05}
BASE: dict[str, Any] = {
    "distributed.sharding": "fsdp2", "tracking.pictures.enabled": False, "optimizer.lr": 1e-3, "ema.decay": 0.5,
    "optimizer.eps": 0.01, "iterations": 2,
}  # fmt: skip
FULL: dict[str, Any] = BASE | {"model.train": "full"}
UNEVEN: dict[str, Any] = {"batch.groups": 3, "batch.micro_batch": 3}
"""On two processes 8 samples in 3 calls, and 4 samples in 2."""
CASES: dict[str, dict[str, Any]] = {
    "lora_rollout": BASE | KL | {"distributed.gather": "rollout"},
    "compiled_lora_block": BASE | KL | {"distributed.gather": "block", "model.compile": "regional"},
    "full_iteration": FULL | KL | {"distributed.gather": "iteration"},
    "full_block_uneven": FULL | KL | UNEVEN | {"distributed.gather": "block", "rollout.guidance": 2.0},
    "joint_block_uneven": FULL | UNEVEN | {"distributed.gather": "block", "objective.loss": "gspo", "objective.passes": 2},
    "forward_rollout_uneven": FULL | UNEVEN | {
        "distributed.gather": "rollout", "objective.name": "nft", "rollout.window.kind": "full", "rollout.window.last": 0,
    },
}  # fmt: skip
FOUR: dict[str, dict[str, Any]] = {
    "four_lora_block": BASE | KL | {"distributed.gather": "block", "batch.groups": 4},
    "four_full_rollout": FULL | {"distributed.gather": "rollout", "batch.groups": 4},
}  # fmt: skip
"""On 1 and 4 processes."""


class Gathers:
    """Counts the gathers of a block's weights."""

    def __init__(self) -> None:
        self.count, self.plain = 0, param_group.foreach_all_gather

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.plain(*arguments)


def train(model: Path, case: str) -> dict[str, Any]:
    execution.COMPILER = "aot_eager"  # needs no C++ compiler
    gathers = Gathers()
    param_group.foreach_all_gather = gathers  # type: ignore[assignment]
    try:
        return train_counted(model, case, gathers)
    finally:
        param_group.foreach_all_gather = gathers.plain


def train_counted(model: Path, case: str, gathers: Gathers) -> dict[str, Any]:
    backend = Backend()
    config = small_config(model, **(CASES | FOUR)[case])
    trainer = build(config, backend).trainer
    trainer.rewards = trainer.collector.rewards = LatentReward(signs)  # type: ignore[assignment]
    rows, counts, drawn = [], [0], []
    trainer.observer = lambda collected, batch: drawn.append(look(collected, batch)) or {}
    graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        before = gathers.count
        rows.append(trainer.iterate())
        counts.append(gathers.count - before)
    turns = None if backend.sharded is None else backend.sharded.turns
    with trainer.weights.averaged():
        average = {name: value.clone() for name, value in trainer.weights.whole(trainer.weights.parameters).items()}
    return {
        "rows": rows, "batches": drawn, "weights": trainer.weights.state()["policy"], "average": average,
        "served": turns.served if turns else 0, "gathers": counts[1:],
        "graphs": counters["stats"]["unique_graphs"] - graphs,
        "units": len(backend.sharded.units) if backend.sharded else 0,
        "said": fit.memory_of_part(known(config), fit.settings_of(config), Division(world=2)).parts,
        "memory": backend.sharded.memory() if backend.sharded else {},
        "adam": trainer.weights.optimizer_state(trainer.optimizer)["state"][0]["exp_avg"],
    }  # fmt: skip


def known(config: Config) -> ModelSize:
    size = fit.size_of(config)
    assert size is not None
    return size


def look(collected: Any, batch: Any) -> dict[str, torch.Tensor]:
    """What was drawn for this process, and how good it was found; no windows where methods take finished samples."""
    t = collected.trajectory
    found = {
        "group": t.group_id, "member": t.member, "prompt": t.prompt_id, "occurrence": t.occurrence, "x": t.x,
        "window": t.trained_mask, "advantage": batch.advantage,
    }  # fmt: skip
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def train_all(model: Path, cases: list[str]) -> dict[str, Any]:
    return {case: train(model, case) for case in cases}


@pytest.fixture(scope="module")
def trained(tiny_sd3: Path) -> dict[int, list[dict[str, Any]]]:
    cases = {1: [*CASES, *FOUR], 2: [*CASES], 4: [*FOUR]}
    return {world: run(world, train_all, tiny_sd3, names) for world, names in cases.items()}


@pytest.mark.parametrize(("case", "world"), [*((case, 2) for case in CASES), *((case, 4) for case in FOUR)])
def test_processes_with_shards_agree_with_one(case: str, world: int, trained: dict[int, list[dict[str, Any]]]) -> None:
    alone, first, *rest = trained[1][0][case], *(part[case] for part in trained[world])
    wanted, found = together([alone], 0), together([first, *rest], 0)
    assert {"group", "member", "prompt", "occurrence", "advantage"} <= set(wanted)
    for name, tensor in wanted.items():
        same = torch.allclose(tensor, found[name], atol=1e-5) if name == "x" else torch.equal(tensor, found[name])
        assert same, name
    for a, b in zip(alone["rows"], first["rows"], strict=True):
        assert a["update/count"] == b["update/count"] > 0
        for name in ("policy/loss", "optimizer/grad_norm", "policy/kl", "score/mean"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    for kind in ("weights", "average"):
        assert list(alone[kind]) == list(first[kind])
        for name, whole in alone[kind].items():
            assert torch.allclose(whole, first[kind][name], rtol=1e-3, atol=1e-5), name
    # Elements near zero are sums that cancel, whose rounding depends on their order.
    assert torch.allclose(alone["adam"], first["adam"], rtol=1e-3, atol=1e-3 * float(alone["adam"].abs().max()))
    if case.startswith("full"):
        assert all(len(tensor) == 0 for tensor in rest[0]["weights"].values() if tensor.ndim)


def test_the_reference_is_the_model_without_lora(trained: dict[int, list[dict[str, Any]]]) -> None:
    for part, case in itertools.product(trained[2], ("lora_rollout", "compiled_lora_block")):
        first, second = part[case]["rows"]
        assert first["policy/kl"] == 0 and second["policy/kl"] > 0
        assert first["optimizer/grad_norm"] > 0


def test_memory_and_gathers(trained: dict[int, list[dict[str, Any]]]) -> None:
    first, second = trained[2]
    for case in CASES:
        assert (first[case]["graphs"] > 0) == case.startswith("compiled")
        memory = first[case]["memory"]
        assert first[case]["gathers"] == second[case]["gathers"]
        if "full" in CASES[case].values():
            assert first[case]["said"]["network in parts"] == pytest.approx(memory["held"], rel=0.01)
            assert memory["held"] == pytest.approx(memory["whole"] / 2, rel=0.01)
    units = first["full_iteration"]["units"]
    # Always gathered: anew after the update, and twice around the reference, whose weights are put in and taken out.
    assert first["full_iteration"]["gathers"] == [3 * units, 3 * units]
    # Gathered for the rollout once; the update's calls (2 groups, 2 steps, 1 a process) gather forwards and backwards.
    assert first["lora_rollout"]["gathers"][0] < first["full_block_uneven"]["gathers"][0]
    assert second["full_block_uneven"]["served"] == 0 < first["full_block_uneven"]["served"]
