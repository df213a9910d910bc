"""The forms of the ratio: identities with the drawn noise, per-sample bias, gradients, the golden point, precision."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import StepPoint, endpoints, gaussian_kl, log_prob, transition
from flowrl.objectives.ratios import (
    RatioForm,
    convert_range,
    divergence,
    log_ratio_pair,
    mean_bias,
    noise_pair,
    reduction_factor,
)
from flowrl.records import LogProbReduction
from tests.dynamics.gaussian import Gaussian, flow_schedule

FORMS: tuple[RatioForm, ...] = get_args(RatioForm)
REDUCTIONS: tuple[LogProbReduction, ...] = get_args(LogProbReduction)


def draw(seed: int, rows: int = 3, dims: tuple[int, ...] = (2, 3), shift: float = 0.05) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old_mean = torch.randn(rows, *dims, generator=g)
    std = torch.rand(rows, *[1] * len(dims), generator=g) + 0.2
    noise = torch.randn(rows, *dims, generator=g)
    return {
        "mean": old_mean + shift * torch.randn(rows, *dims, generator=g),
        "old_mean": old_mean,
        "std": std,
        "x_next": old_mean + std * noise,
        "noise": noise,
    }


def pair(form: RatioForm, case: dict[str, Tensor], reduction: LogProbReduction, mean: Tensor | None = None) -> Tensor:
    """The log ratio of a form through log-probs, as the trainer takes it."""
    mean = case["mean"] if mean is None else mean
    now = log_prob(case["x_next"], mean, case["std"], reduction)
    old = log_prob(case["x_next"], case["old_mean"], case["std"], reduction)
    first, second = log_ratio_pair(
        form, now, old, case["std"], mean_bias(mean, case["old_mean"], case["std"], reduction)
    )
    assert first.dtype == second.dtype == torch.float32 and first.shape == second.shape == now.shape
    return first - second


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_form_is_its_sum_over_the_drawn_noise(reduction: LogProbReduction) -> None:
    case = draw(0)
    for row in range(3):
        std, plain, debiased, normalised = case["std"][row].item(), 0.0, 0.0, 0.0
        for eps, new, old in zip(
            case["noise"][row].flatten().tolist(),
            case["mean"][row].flatten().tolist(),
            case["old_mean"][row].flatten().tolist(),
            strict=True,
        ):
            plain += eps * (new - old) / std - (new - old) ** 2 / (2 * std**2)
            debiased += eps * (new - old) / std
            normalised += eps * (new - old)
        share = {"sum": 1, "mean": 1 / 6, "sqrt": 6**-0.5}[reduction]
        for form, expected in zip(FORMS, (plain, debiased, normalised), strict=True):
            assert pair(form, case, reduction)[row].item() == pytest.approx(expected * share, abs=2e-6), form
            now, old = noise_pair(form, case["mean"], case["old_mean"], case["x_next"], case["std"], reduction)
            assert now[row].item() == pytest.approx(expected * share, abs=2e-7) and not old.any()


def test_bias_belongs_to_each_sample_and_not_to_the_batch() -> None:
    old_mean, std = torch.zeros(2, 4), torch.tensor([[0.5], [0.25]])
    mean = torch.stack([torch.full((4,), 0.1), torch.full((4,), 0.3)])
    bias = mean_bias(mean, old_mean, std, "mean")
    # 0.1^2 / (2 0.5^2) and 0.3^2 / (2 0.25^2); a batch-wide scalar would give both samples one number.
    assert bias.tolist() == pytest.approx([0.02, 0.72], rel=1e-6)
    for row in range(2):
        alone = mean_bias(mean[row : row + 1], old_mean[row : row + 1], std[row : row + 1], "mean")
        assert torch.equal(alone, bias[row : row + 1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bias_is_the_reduced_kl(reduction: LogProbReduction) -> None:
    case = draw(1)
    expected = gaussian_kl(case["mean"], case["old_mean"], case["std"]) * reduction_factor(reduction, 6)
    assert torch.allclose(mean_bias(case["mean"], case["old_mean"], case["std"], reduction), expected, rtol=1e-6)


def test_divergence_is_nats_an_element_without_gradient() -> None:
    mean = torch.full((2, 5), 0.2, requires_grad=True)
    found = divergence(mean, torch.zeros(2, 5), torch.tensor([[0.5], [1.0]]))
    assert found.tolist() == pytest.approx([0.08, 0.02], rel=1e-6) and not found.requires_grad


def test_golden_point_of_a_moved_velocity() -> None:
    """Gaussian data m = 1, s = 0.5 at t = 0.6 -> 0.5, x = 0.2, noise 0.7, the velocity moved by 0.1."""
    point = StepPoint.of(flow_schedule([1.0, 0.6, 0.5, 0.0]), torch.tensor([1]), 2)
    x, old_value = torch.tensor([[0.2]]), Gaussian(1.0, 0.5).velocity(torch.tensor([[0.2]]), 0.6)
    assert old_value.item() == pytest.approx(-1.25, abs=1e-6)
    made = []
    for value in (old_value, old_value + 0.1):
        made.append(transition("flow_sde", 0.7, x, *endpoints(x, value, "velocity", point.alpha, point.sigma), point))
    (old_mean, std), (mean, _) = made
    case = {"mean": mean, "old_mean": old_mean, "std": std, "x_next": old_mean + std * 0.7}
    assert (mean - old_mean).item() == pytest.approx(-0.01245, abs=1e-6)
    assert pair("plain", case, "mean").item() == pytest.approx(-0.0332002, abs=2e-6)
    assert divergence(mean, old_mean, std).item() == pytest.approx(0.00105444, abs=1e-7)
    assert pair("normalised", case, "mean").item() == pytest.approx(-0.008715, abs=1e-6)
    exact = noise_pair("plain", mean, old_mean, case["x_next"], std, "mean")[0]
    assert exact.item() == pytest.approx(-0.0332002, abs=2e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_normalised_gradient_is_the_noise_wherever_the_policy_is(reduction: LogProbReduction) -> None:
    case = draw(2, shift=0.5)
    mean = case["mean"].clone().requires_grad_()
    pair("normalised", case, reduction, mean).sum().backward()
    assert torch.allclose(mean.grad, case["noise"] * reduction_factor(reduction, 6), atol=2e-5)
    again = case["mean"].clone().requires_grad_()
    noise_pair("normalised", again, case["old_mean"], case["x_next"], case["std"], reduction)[0].sum().backward()
    assert torch.allclose(again.grad, case["noise"] * reduction_factor(reduction, 6), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_on_policy_ratio_is_one_and_the_gradient_is_scaled_by_std(form: RatioForm) -> None:
    case = draw(3)
    plain, other = (case["old_mean"].clone().requires_grad_() for _ in range(2))
    pair("plain", case, "mean", plain).sum().backward()
    found = pair(form, case, "mean", other)
    found.sum().backward()
    assert not found.any()
    scale = case["std"] if form == "normalised" else torch.ones_like(case["std"])
    assert torch.allclose(other.grad, scale * plain.grad, rtol=1e-6) and other.grad.abs().min() > 0
    exact = noise_pair(form, case["old_mean"], case["old_mean"], case["x_next"], case["std"], "mean")
    assert not exact[0].any() and not exact[1].any()


def test_drawn_noise_keeps_what_two_log_probs_lose() -> None:
    """At 65,536 elements under ``mean`` a shift of 1e-3 is a log ratio near 4e-6: 1e-7 an ulp of each log-prob."""
    case = draw(4, rows=4, dims=(65_536,), shift=1e-3)
    noise = (case["x_next"].double() - case["old_mean"].double()) / case["std"].double()
    expected = (noise * (case["mean"].double() - case["old_mean"].double())).mean(1)
    exact = noise_pair("normalised", case["mean"], case["old_mean"], case["x_next"], case["std"], "mean")[0].double()
    lossy = pair("normalised", case, "mean").double()
    assert (exact - expected).abs().max() < 2e-10
    assert (lossy - expected).abs().max() > 10 * (exact - expected).abs().max()


def test_old_side_takes_no_gradient_and_wide_input_stays_wide() -> None:
    old_mean = torch.zeros(2, 3, requires_grad=True)
    old = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    std, mean = torch.ones(2, 1, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    bias = mean_bias(mean, old_mean, std.detach(), "sum")
    now, before = log_ratio_pair("normalised", torch.zeros(2, dtype=torch.float64), old, std, bias)
    (now - before).sum().backward()
    assert old.grad is None and old_mean.grad is None and std.grad is None and mean.grad is not None
    assert now.dtype == before.dtype == torch.float64
    assert log_ratio_pair("plain", torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16())[0].dtype == torch.float32


def test_ranges_convert_between_reductions() -> None:
    assert convert_range(1e-4, "mean", "sqrt", 65_536) == pytest.approx(0.0256)
    assert convert_range(1e-4, "mean", "sum", 65_536) == pytest.approx(6.5536)
    assert convert_range(0.0256, "sqrt", "mean", 65_536) == pytest.approx(1e-4)


def test_bad_input_is_named() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="form: expected one of plain, debiased, normalised"):
        log_ratio_pair("raw", one, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: expected one of"):
        noise_pair("raw", one[:, None], one[:, None], one[:, None], one + 1, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias: the form 'debiased' needs \[2\] from mean_bias, got nothing"):
        log_ratio_pair("debiased", two, two)
    with pytest.raises(ValueError, match=r"bias: .* got \[1\]"):
        log_ratio_pair("debiased", two, two, bias=one)
    with pytest.raises(ValueError, match=r"std: the form 'normalised' needs one number a sample, \[2\], got \[1\]"):
        log_ratio_pair("normalised", two, two, one, two)
    with pytest.raises(ValueError, match="std: the form 'normalised'"):
        log_ratio_pair("normalised", two, two, None, two)
    with pytest.raises(ValueError, match=r"log_prob, old_log_prob: expected \[N\] twice"):
        log_ratio_pair("plain", two, one)
    with pytest.raises(ValueError, match=r"log_prob, old_log_prob: expected \[N\] twice"):
        log_ratio_pair("plain", two[:, None], two[:, None])
    with pytest.raises(ValueError, match="mean, old_mean"):
        mean_bias(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 1), "sum")
    with pytest.raises(ValueError, match="std 0"):
        mean_bias(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), "sum")
    with pytest.raises(ValueError, match="std: expected numbers above 0"):
        noise_pair("plain", torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1), "sum")
    with pytest.raises(ValueError, match="x_next: expected"):
        noise_pair("plain", torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(2, 1), "sum")
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        reduction_factor("max", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="elements: expected at least 1"):
        reduction_factor("sum", 0)
