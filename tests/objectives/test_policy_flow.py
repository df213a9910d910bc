"""PolicyFlow on denoising steps: on-policy, the three transports, and the regulariser in the paper's own convention."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import StepPoint, endpoints, log_prob, mean_slope, transition
from flowrl.objectives.policy_flow import Transport, brownian_regulariser, policy_flow_log_ratio
from flowrl.records import LogProbReduction
from tests.dynamics.gaussian import flow_schedule

KERNELS = (("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("precise", 0.7))


def draw(kernel: str = "precise", noise: float = 0.7, moved: float = 0.05) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    point = StepPoint.of(flow_schedule([1.0, 0.8, 0.6, 0.3, 0.0]), torch.tensor([1, 2, 1]), 3)
    x, old_value, change = (torch.randn(3, 4, 2, generator=g) for _ in range(3))
    value = old_value + moved * change
    old_mean, std = transition(kernel, noise, x, *endpoints(x, old_value, "velocity", point.alpha, point.sigma), point)
    mean, _ = transition(kernel, noise, x, *endpoints(x, value, "velocity", point.alpha, point.sigma), point)
    return {
        "value": value,
        "old_value": old_value,
        "x": x,
        "x_next": old_mean + std * torch.randn(3, 4, 2, generator=g),
        "old_mean": old_mean,
        "mean": mean,
        "std": std,
        "point": point,
        "slope": mean_slope(kernel, noise, point),
    }


def flat_point() -> StepPoint:
    return StepPoint.of(flow_schedule([1.0, 0.8, 0.6, 0.3, 0.0]), torch.tensor([1, 2, 1]), 2)


def pair(case: dict[str, Any], reduction: LogProbReduction, transport: Transport) -> tuple[Tensor, Tensor]:
    names = ("value", "old_value", "x_next", "old_mean", "std", "point")
    return policy_flow_log_ratio(*(case[n] for n in names), reduction, transport=transport, slope=case["slope"])


@pytest.mark.parametrize("transport", get_args(Transport))
def test_on_policy_log_ratio_is_zero(transport: Transport) -> None:
    case = draw(moved=0.0)
    case["value"] = case["value"].clone().requires_grad_()
    now, old = pair(case, "sqrt", transport)
    assert torch.equal(now, old) and now.shape == (3,) and now.dtype == torch.float32
    (now - old).sum().backward()
    length = {"step": case["point"].length, "kernel": case["slope"], "path": torch.ones(3, 1, 1)}[transport]
    noise = (case["x_next"] - case["old_mean"]) / case["std"]
    assert torch.allclose(case["value"].grad, -length * noise / case["std"] / 8**0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kernel", "noise"), KERNELS)
@pytest.mark.parametrize("reduction", get_args(LogProbReduction))
def test_kernel_transport_is_the_plain_ratio(kernel: str, noise: float, reduction: LogProbReduction) -> None:
    case = draw(kernel, noise)
    now, old = pair(case, reduction, "kernel")
    plain = log_prob(case["x_next"], case["mean"], case["std"], reduction) - log_prob(
        case["x_next"], case["old_mean"], case["std"], reduction
    )
    assert torch.allclose(now - old, plain, atol=2e-5) and plain.abs().min() > 1e-4


@pytest.mark.parametrize(("transport", "length"), [("step", 0.2), ("path", 1.0)])
def test_worked_number(transport: Transport, length: float) -> None:
    """std 0.5, noise 0.4, velocity up by 0.1: the mean moves by -0.1 length."""
    point = StepPoint.of(flow_schedule([1.0, 0.8, 0.6, 0.0]), torch.tensor([1]), 2)
    one = torch.ones(1, 1)
    now, old = policy_flow_log_ratio(
        0.1 * one, 0 * one, 0.2 * one, 0 * one, 0.5 * one, point, "sum", transport=transport
    )
    shift = -0.1 * length
    assert old.item() == pytest.approx(-(0.2**2) / 0.5, abs=1e-6)
    assert now.item() == pytest.approx(-((0.2 - shift) ** 2) / 0.5, abs=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_regulariser_is_the_papers_in_its_own_time(reduction: LogProbReduction) -> None:
    """There tau = 1 - t runs from noise to data, and the velocity is the negative: |(1 - tau) v - (x - tau v_old)|^2."""
    case = draw()
    found = brownian_regulariser(case["value"], case["old_value"], case["x"], case["point"], reduction)
    for row, t in enumerate([0.8, 0.6, 0.8]):
        total, tau = 0.0, 1 - t
        columns = (case[name][row].flatten().tolist() for name in ("value", "old_value", "x"))
        for v, v_old, x in zip(*columns, strict=True):
            total += ((1 - tau) * -v - (x - tau * -v_old)) ** 2
        expected = total / 8 if reduction == "mean" else total
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


def test_regulariser_vanishes_at_the_score_and_pulls_only_the_present_velocity() -> None:
    case = draw()
    x1_hat = endpoints(case["x"], case["old_value"], "velocity", case["point"].alpha, case["point"].sigma)[1]
    score = -x1_hat / case["point"].t
    assert brownian_regulariser(score, case["old_value"], case["x"], case["point"]).max() < 1e-12
    value, old = case["value"].clone().requires_grad_(), case["old_value"].clone().requires_grad_()
    brownian_regulariser(value, old, case["x"], case["point"]).sum().backward()
    expected = 2 * case["point"].t ** 2 * (case["value"] - score) / 8
    assert old.grad is None and torch.allclose(value.grad, expected, atol=1e-6)


def test_bad_input_is_named() -> None:
    case = draw()
    case["std"] = 0 * case["std"]
    with pytest.raises(ValueError, match="std: expected numbers above 0"):
        pair(case, "sum", "step")
    with pytest.raises(ValueError, match="transport: expected one of step, kernel, path, got 'jump'"):
        pair(draw(), "sum", "jump")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slope: the transport 'kernel' needs"):
        pair({**draw(), "slope": None}, "sum", "kernel")
    with pytest.raises(ValueError, match="expected one shape"):
        pair({**draw(), "x_next": torch.zeros(3, 4, 1)}, "sum", "step")
    flat = torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected one shape \[N, ...\] for all four"):
        pair({**draw(), **dict.fromkeys(("value", "old_value", "x_next", "old_mean"), flat)}, "sum", "step")
    with pytest.raises(ValueError, match=r"expected one shape \[N, ...\] for all three"):
        brownian_regulariser(flat, flat, flat, case["point"])
    assert brownian_regulariser(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), flat_point()).shape == (3,)
    with pytest.raises(ValueError, match="expected one shape"):
        brownian_regulariser(torch.zeros(3, 2), torch.zeros(3, 1), torch.zeros(3, 2), case["point"])
