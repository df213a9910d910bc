"""The SDE family beyond one kernel: every prediction kind, the exactly integrated forms, the Wan form, DDPO's step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import (
    KERNELS,
    MEMORYLESS_NOISE,
    StepPoint,
    endpoints,
    interpolate,
    is_stochastic,
    log_prob,
    prediction_from_endpoints,
    transition,
)
from flowrl.dynamics.kernels import FIXED_NOISE, FLOW_ONLY
from flowrl.records import Schedule

from .gaussian import flow_schedule, sd3_schedule, uniform_schedule, variance_preserving
from .test_kernels import NOISES, SD3_ROWS, latents, step_flow

FLOW, VARIANCE_PRESERVING = flow_schedule([0.93, 0.6, 0.25, 0.1, 0.0]), variance_preserving(4)
PAIRS = [
    (name, kind, path)
    for name in KERNELS
    for path, kinds in (("flow", ("velocity", "epsilon", "x0")), ("vp", ("epsilon", "v", "x0")))
    for kind in kinds
    if path == "flow" or name not in FLOW_ONLY
]


@pytest.mark.parametrize(("name", "kind", "path"), PAIRS)
def test_equal_endpoints_give_equal_means_whatever_the_network_predicts(name: str, kind: str, path: str) -> None:
    schedule: Schedule = FLOW if path == "flow" else VARIANCE_PRESERVING
    point = StepPoint.of(schedule, torch.arange(4), 4)
    x0, x1 = latents(4)
    x = interpolate(x0, x1, point.alpha, point.sigma)
    value = prediction_from_endpoints(x0, x1, kind, point.alpha, point.sigma)
    ends = endpoints(x, value, kind, point.alpha, point.sigma)
    mean, std = transition(name, NOISES[name], x, *ends, point)
    true_mean, true_std = transition(name, NOISES[name], x, x0, x1, point)
    torch.testing.assert_close(mean, true_mean, atol=3e-5, rtol=1e-5)
    assert torch.equal(std, true_std)


@pytest.mark.parametrize("schedule", [sd3_schedule(10), VARIANCE_PRESERVING], ids=["flow", "vp"])
def test_memoryless_is_full_ddim_and_precise_at_root_two(schedule: Schedule) -> None:
    x, other = latents(schedule.steps)
    point = StepPoint.of(schedule, torch.arange(schedule.steps), 4)
    ours = transition("memoryless", 1.0, x, x, other, point)
    for name, noise in (("ddim", 1.0), ("precise", MEMORYLESS_NOISE)):
        for mine, theirs in zip(ours, transition(name, noise, x, x, other, point), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)
    # The posterior of x' given x and x0, by the rule for two Gaussians.
    alpha, sigma, alpha_next, sigma_next = (
        v.double() for v in (point.alpha, point.sigma, point.alpha_next, point.sigma_next)
    )
    ratio = alpha / alpha_next
    forward = sigma**2 - ratio**2 * sigma_next**2
    variance = sigma_next**2 * forward / sigma**2
    torch.testing.assert_close(ours[1].double() ** 2, variance, atol=2e-6, rtol=2e-6)
    state = alpha * x.double() + sigma * other.double()
    mean = (ratio * sigma_next**2 * state + alpha_next * forward * x.double()) / sigma**2
    torch.testing.assert_close(ours[0].double(), mean, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize(
    ("rough", "exact", "noise"), [("flow_sde", "memoryless", MEMORYLESS_NOISE), ("dance_sde", "precise_dance", 0.8)]
)
def test_euler_maruyama_is_the_first_order_part_of_the_exact_step(rough: str, exact: str, noise: float) -> None:
    x, v = latents(1)
    gaps = []
    for dt in (0.02, 0.01, 0.005):
        point = StepPoint.of(flow_schedule([1.0, 0.6, 0.6 - dt]), torch.tensor([1]), 4)
        (m1, s1), (m2, s2) = (step_flow(name, noise, x, v, point) for name in (rough, exact))
        assert s1.item() > 0.1 * math.sqrt(dt)
        gaps.append((float((m1 - m2).abs().max()), abs((s1**2 - s2**2).item())))
    for coarse, fine in pairwise(gaps):  # the gap is of second order: a quarter at half the step
        assert coarse[0] / fine[0] == pytest.approx(4, rel=0.12)
        assert coarse[1] / fine[1] == pytest.approx(4, rel=0.12)


def test_precise_dance_solves_the_frozen_equation() -> None:
    eta, t, t_next = 0.8, 0.5, 0.2
    u = t_next + (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * (t - t_next)
    rho = math.exp(-float((eta**2 / (2 * u**2)).mean()) * (t - t_next))
    point = StepPoint.of(flow_schedule([t, t_next]), torch.tensor([0]), 2)
    kept, std = transition("precise_dance", eta, torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), point)
    assert kept.item() == pytest.approx(t_next * rho, abs=1e-6)
    assert std.item() == pytest.approx(t_next * math.sqrt(1 - rho**2), abs=1e-6)


@pytest.mark.parametrize("name", ["precise_dance", "memoryless", "precise", "cps", "ddim"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_mixing_kernels_end_at_the_data_without_noise(name: str, noise: float) -> None:
    x, v = latents(4)
    mean, std = step_flow(name, noise, x, v, StepPoint.of(uniform_schedule(4), torch.arange(4), 4))
    assert bool(mean.isfinite().all()) and std.flatten()[-1].item() == 0
    torch.testing.assert_close(mean[-1], (x - 0.25 * v)[-1])


@pytest.mark.parametrize("name", sorted(FIXED_NOISE))
def test_a_fixed_level_does_not_read_the_noise(name: str) -> None:
    x, v = latents(4)
    point = StepPoint.of(uniform_schedule(4), torch.arange(4), 4)
    for ours, theirs in zip(step_flow(name, 0.2, x, v, point), step_flow(name, 3.0, x, v, point), strict=True):
        assert torch.equal(ours, theirs)
    assert is_stochastic(name, 0.0) and float(step_flow(name, 0.0, x, v, point)[1].flatten()[0]) > 0


@pytest.mark.parametrize("end", [0.0, 0.04])
def test_wan_form_equals_its_velocity_form(end: float) -> None:
    times = [1.0, 0.93, 0.6, 0.25, end]
    point = StepPoint.of(flow_schedule(times), torch.arange(4), 4)
    x, v = latents(4)
    mean, std = step_flow("wan_sde", 1.0, x, v, point)
    for k, (t, t_next) in enumerate(pairwise(times)):
        g, dt = end + (0.93 - end) * t, t_next - t
        by_hand = x[k].double() * (1 + g**2 / (2 * t) * dt) + v[k].double() * (1 + g**2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(mean[k].double(), by_hand, atol=3e-6, rtol=3e-6)
        assert std[k].item() == pytest.approx(g * math.sqrt(-dt), rel=1e-5)


# The shifted ten-step grid at every index, against plain float64 arithmetic.


@pytest.mark.parametrize("step", range(10))
def test_shifted_grid_against_plain_arithmetic(step: int) -> None:
    smallest = 3 * 0.001 / (1 + 2 * 0.001)
    line = [1 - k / 9 * (1 - smallest) for k in range(10)]
    times = [3 * u / (1 + 2 * u) for u in line] + [0.0]
    t, t_next = times[step], times[step + 1]
    dt, below_one = t_next - t, times[1] if step == 0 else t
    point = StepPoint.of(sd3_schedule(10), torch.tensor([step]), 2)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert point.t.item() == pytest.approx(t, abs=1e-6)
    gs = {"flow_sde": 0.7 * math.sqrt(t / (1 - below_one)), "dance_sde": 0.3, "wan_sde": times[1] * t}
    for name, g in gs.items():
        by_x, std = step_flow(name, NOISES[name], one, zero, point)
        by_v, _ = step_flow(name, NOISES[name], zero, one, point)
        expected = (1 + g**2 * dt / (2 * t), dt * (1 + g**2 * (1 - t) / (2 * t)), g * math.sqrt(-dt))
        assert (by_x.item(), by_v.item(), std.item()) == pytest.approx(expected, rel=2e-5, abs=2e-6)
        left, extra = step_flow(name, NOISES[name], one, 1 / point.t, point)
        residual = math.hypot(t + dt + g**2 * dt / 2 * (1 + (1 - t) / t), g * math.sqrt(-dt))
        assert math.hypot(left.item() * t, extra.item()) == pytest.approx(residual, rel=2e-5)
        if name == "flow_sde" and step in SD3_ROWS:
            assert g == pytest.approx(
                {0: 3.50567, 1: 3.43507, 4: 1.35920, 7: 0.65244, 8: 0.43441, 9: 0.06644}[step], abs=6e-6
            )
    sin = math.sin(0.4 * math.pi)
    assert transition("cps", 0.8, one, one, one, point)[1].item() == pytest.approx(t_next * sin, rel=2e-5, abs=1e-7)


# DDPO on Stable Diffusion 1.


def ddpo_scheduler() -> tuple[object, Tensor, Tensor, Schedule]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps
    bar = torch.cat([scheduler.alphas_cumprod[steps], scheduler.final_alpha_cumprod[None]])
    t = torch.cat([(steps + 1) / 1000, torch.zeros(1)])
    return scheduler, steps, bar, Schedule(t=t, alpha=bar.sqrt(), sigma=(1 - bar).sqrt())


def ddpo_reference(x: Tensor, epsilon: Tensor, bar: float, bar_next: float) -> tuple[Tensor, float]:
    """DDIM with eta = 1 as DDPO writes it, in float64: predicted data, direction to x, variance."""
    variance = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
    data = (x.double() - math.sqrt(1 - bar) * epsilon.double()) / math.sqrt(bar)
    return math.sqrt(bar_next) * data + math.sqrt(1 - bar_next - variance) * epsilon.double(), math.sqrt(variance)


def test_ddpo_step_mean_variance_and_log_prob() -> None:
    scheduler, steps, bar, schedule = ddpo_scheduler()
    x, epsilon = latents(10)
    noise, _ = latents(10, seed=4)
    point = StepPoint.of(schedule, torch.arange(10), 4)
    ends = endpoints(x, epsilon, "epsilon", point.alpha, point.sigma)
    for name in ("ddim", "memoryless"):
        mean, std = transition(name, 1.0, x, *ends, point)
        x_next = mean + std * noise
        got = log_prob(x_next, mean, std, "mean")
        for k in range(10):
            want, want_std = ddpo_reference(x[k], epsilon[k], bar[k].item(), bar[k + 1].item())
            torch.testing.assert_close(mean[k].double(), want, atol=2e-5, rtol=2e-5)
            assert std[k].item() == pytest.approx(want_std, rel=2e-4)
            theirs = scheduler.step(epsilon[k], int(steps[k]), x[k], eta=1.0, variance_noise=noise[k]).prev_sample
            torch.testing.assert_close(x_next[k], theirs, atol=2e-5, rtol=2e-5)
            gap = (x_next[k].double() - want) / want_std
            expected = float((-(gap**2) / 2).mean()) - math.log(want_std) - 0.5 * math.log(2 * math.pi)
            assert got[k].item() == pytest.approx(expected, abs=2e-3)
