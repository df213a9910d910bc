"""Step weights: the table of gradient scales by autograd through the real kernels, and the normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import StepPoint, endpoints, log_prob, mean_slope, transition
from flowrl.objectives.ratios import RatioForm, log_ratio_pair, mean_bias
from flowrl.objectives.step_weights import MEAN_ONE, StepWeight, normalise_weights, step_weight
from flowrl.records import Schedule
from tests.dynamics.gaussian import flow_schedule, sd3_schedule, uniform_schedule

KERNELS = (("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("precise", 0.7), ("ddim", 0.5))


def parts(kernel: str, noise: float, schedule: Schedule, steps: int) -> tuple[StepPoint, Tensor, Tensor]:
    """(point, std, slope) of the first ``steps`` steps, [steps, 1]."""
    point = StepPoint.of(schedule, torch.arange(steps), 2)
    x = torch.zeros(steps, 1)
    return point, transition(kernel, noise, x, x, x, point)[1], mean_slope(kernel, noise, point)


def scale(
    kernel: str, noise: float, schedule: Schedule, ratio: RatioForm, form: StepWeight, steps: int | None = None
) -> list[float]:
    """|d (weight x log ratio) / d velocity| of each step for one unit of noise, by autograd, on policy."""
    steps = schedule.steps - 1 if steps is None else steps
    point, std, slope = parts(kernel, noise, schedule, steps)
    x, value = torch.full((steps, 1), 0.3), torch.full((steps, 1), -0.4, requires_grad=True)
    ends = endpoints(x, value, "velocity", point.alpha, point.sigma)
    mean, _ = transition(kernel, noise, x, *ends, point)
    old_mean = mean.detach()
    x_next = old_mean + std
    now, old = log_prob(x_next, mean, std, "sum"), log_prob(x_next, old_mean, std, "sum")
    first, second = log_ratio_pair(ratio, now, old, std, mean_bias(mean, old_mean, std, "sum"))
    ((first - second) * step_weight(form, std, point.length, slope)).sum().backward()
    assert value.grad is not None
    return value.grad.abs().flatten().tolist()


# t = 0.9 ... 0.1 of ten even steps; the first step, clamped at t = 1, stands before.
PLAIN = [1.245 * math.sqrt(0.1 * (1 - t / 10) / (t / 10)) / 0.7 for t in range(9, 0, -1)]


@pytest.mark.parametrize(
    ("ratio", "form", "first", "others"),
    [
        ("plain", "none", 0.1 / 0.7, PLAIN),
        ("debiased", "none", 0.1 / 0.7, PLAIN),
        ("normalised", "none", 0.1, [0.1245] * 9),
        ("plain", "std", 0.1, [0.1245] * 9),
        ("normalised", "inverse_dt", 1.0, [1.245] * 9),
        ("plain", "std_over_dt", 1.0, [1.245] * 9),
        ("normalised", "inverse_slope", 1.0, [1.0] * 9),
        ("plain", "std_over_slope", 1.0, [1.0] * 9),
        ("plain", "dt_std_over_slope", 0.1, [0.1] * 9),
        ("plain", "dt", 0.01 / 0.7, [0.1 * value for value in PLAIN]),
    ],
)
def test_gradient_scale_of_each_step(ratio: RatioForm, form: StepWeight, first: float, others: list[float]) -> None:
    found = scale("flow_sde", 0.7, uniform_schedule(10), ratio, form, steps=10)
    assert found == pytest.approx([first, *others], rel=2e-4)
    if form == "none" and ratio == "plain":
        assert found[1] == pytest.approx(0.187, abs=6e-4) and found[-1] == pytest.approx(1.687, abs=6e-4)


@pytest.mark.parametrize(("kernel", "noise"), KERNELS)
@pytest.mark.parametrize("schedule", [uniform_schedule(10), sd3_schedule(10)], ids=["even", "sd3"])
def test_flash_and_general_guard_are_flat_on_every_kernel_and_grid(
    kernel: str, noise: float, schedule: Schedule
) -> None:
    for ratio, form in (("plain", "std_over_slope"), ("normalised", "inverse_slope")):
        assert scale(kernel, noise, schedule, ratio, form) == pytest.approx([1.0] * 9, rel=1e-3)  # type: ignore[arg-type]
    plain = scale(kernel, noise, schedule, "plain", "none")
    assert max(plain) > 1.15 * min(plain), "the plain scale must not be flat"


def test_public_guard_differs_from_the_general_one_by_a_constant_only_for_flow_grpo() -> None:
    grid = sd3_schedule(10)
    public = scale("flow_sde", 0.7, grid, "normalised", "inverse_dt")
    assert public == pytest.approx([1.0] + [1.245] * 8, rel=1e-3)
    dance = scale("dance_sde", 0.3, grid, "normalised", "inverse_dt")
    assert max(dance) > 1.1 * min(dance)


def test_pcpo_keeps_the_total_credit_and_shares_it_by_length() -> None:
    """zeta = sum of the native scales: 13.343 for DanceGRPO with 16 steps, eta 0.3, shift 3 (the paper's figure)."""
    u = torch.linspace(1, 0, 17, dtype=torch.float64)
    grid = flow_schedule(3 * u / (1 + 2 * u))
    point, std, slope = parts("dance_sde", 0.3, grid, 16)
    native, dt = (slope / std).flatten(), point.length.flatten()
    raw = step_weight("dt_std_over_slope", std, point.length, slope)
    made = normalise_weights(raw, torch.ones(16, dtype=torch.bool), scale=native)
    credit = made * native
    assert credit.sum().item() == pytest.approx(13.343, abs=5e-4)
    assert (credit / dt).tolist() == pytest.approx([13.343] * 16, abs=1e-3)


def test_worked_numbers() -> None:
    std, dt, slope = torch.tensor([[0.5], [0.2]]), torch.tensor([[0.1], [0.4]]), torch.tensor([[0.25], [0.8]])
    expected = {
        "none": [1, 1],
        "std": [0.5, 0.2],
        "inverse_dt": [10, 2.5],
        "inverse_slope": [4, 1.25],
        "std_over_slope": [2, 0.25],
        "dt": [0.1, 0.4],
        "std_over_dt": [5, 0.5],
        "dt_std_over_slope": [0.2, 0.1],
    }
    for form, numbers in expected.items():
        made = step_weight(form, std, dt, slope)  # type: ignore[arg-type]
        assert made.shape == (2,) and made.dtype == torch.float32 and made.tolist() == pytest.approx(numbers), form
    assert {"std", "std_over_slope", "dt", "dt_std_over_slope"} == MEAN_ONE


def test_weights_have_mean_one_over_what_is_trained() -> None:
    weight = torch.tensor([[1.0, 3.0, math.nan], [2.0, 7.0, 100.0]])
    element = torch.tensor([[True, True, False], [True, False, False]])
    made = normalise_weights(weight, element)
    assert made.tolist() == [[0.5, 1.5, 0.0], [1.0, 0.0, 0.0]] and made.dtype == torch.float32
    assert not normalise_weights(weight, torch.zeros_like(element)).any()
    held = normalise_weights(weight, element, scale=torch.tensor([[2.0, 1.0, 5.0], [1.0, math.inf, 0.0]]))
    # sum(scale) / sum(w scale) = 4 / 7
    assert held[0].tolist() == pytest.approx([4 / 7, 12 / 7, 0.0]) and held[1, 0].item() == pytest.approx(8 / 7)


def test_normalisation_does_not_depend_on_the_number_of_processes() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 6.0])
    element = torch.tensor([True, True, True, False])
    whole = normalise_weights(weight, element)
    sums = []
    for part in (slice(0, 1), slice(1, 4)):
        normalise_weights(weight[part], element[part], reduce=lambda x: sums.append(x) or x)
    together = torch.stack(sums).sum(0)
    found = [normalise_weights(weight[p], element[p], reduce=lambda _: together) for p in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat(found), whole)


def test_bad_input_is_named() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="form: expected one of none, std"):
        step_weight("dt_squared", one, one, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one number a sample in each, got \[2\], \[1\], \[2\]"):
        step_weight("std", one, torch.ones(1), one)
    with pytest.raises(ValueError, match="step weight 'std': not finite and above 0"):
        step_weight("std", torch.tensor([0.1, 0.0]), one, one)
    with pytest.raises(ValueError, match="step weight 'inverse_slope': not finite"):
        step_weight("inverse_slope", one, one, torch.tensor([0.1, 0.0]))
    assert step_weight("none", torch.zeros(2), one, one).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"element: expected bool \[2\] like weight"):
        normalise_weights(one, one)
    with pytest.raises(ValueError, match="weight: expected finite numbers >= 0"):
        normalise_weights(-one, one > 0)
    with pytest.raises(ValueError, match="scale: expected finite numbers >= 0"):
        normalise_weights(one, one > 0, scale=one * math.inf)
