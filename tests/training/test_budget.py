"""Group sizes before the rollout, members after it, and what is remembered between iterations."""

from __future__ import annotations

import pytest
import torch

from flowrl.config.schema import Selection
from flowrl.training.budget import Budget, chosen_members
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

SMALL = {"batch.groups": 4, "batch.group_size": 8, "rollout.steps": 10}


def make(function, prompts: int = 4, **changes: object) -> Trainer:
    return Trainer(toy_config(**(SMALL | changes)), GaussianAdapter(10), LatentReward(function), rows(prompts))


def test_knapsack_gives_members_to_prompts_of_uncertain_success() -> None:
    trainer = make(lambda x0: (x0.flatten(1).sum(1) > 0).float(), **{"batch.allocation": {"name": "knapsack"}})
    sizes = []
    collect = trainer.collector.collect
    trainer.collector.collect = lambda drawn, size, visit: sizes.append(size) or collect(drawn, size, visit)
    trainer.budget.beliefs = type(trainer.budget.beliefs)(
        alpha=torch.tensor([1.0, 50.0, 5.0, 0.01]).double(), beta=torch.tensor([2.0, 0.01, 5.0, 50.0]).double()
    )
    row = trainer.iterate()
    by_prompt = dict(zip([int(p) for p in order(trainer)], sizes[0].tolist(), strict=True))
    assert sum(sizes[0].tolist()) == 32 and by_prompt[0] > by_prompt[1] and by_prompt[2] > by_prompt[3]
    assert row["update/steps"] == 1


def order(trainer: Trainer) -> list[int]:
    from flowrl.data.sampler import draw_groups

    return [d.prompt_id for d in draw_groups(trainer.seed, 0, 4, 4, None)]


def test_beliefs_follow_the_scores_and_survive_a_resume() -> None:
    trainer = make(lambda x0: torch.ones(len(x0)), **{"batch.allocation": {"name": "knapsack", "memory": 0.5}})
    trainer.iterate()
    assert trainer.budget.beliefs.alpha.tolist() == [9.0] * 4 and trainer.budget.beliefs.beta.tolist() == [1.0] * 4
    other = make(lambda x0: torch.ones(len(x0)), **{"batch.allocation": {"name": "knapsack", "memory": 0.5}})
    other.load_state(trainer.state())
    other.iterate()
    assert other.budget.beliefs.alpha.tolist() == [1 + 0.5 * 8 + 8] * 4


def test_vade_draws_the_least_certain_prompts() -> None:
    trainer = make(lambda x0: x0.flatten(1).sum(1), 40, **{"batch.allocation": {"name": "vade"}})
    certain = torch.full((40,), 1000.0).double()
    alpha, beta = certain.clone(), torch.ones(40).double()
    alpha[[3, 17, 21, 30]] = beta[[3, 17, 21, 30]] = 500.0
    trainer.budget.beliefs = type(trainer.budget.beliefs)(alpha, beta)
    found = trainer._collect().trajectory.prompt_id.unique().tolist()
    assert found == [3, 17, 21, 30]


@pytest.mark.parametrize(("name", "kept"), [("best_worst", [0, 1, 6, 7]), ("d3s", [0, 1, 6, 7])])
def test_selection_keeps_the_ends_of_each_group(name: str, kept: list[int]) -> None:
    rewards = torch.arange(8.0).double().repeat(2)
    group = torch.arange(2).repeat_interleave(8)
    found = chosen_members(Selection(name=name, number=4), rewards, group, torch.ones(16, dtype=torch.bool))
    assert found.nonzero().flatten().tolist() == [*kept, *(8 + k for k in kept)]


def test_what_is_not_chosen_is_not_trained_and_costs_nothing() -> None:
    trainer = make(lambda x0: x0.flatten(1).sum(1), **{
        "batch.selection": {"name": "best_worst", "number": 4}, "rollout.share_prefix": False,
    })  # fmt: skip
    row = trainer.iterate()
    assert row["calls/backward_samples"] == 4 * 4 * 9


def test_fixed_sizes_remember_nothing() -> None:
    budget = Budget(toy_config(**SMALL).batch, 4)
    assert not budget.remembers and budget.state() == {}
