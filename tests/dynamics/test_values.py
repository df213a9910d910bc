"""What an intermediate state is worth: slopes of E[x0 | x_t] under one step, the ODE and the policy's own SDE."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.dynamics import endpoints, solver_step

from .gaussian import Gaussian, double_chain, flow_schedule

# s = .5, a = .7: (t, one step, SDE, ODE).
TABLE = [(0.9, 0.031, 0.273, 0.555), (0.6, 0.250, 0.596, 0.791), (0.3, 0.824, 1.014, 1.085)]
DATA = Gaussian(0.0, 0.5)


def to_the_end(kernel: str, noise: float, t: float, steps: int = 4000) -> tuple[float, float]:
    """Slope and conditional variance of x0 given x_t under a fine chain."""
    times = torch.linspace(t, 0, steps + 1, dtype=torch.float64)
    factor, _, std = double_chain(kernel, noise, times, DATA)
    variance = 0.0
    for a, spread in zip(factor.tolist(), std.tolist(), strict=True):
        variance = a**2 * variance + spread**2
    return float(factor.prod()), variance


@pytest.mark.parametrize(("t", "one_step", "sde", "ode"), TABLE)
def test_slopes_of_the_value(t: float, one_step: float, sde: float, ode: float) -> None:
    d, s, a = float(DATA.variance(t)), 0.5, 0.7
    x = torch.tensor([[0.0], [1.0]])
    x0_hat, _ = endpoints(x, DATA.velocity(x, t), "velocity", torch.tensor(1 - t), torch.tensor(t))
    slope = float(x0_hat[1] - x0_hat[0])
    assert slope == pytest.approx(one_step, abs=6e-4)
    assert slope == pytest.approx(s**2 * (1 - t) / d, abs=1e-6)

    assert to_the_end("ode", 0.0, t)[0] == pytest.approx(ode, abs=8e-4)
    assert s / math.sqrt(d) == pytest.approx(ode, abs=5e-4)

    closed = s / math.sqrt(d) * (s * (1 - t) / math.sqrt(d)) ** (a**2 / 2)
    assert closed == pytest.approx(sde, abs=5e-4)
    for kernel in ("flow_sde", "precise"):
        assert to_the_end(kernel, a, t)[0] == pytest.approx(sde, abs=1.5e-3)
    assert slope < closed < s / math.sqrt(d)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("t", [0.9, 0.6, 0.3])
def test_solvers_give_the_slope_of_the_ode(solver: str, t: float) -> None:
    steps = {"euler": 2000, "heun": 60, "dpmpp_2m": 120}[solver]
    schedule = flow_schedule(torch.linspace(t, 0, steps + 1, dtype=torch.float64))

    def predict(x: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time = schedule.t[step][:, None]
        return endpoints(x, DATA.velocity(x, time.double()), "velocity", 1 - time, time)

    x, history = torch.tensor([[0.0], [1.0]]), None
    for k in range(steps):
        x, history = solver_step(solver, predict, x, torch.full((2,), k), schedule, history)
    assert float(x[1] - x[0]) == pytest.approx(0.5 / math.sqrt(float(DATA.variance(t))), abs=6e-4)
    assert float(x[0]) == 0


@pytest.mark.parametrize("t", [0.9, 0.6, 0.3])
def test_a_memoryless_chain_draws_the_posterior(t: float) -> None:
    # Only there the one-step slope is right; what one step then loses of a concave reward is the posterior variance.
    d = float(DATA.variance(t))
    slope, variance = to_the_end("memoryless", 1.0, t)
    assert slope == pytest.approx(0.25 * (1 - t) / d, abs=1e-3)
    assert variance == pytest.approx(0.25 * t**2 / d, abs=1e-3)
