"""The number of processes changes who does the work, and nothing of the work: prompts, noise, credit, losses, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.processes import run
from tests.distributed.toys import config_of, seen, together, trainer_of

PLAIN: dict[str, Any] = {"objective.kl.form": "paper", "objective.kl.weight": 0.1}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "equal_calls": (PLAIN, 1e-5),
    "unequal_calls": (PLAIN | {"batch.micro_batch": 6}, 1e-4),
    "updates": ({"objective.updates": 2, "batch.groups": 8, "objective.passes": 2}, 1e-5),
    "own_windows": ({"rollout.window.kind": "iso_temporal", "rollout.window.size": 1}, 1e-5),
    "shared_start": ({"rollout.share_prefix": True, "rollout.window.first": 1}, 1e-5),
    "groups_left_over": (PLAIN | {"batch.groups": 6}, 1e-5),
    "whitened": ({"advantage.whiten": "sample", "advantage.name": "dr_grpo"}, 1e-5),
}
KEYS = ("prompt", "group", "member", "occurrence", "step", "stochastic", "trained", "update")


def train_all() -> dict[str, Any]:
    return {case: seen(trainer_of(config_of(**changes)), 2) for case, (changes, _) in CASES.items()}


@pytest.fixture(scope="module")
def trained() -> dict[int, list[dict[str, Any]]]:
    """By number of processes: what each process saw, by case."""
    return {world: run(world, train_all) for world in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES)
def test_one_two_and_four_processes_agree(case: str, trained: dict[int, list[dict[str, Any]]]) -> None:
    tolerance = CASES[case][1]
    alone = [part[case] for part in trained[1]]
    for world in (2, 4):
        parts = [part[case] for part in trained[world]]
        for iteration in range(2):
            one, many = together(alone, iteration), together(parts, iteration)
            for key in KEYS:
                assert torch.equal(one[key], many[key]), (world, iteration, key)
            assert torch.equal(one["score"], many["score"])
            for key in ("advantage", "weight", "element"):
                assert torch.equal(one[key], many[key]), (world, iteration, key)
            assert torch.allclose(one["x"], many["x"], rtol=1e-4, atol=1e-4)
            for name in ("policy/loss", "optimizer/grad_norm", "policy/kl", "score/mean"):
                a, b = alone[0]["metrics"][iteration][name], parts[0]["metrics"][iteration][name]
                assert b == pytest.approx(a, rel=tolerance, abs=1e-7), (world, iteration, name)
        assert alone[0]["batches"][0]["advantage"].abs().sum() > 0  # there was something to learn
        first = parts[0]["weights"]
        for part in parts[1:]:
            assert all(torch.equal(first[name], part["weights"][name]) for name in first)
        for name, weight in alone[0]["weights"].items():
            assert torch.allclose(weight, first[name], rtol=1e-3, atol=1e-5)
