"""Step kernels against golden numbers, independent forms, identities and diffusers."""

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
    check_kernel,
    endpoints,
    is_stochastic,
    mean_slope,
    mixing,
    next_latent,
    transition,
)
from flowrl.records import Schedule

from .gaussian import Gaussian, flow_schedule, sd3_schedule, uniform_schedule, variance_preserving

NOISES = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "precise": 0.7, "ddim": 0.6} | {
    "memoryless": 1.0,
    "precise_dance": 0.3,
    "wan_sde": 1.0,
}


def latents(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 3, 4, generator=generator), torch.randn(batch, 2, 3, 4, generator=generator)


def step_flow(name: str, noise: float, x: Tensor, velocity: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    return transition(name, noise, x, *endpoints(x, velocity, "velocity", point.alpha, point.sigma), point)


# Golden point: m = 1, s = .5, t = .6 -> .5, x = .2, exact velocity -1.25.


@pytest.mark.parametrize(
    ("name", "noise", "mean", "std"),
    [
        ("ode", 0.0, 0.325000, 0.0),
        ("flow_sde", 0.7, 0.343375, 0.271109),
        ("dance_sde", 0.3, 0.327250, 0.094868),
        ("cps", 0.8, 0.428647, 0.475528),
        ("precise", 0.7, 0.339185, 0.212242),
        ("ddim", 0.6, 0.340836, 0.223607),  # rho = sqrt(.8)
        ("memoryless", 1.0, 0.375, 0.372678),  # rho = 2 / 3
        ("precise_dance", 0.3, 0.327233, 0.085957),  # rho = exp(-.015)
        ("wan_sde", 1.0, 0.328240, 0.113842),  # g = .6 * .6
    ],
)
def test_golden_point(name: str, noise: float, mean: float, std: float) -> None:
    point = StepPoint.of(flow_schedule([1.0, 0.6, 0.5, 0.0]), torch.tensor([1]), 2)
    x = torch.tensor([[0.2]])
    velocity = Gaussian(1.0, 0.5).velocity(x, 0.6)
    assert velocity.item() == pytest.approx(-1.25, abs=1e-6)
    got_mean, got_std = step_flow(name, noise, x, velocity, point)
    assert got_mean.item() == pytest.approx(mean, abs=1e-6)
    assert got_std.item() == pytest.approx(std, abs=1e-6)


# SD3.5's ten-step grid: t, dt, std of flow_sde (.7) and of cps (.8), d mean/dx and d mean/dv of flow_sde, noise left.
SD3_ROWS = {
    0: (1.000000, -0.039871, 0.70000, 0.91314, 0.75500, -0.03987, 1.0007, 0.9601),
    1: (0.960129, -0.046780, 0.74296, 0.86865, 0.71254, -0.05824, 0.9715, 0.9133),
    4: (0.790368, -0.083090, 0.39179, 0.67266, 0.90289, -0.10345, 0.7251, 0.7073),
    7: (0.464876, -0.186827, 0.28201, 0.26444, 0.91446, -0.23260, 0.3415, 0.2780),
    8: (0.278049, -0.269120, 0.22536, 0.00849, 0.90867, -0.33505, 0.2400, 0.0089),
    9: (0.008929, -0.008929, 0.00628, 0.0, 0.99779, -0.01112, 0.0067, 0.0),
}


@pytest.mark.parametrize("step", SD3_ROWS)
def test_golden_table_of_the_shifted_ten_step_grid(step: int) -> None:
    t, dt, flow_std, cps_std, by_x, by_v, left_flow, left_cps = SD3_ROWS[step]
    point = StepPoint.of(sd3_schedule(10), torch.tensor([step]), 2)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert point.t.item() == pytest.approx(t, abs=1e-6)
    assert -point.length.item() == pytest.approx(dt, abs=1e-6)
    assert transition("flow_sde", 0.7, one, one, one, point)[1].item() == pytest.approx(flow_std, abs=6e-6)
    assert transition("cps", 0.8, one, one, one, point)[1].item() == pytest.approx(cps_std, abs=6e-6)
    assert step_flow("flow_sde", 0.7, one, zero, point)[0].item() == pytest.approx(by_x, abs=6e-6)
    assert step_flow("flow_sde", 0.7, zero, one, point)[0].item() == pytest.approx(by_v, abs=6e-6)
    for name, noise, left in (("flow_sde", 0.7, left_flow), ("cps", 0.8, left_cps)):
        # All the data at 0: x is pure noise of size t and the exact velocity is x / t.
        mean, std = step_flow(name, noise, one, 1 / point.t, point)
        assert math.hypot(mean.item() * t, std.item()) == pytest.approx(left, abs=6e-5)


# Independent forms.


@pytest.mark.parametrize(("name", "a"), [("flow_sde", 0.7), ("flow_sde", 1.3), ("dance_sde", 0.3)])
def test_euler_maruyama_equals_its_velocity_and_score_forms(name: str, a: float) -> None:
    times = [1.0, 0.93, 0.6, 0.25, 0.1, 0.0]
    point = StepPoint.of(flow_schedule(times), torch.arange(5), 4)
    x, v = latents(5)
    mean, std = step_flow(name, a, x, v, point)
    for k, (t, t_next) in enumerate(pairwise(times)):
        g = a if name == "dance_sde" else a * math.sqrt(t / (1 - (times[1] if t == 1 else t)))
        dt = t_next - t
        xk, vk = x[k].double(), v[k].double()
        by_velocity = xk * (1 + g**2 / (2 * t) * dt) + vk * (1 + g**2 * (1 - t) / (2 * t)) * dt
        score = -(xk - (1 - t) * (xk - t * vk)) / t**2
        by_score = xk + vk * dt - 0.5 * g**2 * score * dt
        torch.testing.assert_close(mean[k].double(), by_velocity, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(mean[k].double(), by_score, atol=3e-6, rtol=3e-6)
        assert std[k].item() == pytest.approx(g * math.sqrt(-dt), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "noise"), [("ode", 0.5), ("cps", 0.0), ("precise", 0.0), ("ddim", 0.0), ("precise_dance", 0.0)]
)
def test_without_noise_every_mixing_kernel_is_the_euler_step(name: str, noise: float) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 4)
    x, v = latents(10)
    euler = x.double() + v.double() * (point.t_next.double() - point.t.double())
    mean, std = step_flow(name, noise, x, v, point)
    torch.testing.assert_close(mean.double(), euler, atol=1e-6, rtol=1e-6)
    assert torch.equal(std, torch.zeros(10, 1, 1, 1))
    x0_hat, x1_hat = endpoints(x, v, "velocity", point.alpha, point.sigma)
    assert torch.equal(mean, mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, 1.0)[0])


def test_full_mixing_equals_euler_to_double_precision() -> None:
    x, v = (value.double() for value in latents(3))
    t = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64).reshape(3, 1, 1, 1)
    t_next = t * 0.7
    mean, std = mixing(x - t * v, x + (1 - t) * v, 1 - t_next, t_next, 1.0)
    torch.testing.assert_close(mean, x + v * (t_next - t), atol=1e-15, rtol=1e-14)
    assert torch.equal(std, torch.zeros_like(t))


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_without_noise_euler_maruyama_is_the_ode(name: str) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 4)
    x, v = latents(10)
    mean, std = step_flow(name, 0.0, x, v, point)
    torch.testing.assert_close(mean, step_flow("ode", 0.0, x, v, point)[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(std, torch.zeros(10, 1, 1, 1))


def test_cps_keeps_the_noise_of_the_next_time_whatever_eta() -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 2)
    one, zero = torch.ones(10, 1), torch.zeros(10, 1)
    for eta in (0.1, 0.5, 0.8, 1.0):
        kept, std = transition("cps", eta, zero, zero, one, point)
        torch.testing.assert_close(std, point.t_next * math.sin(eta * math.pi / 2), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close((kept**2 + std**2).sqrt(), point.t_next, atol=1e-6, rtol=1e-6)


def test_precise_solves_the_frozen_equation() -> None:
    # With x0_hat frozen, rho = exp(-integral of g^2 / 2u^2); the integral is taken here by a fine midpoint rule.
    a, t, t_next = 0.9, 0.8, 0.55
    u = t_next + (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * (t - t_next)
    rho = math.exp(-float((a**2 / (2 * u * (1 - u))).mean()) * (t - t_next))
    point = StepPoint.of(flow_schedule([t, t_next]), torch.tensor([0]), 2)
    kept, std = transition("precise", a, torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), point)
    assert kept.item() == pytest.approx(t_next * rho, abs=1e-6)
    assert std.item() == pytest.approx(t_next * math.sqrt(1 - rho**2), abs=1e-6)


def test_flow_sde_is_the_first_order_part_of_precise() -> None:
    x, v = latents(1)
    gaps = []
    for dt in (0.1, 0.05, 0.025):
        point = StepPoint.of(flow_schedule([1.0, 0.6, 0.6 - dt]), torch.tensor([1]), 4)
        (exact, exact_std), (rough, rough_std) = (step_flow(name, 0.7, x, v, point) for name in ("precise", "flow_sde"))
        gaps.append((float((exact - rough).abs().max()), abs((exact_std**2 - rough_std**2).item())))
    for coarse, fine in pairwise(gaps):
        assert coarse[0] / fine[0] == pytest.approx(4, rel=0.15)
        assert coarse[1] / fine[1] == pytest.approx(4, rel=0.35)


def test_precise_starts_and_ends_without_singularities() -> None:
    schedule = uniform_schedule(4)
    x, v = latents(4)
    mean, std = step_flow("precise", 0.7, x, v, StepPoint.of(schedule, torch.arange(4), 4))
    assert bool(mean.isfinite().all()) and bool(std.isfinite().all())
    # From t = 1 all noise is drawn anew; to t = 0 none is.
    torch.testing.assert_close(mean[0], (x - v)[0] * 0.25)
    assert std.flatten()[0].item() == pytest.approx(0.75)
    assert std.flatten()[-1].item() == 0
    torch.testing.assert_close(mean[-1], (x - 0.25 * v)[-1])


@pytest.mark.parametrize("a", [0.3, 0.7, MEMORYLESS_NOISE])
def test_flow_sde_clamps_its_first_step_only(a: float) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 4)
    x, v = latents(10)
    mean, std = step_flow("flow_sde", a, x, v, point)
    assert bool(mean.isfinite().all()) and bool(std.isfinite().all())
    assert std.flatten()[0].item() == pytest.approx(
        a, rel=1e-5
    )  # g sqrt(dt) = a sqrt(dt / (1 - t_1)), and dt = 1 - t_1
    start = StepPoint.of(flow_schedule([0.999, 0.9, 0.0]), torch.tensor([0]), 4)
    assert step_flow("flow_sde", a, x[:1], v[:1], start)[1].item() == pytest.approx(
        a * math.sqrt(999 * 0.099), rel=1e-4
    )


# DDIM.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(prediction: str, spacing: str, eta: float) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=1,
    )
    scheduler.set_timesteps(10)
    steps = scheduler.timesteps
    cumulative = torch.cat([scheduler.alphas_cumprod[steps], scheduler.final_alpha_cumprod[None]])
    assert bool((steps[:-1] - steps[1:] == 100).all()), "diffusers steps by 100; the grid below relies on it"
    schedule = Schedule(
        t=torch.cat([(steps + 1) / 1000, torch.zeros(1)]), alpha=cumulative.sqrt(), sigma=(1 - cumulative).sqrt()
    )
    check_kernel("ddim", eta, schedule)
    x, value = latents(10)
    noise, _ = latents(10, seed=1)
    point = StepPoint.of(schedule, torch.arange(10), 4)
    kind = "epsilon" if prediction == "epsilon" else "v"
    mean, std = transition("ddim", eta, x, *endpoints(x, value, kind, point.alpha, point.sigma), point)
    for k, timestep in enumerate(steps):
        expected = scheduler.step(
            value[k], int(timestep), x[k], eta=eta, variance_noise=noise[k] if eta > 0 else None
        ).prev_sample
        torch.testing.assert_close(mean[k] + std[k] * noise[k], expected, atol=2e-5, rtol=2e-5)


def test_ddim_on_a_flow() -> None:
    t, t_next, eta = 0.6, 0.45, 0.7
    point = StepPoint.of(flow_schedule([t, t_next]), torch.tensor([0]), 4)
    x, v = latents(1)
    mean, std = step_flow("ddim", eta, x, v, point)
    expected = eta * t_next * math.sqrt(1 - t_next**2 * (1 - t) ** 2 / (t**2 * (1 - t_next) ** 2))
    assert std.item() == pytest.approx(expected, rel=1e-5)
    by_hand = (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - expected**2) * (x + (1 - t) * v)
    torch.testing.assert_close(mean, by_hand, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("schedule", [sd3_schedule(10), variance_preserving(10)], ids=["flow", "variance preserving"])
def test_full_ddim_is_memoryless_precise(schedule: Schedule) -> None:
    x, other = latents(10)
    point = StepPoint.of(schedule, torch.arange(10), 4)
    for ours, theirs in zip(
        transition("ddim", 1.0, x, x, other, point),
        transition("precise", MEMORYLESS_NOISE, x, x, other, point),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


# Shapes, types, gathering.


def test_steps_may_differ_within_a_batch() -> None:
    schedule, step = sd3_schedule(10), torch.tensor([3, 0, 9, 3])
    point = StepPoint.of(schedule, step, 4)
    assert {tuple(value.shape) for value in vars(point).values()} == {(4, 1, 1, 1)}
    assert torch.equal(point.t.flatten(), schedule.t[step])
    assert torch.equal(point.sigma_next.flatten(), schedule.sigma[step + 1])
    assert torch.equal(point.alpha_next.flatten(), schedule.alpha[step + 1])
    assert torch.equal(point.t_clamp.flatten(), schedule.t[1].expand(4))
    x, v = latents(4)
    for name, noise in NOISES.items():
        mean, std = step_flow(name, noise, x, v, point)
        for k in range(4):
            alone = step_flow(name, noise, x[k : k + 1], v[k : k + 1], StepPoint.of(schedule, step[k : k + 1], 4))
            assert torch.equal(mean[k : k + 1], alone[0]) and torch.equal(std[k : k + 1], alone[1])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 4)
    x, x0_hat = (value.to(dtype) for value in latents(10))
    mean, std = transition(name, NOISES[name], x, x0_hat, x, point)
    assert mean.dtype is torch.float32 and std.dtype is torch.float32
    assert std.shape == (10, 1, 1, 1)
    assert bool(mean.isfinite().all()) and bool(std.isfinite().all())
    assert torch.equal(mean, transition(name, NOISES[name], x.float(), x0_hat.float(), x.float(), point)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_mean_slope_is_the_derivative_in_the_velocity(name: str) -> None:
    point = StepPoint.of(sd3_schedule(10), torch.arange(10), 2)
    velocity = torch.randn(10, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean, _ = step_flow(name, NOISES[name], torch.ones(10, 1), velocity, point)
    (gradient,) = torch.autograd.grad(mean.sum(), velocity)
    slope = mean_slope(name, NOISES[name], point)
    assert slope.shape == (10, 1) and slope.dtype is torch.float32
    torch.testing.assert_close(slope, gradient.abs(), atol=1e-6, rtol=1e-5)


def test_mean_slope_closed_forms() -> None:
    point = StepPoint.of(uniform_schedule(10), torch.arange(10), 2)
    beta = torch.full((10, 1), 1 + 0.7**2 / 2)
    beta[0] = 1.0
    torch.testing.assert_close(mean_slope("flow_sde", 0.7, point), beta * 0.1, atol=1e-6, rtol=1e-5)
    const = 1 + 0.3**2 * (1 - point.t) / (2 * point.t)
    torch.testing.assert_close(mean_slope("dance_sde", 0.3, point), const * 0.1, atol=1e-6, rtol=1e-5)
    rho = math.cos(0.4 * math.pi)
    cps = ((1 - point.t_next) * point.t - point.t_next * rho * (1 - point.t)).abs()
    torch.testing.assert_close(mean_slope("cps", 0.8, point), cps, atol=1e-6, rtol=1e-5)


def test_next_latent_rounds_a_float32_sum() -> None:
    mean, noise = latents(2)
    std = torch.tensor([0.3, 0.0]).reshape(2, 1, 1, 1)
    full = next_latent(mean, std, noise, torch.float32)
    assert torch.equal(full, mean + std * noise)
    half = next_latent(mean, std, noise, torch.bfloat16)
    assert half.dtype is torch.bfloat16 and torch.equal(half, full.to(torch.bfloat16))
    assert not torch.equal(half.float(), (mean.bfloat16() + std.bfloat16() * noise.bfloat16()).float())


# Checks.


@pytest.mark.parametrize(
    ("name", "noise", "schedule", "message"),
    [
        ("presice", 0.7, uniform_schedule(4), "rollout.kernel.name: unknown kernel 'presice'; did you mean 'precise'?"),
        (
            "zzz",
            0.7,
            uniform_schedule(4),
            "unknown kernel 'zzz'; use one of ode, flow_sde, dance_sde, cps, precise, ddim, memoryless, precise_dance",
        ),
        ("flow_sde", -0.1, uniform_schedule(4), "rollout.kernel.noise: -0.1 is not a noise level"),
        ("flow_sde", math.nan, uniform_schedule(4), "rollout.kernel.noise: nan is not a noise level"),
        ("cps", 1.2, uniform_schedule(4), r"rollout.kernel.noise: 1.2 is too large for cps; its eta lies in \[0, 1\]"),
        ("ddim", 1.2, uniform_schedule(4), "1.2 is too large for ddim"),
        (
            "flow_sde",
            0.7,
            variance_preserving(4),
            "flow_sde is for flow .*use one of cps, ddim, memoryless, ode, precise$",
        ),
        ("dance_sde", 0.3, variance_preserving(4), "dance_sde is for flow models"),
        ("precise_dance", 0.3, variance_preserving(4), "precise_dance is for flow models"),
        ("wan_sde", 1.0, variance_preserving(4), "wan_sde is for flow models"),
        ("memoryless", 0.0, uniform_schedule(4), "0 does not silence memoryless, whose noise is fixed"),
        ("wan_sde", 0.0, uniform_schedule(4), "0 does not silence wan_sde"),
        ("ode", 0.0, flow_schedule([0.0, 0.5, 1.0]), "times must fall strictly from at most 1"),
        ("ode", 0.0, flow_schedule([1.0, 0.4, 0.5, 0.0]), "times must fall strictly from at most 1"),
        ("ode", 0.0, flow_schedule([1.0, 0.5, 0.5, 0.0]), "times must fall strictly from at most 1"),
        ("ode", 0.0, flow_schedule([1.2, 0.5, 0.0]), "times must fall strictly from at most 1"),
        ("ode", 0.0, flow_schedule([1.0]), "times must fall strictly from at most 1"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name: str, noise: float, schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel(name, noise, schedule)


def test_kernels_that_can_run_pass() -> None:
    for name, noise in NOISES.items():
        check_kernel(name, noise, sd3_schedule(10))
    check_kernel("flow_sde", 1.5, sd3_schedule(28))
    for name in ("ode", "cps", "precise", "ddim", "memoryless"):
        check_kernel(name, NOISES[name], variance_preserving(10))


def test_unknown_names_are_refused_everywhere() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="did you mean 'flow_sde'"):
        transition("flow-sde", 0.7, x, x, x, StepPoint.of(uniform_schedule(4), torch.tensor([0]), 2))
    with pytest.raises(ValueError, match="unknown kernel"):
        is_stochastic("nothing", 0.7)


def test_is_stochastic_agrees_with_the_std() -> None:
    point = StepPoint.of(uniform_schedule(4), torch.tensor([1]), 2)
    x = torch.zeros(1, 1)
    for name in KERNELS:
        for noise in (0.0, 0.5):
            assert is_stochastic(name, noise) == (transition(name, noise, x, x, x, point)[1].item() > 0)
