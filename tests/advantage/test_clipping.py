"""Clipped policy losses: coefficient tables by autograd, plain loops, worked numbers, identities and bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.clipping import (
    bapo,
    bapo_bounds,
    clip_between,
    dapo,
    dcpo_dynamic,
    dual_clip,
    gppo,
    live_groups,
    overlong_penalty,
    ppo,
)
from flowrl.advantage.loss_record import PolicyLoss
from flowrl.advantage.policy_loss import clipped
from flowrl.advantage.weighted_losses import dcpo_bounds, gaussian_probability

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(seed: int, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> Case:
    """Log-probs (<= 0), old log-probs, advantages and a ragged mask: holes, an empty row, NaN on masked steps."""
    g = torch.Generator().manual_seed(seed)
    rows, steps = 7, 5
    lp = -3.0 - 2.0 * torch.rand(rows, steps, generator=g, dtype=torch.float64)
    old = (lp - spread * torch.randn(rows, steps, generator=g, dtype=torch.float64)).clamp(max=0.0)
    a = torch.randn(rows, steps, generator=g, dtype=torch.float64)
    a[0, :2] = 0.0
    mask = torch.rand(rows, steps, generator=g) < 0.75
    mask[1] = False
    mask[2] = torch.tensor([False, True, False, False, False])
    for x in (lp, old, a):
        x[~mask] = math.nan
    return lp.to(dtype).requires_grad_(), old.to(dtype), a.to(dtype), mask


def gradient(loss: Callable[..., PolicyLoss], case: tuple[Any, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """The loss per step and its gradient with respect to log_prob."""
    lp = case[0].detach().clone().requires_grad_()
    value = loss(lp, *case[1:], **options).loss
    (grad,) = torch.autograd.grad(value.sum(), lp)
    return value.detach(), grad


def at_ratio(pairs: list[tuple[float, float]]) -> Case:
    """One row with the given (rho, A)."""
    rho, a = (torch.tensor([x], dtype=torch.float64) for x in zip(*pairs, strict=True))
    old = torch.full_like(rho, -5.0)
    return (old + rho.log()).requires_grad_(), old, a, torch.ones_like(rho, dtype=torch.bool)


def plain(rho: float, a: float, lower: float, upper: float, dual: float = math.inf) -> tuple[float, float, bool, bool]:
    """Value, coefficient, low flag and high flag of one step, case by case."""
    if a > 0 and rho > upper:
        return -a * upper, 0.0, False, True
    if a < 0 and rho < lower:
        return -a * lower, 0.0, True, False
    if a < 0 and rho > dual:
        return -a * dual, 0.0, False, True
    return -a * rho, rho, False, False


def _dcpo(q: float, low: float, high: float, cap: float) -> tuple[float, float]:
    inside = 1 - 4 * low / q
    return 0.5 + 0.5 * math.sqrt(inside) if inside > 0 else 0.5, min(0.5 + 0.5 * math.sqrt(1 + 4 * high / q), cap)


LOOPS: list[tuple[Callable[..., PolicyLoss], dict[str, float], Callable[[float], tuple[float, float, float]]]] = [
    (ppo, {}, lambda q: (0.8, 1.2, math.inf)),
    (ppo, {"low": 0.1, "high": 0.3}, lambda q: (0.9, 1.3, math.inf)),
    (ppo, {"low": 0.1, "dual": 1.5}, lambda q: (0.9, 1.1, 1.5)),
    (dual_clip, {}, lambda q: (0.8, 1.2, 3.0)),
    (dual_clip, {"low": 0.3, "high": 0.4, "dual": 1.2}, lambda q: (0.7, 1.4, 1.2)),
    (dapo, {}, lambda q: (0.8, 1.28, math.inf)),
    (dapo, {"low": 0.3, "high": 0.1, "dual": 1.5}, lambda q: (0.7, 1.1, 1.5)),
    (dcpo_dynamic, {}, lambda q: (*_dcpo(q, 0.16, 0.2, 10.0), 10.0)),
    (dcpo_dynamic, {"low": 0.01, "high": 0.05, "cap": 1.8, "dual": 1.4}, lambda q: (*_dcpo(q, 0.01, 0.05, 1.8), 1.4)),
]


@pytest.mark.parametrize(("loss", "options", "bounds"), LOOPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_plain_loop(
    loss: Callable[..., PolicyLoss],
    options: dict[str, float],
    bounds: Callable[[float], tuple[float, float, float]],
    seed: int,
) -> None:
    case = draw(seed, spread=1.3)
    value, grad = gradient(loss, case, **options)
    out = loss(*case, **options)
    assert out.low is not None and out.high is not None
    lp, old, a, mask = (x.tolist() for x in case)
    seen = 0
    for i in range(len(mask)):
        for t in range(len(mask[0])):
            want = (0.0, 0.0, False, False)
            if mask[i][t]:
                want = plain(math.exp(lp[i][t] - old[i][t]), a[i][t], *bounds(math.exp(old[i][t])))
                want = (want[0], -want[1] * a[i][t], *want[2:])
                seen += want[2] or want[3]
            assert (value[i, t].item(), grad[i, t].item()) == pytest.approx(want[:2], abs=1e-12)
            assert (out.low[i, t].item(), out.high[i, t].item()) == want[2:]
    assert seen >= 2


def test_coefficient_table() -> None:
    case = at_ratio([(0.7, 1.0), (0.7, -1.0), (1.4, 1.0), (1.4, -1.0)])
    for loss, expected in ((dapo, [0.7, 0.0, 0.0, -1.4]), (gppo, [0.7, -0.8, 1.28, -1.4])):
        assert (-gradient(loss, case)[1])[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_ppo_is_clipped() -> None:
    lp, old, a, mask = draw(3)
    ratio, kept = torch.where(mask, (lp - old).exp(), 1.0), torch.where(mask, a, 0.0)
    assert torch.equal(ppo(lp, old, a, mask, low=0.1, high=0.3).loss, clipped(ratio, kept, 0.1, 0.3))


def test_flags_at_the_bounds_and_without_advantage() -> None:
    ratio = torch.tensor([[0.5, 1.5, 2.5, 0.25, 2.0, 3.0, 0.25, 2.0, 3.0]])
    a = torch.tensor([[-1.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 1.0, -1.0]])
    out = clip_between(ratio, a, 0.5, 1.5, 2.5)
    assert out.low is not None and out.high is not None
    assert out.low[0].tolist() == [False] * 6 + [True, False, False]
    assert out.high[0].tolist() == [False] * 6 + [False, True, True]


@pytest.mark.parametrize("loss", [ppo, dual_clip, dapo])
def test_clip_scale_widens_step_by_step(loss: Callable[..., PolicyLoss]) -> None:
    case = at_ratio([(1.4, 1.0), (1.4, 1.0), (0.7, -1.0), (0.7, -1.0), (1.01, 1.0)])
    scale = torch.tensor([[1.0, 2.5, 2.5, 1.0, 0.0]])
    value, grad = gradient(loss, (*case, scale), low=0.2, high=0.2)
    assert (-value)[0].tolist() == pytest.approx([1.2, 1.4, -0.7, -0.8, 1.0])
    assert (-grad)[0].tolist() == pytest.approx([0.0, 1.4, -0.7, 0.0, 0.0])
    ones = torch.ones_like(scale)
    assert torch.equal(loss(*case, ones).loss, loss(*case).loss)
    masked = scale.clone()
    masked[0, 4] = math.nan
    mask = torch.tensor([[True] * 4 + [False]])
    assert loss(*case[:3], mask, masked, low=0.2, high=0.2).loss[0].tolist() == pytest.approx(
        [-1.2, -1.4, 0.7, 0.8, 0.0]
    )


def test_dual_clip_bounds_the_loss() -> None:
    case = at_ratio([(2.5, -2.0), (3.5, -2.0), (3.5, 2.0), (0.5, -2.0)])
    value, grad = gradient(dual_clip, case)
    assert value[0].tolist() == pytest.approx([5.0, 6.0, -2.4, 1.6])
    assert grad[0].tolist() == pytest.approx([5.0, 0.0, 0.0, 0.0])
    assert gradient(ppo, case)[0][0].tolist() == pytest.approx([5.0, 7.0, -2.4, 1.6])


def test_dapo_is_ppo_with_a_wider_upper_bound() -> None:
    case = draw(4)
    assert torch.equal(dapo(*case).loss, ppo(*case, low=0.2, high=0.28).loss)
    assert not torch.equal(dapo(*case).loss, ppo(*case).loss)


def test_live_groups() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan, 2.0, 3.0, math.nan])
    group = torch.tensor([9, 9, -4, -4, -4, 5, 5, 8])
    assert live_groups(rewards, group).tolist() == [False, False, True, True, True, True, True, False]
    valid = torch.tensor([True] * 6 + [False, True])
    assert live_groups(rewards, group, valid).tolist() == [False, False, True, True, True, False, False, False]


def test_overlong_worked_numbers() -> None:
    length = torch.tensor([3, 6, 8, 10, 12])
    out = overlong_penalty(length, limit=10, buffer=4)
    assert out.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0] and out.dtype == torch.float32
    assert overlong_penalty(length, limit=10, buffer=4, factor=2).tolist() == [0.0, 0.0, -1.0, -2.0, -2.0]
    assert overlong_penalty(length, limit=10, buffer=4, factor=0).abs().tolist() == [0.0] * 5
    assert overlong_penalty(length, limit=4, buffer=4).tolist() == [-0.75] + [-1.0] * 4
    published = overlong_penalty(torch.tensor([16384.0, 17408.0, 20480.0]))
    assert published.tolist() == [0.0, -0.25, -1.0]


def _bounds(pairs: list[tuple[float, float]], **options: Any) -> list[float]:
    rho, a = (torch.tensor([x], dtype=torch.float64) for x in zip(*pairs, strict=True))
    return [x.item() for x in bapo_bounds(rho, a, torch.ones_like(rho, dtype=torch.bool), **options)]


def test_bapo_worked_numbers() -> None:
    example = [(2.5, 1.0), (0.5, -1.0), (0.93, -1.0)]
    assert _bounds(example) == pytest.approx([0.8, 1.75])
    assert _bounds(example, target=1.2 / 1.73) == pytest.approx([0.6, 1.2])
    assert _bounds(example, target=1.0116) == pytest.approx([0.8, 1.8])
    assert _bounds([(2.5, 1.0), (1.0, 1.0), (0.5, -1.0), (0.5, -1.0), (1.0, -1.0), (1.0, -1.0)]) == pytest.approx(
        [0.8, 2.0]
    )
    assert _bounds([(2.5, 1.0), (0.1, 2.0)]) == pytest.approx([0.6, 1.2])
    assert _bounds([(1.0, -1.0)]) == pytest.approx([0.8, 2.0])
    assert _bounds([(1.0, 0.0)]) == pytest.approx([0.6, 1.2])


def test_bapo_live_metric_moves_with_either_bound() -> None:
    assert _bounds([(1.0, 0.9), (0.72, -1.0), (1.0, -0.6)], metric="live") == pytest.approx([0.75, 1.2])
    assert _bounds([(1.45, 1.0), (1.0, -1.0)], metric="live") == pytest.approx([0.8, 1.45])
    assert _bounds([(1.0, 0.9), (0.72, -1.0), (1.0, -0.6)]) == pytest.approx([0.8, 2.0])
    exact = {
        "metric": "live",
        "lower_start": 0.5,
        "lower_stop": 1.0,
        "upper_start": 1.25,
        "upper_stop": 1.5,
        "step": 0.25,
    }
    assert _bounds([(1.0, 1.0), (0.75, -1.0), (1.0, -0.75)], **exact) == [1.0, 1.25]
    assert _bounds([(1.25, 1.0), (1.0, -1.25)], **exact) == [0.5, 1.25]


def _path(grid: tuple[float, ...]) -> list[tuple[float, float]]:
    lower_start, lower_stop, upper_start, upper_stop, step = grid
    lowers, uppers = [lower_start], [upper_start]
    while lowers[-1] < lower_stop - 1e-9:
        lowers.append(min(lower_start + len(lowers) * step, lower_stop))
    while uppers[-1] < upper_stop - 1e-9:
        uppers.append(min(upper_start + len(uppers) * step, upper_stop))
    return [(x, uppers[0]) for x in lowers] + [(lowers[-1], x) for x in uppers[1:]]


def _sums(cells: list[tuple[float, float]], lo: float, hi: float, metric: str) -> tuple[float, float]:
    if metric == "value":
        pos = math.fsum(min(r, hi) * a for r, a in cells if a >= 0)
        return pos, math.fsum(max(r, lo) * -a for r, a in cells if a < 0)
    pos = math.fsum(r * a for r, a in cells if a >= 0 and r <= hi)
    return pos, math.fsum(r * -a for r, a in cells if a < 0 and r >= lo)


@pytest.mark.parametrize("metric", ["value", "live"])
def test_bapo_against_a_search(metric: Any) -> None:
    rng, found = random.Random(5), set()
    for _ in range(60):
        rows, steps = rng.randint(1, 5), rng.randint(2, 6)
        ratio = torch.tensor([[math.exp(rng.gauss(0.1, 0.5)) for _ in range(steps)] for _ in range(rows)]).double()
        a = torch.tensor([[rng.choice([-1, 0, 1, 1]) * rng.random() for _ in range(steps)] for _ in range(rows)])
        mask = torch.tensor([[rng.random() < 0.8 for _ in range(steps)] for _ in range(rows)])
        ratio[~mask] = math.nan
        grid = rng.choice([(0.6, 0.8, 1.2, 2.0, 0.05), (0.6, 0.9, 1.2, 3.0, 0.05), (0.5, 0.72, 1.1, 1.1, 0.1)])
        cells, path = list(zip(ratio[mask].tolist(), a.double()[mask].tolist(), strict=True)), _path(grid)
        pos, neg = _sums(cells, *rng.choice(path), metric)
        target = 1.0 if neg == 0 else pos / neg * (1 - 1e-9)
        sums = [_sums(cells, *pair, metric) for pair in path]
        want = next((pair for pair, (p, n) in zip(path, sums, strict=True) if p >= target * n), path[-1])
        names = ("lower_start", "lower_stop", "upper_start", "upper_stop", "step")
        ours = bapo_bounds(ratio, a, mask, target=target, metric=metric, **dict(zip(names, grid, strict=True)))
        assert [x.item() for x in ours] == pytest.approx(want, abs=1e-12)
        assert grid[0] <= ours[0] <= grid[1] and grid[2] <= ours[1] <= grid[3]
        found.add(tuple(round(x, 6) for x in want))
    assert len(found) >= 12


@pytest.mark.parametrize("metric", ["value", "live"])
def test_bapo_is_ppo(metric: Any) -> None:
    case = draw(4)
    options: dict[str, Any] = {"metric": metric, "target": 1.3, "upper_start": 1.1, "upper_stop": 1.4, "step": 0.1}
    options |= {"lower_start": 0.7, "lower_stop": 0.9}
    out = bapo(*case, **options)
    ratio = torch.where(case[3], (case[0] - case[1]).exp(), 1.0)
    lower, upper = (x.item() for x in bapo_bounds(ratio, case[2], case[3], **options))
    same = ppo(*case, low=1 - lower, high=upper - 1)
    assert torch.allclose(out.loss, same.loss, atol=1e-12) and out.low is not None and out.high is not None
    assert torch.equal(out.low, same.low) and torch.equal(out.high, same.high)  # type: ignore[arg-type]
    assert out.low.any() and out.high.any() and bapo(*draw(6, dtype=torch.float16)).loss.dtype == torch.float32


def test_bapo_defaults_and_ranks() -> None:
    case = at_ratio([(2.5, 1.0), (0.5, -1.0), (0.93, -1.0)])
    assert (-bapo(*case).loss)[0].tolist() == pytest.approx([1.75, -0.8, -0.93])
    never = at_ratio([(2.5, 1.0), (1.0, -9.0)])
    assert (-bapo(*never).loss)[0].tolist() == pytest.approx([2.0, -9.0])
    parts: list[Tensor] = []
    first, second = (tuple(x[:, cut].detach() for x in case) for cut in (slice(0, 2), slice(2, 3)))

    def keep(x: Tensor) -> Tensor:
        parts.append(x)
        return x

    bapo(*second, reduce=keep)  # type: ignore[arg-type]
    out = bapo(*first, reduce=lambda x: x + parts[0])  # type: ignore[arg-type]
    assert (-out.loss)[0].tolist() == pytest.approx([1.75, -0.8])
    assert (-bapo(*first).loss)[0].tolist() == pytest.approx([1.2, -0.6])  # type: ignore[arg-type]


def test_gppo_against_ppo() -> None:
    case = draw(7, spread=0.8)
    bounds = {"low": 0.2, "high": 0.28}
    value, grad = gradient(gppo, case, beta_low=0.0, beta_high=0.0, dual=None)
    assert torch.equal(grad, gradient(ppo, case, **bounds)[1]) and torch.equal(value, grad)
    assert torch.allclose(gradient(gppo, case, dual=None)[0], gradient(ppo, case, **bounds)[0], atol=1e-15)
    assert torch.allclose(gradient(gppo, case, dual=1.5)[0], gradient(ppo, case, dual=1.5, **bounds)[0], atol=1e-15)
    out, same = gppo(*case, dual=1.5), ppo(*case, dual=1.5, **bounds)
    assert torch.equal(out.low, same.low) and torch.equal(out.high, same.high)  # type: ignore[arg-type]


def test_ce_gppo_and_dual_clip_of_gppo() -> None:
    case = at_ratio([(0.5, -2.0), (1.5, 2.0), (9.9, -1.0), (10.5, -1.0), (1.1, 1.0)])
    value, grad = gradient(gppo, case, beta_low=0.25, beta_high=0.5)
    assert value[0].tolist() == pytest.approx([0.4, -1.28, 9.9, 10.0, -1.1])
    assert grad[0].tolist() == pytest.approx([0.4, -1.28, 9.9, 0.0, -1.1])
    far = at_ratio([(math.exp(-25.0), -1.0), (math.exp(25.0), 1.0)])
    assert gradient(gppo, far)[1][0].tolist() == pytest.approx([0.8, -1.28])


def test_dcpo_defaults() -> None:
    case = at_ratio([(0.7, -1.0), (1.5, 1.0), (12.0, 1.0), (10.5, -1.0)])
    loss = dcpo_dynamic(*case, torch.tensor([[1.0, 1.0, 1e-6, 1.0]])).loss
    assert loss[0].tolist() == pytest.approx([0.8, -1.1708, -10.0, 10.0], abs=1e-4)


def test_dcpo_takes_a_stand_in_for_the_probability() -> None:
    square = torch.tensor([[0.0, 4.0, 8.0]])
    q = gaussian_probability(square, dimensions=4)
    case = at_ratio([(1.3, 1.0), (1.3, 1.0), (1.3, 1.0)])
    dense = (case[0] + 50, case[1] + 50, *case[2:])
    upper = dcpo_bounds(q)[1][0].clamp(max=1.3)
    assert (-dcpo_dynamic(*dense, q).loss)[0].tolist() == pytest.approx(upper.tolist())
    assert 1.17 < upper[0] < upper[1] < upper[2] == 1.3
    with pytest.raises(ValueError, match="old_log_prob: expected log-probabilities <= 0, got up to 45; a density"):
        dcpo_dynamic(*dense)


ONE = at_ratio([(1.0, 1.0)])
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: ppo(*ONE, low=-0.1), "low: expected a finite number >= 0, got -0.1"),
    (lambda: ppo(*ONE, high=math.nan), "high: expected a finite number >= 0, got nan"),
    (lambda: ppo(*ONE, dual=1.0), "dual: expected a finite number > 1, got 1"),
    (lambda: ppo(*ONE, torch.tensor([[-0.5]])), "clip_scale: expected numbers >= 0, got -0.5"),
    (lambda: ppo(*ONE, torch.ones(1, 2)), r"clip_scale: expected real \[1, 1\] like mask"),
    (lambda: ppo(ONE[0], ONE[1], ONE[2][0, :0], ONE[3]), r"advantage: expected \[1, 1\] or \[1\], got \[0\]"),
    (lambda: gppo(*ONE, low=-1), "low: expected"),
    (lambda: gppo(*ONE, high=-1), "high: expected"),
    (lambda: gppo(*ONE, beta_low=-1), "beta_low: expected"),
    (lambda: gppo(*ONE, beta_high=-1), "beta_high: expected"),
    (lambda: dcpo_dynamic(*ONE, low=0), "low: expected a finite number > 0, got 0"),
    (lambda: dcpo_dynamic(*ONE, high=0), "high: expected a finite number > 0, got 0"),
    (lambda: dcpo_dynamic(*ONE, cap=1), "cap: expected a finite number > 1, got 1"),
    (lambda: dcpo_dynamic(*ONE, torch.tensor([[1.1]])), r"old_prob: expected probabilities in \[0, 1\]"),
    (lambda: dcpo_dynamic(*ONE, torch.tensor([[-0.1]])), r"old_prob: expected probabilities in \[0, 1\]"),
    (lambda: bapo(*ONE, metric="count"), "metric: expected 'value' or 'live', got 'count'"),  # type: ignore[arg-type]
    (lambda: bapo(*ONE, target=-1), "target: expected"),
    (lambda: bapo(*ONE, step=0), "step: expected a finite number > 0"),
    (lambda: bapo(*ONE, lower_start=-1), "lower_start: expected"),
    (lambda: bapo(*ONE, lower_stop=0.5), "lower_stop: expected a finite number >= 0.6"),
    (lambda: bapo(*ONE, upper_start=0.7), "upper_start: expected a finite number >= 0.8"),
    (lambda: bapo(*ONE, upper_stop=1.1), "upper_stop: expected a finite number >= 1.2"),
    (lambda: bapo_bounds(ONE[2], ONE[2], ONE[2]), "mask: expected bool"),
    (lambda: bapo_bounds(ONE[2][0], ONE[2], ONE[3]), "ratio: expected real"),
    (lambda: overlong_penalty(torch.ones(1, 2)), r"length: expected finite real numbers \[B\]"),
    (lambda: overlong_penalty(torch.ones(0)), r"length: expected finite real numbers \[B\]"),
    (lambda: overlong_penalty(torch.tensor([math.nan])), r"length: expected finite real numbers \[B\]"),
    (lambda: overlong_penalty(torch.ones(2), buffer=0), "buffer: expected a finite number > 0"),
    (lambda: overlong_penalty(torch.ones(2), limit=3, buffer=4), "limit: expected a finite number >= 4"),
    (lambda: overlong_penalty(torch.ones(2), factor=-1), "factor: expected a finite number >= 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_options_at_their_ends_are_taken() -> None:
    assert ppo(*ONE, low=0, high=0).loss.item() == -1.0
    assert gppo(*ONE, low=0, high=0).loss.item() == -1.0
    ends = {"lower_start": 0.0, "lower_stop": 0.0, "upper_start": 0.0, "upper_stop": 0.0, "target": 0.0}
    assert [x.item() for x in bapo_bounds(ONE[2], ONE[2], ONE[3], **ends)] == [0.0, 0.0]
    assert clip_between(torch.ones(1, 1), torch.ones(1, 1), 0.5, 0.5).loss.item() == -0.5
