"""Gates on whole groups and on reward channels: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowrl.advantage.estimators import grpo
from flowrl.advantage.normalisation import adora, gate_reward, group_gate

from .test_normalisation import case, close, mean, members

NAN = math.nan


def test_adora_worked_numbers() -> None:
    rewards, correct = torch.tensor([1.0, 0.0] * 2), torch.tensor([True, False] * 2)
    out = adora(rewards, torch.tensor([0, 0, 5, 5]), torch.tensor([50, 80, 90, 80]), correct, ddof=1, eps=0.0)
    close(out.advantage, [0.0707, -0.0707, 0.7071, -0.7071])
    close(out.channels["gate"], [0.1, 0.1, 1, 1], 1e-7)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("cuts", [True, False])
def test_adora_against_a_plain_loop(seed: int, cuts: bool) -> None:
    rewards, group, valid = case(seed)
    draw = random.Random(seed)
    cost, correct, cut = ([draw.choice(c) for _ in rewards] for c in ([1, 2, 4], [True, False], [cuts, cuts, False]))
    flags = torch.tensor(cut) if cuts else None
    cost_given = torch.where(valid, torch.tensor(cost).float(), NAN)
    out = adora(rewards, group, cost_given, torch.tensor(correct), flags, valid, scale=0.3, ddof=1, singleton="raw")
    plain = grpo(rewards, group, valid, ddof=1, singleton="raw")
    gate = [0.0] * len(rewards)
    for rows in members(rewards, group, valid).values():
        right = max((cost[i] for i in rows if correct[i]), default=-math.inf)
        wrong = [cost[i] for i in rows if not correct[i] and not cut[i]]
        passed = right > (mean(wrong) if wrong else -math.inf)
        for i in rows:
            gate[i] = 1.0 if passed else 0.3
    close(out.channels["gate"], gate, 1e-7)
    close(out.advantage, (plain.advantage * torch.tensor(gate)).tolist(), 1e-6)
    assert torch.equal(out.live, plain.live) and torch.equal(out.weight, plain.weight)


def test_adora_of_scale_one_is_grpo() -> None:
    rewards, group, valid = case(2)
    out = adora(rewards, group, torch.ones(len(rewards)), valid, None, valid, scale=1.0)
    assert torch.equal(out.advantage, grpo(rewards, group, valid).advantage)


def test_group_gate() -> None:
    group, passed = torch.tensor([3, 9, 3, -1]), torch.tensor([True, False, False, True])
    advantage = torch.tensor([1.0, 2.0, -4.0, 8.0], dtype=torch.bfloat16, requires_grad=True)
    close(group_gate(advantage, group, passed), [1.0, 0.2, -4.0, 8.0], 1e-6)
    close(group_gate(advantage, group, passed, how="all", scale=0.0), [0.0, 0.0, 0.0, 8.0], 0)
    wide = group_gate(advantage[:, None].expand(4, 2), group, passed, scale=0.5)
    close(wide[:, 1], [1.0, 1.0, -4.0, 8.0], 0)


def test_gate_reward_table() -> None:
    rewards = torch.tensor([[1.0, 0.5, 3.0], [0.9, 0.5, 3.0], [NAN, 0.5, 3.0], [1.5, NAN, 3.0]])
    out = gate_reward(rewards, torch.tensor([True, True, False]))
    assert out.nan_to_num(nan=-9).tolist() == [
        [1, 0.5, 3],
        [pytest.approx(0.9), 0, 3],
        [-9, -9, 3],
        [1.5, -9, 3],
    ]
    assert gate_reward(rewards[:2].double(), hard=2, tau=3.5).tolist() == [[0, 0, 3], [0, 0, 3]]


def test_gate_reward_against_a_loop() -> None:
    rewards = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = [[r[0] if r[1] >= 0.5 else 0.0, r[1], r[2] if r[1] >= 0.5 else 0.0] for r in rewards.tolist()]
    close(gate_reward(rewards, hard=1, tau=0.5).flatten(), [x for row in rows for x in row], 0)


R, G, B = torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_gate(G, G, B), "advantage: expected floating [B] or [B, T], got torch.int64 [2]"),
        (lambda: group_gate(R.sum(), G, B), "advantage: expected floating [B] or [B, T], got torch.float32 []"),
        (lambda: group_gate(R, R, B), "group: expected int64 [2]"),
        (lambda: group_gate(R, G, G), "passed: expected bool [2]"),
        (lambda: group_gate(R, G, B, how="most"), "how: expected 'any' or 'all', got 'most'"),  # type: ignore[arg-type]
        (lambda: group_gate(R, G, B, scale=-0.1), "scale: expected a finite number >= 0, got -0.1"),
        (lambda: adora(R, G, R, G), "correct: expected bool [2]"),
        (lambda: adora(R, G, R, B, G), "truncated: expected bool [2]"),
        (lambda: adora(R, G, R * NAN, B), "cost: expected finite values where they count"),
        (lambda: adora(R, G, R, B, ddof=3), "ddof: expected 0 or 1"),
        (lambda: gate_reward(R), "rewards: expected floating [B, R], not empty, got torch.float32 [2]"),
        (lambda: gate_reward(R[:0, None]), "rewards: expected floating [B, R], not empty"),
        (lambda: gate_reward(G[None]), "rewards: expected floating [B, R], not empty, got torch.int64"),
        (lambda: gate_reward(R[None], hard=2), "hard: expected a channel 0 ... 1, got 2"),
        (lambda: gate_reward(R[None], hard=-1), "hard: expected a channel 0 ... 1, got -1"),
        (lambda: gate_reward(R[None], tau=NAN), "tau: expected a finite number"),
        (lambda: gate_reward(R[None], B[:1]), "gated: expected bool [2], got torch.bool [1]"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
