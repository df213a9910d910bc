"""Adjoint Matching on Gaussian data: golden adjoints, the exact tilt as its fixed point, general rewards on a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import KERNELS, mean_slope
from flowrl.objectives.differentiable import (
    adjoint_matching_loss,
    keep_below_quantile,
    lean_adjoints,
    step_kl,
    terminal_adjoint,
    velocity_target,
)
from tests.dynamics.gaussian import Gaussian, double_chain, double_points, endpoints_in_double

ROOT = 2**0.5


def linear_adjoints(kernel: str, times: Tensor, data: Gaussian, b: float, temperature: float) -> Tensor:
    """a_1 .. a_T of the chain for r = b x0, float64 [T], by the recursion over the chain's own factors."""
    factor = double_chain(kernel, ROOT, times, data)[0]
    end = terminal_adjoint(torch.tensor([[b]], dtype=torch.float64), temperature)
    return torch.cat(lean_adjoints(lambda k, a: factor[k] * a, end, len(factor))).flatten()


@pytest.mark.parametrize("kernel", ["memoryless", "flow_sde"])
def test_golden_adjoints_and_velocities(kernel: str) -> None:
    """s = .5, b = 1, lambda = 1: a = -1, -.4, -.076923 and dv = -.25, -.4, -.307692 at t = .2, .5, .8, in the limit."""
    data, wanted = Gaussian(1.0, 0.5), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = []
    for steps in (250, 500, 1000):
        times = torch.linspace(0.98, 0, steps + 1, dtype=torch.float64) if kernel == "flow_sde" else (
            torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        )  # fmt: skip
        at_start = linear_adjoints(kernel, times, data, 1.0, 1.0)
        places = [int((times - t).abs().argmin()) for t in wanted]
        held = times[places]
        assert float((held - wanted).abs().max()) < 3e-3
        # Adjoint at the time itself: a_(k) is the entry before step k; compare with the closed form at that very time.
        closed = -(data.s**2) * (1 - held) / data.variance(held)
        found.append(torch.stack([at_start[k - 1] for k in places]) - closed)
    first, second = 2 * found[1] - found[0], 2 * found[2] - found[1]
    extrapolated = (4 * second - first) / 3
    assert float(extrapolated.abs().max()) < 1e-4
    assert float(found[2].abs().max()) < 5e-3
    golden = -(data.s**2) * (1 - wanted) / data.variance(wanted)
    torch.testing.assert_close(golden, torch.tensor([-1.0, -0.4, -0.076923], dtype=torch.float64), atol=1e-6, rtol=0)
    speed = wanted / (1 - wanted) * golden
    torch.testing.assert_close(speed, torch.tensor([-0.25, -0.4, -0.307692], dtype=torch.float64), atol=1e-6, rtol=0)


def test_velocity_target_tends_to_the_tilted_velocity() -> None:
    """T-RL1 with the predicted shift C / lambda, C = -b s^2 t / D: the target of short memoryless steps."""
    b, temperature, data = 1.5, 0.8, Gaussian(-0.3, 0.5)
    times = torch.linspace(1, 0, 4001, dtype=torch.float64)
    point = double_points(times)
    adjoint = linear_adjoints("memoryless", times, data, b, temperature)
    std = KERNELS["memoryless"](1.0, *(torch.zeros_like(point.t),) * 3, point)[1].flatten()
    slope = mean_slope("memoryless", 1.0, point).flatten().double()
    t = times[:-1]
    predicted = -b * data.s**2 * t / data.variance(t) / temperature
    found = velocity_target(adjoint, std, slope)
    inner = (t > 0.02) & (t < 0.999)
    assert float((found - predicted)[inner].abs().max()) < 2e-3
    assert bool(torch.isfinite(found).all()) and float(found[-1]) == 0


def chain_mean(m: float, factor: Tensor, constant: Tensor, moved: Tensor) -> float:
    for a, c, extra in zip(factor.tolist(), constant.tolist(), moved.tolist(), strict=True):
        m = a * m + c + extra
    return m


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_loss_is_zero_at_the_exact_tilt_of_the_chains_own_law(steps: int) -> None:
    """Memoryless steps of any length: the mean moves by b Var(x0) / lambda, Var of what the chain itself makes."""
    b, temperature, data = 1.3, 0.7, Gaussian(0.4, 0.8)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    factor, constant, std = double_chain("memoryless", 1.0, times, data)
    adjoint = linear_adjoints("memoryless", times, data, b, temperature)
    moved = -(std**2) * adjoint
    variance = 0.0
    for a, noise in zip(factor.tolist(), std.tolist(), strict=True):
        variance = a * a * variance + noise * noise
    gain = chain_mean(0.0, factor, constant, moved) - chain_mean(0.0, factor, constant, torch.zeros(steps))
    assert gain == pytest.approx(b * variance / temperature, rel=1e-12)
    loss = adjoint_matching_loss(moved[:-1, None], torch.zeros(steps - 1, 1), std[:-1, None], adjoint[:-1, None])
    assert float(loss.abs().max()) < 1e-12
    # The penalty that the optimum pays is the divergence of the two Gaussians.
    paid = step_kl(moved[:-1, None], torch.zeros(steps - 1, 1), std[:-1, None]).sum()
    assert float(paid) == pytest.approx(b**2 * variance / (2 * temperature**2), rel=1e-9)


def test_loss_against_a_plain_loop_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, ref, adjoint = (torch.randn(3, 2, 4, generator=generator) for _ in range(3))
    std = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    mean.requires_grad_()
    found = adjoint_matching_loss(mean, ref, std, adjoint)
    for b in range(3):
        s = float(std[b])
        each = [
            (float(mean.detach()[b, i, j] - ref[b, i, j]) / s + s * float(adjoint[b, i, j])) ** 2
            for i in range(2)
            for j in range(4)
        ]
        assert float(found.detach()[b]) == pytest.approx(sum(each) / 8, rel=1e-5)
    found.sum().backward()
    expected = 2 * ((mean - ref) / std + std * adjoint) / std / 8
    torch.testing.assert_close(mean.grad, expected.detach())


def test_a_constant_reward_asks_for_no_control() -> None:
    end = terminal_adjoint(torch.zeros(4, 3), 0.1)
    swept = lean_adjoints(lambda k, a: 0.9 * a, end, 5)
    assert len(swept) == 5 and all(float(a.abs().max()) == 0 for a in swept)
    mean = torch.randn(4, 3)
    assert float(adjoint_matching_loss(mean, mean, torch.ones(4, 1), swept[0]).max()) == 0


def test_sweep_order() -> None:
    asked: list[int] = []

    def pull(k: int, a: Tensor) -> Tensor:
        asked.append(k)
        return (k + 1) * a

    found = lean_adjoints(pull, torch.ones(1), 4)
    assert asked == [3, 2, 1] and [float(a) for a in found] == [24, 12, 4, 1]


def test_outliers_are_dropped() -> None:
    loss = torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0, 100.0, float("inf")])
    assert keep_below_quantile(loss, 0.8).tolist() == [True, True, False, True, True, False, False]
    assert keep_below_quantile(loss, 1.0).tolist() == [True, True, False, True, True, True, False]
    assert not bool(keep_below_quantile(torch.full((3,), float("nan")), 0.5).any())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        terminal_adjoint(torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="std 0"):
        adjoint_matching_loss(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="quantile is 0"):
        keep_below_quantile(torch.ones(2), 0)


# ------------------------------------------------------------------------------------------- general tilt (T-RL5)

CENTRES, WEIGHTS, SPREAD = torch.tensor([-1.0, 0.2, 1.1]), torch.tensor([0.5, 0.2, 0.3]), 0.35


def mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    """v of data sum_i w_i N(m_i, s^2): per component, by responsibility."""
    m, w = CENTRES.double(), WEIGHTS.double()
    d = (1 - t) ** 2 * SPREAD**2 + t**2
    away = x[..., None] - (1 - t)[..., None] * m
    share = torch.softmax(w.log() - away**2 / (2 * d[..., None]), -1)
    k = ((t - (1 - t) * SPREAD**2) / d)[..., None]
    return (share * (-m + k * away)).sum(-1)


def reward(x: Tensor) -> Tensor:
    return torch.sin(2 * x) + 0.4 * x**2 / (1 + x**2)


def tilted_means(k: int, times: Tensor, grid: Tensor, temperature: float) -> Tensor:
    """d/dx lambda-free log E[exp(r(x_T) / lambda) | x_(k)] along the chain, by quadrature over all later steps: on ``grid``.

    Backward recursion psi_k(x) = E[psi_(k+1)(mean_k(x) + std_k eps)], exact but for the quadrature.
    """
    points = double_points(times)
    nodes = torch.linspace(-6, 6, 97, dtype=torch.float64)
    mass = torch.exp(-(nodes**2) / 2)
    mass = mass / mass.sum()
    psi = (reward(grid) / temperature).exp()
    for j in range(len(times) - 2, k - 1, -1):
        psi = _expect(psi, grid, nodes, mass, points, times, j)
    return psi


def _expect(psi: Tensor, grid: Tensor, nodes: Tensor, mass: Tensor, points, times: Tensor, j: int) -> Tensor:
    mean, std = step_of(grid, j, times)
    at = mean[:, None] + std * nodes
    place = ((at - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1.001)
    low = place.floor().long()
    part = place - low
    return ((psi[low] * (1 - part) + psi[low + 1] * part) * mass).sum(1)


def step_of(x: Tensor, j: int, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of memoryless step j at x [N]."""
    point = double_points(times)
    here = type(point)(*(getattr(point, name)[j] for name in vars(point)))
    velocity = mixture_velocity(x, here.t.expand_as(x))
    mean, std = KERNELS["memoryless"](1.0, x, *endpoints_in_double(x, velocity, here), here)
    return mean, torch.as_tensor(std)


def test_general_tilt_is_the_fixed_point_on_a_mixture() -> None:
    """T-RL5: with paths of the optimally controlled chain, E[-std^2 a_(k+1) | x_k] is the exact shift of every mean.

    The data are a mixture and the reward is no polynomial. The optimal chain is simulated by its own tilted transition
    (quadrature of the Doob transform), so nothing but the lean adjoint is under test.
    """
    temperature, steps, count = 0.8, 6, 12_000
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    grid = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    psi = [tilted_means(k, times, grid, temperature) for k in range(steps + 1)]
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    path = [x]
    for k in range(steps):
        mean, std = step_of(path[-1], k, times)
        if float(std) == 0:
            path.append(mean)
            continue
        # Draw from the tilted step N(mean, std^2) psi_(k+1) by resampling 24 proposals a sample.
        tries = mean[:, None] + std * torch.randn(count, 24, generator=generator, dtype=torch.float64)
        place = ((tries - grid[0]) / (grid[1] - grid[0])).round().long().clamp(0, len(grid) - 1)
        chosen = torch.multinomial(psi[k + 1][place], 1, generator=generator)
        path.append(tries.gather(1, chosen)[:, 0])
    end = path[-1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(end).sum(), end)

    def pull(k: int, a: Tensor) -> Tensor:
        x = path[k].clone().requires_grad_()
        return torch.autograd.grad(step_of(x, k, times)[0], x, a)[0]

    adjoints = lean_adjoints(pull, terminal_adjoint(gradient, temperature), steps)
    for k in range(1, steps - 1):
        std = float(step_of(path[k], k, times)[1])
        value = torch.log(psi[k])
        slope = torch.gradient(value, spacing=(float(grid[1] - grid[0]),))[0]
        mean_slope_of = torch.gradient(step_of(grid, k, times)[0], spacing=(float(grid[1] - grid[0]),))[0]
        edges = torch.linspace(float(path[k].quantile(0.05)), float(path[k].quantile(0.95)), 5)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            inside = (path[k] > low) & (path[k] < high)
            found = -(std**2) * adjoints[k][inside]
            place = ((path[k][inside] - grid[0]) / (grid[1] - grid[0])).round().long()
            # Shift of the mean under the tilt: E*[x_(k+1)] - mean = std^2 (d log psi_k / dx) / (d mean_k / dx).
            exact = std**2 * slope[place] / mean_slope_of[place]
            error = float(found.mean() - exact.mean())
            spread = float(found.std()) / inside.sum() ** 0.5
            assert abs(error) < 5 * float(spread) + 0.004, (k, low, error, spread)
