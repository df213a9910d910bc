"""GDPO: worked numbers, a plain-loop reference, identities, missing values."""

from __future__ import annotations

import math
import random

import pytest
import torch

from flowrl.advantage import estimate, gdpo, grpo

PAIRS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
PAIR_GROUP = torch.tensor([0, 0, 1, 1])


def _deviation(values: list[float], ddof: int) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))


def _reference(
    rewards: list[list[float]], group: list[int], weights: list[float], ddof: int, eps: float
) -> list[float]:
    """Add channels one sample at a time, NaN as "does not apply"; a sample without any channel is left out."""
    total = [0.0] * len(rewards)
    for k, weight in enumerate(weights):
        for i, row in enumerate(rewards):
            mates = [
                rewards[j][k] for j in range(len(rewards)) if group[j] == group[i] and not math.isnan(rewards[j][k])
            ]
            if math.isnan(row[k]) or max(mates) == min(mates):
                continue
            total[i] += weight * (row[k] - math.fsum(mates) / len(mates)) / (_deviation(mates, ddof) + eps)
    used = [i for i, row in enumerate(rewards) if not all(math.isnan(r) for r in row)]
    centre = math.fsum(total[i] for i in used) / len(used)
    spread = _deviation([total[i] for i in used], ddof)
    return [(total[i] - centre) / (spread + eps) if i in used else 0.0 for i in range(len(rewards))]


def _case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(24, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 20.0, 0.1]).double()
    return rewards, torch.randint(0, 4, (24,), generator=draw) * 7_000_000_000 - 3


def test_worked_numbers() -> None:
    out = gdpo(PAIRS, PAIR_GROUP, ddof=1, eps=1e-9).advantage
    assert out.tolist() == pytest.approx([-0.5477, 0.5477, -1.0954, 1.0954], abs=1e-4)
    summed = grpo(PAIRS.sum(dim=1), PAIR_GROUP, ddof=1, eps=1e-9).advantage
    assert summed.tolist() == pytest.approx([-0.7071, 0.7071, -0.7071, 0.7071], abs=1e-4)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("seed", range(10))
def test_against_a_plain_loop(ddof: int, seed: int) -> None:
    rewards, group = _case(seed)
    draw = random.Random(seed)
    for _ in range(10):
        rewards[draw.randrange(24), draw.randrange(3)] = math.nan
    rewards[draw.randrange(24)] = math.nan
    weights = [1.0, 0.5, 2.0]
    result = gdpo(rewards, group, ddof=ddof, eps=1e-3, weights=torch.tensor(weights))
    expected = _reference(rewards.tolist(), group.tolist(), weights, ddof, 1e-3)
    assert result.advantage.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(result.loss_mask, ~rewards.isnan().all(dim=1))


def test_one_channel_without_batch_norm_is_grpo() -> None:
    rewards, group = _case(1)
    ours, theirs = gdpo(rewards[:, :1], group, batch_norm=False), grpo(rewards[:, 0], group)
    assert torch.equal(ours.advantage, theirs.advantage)
    assert torch.equal(ours.live, theirs.live) and torch.equal(ours.group_mean, theirs.group_mean)


def test_the_scale_of_a_channel_does_not_matter_but_does_to_grpo_on_the_sum() -> None:
    rewards, group = _case(2)
    scaled = rewards * torch.tensor([1.0, 1.0, 1e4]).double()
    assert torch.allclose(gdpo(scaled, group, eps=0.0).advantage, gdpo(rewards, group, eps=0.0).advantage, atol=1e-6)
    change = grpo(scaled.sum(dim=1), group).advantage - grpo(rewards.sum(dim=1), group).advantage
    assert change.abs().max() > 0.1


def test_a_channel_twice_is_a_channel_of_weight_two() -> None:
    rewards, group = _case(3)
    twice = gdpo(torch.cat([rewards, rewards[:, :1]], dim=1), group).advantage
    assert torch.allclose(twice, gdpo(rewards, group, weights=torch.tensor([2.0, 1.0, 1.0])).advantage, atol=1e-6)


def test_a_constant_or_weightless_channel_adds_nothing() -> None:
    rewards, group = _case(4)
    plain = gdpo(rewards, group)
    constant = gdpo(torch.cat([rewards, torch.full((24, 1), 0.1).double()], dim=1), group)
    assert torch.equal(constant.advantage, plain.advantage)
    dead = gdpo(PAIRS, PAIR_GROUP, weights=torch.tensor([1.0, 0.0]))
    assert dead.live.tolist() == [False, False, True, True] and dead.advantage[:2].tolist() == [0.0, 0.0]


def test_a_constant_group_is_exactly_zero() -> None:
    rewards = torch.tensor([[0.1, 0.3]] * 3 + [[0.0, 1.0], [1.0, 0.7], [0.5, 0.2]])
    result = gdpo(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), eps=0.0)
    assert result.advantage[:3].tolist() == [0.0, 0.0, 0.0]
    assert result.live.tolist() == [False] * 3 + [True] * 3


def test_the_sum_is_centred_over_the_batch() -> None:
    # Only raw singletons give the sum a mean: standardised groups add up to 0.
    result = gdpo(torch.tensor([[1.0], [5.0]]), torch.tensor([0, 1]), singleton="raw", eps=0.0)
    assert result.advantage.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("seed", range(10))
def test_a_masked_member_never_changes_the_others(seed: int) -> None:
    rewards, group = _case(seed)
    valid = torch.rand(24, generator=torch.Generator().manual_seed(seed)) < 0.7
    junk = torch.where(valid[:, None], rewards, math.inf if seed % 2 else math.nan)
    whole, alone = gdpo(junk, group, valid), gdpo(rewards[valid], group[valid])
    assert torch.allclose(whole.advantage[valid], alone.advantage, rtol=0, atol=1e-6)
    assert not whole.advantage[~valid].any() and torch.equal(whole.loss_mask, valid)


def test_through_the_dispatcher() -> None:
    rewards, group = _case(5)
    weights = torch.tensor([1.0, 3.0, 0.0])
    inputs = {"rewards": rewards, "group": group, "weights": weights}
    ours = estimate("gdpo", inputs, {"ddof": 1, "eps": 0.1}, clip=1.0).advantage
    assert torch.equal(ours, gdpo(rewards, group, None, weights, ddof=1, eps=0.1).advantage.clamp(-1, 1))


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        (torch.ones(4), None, "rewards: expected [B, R] with at least one value, got [4]"),
        (PAIRS, torch.ones(3), "weights: expected [2] finite numbers, one a channel, got [3]"),
        (PAIRS, torch.tensor([1.0, math.nan]), "weights: expected [2] finite numbers"),
        (torch.full((4, 2), math.nan), None, "rewards: every valid sample is NaN"),
    ],
)
def test_bad_input_is_named(rewards: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        gdpo(rewards, PAIR_GROUP, None, weights)
    assert message in str(error.value)
