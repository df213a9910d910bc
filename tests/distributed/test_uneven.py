"""Processes with unequal shares of work never wait for one another, and decide alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flowrl.advantage import estimate
from flowrl.distributed.backend import Backend
from flowrl.records import RewardResult
from flowrl.scoring.runtime import Scored
from flowrl.training import metrics
from tests.distributed.processes import run
from tests.distributed.toys import config_of, seen, signs, trainer_of
from tests.training.toy import LatentReward


class OfGroups(LatentReward):
    """Scores by ``signs``, but ``silent`` (a number, NaN for a failure) in the first groups of an iteration of four."""

    def __init__(self, silent: float, groups: int) -> None:
        super().__init__(self._score)
        self.silent, self.groups, self.ids = silent, groups, torch.zeros(0)

    def submit(self, batch: Any) -> Any:
        self.ids = torch.tensor(batch.group_ids)
        return super().submit(batch)

    def _score(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.where(self.ids % 4 < self.groups, self.silent, signs(latents))


CASES: dict[str, tuple[float, int, dict[str, Any]]] = {
    "one_process_silent": (2.0, 2, {}),
    "one_process_silent_with_kl": (2.0, 2, {"objective.kl.form": "paper", "objective.kl.weight": 0.1}),
    "one_process_failed": (float("nan"), 2, {}),
    "all_silent": (2.0, 4, {}),
    "all_failed": (float("nan"), 4, {"failures.max_invalid_fraction": 1.0}),
    "joint_loss": (2.0, 2, {"objective.loss": "gspo"}),
    "forward_process": (2.0, 2, {"objective.name": "awm", "rollout.window.kind": "full"}),
    "knapsack": (2.0, 2, {"batch.allocation.name": "knapsack", "batch.allocation.success": 5.0}),
}  # fmt: skip


def train(case: str) -> dict[str, Any]:
    silent, groups, changes = CASES[case]
    trainer = trainer_of(config_of(**changes))
    trainer.rewards = trainer.collector.rewards = OfGroups(silent, groups)  # type: ignore[assignment]
    return seen(trainer, 3) | {"collectives": trainer.backend.collectives}


def train_all() -> dict[str, Any]:
    return {case: train(case) for case in CASES}


@pytest.fixture(scope="module")
def trained() -> dict[int, list[dict[str, Any]]]:
    return {world: run(world, train_all, limit=60) for world in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_an_uneven_signal_gives_the_step_of_one_process(case: str, trained: dict[int, list[dict[str, Any]]]) -> None:
    (alone,), (first, second) = ([part[case] for part in trained[world]] for world in (1, 2))
    assert first["collectives"] == second["collectives"]
    for a, b, c in zip(alone["metrics"], first["metrics"], second["metrics"], strict=True):
        assert a["update/count"] == b["update/count"] == c["update/count"]
        assert a["update/steps"] == b["update/steps"]
        if a["update/steps"]:
            assert b["optimizer/grad_norm"] == pytest.approx(a["optimizer/grad_norm"], rel=1e-4)
    for name, weight in alone["weights"].items():
        assert torch.allclose(weight, first["weights"][name], rtol=1e-3, atol=1e-5)
    if case.startswith("all_") and "kl" not in case:
        assert alone["metrics"][-1]["update/count"] == 0


def poison(iteration: int, times: int) -> list[tuple[int, int, int, bool]]:
    """In process 1 the gradient is NaN in ``times`` iterations: (skipped, in a row, updates, weights unchanged) after each."""
    trainer = trainer_of(config_of())
    step, found = trainer._step, []

    def broken() -> float:
        if trainer.backend.rank == 1 and iteration <= trainer.iteration < iteration + times:
            for parameter in trainer.weights.parameters:
                parameter.grad = torch.full_like(parameter, torch.nan)
        return step()

    trainer._step = broken  # type: ignore[method-assign]
    for _ in range(4):
        before = [p.detach().clone() for p in trainer.weights.parameters]
        trainer.iterate()
        same = all(torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
        found.append((trainer.skipped.total, trainer.skipped.consecutive, trainer.updates, same))
    return found


def test_all_processes_skip_the_update_that_is_not_finite_in_one() -> None:
    first, second = run(2, poison, 1, 2)
    assert first == second
    assert [(total, row, same) for total, row, _, same in first] == [
        (0, 0, False), (1, 1, True), (2, 2, True), (2, 0, False),
    ]  # fmt: skip


def scored(components: dict[str, Any]) -> Scored:
    scores = np.array([1.0, 3.0], np.float32)
    valid = np.ones(2, np.bool_)
    return Scored(scores, valid, [None, None], {"r": RewardResult(scores, valid, [None, None], components)}, 0.0)


def components_of_one() -> dict[str, Any]:
    backend = Backend()
    parts = {"é part": np.array([1.0, 2.0], np.float32)} if backend.rank == 1 else {}
    credit = estimate("grpo", {"rewards": torch.tensor([1.0, 3.0]), "group": torch.tensor([0, 0])}, {}).over_steps(
        torch.ones(2, 1).bool()
    )
    row = metrics.of_rewards(scored(parts), credit, backend)
    return {"row": row, "after": backend.counts(backend.rank), "collectives": backend.collectives}


def test_a_reward_that_has_components_in_one_process_only() -> None:
    first, second = run(2, components_of_one, limit=30)
    for found in (first, second):
        assert found["after"] == [0, 1]  # the next meeting is about what it should be
        assert found["row"]["reward/r/é part"] == pytest.approx(1.5)
        assert found["row"]["reward/r/mean"] == 2.0 and found["row"]["score/invalid"] == 0
    assert first["collectives"] == second["collectives"]


def meet() -> dict[str, Any]:
    backend = Backend()
    own = torch.arange(backend.rank * 3, dtype=torch.float64).reshape(-1, 3)
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 3))]
    if backend.rank:
        weights[1].grad = torch.full((1, 3), float(backend.rank))
    backend.add_gradients(weights)
    return {
        "gathered": backend.gather(own), "mine": backend.mine(len(own)), "counts": backend.counts(len(own)),
        "names": backend.names(["a"] if backend.rank == 2 else []), "most": backend.largest(-backend.rank),
        "gradients": [p.grad for p in weights], "empty": backend.gather(torch.zeros(0, dtype=torch.bool)),
    }  # fmt: skip


def test_meetings_take_any_number_of_rows() -> None:
    for rank, found in enumerate(run(4, meet)):
        assert found["counts"] == [0, 1, 2, 3]
        assert found["gathered"].tolist() == [
            [0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [6, 7, 8],
        ]  # fmt: skip
        assert found["mine"] == slice(sum(range(rank)), sum(range(rank)) + rank)
        assert found["names"] == ["a"] and found["most"] == 0 and found["empty"].shape == (0,)
        assert found["gradients"][0].tolist() == [0, 0] and found["gradients"][1].tolist() == [[6, 6, 6]]
