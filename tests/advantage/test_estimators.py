"""One-channel estimators: worked numbers, plain-loop references, invariances, masks and bad input."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from flowrl.advantage import ESTIMATORS, Advantage, dr_grpo, estimate, grpo, lite_ppo, rloo

SINGLE = ("grpo", "dr_grpo", "rloo", "lite_ppo")
TWO_GROUPS = ([1.0, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1])


def _run(
    name: str, rewards: list[float], group: list[int], valid: list[bool] | None = None, **policy: Any
) -> Advantage:
    mask = None if valid is None else torch.tensor(valid)
    return ESTIMATORS[name](torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), mask, **policy)


def _deviation(values: list[float], ddof: int) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))


def _reference(
    name: str, rewards: list[float], group: list[int], valid: list[bool], ddof: int, eps: float
) -> list[float]:
    """One sample at a time, with nothing shared with the library."""
    usable = [i for i in range(len(rewards)) if valid[i] and not math.isnan(rewards[i])]
    batch = _deviation([rewards[i] for i in usable], ddof)
    out = [0.0] * len(rewards)
    for i in usable:
        mates = [rewards[j] for j in usable if group[j] == group[i]]
        others = [rewards[j] for j in usable if group[j] == group[i] and j != i]
        if max(mates) == min(mates):
            continue
        centred = rewards[i] - math.fsum(mates) / len(mates)
        out[i] = {
            "grpo": centred / (_deviation(mates, ddof) + eps),
            "dr_grpo": centred,
            "rloo": rewards[i] - math.fsum(others) / len(others),
            "lite_ppo": centred / (batch + eps),
        }[name]
    return out


def _case(seed: int) -> tuple[list[float], list[int], list[bool]]:
    draw = random.Random(seed)
    size = draw.randint(2, 30)
    group = [draw.choice([7_000_000_000, -3, 11]) for _ in range(size)]
    rewards = [draw.choice([draw.gauss(0, 2), 1.0, 1.0]) for _ in range(size)]
    rewards = [math.nan if draw.random() < 0.1 else r for r in rewards]
    valid = [draw.random() < 0.85 for _ in range(size)]
    rewards[0], valid[0] = 0.5, True
    return rewards, group, valid


def _close(tensor: torch.Tensor, values: list[float], tolerance: float = 1e-4) -> None:
    assert tensor.tolist() == pytest.approx(values, abs=tolerance)


def test_grpo_worked_numbers() -> None:
    group = [0, 0, 0, 0]
    _close(_run("grpo", [1, 0, 0, 1], group).advantage, [0.9998, -0.9998, -0.9998, 0.9998], 1e-6)
    _close(_run("grpo", [1, 0, 0, 1], group, ddof=1, eps=0.0).advantage, [0.8660, -0.8660, -0.8660, 0.8660])
    _close(_run("grpo", [1, 0, 0, 1], group, eps=0.0).advantage, [1, -1, -1, 1], 1e-7)
    _close(_run("grpo", [1, 0, 0, 0], group, ddof=1, eps=0.0).advantage, [1.5, -0.5, -0.5, -0.5], 1e-6)
    _close(_run("grpo", [0.9, 0.2], [0, 0], ddof=1, eps=0.0).advantage, [0.70711, -0.70711])


def test_grpo_default_eps_is_that_of_flow_grpo() -> None:
    _close(_run("grpo", [1e-4, -1e-4], [0, 0]).advantage, [0.5, -0.5], 1e-6)


def test_dr_grpo_worked_numbers() -> None:
    _close(_run("dr_grpo", [1, 0, 0, 0], [0, 0, 0, 0]).advantage, [0.75, -0.25, -0.25, -0.25], 0)


def test_rloo_worked_numbers() -> None:
    _close(_run("rloo", [1, 0, 0, 1], [0, 0, 0, 0]).advantage, [0.66667, -0.66667, -0.66667, 0.66667])
    _close(_run("rloo", [1, 0.2, 0.5], [0, 0, 0]).advantage, [0.65, -0.55, -0.1], 1e-7)


def test_lite_ppo_worked_numbers() -> None:
    raw = _run("lite_ppo", *TWO_GROUPS, ddof=1, eps=0.0).advantage
    _close(raw, [0.9661, -0.9661, -0.9661, 0.9661, 0.4830, 0.4830, 0.4830, -1.4491])
    centred = _run("lite_ppo", *TWO_GROUPS, ddof=1, eps=0.0, std_of="centred").advantage
    _close(centred, [1, -1, -1, 1, 0.5, 0.5, 0.5, -1.5], 1e-6)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_against_plain_loops(name: str, ddof: int, seed: int) -> None:
    rewards, group, valid = _case(seed)
    result = _run(name, rewards, group, valid, ddof=ddof, eps=1e-3)
    _close(result.advantage, _reference(name, rewards, group, valid, ddof, 1e-3), 1e-5)
    usable = [v and not math.isnan(r) for r, v in zip(rewards, valid, strict=True)]
    assert result.loss_mask.tolist() == usable
    assert result.weight.tolist() == [float(u) for u in usable]


@pytest.mark.parametrize("ddof", [0, 1])
def test_grpo_is_dr_grpo_over_its_deviation(ddof: int) -> None:
    rewards, group, valid = _case(3)
    centred = _run("dr_grpo", rewards, group, valid, ddof=ddof)
    divided = _run("grpo", rewards, group, valid, ddof=ddof, eps=1e-3)
    expected = torch.where(centred.loss_mask, centred.advantage / (centred.group_std + 1e-3), 0.0)
    assert torch.allclose(divided.advantage, expected, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_rloo_is_dr_grpo_times_n_over_n_minus_one(size: int) -> None:
    rewards = torch.randn(4 * size, generator=torch.Generator().manual_seed(size))
    group = torch.arange(4 * size) % 4
    expected = dr_grpo(rewards, group).advantage * (size / (size - 1))
    assert torch.allclose(rloo(rewards, group).advantage, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("std_of", ["raw", "centred"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_lite_ppo_of_one_group_is_grpo(std_of: str, ddof: int) -> None:
    rewards, _, valid = _case(5)
    one = [42] * len(rewards)
    ours = _run("lite_ppo", rewards, one, valid, ddof=ddof, std_of=std_of)
    _close(ours.advantage, _run("grpo", rewards, one, valid, ddof=ddof).advantage.tolist(), 1e-6)


@pytest.mark.parametrize("name", SINGLE)
def test_shift_scale_and_order(name: str) -> None:
    rewards, group, valid = _case(7)
    plain = _run(name, rewards, group, valid, eps=0.0).advantage
    _close(_run(name, [r + 100 for r in rewards], group, valid, eps=0.0).advantage, plain.tolist(), 1e-5)
    factor = 1.0 if name in ("grpo", "lite_ppo") else 8.0
    scaled = _run(name, [r * 8 for r in rewards], group, valid, eps=0.0).advantage
    _close(scaled, (plain * factor).tolist(), 1e-5)
    order = random.Random(0).sample(range(len(rewards)), len(rewards))
    shuffled = _run(name, [rewards[i] for i in order], [group[i] for i in order], [valid[i] for i in order], eps=0.0)
    _close(shuffled.advantage, plain[order].tolist(), 1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_may_be_shifted_alone_and_does_not_see_others(name: str) -> None:
    rewards, group, valid = _case(9)
    plain = _run(name, rewards, group, valid).advantage
    moved = [r + 50 if g == -3 else r for r, g in zip(rewards, group, strict=True)]
    _close(_run(name, moved, group, valid).advantage, plain.tolist(), 1e-5)
    changed = [r * r if g == -3 else r for r, g in zip(rewards, group, strict=True)]
    other = torch.tensor(group) != -3
    assert torch.equal(_run(name, changed, group, valid).advantage[other], plain[other])


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("seed", range(25))
def test_a_masked_member_never_changes_the_others(name: str, seed: int) -> None:
    rewards, group, valid = _case(100 + seed)
    kept = [i for i in range(len(rewards)) if valid[i] and not math.isnan(rewards[i])]
    junk = [
        r if v else random.Random(seed).choice([math.nan, math.inf, 1e30]) for r, v in zip(rewards, valid, strict=True)
    ]
    result = _run(name, junk, group, valid)
    alone = _run(name, [rewards[i] for i in kept], [group[i] for i in kept])
    assert torch.equal(result.advantage[kept], alone.advantage)
    assert torch.equal(result.live[kept], alone.live)
    gone = [i for i in range(len(rewards)) if i not in kept]
    assert not result.advantage[gone].any() and not result.loss_mask[gone].any()


@pytest.mark.parametrize("name", SINGLE)
def test_a_constant_group_is_exactly_zero(name: str) -> None:
    # 0.1 is no binary fraction: the mean of seven of them differs from 0.1 in the last digit.
    rewards, group = [0.1] * 7 + [0.0, 1.0], [3] * 7 + [8, 8]
    for eps in (0.0, 1e-12):
        result = _run(name, rewards, group, eps=eps)
        assert result.advantage[:7].tolist() == [0.0] * 7
        assert result.live.tolist() == [False] * 7 + [True] * 2
        assert result.loss_mask.all()
        assert result.advantage[7] < 0 < result.advantage[8]


@pytest.mark.parametrize("name", SINGLE)
def test_the_least_difference_is_signal(name: str) -> None:
    high = 1.0 + 2**-23  # the next float32
    result = _run(name, [1.0, high], [0, 0], eps=0.0)
    assert result.live.all() and result.advantage[0] < 0 < result.advantage[1]


def test_singletons() -> None:
    rewards, group, valid = [2.0, 5.0, 7.0, 1.0, 3.0], [1, 2, 2, 3, 3], [True, True, False, True, True]
    for name in SINGLE:
        zero = _run(name, rewards, group, valid)
        assert zero.advantage[:3].tolist() == [0.0] * 3 and zero.live.tolist() == [False] * 3 + [True] * 2
        raw = _run(name, rewards, group, valid, singleton="raw", eps=0.0)
        assert raw.live.all() and raw.advantage[2] == 0
        scale = _deviation([2, 5, 1, 3], 0) if name == "lite_ppo" else 1.0
        _close(raw.advantage[:2] * scale, [2.0, 5.0], 1e-6)


def test_a_group_with_no_value_has_no_statistics() -> None:
    result = _run("grpo", [math.nan, math.nan, 1.0, 0.0], [0, 0, 1, 1])
    assert result.advantage.isfinite().all() and not result.loss_mask[:2].any() and not result.live[:2].any()
    assert result.group_mean[:2].isnan().all() and result.group_mean[2:].tolist() == [0.5, 0.5]
    assert not _run("grpo", [1.0, 0.0], [0, 0], [False, False]).advantage.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("name", SINGLE)
def test_results_are_float32_without_gradient(name: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0, 1], dtype=dtype)
    result = ESTIMATORS[name](rewards.requires_grad_(dtype.is_floating_point), torch.tensor([0, 0, 0, 0]))
    for tensor in (result.advantage, result.weight, result.group_mean, result.group_std):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
    assert result.loss_mask.dtype == result.live.dtype == torch.bool
    assert torch.equal(
        result.advantage, ESTIMATORS[name](torch.tensor([1.0, 0, 0, 1]), torch.zeros(4).long()).advantage
    )


def test_half_precision_rewards_lose_nothing_after_reading() -> None:
    # In float16 the mean of 64 values near 2000 would be off by whole units.
    rewards = (2000 + torch.arange(64) % 3).half()
    exact = grpo(rewards.double(), torch.zeros(64).long())
    assert torch.equal(grpo(rewards, torch.zeros(64).long()).advantage, exact.advantage)


def test_estimate_names_and_clip() -> None:
    rewards, group = torch.tensor([10.0] + [0.0] * 99), torch.zeros(100).long()
    both = {"rewards": rewards, "group": group}
    free = estimate("grpo", both)
    assert free.advantage[0] > 9 and torch.equal(free.advantage, grpo(rewards, group).advantage)
    held = estimate("grpo", both, clip=5.0)
    assert held.advantage[0] == 5.0 and torch.equal(held.advantage[1:], free.advantage[1:])
    assert estimate("grpo", {**both, "rewards": -rewards}, clip=5.0).advantage[0] == -5.0
    for name, function in (("dr_grpo", dr_grpo), ("rloo", rloo), ("lite_ppo", lite_ppo)):
        assert torch.equal(estimate(name, both).advantage, function(rewards, group).advantage)
    strict = estimate("grpo", both, {"ddof": 1, "eps": 0.5})
    assert torch.equal(strict.advantage, grpo(rewards, group, ddof=1, eps=0.5).advantage)
    one = {"rewards": rewards[:1], "group": group[:1]}
    assert estimate("grpo", one, {"singleton": "raw"}).advantage[0] == pytest.approx(10 / 1.0001)


GOOD: dict[str, Any] = {"rewards": torch.ones(3), "group": torch.zeros(3).long(), "valid": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": torch.ones(0), "group": torch.ones(0).long()},
            "rewards: expected [B] with at least one value, got [0]",
        ),
        ({"rewards": torch.ones(3, 1)}, "rewards: expected [B] with at least one value, got [3, 1]"),
        ({"rewards": torch.ones(3, dtype=torch.complex64)}, "rewards: expected real numbers"),
        ({"rewards": torch.tensor([1.0, math.inf, 0.0])}, "rewards: infinite values"),
        ({"rewards": torch.full((3,), math.nan)}, "rewards: every valid sample is NaN"),
        ({"group": torch.zeros(3)}, "group: expected int64 [3], one id a reward, got torch.float32 [3]"),
        ({"group": torch.zeros(2).long()}, "group: expected int64 [3], one id a reward, got torch.int64 [2]"),
        ({"valid": torch.ones(3)}, "valid: expected bool [3], got torch.float32 [3]"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, "valid: expected bool [3], got torch.bool [2]"),
        ({"ddof": 2}, "ddof: expected 0 or 1, got 2"),
        ({"eps": -1.0}, "eps: expected a finite number >= 0, got -1.0"),
        ({"eps": math.nan}, "eps: expected a finite number >= 0, got nan"),
        ({"singleton": "one"}, "singleton: expected 'zero' or 'raw', got 'one'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        grpo(**{**GOOD, **change})
    assert message in str(error.value)


def test_lite_ppo_refuses_an_unknown_deviation() -> None:
    with pytest.raises(ValueError, match="std_of: expected 'raw' or 'centred'"):
        lite_ppo(torch.ones(2), torch.zeros(2).long(), std_of="batch")  # type: ignore[arg-type]
