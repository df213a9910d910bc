"""The policy gradient of a whole chain, through the real kernels and log-prob, against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import StepPoint, endpoints, log_prob, next_latent, transition
from flowrl.records import Schedule

from .gaussian import Gaussian, affine_chain, uniform_schedule


def reinforce_gradient(kernel: str, noise: float, schedule: Schedule, steps: int, s: float) -> Tensor:
    """E[x0 * grad of the summed log-prob] in an offset to the velocity of each of the first ``steps`` steps, exactly.

    Reward and score are both linear in the noises, so the expectation of their product is a second moment. 2n points at
    +-sqrt(n) along each of the n noise axes have the moments of a standard normal up to the third.
    """
    size = schedule.steps + 1
    axes = math.sqrt(size) * torch.eye(size)
    noises = torch.cat([axes, -axes])
    offset = torch.zeros(steps, requires_grad=True)
    x, total, data = noises[:, :1], torch.zeros(2 * size), Gaussian(0.0, s)
    for k in range(schedule.steps):
        point = StepPoint.of(schedule, torch.full((2 * size,), k), 2)
        velocity = data.velocity(x, float(schedule.t[k])) + (offset[k] if k < steps else 0.0)
        mean, std = transition(kernel, noise, x, *endpoints(x, velocity, "velocity", point.alpha, point.sigma), point)
        x = next_latent(mean.detach(), std, noises[:, k + 1 : k + 2], torch.float32)
        if k < steps:
            total = total + log_prob(x, mean, std, "sum")
    (gradient,) = torch.autograd.grad((x[:, 0] * total).mean(), offset)
    return gradient


def test_golden_gradient_of_the_ten_step_chain() -> None:
    gradient = reinforce_gradient("flow_sde", 0.7, uniform_schedule(10), 10, 1.0)
    assert gradient[[0, 3, 7, 9]].tolist() == pytest.approx([-0.0429, -0.1318, -0.1470, -0.1245], abs=6e-5)


@pytest.mark.parametrize(
    ("kernel", "noise"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("precise", 0.7), ("ddim", 0.6)]
)
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_gradient_equals_the_closed_form(kernel: str, noise: float, s: float) -> None:
    schedule = uniform_schedule(10)
    chain = affine_chain(kernel, noise, schedule, s)
    expected = -(chain.slope * chain.tail())[:9]  # every kernel's mean falls as the velocity grows
    gradient = reinforce_gradient(kernel, noise, schedule, 9, s)
    torch.testing.assert_close(gradient.double(), expected, atol=2e-5, rtol=2e-4)
    assert float(expected.abs().max()) > 0.01
