"""Losses beside the engine's: plain loops, mask tables, gradients, what they reduce to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import POLICY_LOSSES, policy_loss
from flowrl.objectives.surrogates import SURROGATES, dpok, flow_dppo, pcpo, surrogate_loss

ROWS, STEPS = 6, 5


def inputs(seed: int, divergence: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, STEPS, generator=g, dtype=torch.float64)

    old = normal(2.0) - 50
    made = {
        "log_prob": old + normal(0.3),
        "old_log_prob": old,
        "advantage": normal(1.0),
        "mask": torch.rand(ROWS, STEPS, generator=g) < 0.8,
    }
    return made | ({"divergence": normal(1e-5).abs()} if divergence else {})


def gradient(name: str, case: dict[str, Tensor], options: dict[str, Any]) -> tuple[Any, Tensor]:
    log_prob = case["log_prob"].clone().requires_grad_()
    made = surrogate_loss(name, {**case, "log_prob": log_prob}, options)
    made.loss.sum().backward()
    assert log_prob.grad is not None
    return made, log_prob.grad


def reference(name: str, d: float, a: float, divergence: float) -> tuple[float, float, bool, bool]:
    """(loss, gradient, low, high) of one element, written out."""
    rho = math.exp(d)
    if name == "pcpo":
        if (a > 0 and d > 0.2) or (a < 0 and d < -0.2):
            return 0.0, 0.0, a < 0, a > 0
        return 0.2 * abs(a) - a * d, -a, False, False
    if name == "flow_dppo":
        if divergence >= 1e-5 and ((a > 0 and rho > 1) or (a < 0 and rho < 1)):
            return 0.0, 0.0, a < 0, a > 0
        return -a * rho, -a * rho, False, False
    if rho < 0.8 or rho > 1.2:
        return -a * min(max(rho, 0.8), 1.2), 0.0, rho < 0.8, rho > 1.2
    return -a * rho, -a * rho, False, False


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_loop(name: str, seed: int) -> None:
    case = inputs(seed, divergence=name == "flow_dppo")
    made, slope = gradient(name, case, {})
    hits = 0
    for i in range(ROWS):
        for j in range(STEPS):
            if not case["mask"][i, j]:
                assert made.loss[i, j] == 0 and slope[i, j] == 0 and not made.low[i, j] and not made.high[i, j]
                continue
            d = (case["log_prob"][i, j] - case["old_log_prob"][i, j]).item()
            distance = case["divergence"][i, j].item() if name == "flow_dppo" else 0.0
            loss, expected, low, high = reference(name, d, case["advantage"][i, j].item(), distance)
            assert made.loss[i, j].item() == pytest.approx(loss, abs=1e-9)
            assert slope[i, j].item() == pytest.approx(expected, abs=1e-9)
            assert (bool(made.low[i, j]), bool(made.high[i, j])) == (low, high)
            hits += low + high
    assert hits > 0


@pytest.mark.parametrize("name", SURROGATES)
def test_on_policy_gradient_is_the_advantage(name: str) -> None:
    case = inputs(5, divergence=name == "flow_dppo")
    case["log_prob"] = case["old_log_prob"].clone()
    if name == "flow_dppo":
        case["divergence"] = torch.zeros_like(case["divergence"])
    made, slope = gradient(name, case, {})
    assert torch.allclose(slope, torch.where(case["mask"], -case["advantage"], 0.0))
    assert not made.low.any() and not made.high.any()


@pytest.mark.parametrize("name", SURROGATES)
def test_masked_elements_reach_nothing_and_half_becomes_float(name: str) -> None:
    case = inputs(6, divergence=name == "flow_dppo")
    clean, slope = gradient(name, case, {})
    dirty = {k: v if k == "mask" else torch.where(case["mask"], v, math.nan) for k, v in case.items()}
    again, other = gradient(name, dirty, {})
    assert torch.equal(clean.loss, again.loss) and torch.equal(slope, other)
    half = {k: v if k == "mask" else v.bfloat16() for k, v in case.items()}
    assert surrogate_loss(name, half).loss.dtype == torch.float32
    one_each = surrogate_loss(name, {**case, "advantage": case["advantage"][:, 0]}).loss
    spread = surrogate_loss(name, {**case, "advantage": case["advantage"][:, :1].expand(ROWS, STEPS)}).loss
    assert torch.equal(one_each, spread)


def test_pcpo_hinge_gradient() -> None:
    """margin 0.2: A > 0 stops above 0.2, A < 0 below -0.2; the other side keeps pulling with -A, whatever rho."""
    d = torch.tensor([[0.19, 0.21, -3.0, -0.19, -0.21, 3.0]], dtype=torch.float64)
    a = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    log_prob = d.clone().requires_grad_()
    made = pcpo(log_prob, torch.zeros_like(d), a, torch.ones_like(d, dtype=torch.bool))
    made.loss.sum().backward()
    assert log_prob.grad.tolist() == [[-2.0, 0.0, -2.0, 2.0, 0.0, 2.0]]
    assert made.loss[0].tolist() == pytest.approx([0.02, 0.0, 6.4, 0.02, 0.0, 6.4])
    assert made.high.tolist() == [[False, True, False, False, False, False]]
    assert made.low.tolist() == [[False, False, False, False, True, False]]


def test_bounds_themselves_are_inside_and_no_advantage_means_no_bound() -> None:
    d = torch.tensor([[0.5, -0.5, 3.0, -3.0]], dtype=torch.float64)
    a = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.ones_like(d, dtype=torch.bool)
    made = pcpo(d, torch.zeros_like(d), a, mask, margin=0.5)
    assert not made.low.any() and not made.high.any() and not made.loss.any()
    log_rho = torch.tensor([[math.log(0.5), math.log(1.5)]], dtype=torch.float64)
    at = dpok(log_rho, torch.zeros_like(log_rho), torch.ones(1, 2).double(), mask[:, :2], bound=0.5)
    rho = log_rho.exp()
    assert at.low.tolist() == [[bool(rho[0, 0] < 0.5), False]] and at.high.tolist() == [[False, bool(rho[0, 1] > 1.5)]]


def test_pcpo_is_ppo_to_first_order() -> None:
    case = inputs(7, divergence=False)
    case["log_prob"] = case["old_log_prob"] + 1e-3 * (case["log_prob"] - case["old_log_prob"])
    _, hinge = gradient("pcpo", case, {"margin": 3e-4})
    _, clip = gradient("ppo", case, {"low": 1 - math.exp(-3e-4), "high": math.exp(3e-4) - 1})
    assert torch.allclose(hinge, clip, rtol=2e-3) and (hinge == 0).sum() > (~case["mask"]).sum()


@pytest.mark.parametrize("distance", [0.9e-5, 1e-5, 1.1e-5])
def test_flow_dppo_mask_table(distance: float) -> None:
    d = torch.tensor([[0.5, -0.5, 0.0, 0.5, -0.5, 0.0]], dtype=torch.float64)
    a = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones_like(d, dtype=torch.bool)
    made = flow_dppo(d, torch.zeros_like(d), a, mask, torch.full_like(d, distance))
    far = distance >= 1e-5  # the threshold itself is far
    assert made.high.tolist() == [[far, False, False, False, False, False]]
    assert made.low.tolist() == [[False, False, False, False, far, False]]
    kept = [not far, True, True, True, not far, True]
    expected = [-x * math.exp(y) * k for x, y, k in zip(a[0].tolist(), d[0].tolist(), kept, strict=True)]
    assert made.loss[0].tolist() == pytest.approx(expected)


def test_flow_dppo_gradient_is_the_engines_below_its_cap() -> None:
    case = inputs(8)
    _, ours = gradient("flow_dppo", case, {})
    _, engine = gradient("dppo", case, {"low": 1e-5, "high": 1e-5})
    assert torch.allclose(ours, engine, rtol=1e-12) and (ours == 0).sum() > (~case["mask"]).sum()
    case["log_prob"] = case["old_log_prob"] + 4.0  # rho = 54.6, above the engine's cap of 20
    case["divergence"] = torch.zeros_like(case["divergence"])
    _, ours = gradient("flow_dppo", case, {})
    expected = torch.where(case["mask"], -case["advantage"] * math.exp(4.0), 0.0)
    assert torch.allclose(ours, expected, rtol=1e-9)


def test_dpok_without_a_bound_is_the_weighted_log_prob() -> None:
    case = inputs(9, divergence=False)
    made, slope = gradient("dpok", case, {"bound": None})
    assert torch.allclose(made.loss, torch.where(case["mask"], -case["advantage"] * case["log_prob"], 0.0))
    assert torch.allclose(slope, torch.where(case["mask"], -case["advantage"], 0.0))
    assert made.low is None and made.high is None


def test_names_reach_the_engine_and_mistakes_are_named() -> None:
    case = inputs(10, divergence=False)
    ours, engine = surrogate_loss("ppo", case, {"low": 0.1}), policy_loss("ppo", case, {"low": 0.1})
    assert torch.equal(ours.loss, engine.loss) and not set(SURROGATES) & set(POLICY_LOSSES)
    with pytest.raises(ValueError, match="name: expected one of pcpo, flow_dppo, dpok, bapo"):
        surrogate_loss("pcp", case)
    with pytest.raises(ValueError, match="flow_dppo: needs the input 'divergence'"):
        surrogate_loss("flow_dppo", case)
    with pytest.raises(ValueError, match="pcpo: no option 'xi'; expected one of margin"):
        surrogate_loss("pcpo", case, {"xi": 0.1})
    args = (case["log_prob"], case["old_log_prob"], case["advantage"], case["mask"])
    with pytest.raises(ValueError, match="margin: expected a finite number >= 0, got -1"):
        pcpo(*args, margin=-1)
    with pytest.raises(ValueError, match="threshold: expected a finite number >= 0"):
        flow_dppo(*args, torch.zeros(ROWS, STEPS), threshold=-1)
    with pytest.raises(ValueError, match="divergence: expected numbers >= 0, got -1"):
        flow_dppo(*args, -torch.ones(ROWS, STEPS))
    with pytest.raises(ValueError, match="bound: expected a finite number >= 0"):
        dpok(*args, bound=-0.1)
