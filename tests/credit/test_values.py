"""Values of intermediate states against the Gaussian bench, where one-step and ODE estimates have closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.credit import ValuedStates, euler_grid, extrapolate, ode_value, spread_values, which_states
from flowrl.credit.values import Predict
from flowrl.dynamics import StepPoint, interpolate, prediction_from_endpoints, transition
from flowrl.dynamics.interpolants import endpoints
from flowrl.records import Prediction, Schedule
from tests.dynamics.gaussian import Gaussian, affine_chain, flow_schedule, sd3_schedule, uniform_schedule

NAN = math.nan


def predictor(bench: Gaussian, schedule: Schedule, seen: list[Tensor] | None = None) -> Predict:
    """The exact velocity at each sample's own step; ``seen`` collects the rows of every call."""

    def predict(x: Tensor, step: Tensor, rows: Tensor) -> Prediction:
        assert len(x) == len(step) == len(rows)
        if seen is not None:
            seen.append(rows)
        t = schedule.t[step].reshape(-1, *[1] * (x.ndim - 1))
        return Prediction(bench.velocity(x, t), "velocity")

    return predict


def slope(bench: Gaussian, schedule: Schedule, step: int, n: int) -> float:
    """d x0 / d x of the path from state ``step``."""
    x = torch.tensor([[0.0], [1.0]])
    out, _ = ode_value(predictor(bench, schedule), x, torch.tensor([step, step]), schedule, n)
    return float(out[1] - out[0])


@pytest.mark.parametrize(("t", "one_step", "path"), [(0.9, 0.031, 0.555), (0.6, 0.250, 0.791), (0.3, 0.824, 1.085)])
def test_slopes_of_the_gaussian_bench(t: float, one_step: float, path: float) -> None:
    """s^2 (1-t) / D for one step, s / sqrt(D) for the path; the stochastic sampler's own value lies between them."""
    bench, schedule = Gaussian(0.0, 0.5), uniform_schedule(1000, start=t)
    d = float(bench.variance(t))
    assert slope(bench, schedule, 0, 1) == pytest.approx(0.25 * (1 - t) / d, abs=1e-6)
    assert slope(bench, schedule, 0, 1) == pytest.approx(one_step, abs=6e-4)
    assert slope(bench, schedule, 0, 0) == pytest.approx(0.5 / math.sqrt(d), rel=2e-3)
    assert slope(bench, schedule, 0, 0) == pytest.approx(path, abs=2e-3)
    own = float(bench.sde_step(torch.tensor(1.0), t, 0.0, 0.7)[0] - bench.sde_step(torch.tensor(0.0), t, 0.0, 0.7)[0])
    coarse = slope(bench, schedule, 0, 4)
    assert slope(bench, schedule, 0, 1) < own < slope(bench, schedule, 0, 0)
    assert slope(bench, schedule, 0, 1) < coarse < slope(bench, schedule, 0, 0)


@pytest.mark.parametrize("t", [0.95, 0.6, 0.2])
def test_a_linear_reward_of_one_step_is_the_reward_of_the_posterior_mean(t: float) -> None:
    """b E[x0 | x_t] from the joint Gaussian of (x0, x_t): m + Cov(x0, x_t) / Var(x_t) (x_t - E x_t)."""
    bench, b = Gaussian(1.0, 0.5), torch.tensor([2.0, -1.0, 0.5])
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    at = torch.full((7,), t)
    x0_hat = extrapolate(x, bench.velocity(x, t), "velocity", 1 - at, at)
    regression = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
    assert torch.allclose(x0_hat @ b, (1 + regression * (x - (1 - t))) @ b, atol=1e-5)


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v", "x0"])
def test_extrapolate_finds_the_end_of_every_kind_of_output(kind: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(3, 2, 4, generator=draw), torch.randn(3, 2, 4, generator=draw)
    angle = torch.tensor([0.3, 0.8, 1.2])
    alpha, sigma = (1 - angle / 2, angle / 2) if kind == "velocity" else (angle.cos(), angle.sin())
    wide = [values[:, None, None] for values in (alpha, sigma)]
    value = prediction_from_endpoints(x0, x1, kind, *wide)
    x = interpolate(x0, x1, *wide)
    assert torch.allclose(extrapolate(x, value, kind, alpha, sigma), x0, atol=1e-5)
    assert torch.equal(extrapolate(x, value, kind, *wide), extrapolate(x, value, kind, alpha, sigma))
    assert extrapolate(x.bfloat16(), value.bfloat16(), kind, alpha, sigma).dtype == torch.float32


@pytest.mark.parametrize("step", range(6))
def test_the_whole_path_is_the_product_of_the_chain(step: int) -> None:
    """Exact discrete answer: the factors of the remaining Euler steps multiplied; with a mean, the offset as well."""
    schedule = sd3_schedule(6)
    chain = affine_chain("ode", 0.0, schedule, 0.5)
    assert slope(Gaussian(0.0, 0.5), schedule, step, 0) == pytest.approx(float(chain.factor[step:].prod()), rel=1e-4)
    bench, x = Gaussian(1.0, 0.5), torch.tensor([[0.7, -0.4]])
    for k in range(step, 6):
        point = StepPoint.of(schedule, torch.tensor([k]), 2)
        ends = endpoints(x, bench.velocity(x, point.t), "velocity", point.alpha, point.sigma)
        x, _ = transition("ode", 0.0, x, *ends, point)
    found, calls = ode_value(predictor(bench, schedule), torch.tensor([[0.7, -0.4]]), torch.tensor([step]), schedule)
    assert torch.equal(found, x) and calls == 6 - step


def test_one_step_to_the_end_is_the_extrapolation() -> None:
    bench, schedule = Gaussian(1.0, 0.5), sd3_schedule(5)
    x, step = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 3, 1, 4])
    found, calls = ode_value(predictor(bench, schedule), x, step, schedule, 1)
    t = schedule.t[step]
    expected = extrapolate(x, bench.velocity(x, t[:, None, None]), "velocity", 1 - t, t)
    assert torch.allclose(found, expected, atol=1e-6) and calls == 4


def test_one_step_stops_where_the_schedule_ends() -> None:
    """A schedule that ends at t = .1 has noise left, and the estimate keeps it."""
    schedule, x = flow_schedule([1.0, 0.5, 0.1]), torch.tensor([[2.0]])
    found, _ = ode_value(lambda x, step, rows: Prediction(x * 0 + 3, "velocity"), x, torch.tensor([1]), schedule, 1)
    assert float(found) == pytest.approx(2 - 3 * 0.4)


@pytest.mark.parametrize(("n", "cost"), [(0, [5, 3, 0, 1, 5]), (2, [2, 2, 0, 1, 2]), (4, [4, 3, 0, 1, 4])])
def test_every_sample_goes_its_own_way(n: int, cost: list[int]) -> None:
    bench, schedule = Gaussian(1.0, 0.5), sd3_schedule(5)
    x, step = torch.randn(5, 2, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 2, 5, 4, 0])
    seen: list[Tensor] = []
    found, calls = ode_value(predictor(bench, schedule, seen), x, step, schedule, n)
    assert torch.bincount(torch.cat(seen), minlength=5).tolist() == cost and calls == sum(cost)
    assert torch.equal(found[2], x[2])
    for i in range(5):
        alone, _ = ode_value(predictor(bench, schedule), x[i : i + 1], step[i : i + 1], schedule, n)
        assert torch.allclose(alone[0], found[i], atol=1e-6)
    assert not torch.allclose(found[0], x[0])


def test_what_it_is_given_stays_as_it_was() -> None:
    schedule, x = sd3_schedule(3), torch.ones(2, 1, requires_grad=True)
    found, _ = ode_value(predictor(Gaussian(), schedule), x, torch.tensor([0, 3]), schedule)
    assert x.tolist() == [[1.0], [1.0]] and not found.requires_grad
    half, _ = ode_value(predictor(Gaussian(), schedule), x.detach().bfloat16(), torch.tensor([0, 3]), schedule)
    assert half.dtype == torch.float32
    kind = ode_value(lambda x, step, rows: Prediction(x * 0 + 0.3, "x0"), x, torch.tensor([0, 0]), schedule)[0]
    assert torch.allclose(kind, torch.full((2, 1), 0.3))


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, [[0, 1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 8, 8, 8, 8, 8], [8] * 9]),
        (1, [[0, 8], [5, 8], [8, 8]]),
        (2, [[0, 4, 8], [5, 7, 8], [8, 8, 8]]),
        (3, [[0, 3, 5, 8], [5, 6, 7, 8], [8, 8, 8, 8]]),
        (5, [[0, 2, 3, 5, 6, 8], [5, 6, 7, 8, 8, 8], [8] * 6]),
    ],
)
def test_sub_grids(n: int, expected: list[list[int]]) -> None:
    assert euler_grid(torch.tensor([0, 5, 8]), 8, n).tolist() == expected


def test_which_states_are_valued() -> None:
    """Trained steps 2, 3, 5, 6, 7: the state before step 2, and those after each step but the last."""
    trained = [2, 3, 5, 6, 7]
    assert which_states(trained) == ValuedStates(2, (0, 1, 2, 3), (2, 3, 4, 6, 7), 5)
    assert which_states(trained, 2) == ValuedStates(2, (1, 3), (2, 4, 7), 5)
    assert which_states(trained, 3) == ValuedStates(2, (2,), (2, 6), 5)
    assert which_states(trained, 5).states == (2,) and which_states([4]).states == (4,)
    for stride in range(1, 8):
        assert len(which_states(range(6), stride).states) == 1 + 5 // stride


def test_spread_values_holds_the_next_one_or_shares_the_gain() -> None:
    """Blocks of two: start 1, after two steps 3, after four 4, outcome 10."""
    where = which_states([2, 3, 5, 6, 7], 2)
    values, outcome = torch.tensor([[1.0, 3.0, 4.0]]), torch.tensor([10.0])
    start, held = spread_values(values, outcome, where)
    assert start.tolist() == [1.0] and held.tolist() == [[3, 3, 4, 4, 10]] and held.dtype == torch.float64
    start, shared = spread_values(values, outcome, where, "linear")
    assert start.tolist() == [1.0] and shared.tolist() == [[2, 3, 3.5, 4, 10]]
    every = which_states([2, 3, 5, 6, 7])
    values = torch.tensor([[1.0, 3.0, NAN, 5.0, 2.0]])
    for how in ("hold", "linear"):
        start, same = spread_values(values, outcome, every, how)  # type: ignore[arg-type]
        assert same[0].tolist() == pytest.approx([3.0, NAN, 5.0, 2.0, 10.0], nan_ok=True)
    one = spread_values(torch.tensor([[1.0]]), outcome, which_states([0, 1, 2, 3], 9), "linear")[1]
    assert one.tolist() == [[3.25, 5.5, 7.75, 10.0]]


def test_a_missing_value_loses_its_block() -> None:
    where, outcome = which_states([0, 1, 2, 3], 2), torch.tensor([4.0])
    values = torch.tensor([[1.0, NAN]])
    assert spread_values(values, outcome, where)[1].isnan().tolist() == [[True, True, False, False]]
    assert spread_values(values, outcome, where, "linear")[1].isnan().tolist() == [[True, True, True, False]]


def _ode(**change: Any) -> Any:
    schedule = sd3_schedule(4)
    given: dict[str, Any] = {"x": torch.ones(2, 1), "step": torch.tensor([0, 1]), "n": 0, **change}
    return ode_value(predictor(Gaussian(), schedule), schedule=schedule, **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _ode(step=torch.tensor([0, 5])), "step"),
        (lambda: _ode(step=torch.tensor([-1, 0])), "step"),
        (lambda: _ode(step=torch.tensor([0.0, 1.0])), "step"),
        (lambda: _ode(n=-1), "n"),
        (lambda: _ode(x=torch.ones(3, 1)), "x"),
        (lambda: euler_grid(torch.zeros(0, dtype=torch.int64), 4, 1), "step"),
        (lambda: euler_grid(torch.zeros(1, 1, dtype=torch.int64), 4, 1), "step"),
        (lambda: which_states([]), "trained"),
        (lambda: which_states([-1, 0]), "trained"),
        (lambda: which_states([0, 2, 2]), "trained"),
        (lambda: which_states([0, 1], 0), "stride"),
        (lambda: spread_values(torch.ones(2, 1), torch.ones(2), which_states([0, 1]), "hold"), "values, outcome"),
        (lambda: spread_values(torch.ones(2, 2), torch.ones(3), which_states([0, 1]), "hold"), "values, outcome"),
        (lambda: spread_values(torch.ones(2, 2), torch.ones(2), which_states([0, 1]), "last"), "how"),  # type: ignore[arg-type]
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: "):
        call()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction kind"):
        extrapolate(torch.ones(1, 1), torch.ones(1, 1), "score", torch.ones(1), torch.ones(1))  # type: ignore[arg-type]
