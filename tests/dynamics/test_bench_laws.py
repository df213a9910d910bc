"""Laws of whole chains on Gaussian data: marginals are kept, orders of convergence, exact transitions, path divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import MEMORYLESS_NOISE, StepPoint, check_kernel, gaussian_kl, transition

from .gaussian import (
    Gaussian,
    double_chain,
    double_points,
    flow_schedule,
    moments,
    sample,
    sd3_schedule,
    uniform_schedule,
)

G = Callable[[Tensor], Tensor]
EULER_MARUYAMA = [("flow_sde", 0.7), ("dance_sde", 0.3), ("wan_sde", 1.0), ("flow_sde", MEMORYLESS_NOISE)]
INTEGRATED = [("precise", 0.7), ("precise_dance", 0.3), ("memoryless", 1.0)]


def grid(steps: int, start: float = 1.0, end: float = 0.0) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


# Fokker-Planck: each member of the family has the flow's own marginals.


@pytest.mark.parametrize(("kernel", "noise"), [*EULER_MARUYAMA, *INTEGRATED])
@pytest.mark.parametrize("data", [Gaussian(0.8, 0.5), Gaussian(-0.5, 1.0)], ids=["narrow", "wide"])
def test_two_thousand_steps_keep_mean_and_variance(kernel: str, noise: float, data: Gaussian) -> None:
    times = grid(2000)
    means, variances = moments(kernel, noise, times, data)
    clamped = (kernel, noise) == ("flow_sde", 0.7)  # its first step adds a^4 / 4, forgotten as N^(-a^2)
    for k in (1000, 1500, 2000):
        t = float(times[k])
        assert float(means[k]) == pytest.approx((1 - t) * data.m, abs=2e-3)
        assert float(variances[k] / data.variance(t)) == pytest.approx(1, abs=0.02 if clamped and k < 2000 else 0.005)


def test_the_clamped_first_step_is_what_flow_sde_owes() -> None:
    for steps, tolerance in ((200, 6e-3), (20000, 2e-4)):
        _, variances = moments("flow_sde", 0.7, grid(steps), Gaussian())
        assert float(variances[1]) == pytest.approx((1 - 1 / steps - 0.245) ** 2 + 0.49, abs=1e-9)
        assert float(variances[1]) == pytest.approx(1 + 0.7**4 / 4, abs=tolerance * 1.5)


@pytest.mark.parametrize(("kernel", "noise"), EULER_MARUYAMA[:3])
def test_two_thousand_sampled_steps(kernel: str, noise: float) -> None:
    count, data, generator = 5000, Gaussian(0.8, 0.5), torch.Generator().manual_seed(11)
    x = torch.randn(count, 1, generator=generator)
    x = sample(kernel, noise, uniform_schedule(2000), x, data.velocity, generator)
    assert x.mean().item() == pytest.approx(0.8, abs=4 * 0.5 / math.sqrt(count) + 1e-3)
    assert x.var().item() == pytest.approx(0.25, rel=4 * math.sqrt(2 / count) + 0.005)


# Exact transitions of the continuous equation.

TRANSITIONS: dict[str, tuple[float, G]] = {
    "flow_sde": (0.7, lambda u: 0.49 * u / (1 - u)),
    "precise": (0.7, lambda u: 0.49 * u / (1 - u)),
    "dance_sde": (0.3, lambda u: torch.full_like(u, 0.09)),
    "precise_dance": (0.3, lambda u: torch.full_like(u, 0.09)),
    "memoryless": (1.0, lambda u: 2 * u / (1 - u)),
    "wan_sde": (1.0, lambda u: (0.5 + (0.59998 - 0.5) * u) ** 2),  # the second and the last time of the grid below
}


def memory(g2: G, s: float, t: float, t_next: float) -> float:
    """R = exp(-integral g^2 / 2D) by a fine midpoint rule."""
    u = t_next + (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * (t - t_next)
    return math.exp(-float((g2(u) / (2 * Gaussian(0.0, s).variance(u))).mean()) * (t - t_next))


@pytest.mark.parametrize("kernel", TRANSITIONS)
def test_fine_chains_reach_the_exact_transition_at_the_golden_point(kernel: str) -> None:
    noise, g2 = TRANSITIONS[kernel]
    data = Gaussian(1.0, 0.5)
    factor, constant, std = double_chain(kernel, noise, grid(5000, 0.6, 0.5), data)
    mean, variance = 0.2, 0.0
    for a, b, spread in zip(factor.tolist(), constant.tolist(), std.tolist(), strict=True):
        mean, variance = a * mean + b, a**2 * variance + spread**2
    d, d_next, kept = 0.4, 0.3125, memory(g2, 0.5, 0.6, 0.5)
    assert mean == pytest.approx(0.5 + math.sqrt(d_next / d) * kept * (0.2 - 0.4), abs=2e-5)
    assert math.sqrt(variance) == pytest.approx(math.sqrt(d_next * (1 - kept**2)), abs=1e-4)
    if kernel == "precise":
        assert (mean, math.sqrt(variance)) == pytest.approx((0.337614, 0.220924), abs=1e-4)


def test_closed_forms_of_the_memory() -> None:
    s, t, t_next = 0.5, 0.6, 0.5
    assert memory(TRANSITIONS["flow_sde"][1], s, t, t_next) == pytest.approx(0.918594, abs=1e-6)

    def primitive(u: float) -> float:
        return math.atan(((1 + s**2) * u - s**2) / s) / s

    by_arctan = math.exp(-0.09 / 2 * (primitive(t) - primitive(t_next)))
    assert memory(TRANSITIONS["dance_sde"][1], s, t, t_next) == pytest.approx(by_arctan, abs=1e-9)


def test_a_constant_g_remembers_the_start_noise() -> None:
    for eta, s in ((0.3, 1.0), (0.8, 0.5)):
        expected = math.exp(-(eta**2) / 2 * (math.atan(1 / s) + math.atan(s)) / s)
        for kernel, off in (("dance_sde", 1e-4), ("precise_dance", 4e-3)):
            factor, _, _ = double_chain(kernel, eta, grid(20000), Gaussian(0.0, s))
            _, variances = moments(kernel, eta, grid(20000), Gaussian(0.0, s))
            assert float(factor.prod() / variances[-1].sqrt()) == pytest.approx(expected, abs=off)
    assert math.exp(-0.045 * math.pi / 2) == pytest.approx(0.932, abs=1e-3)
    factor, _, _ = double_chain("memoryless", 1.0, grid(10), Gaussian())
    assert float(factor.prod()) == 0


# Orders of convergence.


def error(kernel: str, noise: float, steps: int) -> float:
    return abs(float(moments(kernel, noise, grid(steps), Gaussian())[1][-1]) - 1)


@pytest.mark.parametrize(
    ("kernel", "noise"), [("dance_sde", 0.3), ("precise", 0.7), ("wan_sde", 1.0), ("memoryless", 1.0)]
)
def test_order_one_to_a_hundred_thousand_steps(kernel: str, noise: float) -> None:
    errors = [error(kernel, noise, steps) for steps in (1000, 10_000, 100_000)]
    slopes = [math.log10(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([1.0, 1.0], abs=0.01)


def test_precise_dance_is_of_first_order_until_its_noise_outruns_the_grid() -> None:
    errors = []
    for steps in (1000, 10_000):
        _, variances = moments("precise_dance", 0.8, grid(steps, 1.0, 0.3), Gaussian())
        errors.append(abs(float(variances[-1] - Gaussian().variance(0.3))))
    assert math.log10(errors[0] / errors[1]) == pytest.approx(1, abs=0.01)
    # To t = 0: steps below t = eta sqrt(dt) draw all noise anew, each with a defect of t^2; those sum to sqrt(dt).
    assert math.log10(error("precise_dance", 0.8, 10_000) / error("precise_dance", 0.8, 100_000)) == pytest.approx(
        0.57, abs=0.01
    )


def test_the_order_of_flow_sde_tends_to_a_squared() -> None:
    errors = [error("flow_sde", 0.7, steps) for steps in (100, 1000, 10_000, 100_000)]
    slopes = [math.log10(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([0.14, 0.42, 0.47], abs=0.006)
    assert error("dance_sde", 0.3, 1000) == pytest.approx(2.39e-3, abs=1e-5)
    assert error("precise", 0.7, 1000) == pytest.approx(3.10e-3, abs=1e-5)
    assert error("ode", 0.0, 1000) == pytest.approx(2.57e-3, abs=1e-5)


def test_cps_stays_at_its_plateau() -> None:
    got = [float(moments("cps", 0.8, grid(steps), Gaussian())[1][-1]) for steps in (1000, 10_000, 100_000)]
    assert got == pytest.approx([0.651, 0.654, 0.654], abs=5e-4)


# Path divergence of the memoryless sampler: the ELBO weight (1 - t) / t.


def test_elbo_weight_identity() -> None:
    delta, s = 0.3, 0.5
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    shift = delta * t / Gaussian(0.0, s).variance(t)
    assert float(((1 - t) / t * shift**2).mean()) == pytest.approx(delta**2 / (2 * s**2), rel=1e-6)
    moved = Gaussian(delta, s).velocity(torch.ones_like(t), t) - Gaussian(0.0, s).velocity(torch.ones_like(t), t)
    torch.testing.assert_close(moved, -shift)


def path_divergence(kernel: str, noise: float, steps: int, delta: float, s: float) -> float:
    """Sum of the steps' KLs between the chains of N(delta, s^2) and N(0, s^2); their velocities differ by a constant."""
    schedule = uniform_schedule(steps)
    point = StepPoint.of(schedule, torch.arange(steps), 2)
    x = torch.zeros(steps, 1)
    (mean, std), (other, _) = (
        transition(kernel, noise, x, x - point.t * v, x + (1 - point.t) * v, point)
        for v in (Gaussian(m, s).velocity(x, point.t.double()) for m in (delta, 0.0))
    )
    drawn = (std > 0).flatten()
    return float(gaussian_kl(mean[drawn], other[drawn], std[drawn]).double().sum())


@pytest.mark.parametrize(("kernel", "noise"), [("memoryless", 1.0), ("flow_sde", MEMORYLESS_NOISE), ("ddim", 1.0)])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_steps_of_a_memoryless_chain_add_up_to_the_divergence_of_the_data(kernel: str, noise: float, s: float) -> None:
    delta = 0.3
    exact = delta**2 / (2 * s**2)
    assert path_divergence(kernel, noise, 3000, delta, s) == pytest.approx(exact, rel=4e-3)
    assert path_divergence("flow_sde", 0.7, 3000, delta, s) > 1.2 * exact


# Schedules.


def shifted(u: Tensor, s: float) -> Tensor:
    return s * u / (1 + (s - 1) * u)


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0, 5.0])
def test_a_shift_keeps_the_endpoints(s: float) -> None:
    times = shifted(grid(10), s)
    assert float(times[0]) == 1 and float(times[-1]) == 0 and bool((times.diff() < 0).all())
    torch.testing.assert_close(shifted(shifted(grid(10), s), 3.0), shifted(grid(10), 3 * s))
    schedule = flow_schedule(times)
    assert float(schedule.alpha[0]) == 0 and float(schedule.alpha[-1]) == 1
    for kernel in ("precise", "flow_sde"):
        check_kernel(kernel, 0.7, schedule)
    # Pure noise goes in, whatever the shift: the first step of precise draws everything anew, the last one nothing.
    x = torch.ones(10, 1)
    mean, std = transition("precise", 0.7, x, 0 * x, x, StepPoint.of(schedule, torch.arange(10), 2))
    assert float(std[0]) == pytest.approx(float(times[1])) and float(mean[0]) == 0
    assert float(std[-1]) == 0 and float(mean[-1]) == 0


def test_the_shifted_grid_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(sd3_schedule(10).t, scheduler.sigmas, atol=1e-6, rtol=1e-6)


def test_double_points_are_those_of_a_schedule() -> None:
    single, double = StepPoint.of(uniform_schedule(7), torch.arange(7), 2), double_points(grid(7))
    for name, value in vars(single).items():
        torch.testing.assert_close(value, vars(double)[name].float())
