"""Other baselines than the group's mean: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.baselines import METHODS, gpg, pass_at_k, poise, remax, v0, v0_budget
from flowrl.advantage.estimators import dr_grpo, rloo
from flowrl.advantage.inputs import read_rows
from flowrl.advantage.record import Advantage

SEEDS = range(12)


def _case(seed: int) -> tuple[list[float], list[int], list[bool], list[float]]:
    """Rewards with ties and NaN, ids without order, some rows not valid, and one more number a row."""
    draw = random.Random(seed)
    size = draw.randint(2, 24)
    group = [draw.choice([7_000_000_000, -3, 11, 12]) for _ in range(size)]
    rewards = [draw.choice([draw.gauss(0, 2), 1.0, 0.0, 0.3]) for _ in range(size)]
    rewards = [math.nan if draw.random() < 0.1 else r for r in rewards]
    valid = [draw.random() < 0.85 for _ in range(size)]
    rewards[0], valid[0] = 0.5, True
    return rewards, group, valid, [draw.gauss(0, 1) for _ in range(size)]


def _tensors(rewards: list[float], group: list[int], valid: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(group), torch.tensor(valid)


def _counted(rewards: list[float], valid: list[bool]) -> list[int]:
    return [i for i, r in enumerate(rewards) if valid[i] and not math.isnan(r)]


def _mates(i: int, group: list[int], counted: list[int]) -> list[int]:
    return [j for j in counted if group[j] == group[i] and j != i]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _close(result: Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx(expected, abs=tolerance)


def _check_record(out: Advantage, counted: list[int]) -> None:
    kept = [i in counted for i in range(len(out.advantage))]
    assert out.loss_mask.tolist() == kept
    assert out.weight.tolist() == [float(k) for k in kept]
    assert bool((out.advantage[~out.loss_mask] == 0).all())


def test_poise_worked_numbers() -> None:
    rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([4, 4])
    out = poise(rewards, group, torch.tensor([0.4, 0.6]))
    _close(out.advantage, [0.4, -0.4], 1e-6)
    assert out.returns is not None and out.critic_mask is not None
    _close(out.returns, [0, 1], 1e-6)
    assert out.critic_mask.tolist() == [True, True] and out.live.tolist() == [True, True]
    constant = poise(rewards, group, torch.tensor([0.25, 0.25]))
    _close(constant.advantage, [0.75, -0.25], 1e-6)
    both = poise(rewards, group, torch.tensor([0.4, 0.6]), target="group")
    assert both.returns is not None
    _close(both.returns, [0.5, 0.5], 1e-6)


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("target", ["others", "group"])
@pytest.mark.parametrize("seed", SEEDS)
def test_poise_against_a_plain_loop(seed: int, target: Any, singleton: Any) -> None:
    rewards, group, valid, probe = _case(seed)
    counted = _counted(rewards, valid)
    probe = [p if i in counted else math.nan for i, p in enumerate(probe)]
    value, ids, mask = _tensors(rewards, group, valid)
    out = poise(value, ids, torch.tensor(probe), mask, target=target, singleton=singleton)
    advantage, aim, fitted, live = [], [], [], []
    for i in range(len(rewards)):
        mates = _mates(i, group, counted)
        alone = not mates
        size = len(mates) + (i in counted)
        live.append(size > 1 or (singleton == "raw" and size == 1))
        if i not in counted:
            advantage.append(0.0)
        elif alone:
            advantage.append(rewards[i] if singleton == "raw" else 0.0)
        else:
            advantage.append(rewards[i] - _mean([probe[j] for j in mates]))
        has_aim = i in counted and (target == "group" or not alone)
        fitted.append(has_aim)
        pool = mates if target == "others" else [*mates, i]
        aim.append(_mean([rewards[j] for j in pool]) if has_aim else 0.0)
    _close(out.advantage, advantage)
    _check_record(out, counted)
    assert out.live.tolist() == live
    assert out.returns is not None and out.critic_mask is not None
    _close(out.returns, aim)
    assert out.critic_mask.tolist() == fitted


@pytest.mark.parametrize("seed", SEEDS)
def test_poise_on_rewards_as_probe_is_rloo(seed: int) -> None:
    rewards, group, valid = _tensors(*_case(seed)[:3])
    ours, theirs = poise(rewards, group, rewards, valid), rloo(rewards, group, valid)
    assert torch.allclose(ours.advantage, theirs.advantage, atol=1e-6)
    assert ours.group_mean is not None and theirs.group_mean is not None
    assert torch.equal(ours.group_mean.nan_to_num(), theirs.group_mean.nan_to_num())
    assert ours.group_std is not None and theirs.group_std is not None
    assert torch.equal(ours.group_std.nan_to_num(), theirs.group_std.nan_to_num())


def test_poise_of_a_probe_that_equals_constant_rewards_is_exactly_zero() -> None:
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    out = poise(rewards, torch.zeros(3, dtype=torch.int64), rewards)
    assert out.advantage.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", [v0, remax])
@pytest.mark.parametrize("seed", SEEDS)
def test_row_baselines_against_a_plain_loop(seed: int, method: Callable[..., Advantage]) -> None:
    rewards, _, valid, level = _case(seed)
    level[-1] = math.nan if len(level) > 2 else level[-1]
    out = method(torch.tensor(rewards), torch.tensor(level), torch.tensor(valid))
    counted = [i for i in _counted(rewards, valid) if not math.isnan(level[i])]
    _close(out.advantage, [rewards[i] - level[i] if i in counted else 0.0 for i in range(len(level))])
    _check_record(out, counted)
    assert out.live.tolist() == out.loss_mask.tolist()
    assert out.group_mean is None


def test_v0_on_the_mates_mean_is_rloo() -> None:
    rewards, group = torch.tensor([1.0, 0.0, 0.5, 2.0, 3.0]), torch.tensor([5, 5, 5, 2, 2])
    mates = torch.tensor([0.25, 0.75, 0.5, 3.0, 2.0])
    assert torch.allclose(v0(rewards, mates).advantage, rloo(rewards, group).advantage, atol=1e-6)


def test_v0_budget_counts_failures_beside_a_success() -> None:
    """The expected number of failures in groups that also hold a success, by enumeration of all outcomes."""
    rate, budget = torch.tensor([0.5, 0.5, 0.3]), torch.tensor([4, 8, 1])
    _close(v0_budget(rate, budget), [1.75, 3.96875, 0.0], 1e-6)
    for p in (0.0, 0.2, 0.7, 1.0):
        for number in (1, 2, 5):
            expected = 0.0
            for outcome in range(2**number):
                wins = outcome.bit_count()
                if wins > 0:
                    expected += (number - wins) * p**wins * (1 - p) ** (number - wins)
            assert float(v0_budget(torch.tensor(p), torch.tensor(number))) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_worked_numbers() -> None:
    rewards, group = torch.tensor([1.0, 0.4, 0.2]), torch.zeros(3, dtype=torch.int64)
    out = pass_at_k(rewards, group)
    _close(out.advantage, [0.6, 0, 0], 1e-6)
    assert out.weight.tolist() == [1, 1, 1] and out.live.tolist() == [True] * 3
    _close(pass_at_k(rewards, group, scale="std", eps=0.0).advantage, [0.6 / 0.416333, 0, 0], 1e-4)
    _close(pass_at_k(1e-6 * rewards, group, scale="std").advantage, [0.6 / 1.416333, 0, 0], 1e-4)
    for tied in ([1.0, 1.0, 0.0], [2.0, 2.0, 2.0]):
        out = pass_at_k(torch.tensor(tied), group)
        assert out.advantage.tolist() == [0, 0, 0] and out.live.tolist() == [False] * 3
    assert pass_at_k(torch.tensor([3.0]), group[:1]).advantage.tolist() == [0.0]


@pytest.mark.parametrize(("scale", "ddof"), [("none", 1), ("std", 0), ("std", 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_pass_at_k_against_a_plain_loop(seed: int, scale: Any, ddof: int) -> None:
    rewards, group, valid, _ = _case(seed)
    counted = _counted(rewards, valid)
    out = pass_at_k(*_tensors(rewards, group, valid), scale=scale, ddof=ddof, eps=0.01)
    expected, live = [], []
    for i in range(len(rewards)):
        ranked = sorted((rewards[j] for j in counted if group[j] == group[i]), reverse=True)
        signal = len(ranked) > 1 and ranked[0] > ranked[1]
        live.append(signal)
        lead = ranked[0] - ranked[1] if signal and i in counted and rewards[i] == ranked[0] else 0.0
        if scale == "std" and lead:
            centre = _mean(ranked)
            lead /= math.sqrt(math.fsum((r - centre) ** 2 for r in ranked) / (len(ranked) - ddof)) + 0.01
        expected.append(lead)
    _close(out.advantage, expected)
    assert out.live.tolist() == live
    _check_record(out, counted)


def test_gpg_worked_numbers() -> None:
    """Group 0 has signal and group 1 has none; of the 5 rewards 3 are not 0."""
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    third = torch.tensor([2.0, -1.0, -1.0, 0.0, 0.0]) / 3
    _close(gpg(rewards, group).advantage, (5 / 3 * third).tolist(), 1e-6)
    _close(gpg(rewards - 1, group, alpha="verl").advantage, (5 / 2 * third).tolist(), 1e-6)
    _close(gpg(rewards, group, alpha="verl", f_norm=2.0).advantage, (5 / 3 * third / 2).tolist(), 1e-6)
    twice = gpg(rewards, group, reduce=lambda x: x + torch.tensor([5.0, 0.0], dtype=torch.float64))
    _close(twice.advantage, (10 / 3 * third).tolist(), 1e-6)
    assert gpg(torch.ones(5), group).advantage.tolist() == [0.0] * 5
    _close(gpg(rewards[:2], group[:2], alpha="verl").advantage, [1.0, -1.0], 1e-6)


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("alpha", ["paper", "verl"])
@pytest.mark.parametrize("seed", SEEDS)
def test_gpg_against_a_plain_loop(seed: int, alpha: Any, singleton: Any) -> None:
    rewards, group, valid, _ = _case(seed)
    counted = _counted(rewards, valid)
    out = gpg(*_tensors(rewards, group, valid), alpha=alpha, f_norm=0.5, singleton=singleton)
    centred, alive = [0.0] * len(rewards), 0
    for i in counted:
        pool = [rewards[j] for j in counted if group[j] == group[i]]
        if len(pool) == 1 and singleton == "raw":
            centred[i] = rewards[i]
            alive += 1
        elif max(pool) > min(pool):
            centred[i] = rewards[i] - _mean(pool)
            alive += 1
    nonzero = sum(rewards[i] != 0 for i in counted)
    factor = len(counted) / max(alive if alpha == "paper" else nonzero, 1) / 0.5
    _close(out.advantage, [factor * c for c in centred], 1e-4)
    _check_record(out, counted)


def test_gpg_without_dead_groups_is_dr_grpo() -> None:
    rewards, group = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.5]), torch.tensor([9, 9, 1, 1, 1])
    ours, theirs = gpg(rewards, group), dr_grpo(rewards, group)
    assert torch.allclose(ours.advantage, theirs.advantage, atol=1e-7)
    assert ours.group_std is not None and theirs.group_std is not None
    assert torch.equal(ours.group_std, theirs.group_std)


def test_results_are_float32_without_a_gradient_and_inputs_stay() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    probe = torch.tensor([0.5, 0.25, 0.5], dtype=torch.bfloat16, requires_grad=True)
    group = torch.zeros(3, dtype=torch.int64)
    before = rewards.detach().clone()
    for out in (poise(rewards, group, probe), v0(rewards, probe), remax(rewards, probe), gpg(rewards, group)):
        assert out.advantage.dtype == torch.float32 and not out.advantage.requires_grad
    assert torch.equal(rewards.detach(), before)


def test_read_rows_keeps_what_counts() -> None:
    kept = read_rows("x", torch.tensor([1.0, math.nan, 0.0]), torch.tensor([True, False, True]), lowest=0.0)
    assert kept.tolist() == [1.0, 0.0, 0.0] and kept.dtype == torch.float64


ROW = torch.tensor([1.0, 0.0])
IDS = torch.tensor([0, 0])
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: poise(ROW, IDS, torch.ones(3)), r"probe: expected real \[2\].*\[3\]"),
    (lambda: poise(ROW, IDS, torch.ones(2, dtype=torch.complex64)), "probe: expected real"),
    (
        lambda: poise(ROW, IDS, torch.tensor([0.0, math.nan])),
        "probe: expected finite values where they count, got nan at row 1",
    ),
    (lambda: poise(ROW, IDS, ROW, target="mine"), "target: .*'mine'"),  # type: ignore[arg-type]
    (lambda: poise(ROW, IDS, ROW, singleton="x"), "singleton"),  # type: ignore[arg-type]
    (lambda: poise(ROW, IDS.int(), ROW), "group"),
    (lambda: v0(torch.tensor(1.0), ROW), "rewards"),
    (lambda: v0(ROW, torch.ones(3)), r"prompt_value: expected \[2\].*\[3\]"),
    (lambda: v0(ROW, torch.tensor([0.0, math.inf])), "prompt_value: .*got inf at row 1"),
    (lambda: remax(ROW, torch.ones(2, 1)), r"greedy_reward: expected \[2\]"),
    (lambda: remax(torch.tensor([math.nan, math.nan]), ROW), "rewards: every valid sample is NaN"),
    (lambda: v0_budget(ROW, torch.tensor([1.0])), "budget"),
    (lambda: v0_budget(ROW, torch.tensor([1, 0])), "budget"),
    (lambda: v0_budget(torch.tensor([1.1]), torch.tensor([2])), "prompt_value"),
    (lambda: v0_budget(torch.tensor([-0.1]), torch.tensor([2])), "prompt_value"),
    (lambda: pass_at_k(ROW, IDS, scale="mad"), "scale: .*'mad'"),  # type: ignore[arg-type]
    (lambda: pass_at_k(ROW, IDS, ddof=2), "ddof"),
    (lambda: pass_at_k(ROW, IDS, eps=-1.0), "eps"),
    (lambda: gpg(ROW, IDS, alpha="b"), "alpha: .*'b'"),  # type: ignore[arg-type]
    (lambda: gpg(ROW, IDS, f_norm=0.0), "f_norm"),
    (lambda: gpg(ROW, IDS, f_norm=math.inf), "f_norm"),
    (lambda: gpg(ROW, IDS, singleton="x"), "singleton"),  # type: ignore[arg-type]
    (lambda: read_rows("cost", torch.tensor([0.0, -1.0]), IDS == 0, lowest=0.0), "cost: .*>= 0 .*got -1 at row 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries() -> None:
    assert [(m.key, m.tier) for m in METHODS] == [
        ("poise", 2),
        ("v0", 2),
        ("v0_budget", 3),
        ("remax", 2),
        ("pass_at_k", 2),
        ("gpg", 2),
    ]
    for method in METHODS:
        for test in method.evidence.values():
            assert test.split("::")[1] in globals() or "/test_baselines.py" not in test
