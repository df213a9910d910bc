"""Log-probabilities and divergences against torch.distributions, closed forms and sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowrl.dynamics import (
    StepPoint,
    endpoints,
    gaussian_kl,
    log_prob,
    mean_slope,
    next_latent,
    reference_kl,
    transition,
)

from .gaussian import Gaussian, flow_schedule, sd3_schedule, uniform_schedule

STOCHASTIC = [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("precise", 0.7), ("ddim", 0.6)]
SIZE = 2 * 3 * 4


def draw(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_next, mean = torch.randn(2, batch, 2, 3, 4, generator=generator)
    return x_next, mean, torch.linspace(0.05, 1.5, batch).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(("reduction", "divisor"), [("sum", 1.0), ("mean", SIZE), ("sqrt", math.sqrt(SIZE))])
def test_log_prob_equals_torch_normal(reduction: str, divisor: float) -> None:
    x_next, mean, std = draw(5)
    expected = Normal(mean.double(), std.double()).log_prob(x_next.double()).sum((1, 2, 3)) / divisor
    got = log_prob(x_next, mean, std, reduction)
    assert got.shape == (5,) and got.dtype is torch.float32
    torch.testing.assert_close(got, expected.float(), rtol=2e-6, atol=2e-6)


def test_log_prob_gradient_is_the_scaled_deviation() -> None:
    x_next, mean, std = draw(3)
    mean.requires_grad_()
    log_prob(x_next, mean, std, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, (x_next - mean.detach()) / std**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan])
def test_a_step_without_noise_has_no_log_prob(bad: float) -> None:
    x_next, mean, std = draw(3)
    std[1] = bad
    with pytest.raises(ValueError, match="log_prob: a step with std 0"):
        log_prob(x_next, mean, std, "sum")
    with pytest.raises(ValueError, match="gaussian_kl: a step with std 0"):
        gaussian_kl(x_next, mean, std)
    point = StepPoint.of(uniform_schedule(4), torch.tensor([0, 1, 2]), 4)
    for form in ("paper", "no_dt"):
        with pytest.raises(ValueError, match=f"reference_kl '{form}': a step with std 0"):
            reference_kl(form, mean, x_next, std, point, mean, x_next)
    assert bool(reference_kl("velocity", mean, x_next, std, point, mean, x_next).isfinite().all())


def test_unknown_names_are_refused() -> None:
    x_next, mean, std = draw(3)
    point = StepPoint.of(uniform_schedule(4), torch.tensor([0, 1, 2]), 4)
    with pytest.raises(
        ValueError, match=r"objective\.log_prob_reduction: unknown reduction 'max'; use one of sum, mean"
    ):
        log_prob(x_next, mean, std, "max")
    with pytest.raises(ValueError, match=r"objective\.kl\.form: unknown form 'k3'; use one of paper, no_dt, velocity"):
        reference_kl("k3", mean, x_next, std, point, mean, x_next)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    x_next, mean, std = draw(3)
    x_next, mean = x_next.to(dtype), mean.to(dtype)
    assert torch.equal(log_prob(x_next, mean, std, "mean"), log_prob(x_next.float(), mean.float(), std, "mean"))
    assert gaussian_kl(x_next, mean, std).dtype is torch.float32
    point = StepPoint.of(uniform_schedule(4), torch.tensor([0, 1, 2]), 4)
    for form in ("paper", "no_dt", "velocity"):
        assert reference_kl(form, mean, x_next, std, point, mean, x_next).dtype is torch.float32


def test_gaussian_kl_equals_torch_and_sampling() -> None:
    mean, mean_ref, std = draw(4)
    mean_ref = mean + 0.2 * mean_ref
    std = std + 0.3
    expected = kl_divergence(Normal(mean.double(), std.double()), Normal(mean_ref.double(), std.double()))
    got = gaussian_kl(mean, mean_ref, std)
    torch.testing.assert_close(got, expected.sum((1, 2, 3)).float(), rtol=1e-5, atol=1e-6)

    count, generator = 20_000, torch.Generator().manual_seed(1)
    m, r, s = mean[1:2], mean_ref[1:2], std[1:2].expand(count, 1, 1, 1)
    x_next = m + s * torch.randn(count, 2, 3, 4, generator=generator)
    gap = log_prob(x_next, m.expand_as(x_next), s, "sum") - log_prob(x_next, r.expand_as(x_next), s, "sum")
    assert gap.mean().item() == pytest.approx(got[1].item(), abs=4 * gap.std().item() / math.sqrt(count))


def test_policy_perturbation_at_the_golden_point() -> None:
    point = StepPoint.of(flow_schedule([1.0, 0.6, 0.5, 0.0]), torch.tensor([1]), 2)
    x = torch.tensor([[0.2]])
    velocity = Gaussian(1.0, 0.5).velocity(x, 0.6)
    (old, std), (new, _) = (
        transition("flow_sde", 0.7, x, *endpoints(x, v, "velocity", point.alpha, point.sigma), point)
        for v in (velocity, velocity + 0.1)
    )
    x_next = next_latent(old, std, torch.tensor([[0.7]]), torch.float32)
    log_ratio = log_prob(x_next, new, std, "sum") - log_prob(x_next, old, std, "sum")
    divergence = gaussian_kl(new, old, std)
    assert (new - old).item() == pytest.approx(-0.01245, abs=1e-6)
    assert log_ratio.item() == pytest.approx(-0.0332002, abs=2e-6)
    assert divergence.item() == pytest.approx(0.00105444, abs=1e-7)
    assert ((log_ratio + divergence) * std).item() == pytest.approx(-0.008715, abs=1e-6)


def steps_of(name: str, noise: float, point: StepPoint) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mean, mean_ref, std, v, v_ref) of a policy and its reference on one batch."""
    batch = len(point.t)
    x, v, _ = draw(batch)
    v_ref = v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(9))
    (mean, std), (mean_ref, _) = (
        transition(name, noise, x, *endpoints(x, value, "velocity", point.alpha, point.sigma), point)
        for value in (v, v_ref)
    )
    return mean, mean_ref, std, v, v_ref


def test_step_divergence_closed_forms() -> None:
    times = torch.tensor([0.9, 0.6, 0.35, 0.1, 0.0])
    point = StepPoint.of(flow_schedule(times), torch.arange(4), 4)
    t, dt = times[:4].double(), (times[:4] - times[1:]).double()
    a, eta = 0.7, 0.3

    mean, mean_ref, std, v, v_ref = steps_of("flow_sde", a, point)
    gap = (v - v_ref).double().square().sum((1, 2, 3))
    expected = dt * (1 + a**2 / 2) ** 2 * (1 - t) * gap / (2 * a**2 * t)
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std).double(), expected, rtol=2e-4, atol=1e-6)

    mean, mean_ref, std, v, v_ref = steps_of("dance_sde", eta, point)
    expected = dt / (2 * eta**2) * (1 + eta**2 * (1 - t) / (2 * t)) ** 2 * gap
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std).double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "noise"), STOCHASTIC)
def test_reference_kl_forms_and_units(name: str, noise: float) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.tensor([1, 4, 7]), 4)
    mean, mean_ref, std, v, v_ref = steps_of(name, noise, point)
    paper, no_dt, velocity = (
        reference_kl(form, mean, mean_ref, std, point, v, v_ref) for form in ("paper", "no_dt", "velocity")
    )
    dt = torch.tensor([0.046780, 0.083090, 0.186827])
    assert paper.shape == no_dt.shape == velocity.shape == (3,)
    torch.testing.assert_close(paper * SIZE, gaussian_kl(mean, mean_ref, std), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(no_dt, paper * dt, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(velocity, (v - v_ref).square().mean((1, 2, 3)), rtol=1e-5, atol=1e-9)
    slope = mean_slope(name, noise, point).flatten()
    torch.testing.assert_close(paper, velocity * slope**2 / (2 * std.flatten() ** 2), rtol=2e-3, atol=1e-7)


def test_no_dt_divides_by_the_diffusion_coefficient() -> None:
    point = StepPoint.of(sd3_schedule(10), torch.tensor([1, 4, 7]), 4)
    mean, mean_ref, std, v, v_ref = steps_of("flow_sde", 0.7, point)
    g = torch.tensor([3.43507, 1.35920, 0.65244])
    expected = (mean - mean_ref).square().mean((1, 2, 3)) / (2 * g**2)
    torch.testing.assert_close(
        reference_kl("no_dt", mean, mean_ref, std, point, v, v_ref), expected, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize(("name", "noise"), STOCHASTIC)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_stored_latent_replays_to_a_ratio_of_one(name: str, noise: float, storage: torch.dtype) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.tensor([0, 1, 4, 7]), 4)
    x, v, _ = draw(4)
    x = x.to(storage)

    def step() -> tuple[Tensor, Tensor]:
        return transition(name, noise, x, *endpoints(x, v, "velocity", point.alpha, point.sigma), point)

    mean, std = step()
    eps = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    stored = next_latent(mean, std, eps, storage)
    old = log_prob(stored, mean, std, "sum")
    assert torch.equal((log_prob(stored, *step(), "sum") - old).exp(), torch.ones(4))
    if storage is torch.bfloat16:
        unrounded = log_prob(mean + std * eps, mean, std, "sum")
        assert bool((unrounded != old).any())


def test_the_weight_of_the_path_divergence_is_least_without_memory() -> None:
    # The path KL of two drifts weighs ||dv||^2 by (1/g + g(1-t)/2t)^2 / 2, read here off the step KL of small steps.
    dt = 1e-3
    t = torch.tensor([0.2, 0.5, 0.8])
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    for value in t.tolist():
        point = StepPoint.of(flow_schedule([1.0, value, value - dt]), torch.tensor([1]), 2)
        weights = []
        for a in (0.7, math.sqrt(2.0), 2.2):
            (mean, std), (mean_ref, _) = (
                transition("flow_sde", a, zero, *endpoints(zero, v, "velocity", point.alpha, point.sigma), point)
                for v in (one, zero)
            )
            weights.append(gaussian_kl(mean, mean_ref, std).item() / point.length.item())
        assert weights[1] == pytest.approx((1 - value) / value, rel=1e-3)
        assert weights[1] < weights[0] and weights[1] < weights[2]
