"""Weights, masks and tilts: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import dr_grpo, grpo, rloo
from flowrl.advantage.weighting import METHODS, duration, empg, intervention, modulate_by_entropy, r3l

SEEDS = range(6)
PAIR = torch.tensor([0, 0])
LADDER = torch.tensor([[0.2, 0.8], [0.5, 9.0]])
LADDER_MASK = torch.tensor([[True, True], [True, False]])


def _close(result: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), abs=tolerance)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_empg_worked_numbers() -> None:
    out = modulate_by_entropy(torch.tensor([1.0, -1.0]), LADDER, LADDER_MASK)
    _close(out.channels["gain"], [1.5194, 0.5590, 0.9216, 0.0], 1e-4)
    _close(out.channels["future"], [math.exp(-1), 0.0, 0.0, 0.0], 1e-6)
    _close(out.advantage, [1.1584, 0.1611, -1.3195, 0.0], 1e-4)
    tilted = [1.5194 + 0.05 * math.exp(-1), 0.5590, -0.9216]
    less = modulate_by_entropy(torch.tensor([1.0, -1.0]), LADDER, LADDER_MASK, zeta=0.05)
    _close(less.advantage, [*(v - _mean(tilted) for v in tilted), 0.0], 1e-4)
    assert out.live.tolist() == [True, True] and torch.equal(out.loss_mask, LADDER_MASK)
    assert torch.equal(out.weight, LADDER_MASK.float())


def test_empg_scales_by_the_given_range() -> None:
    out = modulate_by_entropy(torch.tensor([1.0, -1.0]), LADDER, LADDER_MASK, entropy_range=(0.0, 2.0), zeta=1.0)
    gains = [math.exp(-h) for h in (0.1, 0.4, 0.25)]
    _close(out.channels["gain"], [*(g / _mean(gains) for g in gains), 0.0], 1e-6)
    _close(out.channels["future"], [gains[1], 0, 0, 0], 1e-6)
    flat = modulate_by_entropy(
        torch.tensor([1.0, -1.0]), LADDER, LADDER_MASK, entropy_range=(0.5, 0.5), k=0, k_future=0
    )
    _close(flat.channels["gain"], [1, 1, 1, 0], 1e-6)


def test_empg_of_constant_entropy() -> None:
    mask = torch.tensor([[True, False, True], [True, True, True]])
    out = modulate_by_entropy(torch.tensor([2.0, -1.0]), torch.full((2, 3), 0.7), mask)
    assert out.channels["gain"].tolist() == mask.float().tolist()
    assert out.channels["future"].tolist() == [[1, 0, 0], [1, 1, 0]]
    assert float(out.advantage.sum()) == pytest.approx(0, abs=1e-6)
    nothing = modulate_by_entropy(torch.ones(2), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert not nothing.advantage.any() and not nothing.live.any()
    assert not nothing.channels["gain"].any()


def test_empg_takes_an_advantage_of_each_step_and_shares_its_defaults() -> None:
    rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([3, 3])
    outcome = grpo(rewards, group)
    by_row = modulate_by_entropy(outcome.advantage, LADDER, LADDER_MASK)
    by_step = modulate_by_entropy(outcome.over_steps(LADDER_MASK).advantage, LADDER, LADDER_MASK)
    assert torch.equal(by_row.advantage, by_step.advantage)
    assert torch.equal(by_row.advantage, empg(rewards, group, LADDER, LADDER_MASK).advantage)
    uneven = modulate_by_entropy(torch.tensor([[1.0, 2.0], [-1.0, 9.0]]), LADDER, LADDER_MASK, k=0.0, zeta=0.0)
    _close(uneven.advantage, [1 / 3, 4 / 3, -5 / 3, 0], 1e-6)


def _batch(seed: int) -> tuple[list[float], list[int], Tensor, Tensor, Tensor]:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, steps = 9, 6
    group = [draw.choice([2**40, -3, 11]) for _ in range(rows)]
    rewards = [draw.choice([draw.gauss(0, 2), 1.0, 0.0]) for _ in range(rows)]
    rewards[2] = math.nan
    mask = (torch.arange(steps) < torch.randint(0, steps + 1, (rows, 1), generator=generator)) & (
        torch.rand(rows, steps, generator=generator) < 0.8
    )
    mask[0, 1] = mask[2, 0] = True
    segment = torch.arange(steps).expand(rows, steps) // 2
    return rewards, group, mask, segment, torch.rand(rows, steps, generator=generator, dtype=torch.float64)


def _empg_loop(
    start: list[float], entropy: list[list[float]], k: float, k_future: float, zeta: float
) -> tuple[list[list[float]], list[list[float]]]:
    """One row of unmasked steps at a time; entropy[b] holds the steps of row b."""
    every = [h for row in entropy for h in row]
    low, high = min(every), max(every)
    unit = [[(h - low) / (high - low + 1e-8) for h in row] for row in entropy]
    average = _mean([math.exp(-k * u) for row in unit for u in row])
    gain = [[math.exp(-k * u) / average for u in row] for row in unit]
    tilted = [
        [
            start[b] * gain[b][t] + (zeta * math.exp(-k_future * unit[b][t + 1]) if t + 1 < len(unit[b]) else 0.0)
            for t in range(len(unit[b]))
        ]
        for b in range(len(entropy))
    ]
    centre = _mean([v for row in tilted for v in row])
    return [[v - centre for v in row] for row in tilted], gain


@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize(("base", "outcome"), [("grpo", grpo), ("dr_grpo", dr_grpo), ("rloo", rloo)])
@pytest.mark.parametrize("seed", SEEDS)
def test_empg_against_a_plain_loop(seed: int, base: Any, outcome: Callable[..., Any], by_segment: bool) -> None:
    rewards, group, mask, segment, entropy = _batch(seed)
    value, ids = torch.tensor(rewards), torch.tensor(group)
    held = torch.where(mask, entropy, math.nan)
    out = empg(value, ids, held, mask, segment if by_segment else None, base=base, k=1.3, k_future=0.6, zeta=0.3)
    start = outcome(value, ids).advantage.tolist()
    rows = [b for b in range(len(mask)) if not math.isnan(rewards[b])]
    steps: list[list[list[int]]] = []
    for b in rows:
        places = [t for t in range(mask.shape[1]) if mask[b, t]]
        blocks = sorted({int(segment[b, t]) for t in places})
        by_block = [[t for t in places if int(segment[b, t]) == block] for block in blocks]
        steps.append(by_block if by_segment else [[t] for t in places])
    levels = [[_mean([float(entropy[b, t]) for t in block]) for block in steps[i]] for i, b in enumerate(rows)]
    result, gain = _empg_loop([start[b] for b in rows], levels, 1.3, 0.6, 0.3)
    expected, gains = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, b in enumerate(rows):
        for j, block in enumerate(steps[i]):
            for t in block:
                expected[b, t], gains[b, t] = result[i][j], gain[i][j]
    _close(out.advantage, expected.tolist(), 1e-4)
    _close(out.channels["gain"], gains.tolist(), 1e-5)
    assert torch.equal(out.live, outcome(value, ids).live)
    assert not out.loss_mask[2].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_empg_without_coefficients_is_the_centred_advantage(seed: int) -> None:
    rewards, group, mask, _, entropy = _batch(seed)
    value, ids = torch.tensor(rewards), torch.tensor(group)
    out = empg(value, ids, entropy, mask, k=0.0, zeta=0.0)
    plain = grpo(value, ids).over_steps(mask)
    centre = plain.advantage[plain.loss_mask].mean()
    assert torch.allclose(out.advantage, torch.where(plain.loss_mask, plain.advantage - centre, 0.0), atol=1e-6)
    assert out.group_mean is not None and plain.group_mean is not None
    assert torch.equal(out.group_mean.nan_to_num(), plain.group_mean.nan_to_num())


def test_empg_takes_rows_out_and_sums_over_ranks() -> None:
    rewards, group, mask, _, entropy = _batch(1)
    value, ids, valid = torch.tensor(rewards), torch.tensor(group), torch.arange(len(group)) != 4
    mask[4, 0] = True
    full = empg(value, ids, entropy, mask, valid=valid)
    assert not full.loss_mask[4].any()
    doubled = empg(value, ids, entropy, mask, valid=valid, reduce=lambda x: 2 * x)
    assert torch.allclose(full.advantage, doubled.advantage, atol=1e-6)
    shifted = empg(value, ids, entropy, mask, valid=valid, reduce=lambda x: x + 1)
    assert not torch.allclose(full.channels["gain"], shifted.channels["gain"], atol=1e-3)
    ranged = empg(value, ids, entropy, mask, valid=valid, entropy_range=(0.0, 9.0))
    assert float(ranged.channels["gain"].max()) < float(full.channels["gain"].max())


def test_r3l_worked_numbers() -> None:
    rewards, group = torch.tensor([1.0, 0.5, 0.0]), torch.zeros(3, dtype=torch.int64)
    mask, pivot = torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 1, 2])
    out = r3l(rewards, group, mask, pivot)
    _close(out.advantage, [[1, 1], [0, 0], [0, 0]], 1e-7)
    assert out.loss_mask.tolist() == [[True, True], [False, True], [False, False]]
    assert torch.equal(out.weight, out.loss_mask.float())
    start = torch.zeros(3, dtype=torch.int64)
    _close(r3l(rewards, group, mask, start).advantage[:, 0], [1, 0, -0.5], 1e-7)
    _close(r3l(rewards, group, mask, start, max_rule="docs").advantage[:, 0], [3, 0, -0.5], 1e-7)
    _close(r3l(rewards, group, mask, start, max_rule="none").advantage[:, 0], [1.5, 0, -0.5], 1e-7)
    _close(r3l(rewards, group, mask, start, max_reward=0.5, alpha=2).advantage[:, 0], [1, 1, -0.5], 1e-7)
    _close(r3l(rewards, group, mask, start, max_rule="none", alpha=0.0).advantage[:, 0], [0, 0, -0.5], 1e-7)
    average = math.log(_mean([math.e, math.exp(0.5), 1]))
    soft = r3l(rewards, group, mask, start, baseline="log_avg_exp", max_rule="none", alpha=1.0)
    _close(soft.advantage[:, 0], [r - average for r in (1, 0.5, 0)], 1e-6)
    alone = torch.tensor([0, 1, 2])
    _close(r3l(0.2 * rewards, alone, mask, start).advantage[:, 0], [0.6, 0.3, 0], 1e-7)
    _close(r3l(0.2 * rewards, alone, mask, start, baseline="log_avg_exp").advantage[:, 0], [0.6, 0.3, 0], 1e-7)
    assert r3l(0.2 * rewards, alone, mask, start, singleton="zero").live.tolist() == [False] * 3


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("rule", ["code", "docs", "none"])
@pytest.mark.parametrize(("baseline", "tau"), [("mean", 1.0), ("log_avg_exp", 0.4)])
@pytest.mark.parametrize("seed", SEEDS)
def test_r3l_against_a_plain_loop(seed: int, baseline: Any, tau: float, rule: Any, singleton: Any) -> None:
    rewards, group, mask, _, _ = _batch(seed)
    pivot = [(3 * b + seed) % 8 if b % 2 else 0 for b in range(len(group))]
    out = r3l(
        torch.tensor(rewards),
        torch.tensor(group),
        mask,
        torch.tensor(pivot),
        baseline=baseline,
        tau=tau,
        alpha=2.5,
        max_rule=rule,
        max_reward=0.9,
        singleton=singleton,
    )
    expected = torch.zeros(mask.shape)
    trained = torch.zeros(mask.shape, dtype=torch.bool)
    live = [False] * len(group)
    for b in range(len(group)):
        pool = [r for r, g in zip(rewards, group, strict=True) if g == group[b] and not math.isnan(r)]
        single = len(pool) == 1 and singleton == "raw"
        signal = bool(pool) and max(pool) > min(pool)
        live[b] = signal or single or (rule != "none" and any(r >= 0.9 for r in pool))
        if math.isnan(rewards[b]):
            continue
        if baseline == "mean" or single:
            base = 0.0 if single else _mean(pool)
        else:
            base = tau * math.log(_mean([math.exp(r / tau) for r in pool]))
        a = rewards[b] - base if signal or single else 0.0
        a = 2.5 * a if a >= 0 else a
        if rule != "none" and rewards[b] >= 0.9:
            a = 1.0 if rule == "code" else 2.5
        for t in range(mask.shape[1]):
            trained[b, t] = bool(mask[b, t]) and t >= pivot[b]
            expected[b, t] = a if trained[b, t] else 0.0
    _close(out.advantage, expected.tolist())
    assert torch.equal(out.loss_mask, trained) and out.live.tolist() == live


@pytest.mark.parametrize("seed", SEEDS)
def test_r3l_reduces_to_dr_grpo(seed: int) -> None:
    rewards, group, mask, _, _ = _batch(seed)
    value, ids, start = torch.tensor(rewards), torch.tensor(group), torch.zeros(len(group), dtype=torch.int64)
    plain = dr_grpo(value, ids, singleton="raw").over_steps(mask)
    ours = r3l(value, ids, mask, start, alpha=1.0, max_rule="none")
    assert torch.allclose(ours.advantage, plain.advantage, atol=1e-6)
    assert ours.group_std is not None and plain.group_std is not None and plain.group_mean is not None
    assert torch.equal(ours.group_std.nan_to_num(), plain.group_std.nan_to_num())
    soft = r3l(value, ids, mask, start, alpha=1.0, max_rule="none", baseline="log_avg_exp", tau=1e6)
    assert torch.allclose(soft.advantage, plain.advantage, atol=1e-4)


@pytest.mark.parametrize("baseline", ["mean", "log_avg_exp"])
def test_r3l_of_a_failed_group_is_exactly_zero(baseline: Any) -> None:
    zero, mask = torch.zeros(3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
    out = r3l(torch.full((3,), 0.1), zero, mask, zero, baseline=baseline)
    assert not out.advantage.any() and not out.live.any() and bool(out.loss_mask.all())


@pytest.mark.parametrize("by_segment", [False, True])
def test_intervention_against_a_plain_loop(by_segment: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    mask, fix = torch.rand(6, 8, generator=generator) < 0.8, torch.rand(6, 8, generator=generator) < 0.2
    segment = (torch.arange(8).expand(6, 8) // 3).clone()
    segment[:, 7] = -1
    pivot = torch.tensor([0, 1, 2, 5, 8, 9])
    out = intervention(mask, pivot, fix, segment if by_segment else None)
    for b in range(6):
        for t in range(8):
            number = int(segment[b, t]) if by_segment else t
            before = 0 <= number < int(pivot[b])
            assert bool(out[b, t]) == (bool(mask[b, t]) and (before or bool(fix[b, t])))
    start = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(intervention(mask, start, fix), mask & fix)
    assert torch.equal(intervention(mask, start + 8, torch.zeros_like(fix)), mask)


def test_duration_worked_numbers() -> None:
    cost = torch.tensor([10.0, 20.0, 30.0, 99.0])
    valid = torch.tensor([True, True, True, False])
    _close(duration(cost, valid), [0.5, 1.0, 1.5, 0.0], 1e-7)
    _close(duration(cost[:2]), [2 / 3, 4 / 3], 1e-6)
    _close(duration(torch.tensor([0, 4]), power=0.5), [0.0, 2.0], 1e-7)
    _close(duration(torch.tensor([0, 4]), power=0.0), [1.0, 1.0], 1e-7)
    _close(duration(torch.tensor([1.0, 2.0]), power=-1.0), [4 / 3, 2 / 3], 1e-6)
    other = torch.tensor([15.0, 2.0], dtype=torch.float64)  # another rank: two rows of cost 15 in all
    _close(duration(cost[:2], reduce=lambda x: x + other if x.ndim else x), [10 / 11.25, 20 / 11.25], 1e-6)
    assert duration(cost, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_duration_against_a_plain_loop(power: float) -> None:
    draw = random.Random(int(10 * power))
    cost = [draw.random() * 60 for _ in range(17)]
    valid = [draw.random() < 0.8 for _ in range(17)]
    mean = _mean([c**power for c, v in zip(cost, valid, strict=True) if v])
    held = torch.tensor([c if v else math.nan for c, v in zip(cost, valid, strict=True)], requires_grad=True)
    out = duration(held, torch.tensor(valid), power=power)
    assert not out.requires_grad
    _close(out, [c**power / mean if v else 0.0 for c, v in zip(cost, valid, strict=True)])
    assert float(out.sum()) / sum(valid) == pytest.approx(1, abs=1e-6)


ROW, MASK, ONE = torch.tensor([1.0, 0.0]), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: empg(ROW, PAIR, ONE, MASK, base="ppo"), "base: .*'ppo'"),  # type: ignore[arg-type]
    (lambda: empg(ROW, PAIR, ONE, MASK[:1]), r"mask: expected bool \[2, T\]"),
    (lambda: empg(ROW, PAIR, ONE[:, :2], MASK), "entropy"),
    (lambda: empg(ROW, PAIR, ONE, MASK, PAIR), "segment"),
    (lambda: empg(ROW, PAIR, ONE, MASK, torch.tensor([[0, 0, -1]] * 2)), "segment: .*>= 0"),
    (lambda: empg(ROW, PAIR, ONE, MASK, k=math.inf), "k: .*inf"),
    (lambda: empg(ROW, PAIR, ONE, MASK, k_future=math.nan), "k_future: .*nan"),
    (lambda: empg(ROW, PAIR, ONE, MASK, zeta=math.inf), "zeta: .*inf"),
    (lambda: empg(ROW, PAIR, ONE, MASK, entropy_range=(1.0, 0.0)), "entropy_range"),
    (lambda: modulate_by_entropy(ONE[:, :2], ONE, MASK), r"advantage: expected \[2, 3\] or \[2\], got \[2, 2\]"),
    (lambda: modulate_by_entropy(ROW, ONE, MASK.int()), "mask"),
    (lambda: modulate_by_entropy(torch.tensor([1.0, math.nan]), ONE, MASK), "advantage: .*not finite"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR, baseline="max"), "baseline, max_rule: got 'max'"),  # type: ignore[arg-type]
    (lambda: r3l(ROW, PAIR, MASK, PAIR, max_rule="both"), "'both'"),  # type: ignore[arg-type]
    (lambda: r3l(ROW, PAIR, MASK, PAIR, tau=0.0), "tau, alpha"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR, tau=math.inf), "tau, alpha"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR, alpha=-1.0), "tau, alpha"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR, alpha=math.inf), "tau, alpha"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR, singleton="x"), "singleton"),  # type: ignore[arg-type]
    (lambda: r3l(ROW, PAIR, MASK, PAIR - 1), "pivot: .*-1"),
    (lambda: r3l(ROW, PAIR, MASK, PAIR.int()), "pivot"),
    (lambda: r3l(ROW, PAIR, MASK[:1], PAIR), "mask"),
    (lambda: intervention(MASK.int(), PAIR, MASK), "mask"),
    (lambda: intervention(MASK, PAIR[:1], MASK), "pivot"),
    (lambda: intervention(MASK, PAIR, ONE), "intervened"),
    (lambda: intervention(MASK, PAIR, MASK, PAIR), "segment"),
    (lambda: duration(ONE), "cost"),
    (lambda: duration(ROW[:0]), "cost"),
    (lambda: duration(torch.tensor([1.0, -1.0])), "cost: .*got -1 at row 1"),
    (lambda: duration(ROW, power=-1.0), "cost: .*finite mean"),
    (lambda: duration(0 * ROW), "cost: .*> 0"),
    (lambda: duration(ROW, PAIR), "valid"),
    (lambda: duration(ROW, power=math.nan), "power"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries() -> None:
    assert [(m.key, m.kind, m.tier) for m in METHODS] == [
        ("empg", "estimator", 2),
        ("r3l", "estimator", 2),
        ("intervention", "weight", 3),
        ("duration", "weight", 2),
    ]
    for method in METHODS:
        for test in method.evidence.values():
            assert test.split("::")[1] in globals()
