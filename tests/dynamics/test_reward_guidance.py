"""Guidance by the gradient of a process reward: its size in every kernel, its fixed points, its distillate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flowrl.dynamics import KERNELS, StepPoint, endpoints, mean_slope, transition
from flowrl.dynamics.reward_guidance import (
    guidance_shift,
    pulled_value,
    score_part,
    spsa_gradient,
    unit_gradient,
    velocity_pull,
)
from tests.dynamics.gaussian import Gaussian, double_points, sd3_schedule, uniform_schedule, variance_preserving

STOCHASTIC = sorted(KERNELS.keys() - {"ode"})
MIXING = ("cps", "precise", "ddim", "memoryless", "precise_dance")


def points(schedule, start: int = 0) -> StepPoint:
    return StepPoint.of(schedule, torch.arange(start, schedule.steps), 2)


def diffusion(kernel: str, noise: float, point: StepPoint) -> torch.Tensor:
    """g of the Euler-Maruyama kernels, written out again."""
    t = point.t
    if kernel == "flow_sde":
        return noise * (t / (1 - torch.where(t == 1, point.t_clamp, t))).sqrt()
    return torch.full_like(t, noise) if kernel == "dance_sde" else point.t_last + (point.t_clamp - point.t_last) * t


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "wan_sde"])
def test_euler_maruyama_moves_by_half_g_squared_dt(kernel: str) -> None:
    """F7 (ii): a linear reward b . x shifts the mean by g^2 dt b / (2 beta)."""
    for schedule in (uniform_schedule(10), sd3_schedule(8)):
        point = points(schedule)
        expected = diffusion(kernel, 0.7, point) ** 2 * point.length / 2
        torch.testing.assert_close(guidance_shift("langevin", kernel, 0.7, point), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernel", MIXING)
@pytest.mark.parametrize("schedule", [uniform_schedule(9), variance_preserving(9)])
def test_mixing_moves_by_the_part_of_the_noise_that_is_drawn_anew(kernel: str, schedule) -> None:
    """sigma sigma' (1 - rho), with rho read off the kernel's std alone."""
    if kernel == "precise_dance" and float(schedule.alpha[0]) > 0:
        return  # a flow kernel
    point = points(schedule)
    _, std = transition(kernel, 0.8, *(torch.zeros_like(point.t),) * 3, point)
    rho = (1 - (std / point.sigma_next.clamp(min=1e-9)) ** 2).clamp(min=0).sqrt()
    found = guidance_shift("langevin", kernel, 0.8, point)
    torch.testing.assert_close(found, point.sigma * point.sigma_next * (1 - rho), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_guidance_is_a_shift_of_the_score_with_the_velocity_held(kernel: str) -> None:
    """The mean minus the ODE mean is score_part times the score, for any endpoints; the ode kernel has none."""
    point = points(uniform_schedule(7))
    generator = torch.Generator().manual_seed(1)
    x, value = (torch.randn(7, 5, generator=generator) for _ in range(2))
    x0_hat, x1_hat = endpoints(x, value, "velocity", point.alpha, point.sigma)
    mean, _ = transition(kernel, 0.6, x, x0_hat, x1_hat, point)
    straight, _ = transition("ode", 0.6, x, x0_hat, x1_hat, point)
    expected = straight - score_part(kernel, 0.6, point) * x1_hat / point.sigma
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=2e-6)
    assert not score_part("ode", 0.6, point).any()


def test_published_setting_and_limits_of_kappa() -> None:
    """Euphonium's DanceGRPO kernel: scale .01 at eta .25 is beta 3.125. kappa -> t / (1 - t) as g grows, -> 0 as it falls."""
    point = points(uniform_schedule(16), 12)
    shift = guidance_shift("langevin", "dance_sde", 0.25, point) / 3.125
    torch.testing.assert_close(shift, 0.01 * point.length, rtol=1e-5, atol=1e-9)
    point = points(uniform_schedule(10), 1)
    share = velocity_pull("langevin", "flow_sde", 0.7, point) / (point.t / (1 - point.t))
    torch.testing.assert_close(share, torch.full_like(share, 0.7**2 / (2 + 0.7**2)), rtol=1e-4, atol=0)
    assert float(share[0]) == pytest.approx(0.197, abs=5e-4)
    root = velocity_pull("langevin", "flow_sde", math.sqrt(2), point) / (point.t / (1 - point.t))
    torch.testing.assert_close(root, torch.full_like(root, 0.5), rtol=1e-4, atol=0)
    exact = velocity_pull("exact_tilt", "flow_sde", 0.7, point)
    torch.testing.assert_close(velocity_pull("langevin", "dance_sde", 300.0, point), exact, rtol=1e-3, atol=0)
    assert float(velocity_pull("langevin", "dance_sde", 1e-3, point).max()) < 1e-6


@pytest.mark.parametrize("mode", ["langevin", "exact_tilt"])
@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_student_takes_the_guided_step_without_a_reward(mode, kernel: str) -> None:
    """F7 (iv): the plain step of the distilled output has the teacher's guided mean, at all t and kinds of output."""
    generator = torch.Generator().manual_seed(2)
    x, value, gradient = (torch.randn(8, 6, generator=generator) for _ in range(3))
    flow_only = kernel in ("flow_sde", "dance_sde", "precise_dance", "wan_sde")
    for schedule, own in ((uniform_schedule(9), "velocity"), (variance_preserving(9), "v")):
        for kind in () if flow_only and own == "v" else (own, "epsilon", "x0"):
            point = points(schedule, 1)
            ends = endpoints(x, value, kind, point.alpha, point.sigma)
            mean, _ = transition(kernel, 0.7, x, *ends, point)
            teacher = mean + 0.8 * guidance_shift(mode, kernel, 0.7, point) * gradient
            pull = 0.8 * velocity_pull(mode, kernel, 0.7, point) * gradient
            student = pulled_value(value, kind, pull, point)
            found, _ = transition(kernel, 0.7, x, *endpoints(x, student, kind, point.alpha, point.sigma), point)
            torch.testing.assert_close(found, teacher, rtol=2e-4, atol=5e-5)
    assert torch.equal(pulled_value(value, "velocity", torch.zeros_like(value), point), value)


@pytest.mark.parametrize(("kernel", "noise"), [("flow_sde", 0.7), ("precise", 0.7), ("dance_sde", 0.4), ("ode", 0.0)])
def test_exact_tilt_of_a_quadratic_reward_reaches_its_gaussian(kernel: str, noise: float) -> None:
    """T-RL2: r = -(x0 - c)^2 / (2 q). V is quadratic, so the guided chain is affine: its mean and variance by recursion."""
    m, s, c, q, beta = 0.4, 0.8, 1.5, 0.5, 0.7
    precision = 1 / s**2 + 1 / (beta * q)
    wanted_mean, wanted_variance = (m / s**2 + c / (beta * q)) / precision, 1 / precision
    times = torch.linspace(0.999, 0, 3001, dtype=torch.float64)
    data, point = Gaussian(m, s), double_points(times)
    shift = guidance_shift("exact_tilt", kernel, noise, point).double()

    def mean_at(value: float) -> torch.Tensor:
        x = torch.full_like(point.t, value)
        v = data.velocity(x, point.t)
        mean, _ = KERNELS[kernel](noise, x, x - point.t * v, x + (1 - point.t) * v, point)
        # V = beta log E[exp(r / beta) | x], x0 | x ~ N(mu, w): grad V = -(mu - c) / (q + w / beta) d mu / dx
        spread = data.variance(point.t)
        slope, w = s**2 * (1 - point.t) / spread, s**2 * point.t**2 / spread
        mu = m + slope * (x - (1 - point.t) * m)
        return mean - shift * (mu - c) / (q + w / beta) * slope / beta

    constant, factor = mean_at(0.0), mean_at(1.0) - mean_at(0.0)
    _, std = KERNELS[kernel](noise, *(torch.zeros_like(point.t),) * 3, point)
    std = torch.as_tensor(std).double().expand_as(constant)
    mean, variance = (1 - 0.999) * m, float(data.variance(0.999))
    for a, b, d in zip(factor.flatten().tolist(), constant.flatten().tolist(), std.flatten().tolist(), strict=True):
        mean, variance = a * mean + b, a * a * variance + d * d
    assert mean == pytest.approx(wanted_mean, abs=4e-3)
    assert variance == pytest.approx(wanted_variance, rel=1.5e-2)


def test_exact_tilt_refuses_pure_noise_and_unknown_modes() -> None:
    point = points(uniform_schedule(4))
    for call in (guidance_shift, velocity_pull):
        with pytest.raises(ValueError, match="starts from pure noise"):
            call("exact_tilt", "precise", 0.7, point)
        with pytest.raises(ValueError, match="mode 'newton' is not known"):
            call("newton", "precise", 0.7, point)


def test_spsa_of_a_linear_reward_is_unbiased() -> None:
    """F7 (vi): over all sign vectors the mean is the gradient exactly; one draw is (b . d) d."""
    b = torch.tensor([0.5, -2.0, 3.0, 1.0])
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    signs = [torch.tensor(d).float().expand(3, 4) for d in itertools.product((1, -1), repeat=4)]
    values, gradient = spsa_gradient(lambda at: at @ b, x, signs, 0.25)
    torch.testing.assert_close(gradient, b.expand(3, 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, x @ b, rtol=1e-5, atol=1e-5)
    _, one = spsa_gradient(lambda at: at @ b, x, signs[3:4], 0.25)
    torch.testing.assert_close(one, (signs[3] @ b)[:, None] * signs[3], rtol=1e-4, atol=1e-4)


def test_spsa_refuses() -> None:
    with pytest.raises(ValueError, match="radius above 0"):
        spsa_gradient(lambda at: at[:, 0], torch.zeros(2, 3), [], 0.1)
    with pytest.raises(ValueError, match="expected \\[2\\], got \\[3\\]"):
        spsa_gradient(lambda at: torch.zeros(3), torch.zeros(2, 3), [torch.ones(2, 3)], 0.1)


def test_unit_gradient_has_norm_one_and_leaves_zero() -> None:
    found = unit_gradient(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_slope_and_shift_agree_for_exact_tilt() -> None:
    """Euler-Maruyama: the coefficient on grad V is dt (g^2 / 2 + t / (1 - t)) (F7, exactness gap)."""
    point = points(uniform_schedule(10), 1)
    g = diffusion("flow_sde", 0.7, point)
    expected = point.length * (g**2 / 2 + point.t / (1 - point.t))
    torch.testing.assert_close(guidance_shift("exact_tilt", "flow_sde", 0.7, point), expected, rtol=1e-5, atol=1e-6)
    assert bool((mean_slope("flow_sde", 0.7, point) > 0).all())
