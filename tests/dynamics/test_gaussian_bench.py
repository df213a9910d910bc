"""Whole chains on Gaussian data, where every sampler's law is known: variances, memory, orders, marginals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import MEMORYLESS_NOISE

from .gaussian import Gaussian, affine_chain, flow_schedule, sample, uniform_schedule

COLUMNS = (("ode", 0.0), ("flow_sde", 0.7), ("cps", 0.8), ("precise", 0.7))
NEW = (("memoryless", 1.0), ("precise_dance", 0.3), ("wan_sde", 1.0))
TERMINAL_VARIANCE = {
    (1, 5): (0.5937, 0.8385, 0.4281, 0.5548),
    (1, 10): (0.7726, 0.9313, 0.5237, 0.7407),
    (1, 40): (0.9377, 0.9990, 0.6111, 0.9261),
    (1, 1000): (0.9974, 1.0057, 0.6506, 0.9969),
    (0.5, 10): (0.1856, 0.2300, 0.1238, 0.1754),
    (0.5, 40): (0.2321, 0.2474, 0.1491, 0.2278),
    (0.5, 1000): (0.2493, 0.2509, 0.1621, 0.2490),
    (2, 10): (2.9692, 3.5444, 2.1190, 2.8860),
    (2, 40): (3.7143, 3.9830, 2.4751, 3.6843),
    (2, 1000): (3.9882, 4.0317, 2.6072, 3.9868),
    (0, 5): (0, 0.0328, 0, 0),
    (0, 10): (0, 0.0069, 0, 0),
    (0, 40): (0, 0.0004, 0, 0),
}


@pytest.mark.parametrize(("s", "steps"), TERMINAL_VARIANCE)
def test_terminal_variance_table(s: float, steps: int) -> None:
    for (kernel, noise), expected in zip(COLUMNS, TERMINAL_VARIANCE[s, steps], strict=True):
        got = affine_chain(kernel, noise, uniform_schedule(steps), s).variance()[-1]
        assert got == pytest.approx(expected, abs=6e-5 if steps < 1000 else 1e-4), kernel


@pytest.mark.parametrize(
    ("eta", "expected"),
    [
        (0.1, (0.769, 0.933, 0.991)),
        (0.3, (0.741, 0.890, 0.942)),
        (0.5, (0.677, 0.802, 0.849)),
        (0.7, (0.580, 0.680, 0.723)),
        (1.0, (0.401, 0.465, 0.497)),
    ],
)
def test_cps_variance_by_eta(eta: float, expected: tuple[float, ...]) -> None:
    got = [affine_chain("cps", eta, uniform_schedule(steps), 1).variance()[-1] for steps in (10, 40, 1000)]
    assert got == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("kernel", "noise"), COLUMNS)
def test_one_row_of_the_table_by_sampling(kernel: str, noise: float) -> None:
    count, generator = 200_000, torch.Generator().manual_seed(3)
    schedule, data = uniform_schedule(10), Gaussian()
    x = sample(kernel, noise, schedule, torch.randn(count, 1, generator=generator), data.velocity, generator)
    expected = TERMINAL_VARIANCE[1, 10][COLUMNS.index((kernel, noise))]
    assert x.var().item() == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / count))
    assert x.mean().item() == pytest.approx(0, abs=4 * math.sqrt(expected / count))


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("kernel", "noise"), [*COLUMNS, ("dance_sde", 0.3), ("ddim", 0.6), *NEW])
def test_factors_equal_the_closed_recursion(kernel: str, noise: float, s: float) -> None:
    schedule = uniform_schedule(10)
    chain = affine_chain(kernel, noise, schedule, s)
    for k in range(10):
        t, t_next = 1 - k / 10, (9 - k) / 10
        slope = float(Gaussian(0.0, s).slope(t))
        if kernel in ("flow_sde", "dance_sde", "wan_sde"):
            below_one = 0.9 if k == 0 else t
            g = {"dance_sde": noise, "wan_sde": 0.9 * t}.get(kernel, noise * math.sqrt(t / (1 - below_one)))
            factor = 1 - g**2 * 0.1 / (2 * t) - slope * (1 + g**2 * (1 - t) / (2 * t)) * 0.1
            std = g * math.sqrt(0.1)
        else:
            kept = t_next * (1 - t) / (t * (1 - t_next))
            rho = {
                "ode": 1.0,
                "cps": math.cos(noise * math.pi / 2),
                "precise": kept ** (noise**2 / 2),
                "ddim": math.sqrt(1 - noise**2 * (1 - kept**2)),
                "memoryless": kept,
                "precise_dance": math.exp(-(noise**2) / 2 * (1 / t_next - 1 / t)) if k < 9 else 0.0,
            }[kernel]
            factor = (1 - t_next) * (1 - t * slope) + t_next * rho * (1 + (1 - t) * slope)
            std = t_next * math.sqrt(1 - rho**2)
        assert chain.factor[k].item() == pytest.approx(factor, abs=2e-6)
        assert chain.std[k].item() == pytest.approx(std, abs=2e-6)


@pytest.mark.parametrize(
    ("kernel", "noise", "correlation", "variance"),
    [
        ("flow_sde", 0.7, (0.291, 0.235), (0.8525, 0.9438)),
        ("dance_sde", 0.3, (0.922, 0.930), (0.1178, 0.1280)),
        ("cps", 0.8, (0.007, 0.000), (0.5237, 0.6111)),
        ("precise", 0.7, (0.000, 0.000), (0.7407, 0.9261)),
    ],
)
def test_endpoint_memory(
    kernel: str, noise: float, correlation: tuple[float, float], variance: tuple[float, float]
) -> None:
    for steps, expected, left in zip((10, 40), correlation, variance, strict=True):
        chain = affine_chain(kernel, noise, uniform_schedule(steps), 1)
        assert chain.correlation == pytest.approx(expected, abs=6e-4)
        assert chain.variance()[-1] - chain.memory**2 == pytest.approx(left, abs=6e-5)


def order(kernel: str, noise: float, coarse: int, fine: int, start: float = 1.0) -> float:
    data = Gaussian()
    errors = [
        abs(
            affine_chain(kernel, noise, uniform_schedule(steps, start), 1).variance(float(data.variance(start)))[-1] - 1
        )
        for steps in (coarse, fine)
    ]
    return math.log(errors[0] / errors[1]) / math.log(fine / coarse)


@pytest.mark.parametrize(("kernel", "noise"), [("ode", 0.0), ("dance_sde", 0.3), ("precise", 0.7)])
def test_first_order_kernels(kernel: str, noise: float) -> None:
    assert order(kernel, noise, 100, 1000) == pytest.approx(1, abs=0.02)
    assert order(kernel, noise, 1000, 5000) == pytest.approx(1, abs=0.03)


def test_the_clamped_first_step_costs_flow_sde_its_order() -> None:
    assert order("flow_sde", 0.7, 100, 1000) == pytest.approx(0.14, abs=0.01)
    assert order("flow_sde", 0.7, 1000, 10000) == pytest.approx(0.42, abs=0.01)
    assert order("flow_sde", 0.7, 100, 1000, start=0.9) == pytest.approx(1, abs=0.03)
    first = affine_chain("flow_sde", 0.7, uniform_schedule(5000), 1).variance()[1]
    assert first == pytest.approx(1 + 0.7**4 / 4, abs=1e-3)


def test_cps_does_not_reach_the_data_law() -> None:
    thousand, ten_thousand = (affine_chain("cps", 0.8, uniform_schedule(n), 1).variance()[-1] for n in (1000, 10000))
    assert thousand == pytest.approx(0.651, abs=5e-4)
    assert ten_thousand == pytest.approx(0.654, abs=5e-4)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("s", [0.0, 0.5, 2.0])
def test_excess_variance_of_one_step(t: float, s: float) -> None:
    data, dt, a, eta = Gaussian(0.0, s), 0.1, 0.7, 0.8
    t_next = t - dt
    d, d_next = float(data.variance(t)), float(data.variance(t_next))
    schedule = flow_schedule([t, t_next])
    for kernel, noise in (("flow_sde", a), ("dance_sde", 0.3), ("ode", 0.0), ("cps", eta)):
        excess = affine_chain(kernel, noise, schedule, s).variance(d)[-1] - d_next
        g2 = {"flow_sde": a**2 * t / (1 - t), "dance_sde": 0.09}.get(kernel, 0.0)
        k = (t - (1 - t) * s**2) / d
        expected = dt**2 * (-(s**2) / d + k * g2 + g2**2 / (4 * d))
        if kernel == "cps":
            expected = -(s**2) * ((1 - t_next) * t - math.cos(eta * math.pi / 2) * t_next * (1 - t)) ** 2 / d
        assert excess == pytest.approx(expected, abs=1e-6), kernel


def test_the_bench_itself_at_the_golden_point() -> None:
    data, x = Gaussian(1.0, 0.5), torch.tensor(0.2, dtype=torch.float64)
    assert data.ode_map(x, 0.6, 0.5).item() == pytest.approx(0.323223, abs=1e-6)
    mean, std = data.sde_step(x, 0.6, 0.5, 0.7)
    assert (mean.item(), std.item()) == pytest.approx((0.337614, 0.220924), abs=1e-6)


@pytest.mark.parametrize("kernel", ["flow_sde", "precise"])
def test_many_small_steps_reach_the_exact_transition(kernel: str) -> None:
    data = Gaussian(0.0, 0.5)
    mean, std = data.sde_step(torch.ones((), dtype=torch.float64), 0.6, 0.5, 0.7)
    chain = affine_chain(kernel, 0.7, flow_schedule(torch.linspace(0.6, 0.5, 1001, dtype=torch.float64)), 0.5)
    assert chain.memory == pytest.approx(mean.item(), abs=3e-4)
    assert math.sqrt(chain.variance(0.0)[-1]) == pytest.approx(std.item(), abs=3e-4)


MARGINAL_KEEPERS = [("flow_sde", 0.7), ("dance_sde", 0.3), ("flow_sde", MEMORYLESS_NOISE)]


@pytest.mark.parametrize(("kernel", "noise"), MARGINAL_KEEPERS)
def test_euler_maruyama_keeps_every_marginal_variance(kernel: str, noise: float) -> None:
    data = Gaussian(0.0, 0.5)
    # Away from t = 1, where flow_sde clamps or is steep, and from t = 0, where a constant g is stiff.
    times = torch.linspace(0.9, 0.05, 2001, dtype=torch.float64)
    got = torch.tensor(affine_chain(kernel, noise, flow_schedule(times), 0.5).variance(float(data.variance(0.9))))
    assert float((got / data.variance(times) - 1).abs().max()) < 4e-3


def mixture_velocity(x: Tensor, t: float) -> Tensor:
    """Exact velocity of .3 N(-1, .3^2) + .7 N(1.5, .5^2): each part's velocity weighted by its posterior."""
    parts = [(0.3, Gaussian(-1.0, 0.3)), (0.7, Gaussian(1.5, 0.5))]
    logits = torch.cat(
        [math.log(p / math.sqrt(d.variance(t))) - (x - (1 - t) * d.m) ** 2 / (2 * d.variance(t)) for p, d in parts], 1
    )
    return (logits.softmax(1) * torch.cat([d.velocity(x, t) for _, d in parts], 1)).sum(1, keepdim=True).float()


@pytest.mark.parametrize(("kernel", "noise"), [*MARGINAL_KEEPERS, ("precise", 0.7), ("memoryless", 1.0)])
def test_stochastic_kernels_keep_a_mixture(kernel: str, noise: float) -> None:
    count, generator = 12_000, torch.Generator().manual_seed(5)
    schedule = uniform_schedule(400)
    x = sample(kernel, noise, schedule, torch.randn(count, 1, generator=generator), mixture_velocity, generator)
    error = 4 / math.sqrt(count)
    assert (x < 0).float().mean().item() == pytest.approx(0.3 * 0.99957 + 0.7 * 0.00135, abs=error * 0.46 + 0.004)
    assert x.mean().item() == pytest.approx(0.75, abs=error * 1.23 + 0.01)
    second = 0.3 * (1 + 0.09) + 0.7 * (2.25 + 0.25)
    assert (x**2).mean().item() == pytest.approx(second, abs=error * 2.0 + 0.03)
