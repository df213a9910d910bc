"""Paths and endpoint estimates: identities of flows and of variance-preserving diffusion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import endpoints, interpolate, prediction_from_endpoints, score

from .gaussian import Gaussian

FLOW = "flow"
VARIANCE_PRESERVING = "variance preserving"


def path(name: str) -> tuple[Tensor, Tensor]:
    t = torch.tensor([0.05, 0.3, 0.6, 0.95]).reshape(-1, 1, 1, 1)
    return (1 - t, t) if name == FLOW else (torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2))


def ends() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, 3, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("velocity", FLOW),
        ("epsilon", FLOW),
        ("x0", FLOW),
        ("epsilon", VARIANCE_PRESERVING),
        ("v", VARIANCE_PRESERVING),
        ("x0", VARIANCE_PRESERVING),
    ],
)
def test_endpoints_invert_the_path_and_the_prediction(kind: str, name: str) -> None:
    alpha, sigma = path(name)
    x0, x1 = ends()
    x = interpolate(x0, x1, alpha, sigma)
    value = prediction_from_endpoints(x0, x1, kind, alpha, sigma)
    x0_hat, x1_hat = endpoints(x, value, kind, alpha, sigma)
    torch.testing.assert_close(x0_hat, x0, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(x1_hat, x1, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(interpolate(x0_hat, x1_hat, alpha, sigma), x, atol=2e-6, rtol=1e-5)


def test_v_is_the_derivative_of_the_path_in_its_angle() -> None:
    x0, x1 = (end.double() for end in ends())
    angle = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    element = torch.cos(angle) * x0[0, 0, 0, 0] + torch.sin(angle) * x1[0, 0, 0, 0]
    (derivative,) = torch.autograd.grad(element, angle)
    v = prediction_from_endpoints(x0, x1, "v", torch.cos(angle.detach()), torch.sin(angle.detach()))
    assert v[0, 0, 0, 0].item() == pytest.approx(derivative.item(), abs=1e-6)


def test_velocity_and_score_determine_each_other() -> None:
    alpha, t = path(FLOW)
    x0, x1 = ends()
    x = interpolate(x0, x1, alpha, t)
    _, x1_hat = endpoints(x, x1 - x0, "velocity", alpha, t)
    s = score(x1_hat, t)
    torch.testing.assert_close(s, -(x - (1 - t) * x0) / t**2, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(-(x + t * s) / (1 - t), x1 - x0, atol=5e-5, rtol=1e-5)


def test_exact_velocity_gives_the_posterior_mean_and_the_score() -> None:
    data, t = Gaussian(1.0, 0.5), 0.6
    x = torch.tensor([[0.2], [-1.0]])
    x0_hat, x1_hat = endpoints(x, data.velocity(x, t), "velocity", torch.tensor(1 - t), torch.tensor(t))
    posterior = 1 + 0.25 * 0.4 / data.variance(t) * (x - 0.4)
    torch.testing.assert_close(x0_hat, posterior.float())
    torch.testing.assert_close(score(x1_hat, torch.tensor(t)), data.score(x, t).float())
    assert x0_hat[0].item() == pytest.approx(0.95, abs=1e-6)
    assert x1_hat[0].item() == pytest.approx(-0.3, abs=1e-6)


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v", "x0"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(kind: str, dtype: torch.dtype) -> None:
    alpha, sigma = path(VARIANCE_PRESERVING)
    x, value = (end.to(dtype) for end in ends())
    for half, full in zip(
        endpoints(x, value, kind, alpha, sigma),
        endpoints(x.float(), value.float(), kind, alpha, sigma),
        strict=True,
    ):
        assert half.dtype is torch.float32
        assert torch.equal(half, full)


def test_an_unknown_kind_is_refused() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"'noise' is not known.*'velocity', 'epsilon', 'v', 'x0'"):
        endpoints(x, x, "noise", torch.tensor(0.5), torch.tensor(0.5))
    with pytest.raises(ValueError, match="'noise' is not known"):
        prediction_from_endpoints(x, x, "noise", torch.tensor(0.5), torch.tensor(0.5))
