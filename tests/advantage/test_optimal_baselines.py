"""Baselines of least variance: worked numbers, plain loops, identities, optimality, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import dr_grpo
from flowrl.advantage.optimal_baselines import (
    METHODS,
    gaussian_energy,
    opo,
    optimal_baseline,
    otb,
    snr_lr,
    token_energy,
)

SEEDS = range(10)
PAIR = torch.tensor([0, 0])


def _close(result: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), abs=tolerance)


@pytest.mark.parametrize("method", [opo, optimal_baseline])
def test_weighted_baseline_worked_numbers(method: Callable[..., Any]) -> None:
    rewards = torch.tensor([1.0, 0.0])
    _close(method(rewards, PAIR, torch.tensor([1.0, 3.0])).advantage, [0.75, -0.25], 1e-7)
    _close(method(rewards, PAIR, torch.tensor([0.0, 3.0])).advantage, [1.0, 0.0], 1e-7)
    out = method(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2]), singleton="raw")
    _close(out.advantage, [0.75, -0.25, 5.0], 1e-7)
    assert out.live.tolist() == [True] * 3
    same = method(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), torch.tensor([0.3, 0.7, 0.1]))
    assert same.advantage.tolist() == [0.0] * 3 and same.live.tolist() == [False] * 3


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("seed", SEEDS)
def test_weighted_baselines_against_a_plain_loop(seed: int, singleton: Any) -> None:
    draw = random.Random(seed)
    size = draw.randint(2, 20)
    group = [draw.choice([2**40, -3, 11, 12]) for _ in range(size)]
    rewards = [draw.choice([draw.gauss(0, 2), 1.0, math.nan]) for _ in range(size)]
    rewards[0] = 0.5
    weight = [draw.choice([draw.random() * 5, 0.0]) for _ in range(size)]
    valid = [True, *(draw.random() < 0.85 for _ in range(size - 1))]
    counted = [i for i in range(size) if valid[i] and not math.isnan(rewards[i])]
    weight = [w if i in counted else -math.inf for i, w in enumerate(weight)]
    expected = [0.0] * size
    for i in counted:
        pool = [j for j in counted if group[j] == group[i]]
        if len(pool) == 1:
            expected[i] = rewards[i] if singleton == "raw" else 0.0
            continue
        mass = [weight[j] for j in pool]
        if sum(mass) == 0:
            mass = [1.0 for _ in pool]
        expected[i] = rewards[i] - sum(m * rewards[j] for m, j in zip(mass, pool, strict=True)) / sum(mass)
    arguments = torch.tensor(rewards), torch.tensor(group), torch.tensor(weight), torch.tensor(valid)
    for method in (opo, optimal_baseline):
        out = method(*arguments, singleton=singleton)
        _close(out.advantage, expected)
        assert out.loss_mask.tolist() == [i in counted for i in range(size)]


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_equal_weights_are_dr_grpo(weight: float) -> None:
    rewards, group = torch.tensor([1.0, 0.0, 3.0, 0.25, 0.5]), torch.tensor([9, 9, 1, 1, 1])
    ours, theirs = opo(rewards, group, torch.full((5,), weight)), dr_grpo(rewards, group)
    assert torch.allclose(ours.advantage, theirs.advantage, atol=1e-7)
    for a, b in ((ours.group_mean, theirs.group_mean), (ours.group_std, theirs.group_std)):
        assert a is not None and b is not None and torch.equal(a, b)


def test_energy_as_length_is_opo() -> None:
    rewards, group, length = torch.randn(12), torch.arange(12) % 3, torch.randint(1, 9, (12,))
    a, b = opo(rewards, group, length).advantage, optimal_baseline(rewards, group, length.float()).advantage
    assert torch.equal(a, b)


def test_the_energy_weighted_baseline_has_the_least_variance() -> None:
    """Scores of several dimensions and rewards, uncorrelated with nothing: moving the baseline raises the variance."""
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    score = score - score.mean(0)  # a score has mean 0, so that no baseline changes the mean gradient
    rewards = score[:, 0] ** 2 + torch.rand(400, generator=generator, dtype=torch.float64)
    out = optimal_baseline(rewards, torch.zeros(400, dtype=torch.int64), score.square().sum(1))
    best = float(rewards[0] - out.advantage[0].double())

    def variance(baseline: float) -> float:
        return float(((rewards - baseline)[:, None] * score).var(0).sum())

    assert abs(best - float(rewards.mean())) > 0.1
    assert variance(best) < min(variance(best + 0.01), variance(best - 0.01), variance(float(rewards.mean())))


def test_snr_lr_worked_numbers() -> None:
    signal, noise = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 3.0, 0.0, 3.0])
    _close(snr_lr(signal, noise), [0.5, 1.0, 0.0, 0.0, 0.25], 1e-7)
    _close(snr_lr(signal, noise, smoothness=4.0), [0.125, 0.25, 0.0, 0.0, 0.0625], 1e-7)
    _close(snr_lr(0.1 * signal, 0.1 * noise), [0.5, 1.0, 0.0, 0.0, 0.25], 1e-6)
    assert snr_lr(torch.tensor(1.0), torch.tensor(1.0)).shape == ()


def test_snr_lr_minimises_the_bound_on_a_quadratic() -> None:
    """The expected decrease eta |Eg|^2 - eta^2 L (|Eg|^2 + Var) / 2 is greatest there."""
    signal, noise, smoothness = 0.7, 2.1, 5.0
    best = float(snr_lr(torch.tensor(signal), torch.tensor(noise), smoothness=smoothness))

    def decrease(rate: float) -> float:
        return rate * signal - rate**2 * smoothness * (signal + noise) / 2

    assert decrease(best) > max(decrease(0.99 * best), decrease(1.01 * best))


def test_token_energy_is_the_distance_to_the_action() -> None:
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for action in range(3):
        log_prob, square = pi[action].log().reshape(1, 1), pi.square().sum().reshape(1, 1)
        expected = float((torch.eye(3, dtype=torch.float64)[action] - pi).square().sum())
        assert float(token_energy(log_prob, square, torch.ones(1, 1, dtype=torch.bool))) == pytest.approx(expected)
    mask = torch.tensor([[True, False, True]])
    out = token_energy(torch.tensor([[0.0, 9.0, 0.0005]]), torch.tensor([[0.9, 0.0, 1.0]]), mask)
    assert out.tolist() == [[0.0, 0.0, 0.0]]


def test_gaussian_energy_is_the_score_on_the_mean() -> None:
    mean = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    point, sigma = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64), 0.7
    torch.distributions.Normal(mean, sigma).log_prob(point).sum().backward()
    assert mean.grad is not None
    mask = torch.tensor([[True, False]])
    noise = torch.stack([(point / sigma).square().sum(), torch.tensor(math.nan)])[None]
    for deviation in (torch.tensor([sigma, 0.0]), torch.tensor([[sigma, 0.0]])):
        out = gaussian_energy(noise, deviation, mask)
        assert out.tolist() == [[pytest.approx(float(mean.grad.square().sum()), rel=1e-6), 0.0]]


def _steps(seed: int, holes: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, steps = 11, 7
    group = torch.tensor([2**40, -3, 11])[torch.randint(0, 3, (rows,), generator=generator)]
    group[0] = 99  # a group of one
    length = torch.randint(0, steps + 1, (rows, 1), generator=generator)
    length[0], length[1] = 4, steps
    mask = torch.arange(steps) < length
    if holes:
        mask = mask & (torch.rand(rows, steps, generator=generator) < 0.7)
        mask[0, 0] = True
    reward = torch.where(mask, torch.randn(rows, steps, generator=generator, dtype=torch.float64), 0.0)
    probability = torch.rand(rows, steps, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    square = probability**2 + (1 - probability) ** 2 / 3
    return reward, group, mask, probability.log(), square


def _otb_loop(
    reward: Tensor, group: Tensor, mask: Tensor, energy: Tensor, align: str, tail: bool, raw: bool
) -> list[list[float]]:
    rows, steps = mask.shape
    places = [[t for t in range(steps) if mask[b, t]] for b in range(rows)]
    value = [{t: sum(float(reward[b, s]) for s in places[b] if s >= t) for t in places[b]} for b in range(rows)]
    mass = [{t: sum(float(energy[b, s]) for s in places[b] if s <= t) for t in places[b]} for b in range(rows)]
    out = [[0.0] * steps for _ in range(rows)]
    for b in range(rows):
        mates = [j for j in range(rows) if group[j] == group[b] and places[j]]
        for rank, t in enumerate(places[b]):
            if align == "column":
                there = [(j, t) for j in mates if t in places[j]]
            else:
                there = [(j, places[j][rank]) for j in mates if len(places[j]) > rank]
            if len(there) == 1:
                out[b][t] = value[b][t] if (raw if len(mates) == 1 else tail) else 0.0
                continue
            weights = [mass[j][s] for j, s in there]
            if sum(weights) == 0:
                weights = [1.0] * len(there)
            mean = sum(w * value[j][s] for w, (j, s) in zip(weights, there, strict=True)) / sum(weights)
            out[b][t] = value[b][t] - mean
    return out


@pytest.mark.parametrize(("tail", "raw"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("align", ["column", "rank"])
@pytest.mark.parametrize(("seed", "holes"), [(0, False), (1, False), (2, True), (3, True), (4, True)])
def test_otb_against_a_plain_loop(seed: int, holes: bool, align: Any, tail: bool, raw: bool) -> None:
    reward, group, mask, log_prob, square = _steps(seed, holes)
    out = otb(
        reward, group, mask, None, log_prob, square, align=align, zero_tail=tail, singleton="raw" if raw else "zero"
    )
    energy = 1 - 2 * log_prob.exp() + square
    expected = _otb_loop(reward, group, mask, energy, align, tail, raw)
    _close(out.advantage, expected)
    assert torch.equal(out.loss_mask, mask) and torch.equal(out.weight, mask.float())
    live = [
        any(abs(v) > 1e-9 for j in range(len(mask)) if group[j] == group[b] for v in expected[j])
        and bool(mask[b].any())
        for b in range(len(mask))
    ]
    assert (out.live & mask.any(1)).tolist() == live
    factor = torch.rand(mask.shape, dtype=torch.float64) + 0.5
    weighed = otb(reward, group, mask, energy, importance=factor, align=align)
    _close(weighed.advantage, _otb_loop(reward, group, mask, energy * factor**2, align, False, False))


def test_otb_returns_and_the_default_options() -> None:
    reward = torch.tensor([[0.0, 1.0, 2.0], [0.0, 5.0, 0.0], [0.0, 0.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    group = torch.tensor([0, 0, 1])
    out = otb(reward, group, mask, torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0], [1.0, 1.0, 1.0]]))
    assert out.returns is not None
    assert out.returns.tolist() == [[3.0, 3.0, 2.0], [5.0, 5.0, 0.0], [7.0, 7.0, 7.0]]
    assert out.advantage.tolist() == [[-1.5, -1.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert out.live.tolist() == [True, True, False]
    assert otb(reward, group, mask, torch.ones(3, 3), zero_tail=True).advantage[0].tolist() == [-1.0, -1.0, 2.0]


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_otb_of_equal_energies_is_the_mean_return(level: float) -> None:
    """Without energy at all the plain mean stands in, where a divisor + 1e-8 would leave the returns as they are."""
    reward, group, mask, *_ = _steps(1, False)
    out = otb(reward, group, mask, torch.full(mask.shape, level))
    _close(out.advantage, _otb_loop(reward, group, mask, torch.ones(mask.shape), "column", False, False))


@pytest.mark.parametrize("align", ["column", "rank"])
def test_otb_of_equal_outcomes_is_exactly_zero(align: Any) -> None:
    _, group, mask, log_prob, square = _steps(0, False)
    last = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    out = otb(torch.where(last, 0.1, 0.0), group, mask, None, log_prob, square, align=align)
    assert not out.advantage.any() and not out.live.any()


def test_masked_steps_may_hold_anything_and_results_carry_no_gradient() -> None:
    reward, group, mask, log_prob, square = _steps(2, True)
    before = otb(reward, group, mask, None, log_prob, square)
    log_prob = torch.where(mask, log_prob, math.nan).requires_grad_()
    after = otb(reward, group, mask, None, log_prob, torch.where(mask, square, math.inf))
    assert torch.equal(before.advantage, after.advantage) and not after.advantage.requires_grad
    half = otb(reward.bfloat16(), group, mask, torch.ones(mask.shape, dtype=torch.bfloat16))
    assert half.advantage.dtype == torch.float32


ROW, ONE = torch.tensor([1.0, 0.0]), torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: opo(ROW, PAIR, torch.ones(3)), r"cost: expected real \[2\]"),
    (lambda: opo(ROW, PAIR, torch.tensor([1.0, -1.0])), "cost: expected finite values and >= 0 .*got -1 at row 1"),
    (lambda: optimal_baseline(ROW, PAIR, torch.tensor([1.0, math.nan])), "energy: .*got nan"),
    (lambda: opo(ROW, PAIR, ROW, singleton="x"), "singleton"),  # type: ignore[arg-type]
    (lambda: snr_lr(ROW, torch.ones(3)), "gradient_variance"),
    (lambda: snr_lr(-ROW, ROW), "gradient_mean_square: .*>= 0"),
    (lambda: snr_lr(torch.tensor(-1.0), torch.tensor(1.0)), "gradient_mean_square: .*>= 0"),
    (lambda: snr_lr(ROW, -ROW), "gradient_variance: .*>= 0"),
    (lambda: snr_lr(ROW, ROW, smoothness=0.0), "smoothness"),
    (lambda: snr_lr(ROW, ROW, smoothness=math.inf), "smoothness"),
    (lambda: token_energy(ONE, ONE, MASK), "old_log_prob: .*gaussian_energy"),
    (lambda: token_energy(-ONE, ONE[:1], MASK), "sum_pi_squared"),
    (lambda: token_energy(-ONE, ONE, MASK.int()), "mask"),
    (lambda: gaussian_energy(-ONE, ONE, MASK), "noise_square"),
    (lambda: gaussian_energy(ONE, 0 * ONE, MASK), "sigma"),
    (lambda: gaussian_energy(ONE, ONE[:, :2], MASK), r"sigma: expected \[2, 3\] or \[3\], got \[2, 2\]"),
    (lambda: gaussian_energy(ONE, ONE, MASK.int()), "mask"),
    (lambda: otb(0 * ONE, PAIR, MASK), "step_energy: .*neither"),
    (lambda: otb(0 * ONE, PAIR, MASK, old_log_prob=-ONE), "step_energy: .*neither"),
    (lambda: otb(0 * ONE, PAIR, MASK, -ONE), "step_energy: expected >= 0"),
    (lambda: otb(0 * ONE, PAIR, MASK, ONE, importance=ONE[:1]), "importance"),
    (lambda: otb(ONE, PAIR, ~MASK, ONE), "step_reward: a reward on a masked step"),
    (lambda: otb(ONE, PAIR[:1], MASK, ONE), "group"),
    (lambda: otb(ONE, PAIR, MASK.int(), ONE), "mask"),
    (lambda: otb(ONE, PAIR, MASK, ONE, align="turn"), "align: .*'turn'"),  # type: ignore[arg-type]
    (lambda: otb(ONE, PAIR, MASK, ONE, singleton="x"), "singleton"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries() -> None:
    assert [(m.key, m.tier) for m in METHODS] == [("opo", 2), ("otb", 2), ("oblr_po", 3), ("oblr_lr", 3)]
    for method in METHODS:
        for test in method.evidence.values():
            assert test.split("::")[1] in globals() or "/test_optimal_baselines.py" not in test
