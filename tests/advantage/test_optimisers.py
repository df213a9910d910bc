"""Optimiser-level rules: exactness on quadratics, posterior by brute force, recursions, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.optimisers import (
    METHODS,
    MomentumState,
    bq_covariance,
    bq_weights,
    harpg_point,
    harpg_step,
    igt_point,
    igt_step,
    scaled_minibatches,
    score_kernel,
    stationary_variance,
)

HESSIAN = torch.tensor([[-2.0, 0.5], [0.5, -1.0]], dtype=torch.float64)
OFFSET = torch.tensor([1.0, -3.0], dtype=torch.float64)
NAN = float("nan")


def _same(left: Tensor, right: Tensor, atol: float = 1e-7) -> None:
    assert left.dtype == right.dtype and torch.allclose(left, right, rtol=1e-6, atol=atol)


def _gradient(theta: Tensor) -> Tensor:
    """Of a concave quadratic."""
    return (HESSIAN * theta).sum(1) + OFFSET


def _started(theta: Tensor) -> MomentumState:
    return MomentumState.start(theta, _gradient(theta))


def test_igt_against_plain_recursion() -> None:
    theta, eta, size = torch.tensor([2.0, 1.0], dtype=torch.float64), 0.25, 0.3
    state, here, before, d = _started(theta), [2.0, 1.0], [2.0, 1.0], _gradient(theta).tolist()
    for _ in range(5):
        ahead = [a + 3 * (a - b) for a, b in zip(here, before, strict=True)]
        assert igt_point(state, eta=eta).tolist() == pytest.approx(ahead)
        g = _gradient(torch.tensor(ahead, dtype=torch.float64)).tolist()
        d = [0.75 * x + 0.25 * y for x, y in zip(d, g, strict=True)]
        length = math.hypot(*d)
        here, before = [a + size * x / length for a, x in zip(here, d, strict=True)], here
        state = igt_step(torch.tensor(g, dtype=torch.float64), state, eta=eta, step_size=size)
        assert state.parameters.tolist() == pytest.approx(here) and state.previous.tolist() == pytest.approx(before)
        assert state.direction.tolist() == pytest.approx(d)


def test_igt_has_no_lag_on_a_quadratic() -> None:
    """The direction stays the gradient at theta, where momentum without the lookahead falls behind."""
    state = plain = _started(torch.tensor([5.0, 5.0], dtype=torch.float64))
    for _ in range(6):
        assert state.direction.tolist() == pytest.approx(_gradient(state.previous).tolist())
        state = igt_step(_gradient(igt_point(state)), state, step_size=0.2)
        plain = igt_step(_gradient(plain.parameters), plain, step_size=0.2)
    assert not torch.allclose(plain.direction, _gradient(plain.previous), atol=1e-2)


@pytest.mark.parametrize("normalised", [True, False])
def test_harpg_is_exact_on_a_quadratic(normalised: bool) -> None:
    state, size = _started(torch.tensor([5.0, 5.0], dtype=torch.float64)), 0.05
    for u in (0.0, 0.3, 1.0, 0.6):
        assert harpg_point(state, u).tolist() == pytest.approx(
            [(1 - u) * a + u * b for a, b in zip(state.previous.tolist(), state.parameters.tolist(), strict=True)]
        )
        curved = (HESSIAN * (state.parameters - state.previous)).sum(1)
        here, g = state.parameters, _gradient(state.parameters)
        state = harpg_step(g, curved, state, step_size=size, normalised=normalised)
        assert state.direction.tolist() == pytest.approx(g.tolist())
        length = math.hypot(*g.tolist()) if normalised else 1.0
        assert (state.parameters - here).tolist() == pytest.approx([size * x / length for x in g.tolist()])
        assert state.previous.equal(here)


def test_harpg_mixes_the_carried_direction_and_the_new_gradient() -> None:
    state = MomentumState.start(torch.zeros(2), torch.tensor([1.0, 0.0]))
    after = harpg_step(torch.tensor([0.0, 10.0]), torch.tensor([2.0, 0.0]), state)
    assert after.direction.tolist() == pytest.approx([2.7, 1.0])  # 0.9 (1 + 2), 0.1 x 10
    assert after.parameters.tolist() == pytest.approx([0.027, 0.01])


def test_eta_one_is_normalised_ascent() -> None:
    state = MomentumState.start(torch.ones(2), torch.tensor([7.0, 7.0]))
    g = torch.tensor([3.0, -4.0])
    assert igt_point(state, eta=1.0).equal(state.parameters)
    for after in (
        igt_step(g, state, eta=1.0, step_size=0.5),
        harpg_step(g, torch.full((2,), 9.0), state, eta=1.0, step_size=0.5, normalised=True),
    ):
        assert after.parameters.tolist() == pytest.approx([1.3, 0.6])
    ascent = harpg_step(g, torch.full((2,), 9.0), state, eta=1.0, step_size=0.5)
    assert ascent.parameters.tolist() == pytest.approx([2.5, -1.0])


def test_no_direction_takes_no_step_and_defaults_hold() -> None:
    still = MomentumState.start(torch.ones(3), torch.zeros(3))
    assert igt_step(torch.zeros(3), still).parameters.tolist() == [1, 1, 1]
    assert igt_step(torch.tensor([0.0, 0.0, 1e-4]), still).parameters.tolist() == pytest.approx([1, 1, 1.01])
    moved = MomentumState(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert igt_point(moved).tolist() == pytest.approx([10.0])
    assert igt_step(torch.tensor([-4.0]), moved).direction.tolist() == pytest.approx([0.5])
    assert igt_step(torch.ones(1), moved, step_size=3.0).parameters.tolist() == pytest.approx([4.0])
    assert harpg_step(torch.ones(1), torch.zeros(1), moved, step_size=3.0).parameters.tolist() == pytest.approx([4.0])
    again = MomentumState.from_state_dict(moved.state_dict())
    assert again.parameters.equal(moved.parameters) and again.previous.equal(moved.previous)


SCORES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def test_quadrature_worked_numbers() -> None:
    weights = bq_weights(score_kernel(SCORES), torch.tensor([1.0, 0.0, 2.0]))
    assert weights.tolist() == pytest.approx([0.125, -0.375, 0.75]) and weights.dtype == torch.float32
    assert (weights[:, None] * SCORES).sum(0).tolist() == pytest.approx([0.875, 0.375])
    assert bq_covariance(SCORES).flatten().tolist() == pytest.approx([0.375, -0.125, -0.125, 0.375])


def test_quadrature_is_the_gaussian_posterior() -> None:
    """The same posterior from the other side: r = u^T G^-1 g + noise with g ~ N(0, G), solved in parameter space."""
    gen = torch.Generator().manual_seed(0)
    u = torch.randn(9, 3, generator=gen, dtype=torch.float64)
    root = torch.randn(3, 3, generator=gen, dtype=torch.float64)
    fisher, y, noise = root @ root.T + torch.eye(3, dtype=torch.float64), torch.randn(9, generator=gen).double(), 0.7
    inverse = torch.linalg.inv(fisher)
    precision = inverse + inverse @ u.T @ u @ inverse / noise
    covariance = torch.linalg.inv(precision)
    mean = covariance @ inverse @ u.T @ y / noise
    weights = bq_weights(score_kernel(u, fisher), y, noise=noise)
    _same((weights[:, None].double() * u).sum(0), mean, 1e-5)
    _same(bq_covariance(u, fisher, noise=noise), covariance)
    _same(score_kernel(u, fisher), u @ inverse @ u.T)


def test_large_noise_is_monte_carlo_and_tells_nothing_new() -> None:
    y = torch.tensor([1.0, 0.0, 2.0])
    weights = bq_weights(score_kernel(SCORES), y, noise=1e6)
    assert (weights * 1e6).tolist() == pytest.approx(y.tolist(), abs=1e-4)
    _same(bq_covariance(SCORES, noise=1e9), torch.eye(2, dtype=torch.float64), 1e-6)


def test_duplicates_share_their_credit() -> None:
    one = bq_weights(torch.ones(1, 1), torch.ones(1))
    two = bq_weights(torch.ones(2, 2), torch.ones(2))
    assert one.tolist() == pytest.approx([0.5]) and two.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_rows_without_a_value_take_no_part() -> None:
    kernel = score_kernel(SCORES)
    alone = bq_weights(kernel[1:, 1:], torch.tensor([0.5, 2.0])).tolist()
    for rewards, valid in (
        (torch.tensor([NAN, 0.5, 2.0]), None),
        (torch.tensor([9.0, 0.5, 2.0]), torch.tensor([False, True, True])),
    ):
        assert bq_weights(kernel, rewards, valid).tolist() == pytest.approx([0.0, *alone])


def test_scaled_minibatches() -> None:
    assert scaled_minibatches(1_048_576, 4096, 4) == 1024
    assert scaled_minibatches(4096, 4096, 4) == 4
    assert scaled_minibatches(5000, 4096, 4) == 5  # never larger ones
    assert scaled_minibatches(1, 4096, 4) == 1
    assert scaled_minibatches(1, 1, 1) == 1


@pytest.mark.parametrize(
    ("eta", "curvature", "noise", "samples"), [(0.1, 1.0, 2.0, 4), (0.3, 5.0, 0.5, 1), (0.9, 0.2, 1.0, 64)]
)
def test_stationary_variance_by_recursion(eta: float, curvature: float, noise: float, samples: int) -> None:
    variance = 0.0
    for _ in range(2000):
        variance = (1 - eta * curvature) ** 2 * variance + eta**2 * noise / samples
    assert stationary_variance(eta, curvature, noise, samples) == pytest.approx(variance)


def test_stationary_variance_limits() -> None:
    assert stationary_variance(0.1, 1.0, 2.0, 4) == pytest.approx(0.1 * 2 / (4 * 1.9))
    assert stationary_variance(2.0, 1.0, 1.0, 1) == math.inf and stationary_variance(1.9, 1.0, 0.0, 1) == 0
    assert stationary_variance(2.5, 1.0, 1.0, 1) == math.inf
    small, large = stationary_variance(0.01, 1.0, 1.0, 1), stationary_variance(0.04, 1.0, 1.0, 4)
    assert large == pytest.approx(small, rel=0.02)


ONES, EYE = torch.ones(2), torch.eye(2)
START = MomentumState.start(ONES, ONES)
BAD: list[tuple[str, Any]] = [
    ("parameters", lambda: MomentumState.start(EYE, EYE)),
    ("parameters", lambda: MomentumState.start(torch.ones(2, dtype=torch.int64), ONES)),
    ("gradient", lambda: MomentumState.start(ONES, torch.ones(3))),
    ("gradient", lambda: igt_step(torch.ones(3), START)),
    ("gradient", lambda: harpg_step(torch.ones(3), ONES, START)),
    ("hessian_product", lambda: harpg_step(ONES, torch.ones(3), START)),
    ("eta", lambda: igt_step(ONES, START, eta=0.0)),
    ("eta", lambda: igt_point(START, eta=1.1)),
    ("eta", lambda: harpg_step(ONES, ONES, START, eta=0.0)),
    ("step_size", lambda: igt_step(ONES, START, step_size=0.0)),
    ("step_size", lambda: harpg_step(ONES, ONES, START, step_size=math.inf)),
    ("uniform", lambda: harpg_point(START, 1.1)),
    ("uniform", lambda: harpg_point(START, -0.1)),
    ("scores", lambda: score_kernel(ONES)),
    ("scores", lambda: score_kernel(torch.ones(0, 2))),
    ("scores", lambda: score_kernel(EYE * math.inf)),
    ("fisher", lambda: score_kernel(EYE, torch.eye(3))),
    ("fisher", lambda: bq_covariance(EYE, EYE * math.inf)),
    ("kernel", lambda: bq_weights(torch.eye(3), ONES)),
    ("kernel", lambda: bq_weights(torch.full((2, 2), NAN), ONES)),
    ("rewards", lambda: bq_weights(EYE, EYE)),
    ("rewards", lambda: bq_weights(EYE, ONES * NAN)),
    ("valid", lambda: bq_weights(EYE, ONES, ONES)),
    ("noise", lambda: bq_weights(EYE, ONES, noise=0.0)),
    ("noise", lambda: bq_covariance(EYE, noise=math.inf)),
    ("environments", lambda: scaled_minibatches(0, 1, 1)),
    ("reference_environments", lambda: scaled_minibatches(1, 0, 1)),
    ("reference_minibatches", lambda: scaled_minibatches(1, 1, 0)),
    ("step_size", lambda: stationary_variance(0.0, 1.0, 1.0, 1)),
    ("curvature", lambda: stationary_variance(1.0, 0.0, 1.0, 1)),
    ("noise", lambda: stationary_variance(1.0, 1.0, -1.0, 1)),
    ("samples", lambda: stationary_variance(1.0, 1.0, 1.0, 0)),
]


@pytest.mark.parametrize(("named", "call"), BAD)
def test_bad_input_is_named(named: str, call: Any) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_entries_point_to_tests() -> None:
    assert [m.key for m in METHODS] == ["n_pg_igt", "harpg", "bayesian_pg", "scaled_minibatches"]
    assert {m.tier for m in METHODS} == {3} and all("reconstructed" in m.evidence for m in METHODS)
    for m in METHODS:
        assert all(test.split("::")[1] in globals() for test in m.evidence.values())
