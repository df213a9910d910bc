"""Deterministic solvers: parity with diffusers, order of convergence, exact cases, histories."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import SOLVERS, History, StepPoint, calls, endpoints, solver_step, transition
from flowrl.records import Schedule

from .gaussian import Gaussian, flow_schedule, sd3_schedule, uniform_schedule, variance_preserving

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def network(x: Tensor, time: Tensor) -> Tensor:
    """A smooth nonlinear output; row b depends on row b alone."""
    return torch.sin(1.3 * x) * (1 - 0.5 * time) + 0.4 * torch.roll(x, 1, -1) - 0.3 * time**2


def predictor(schedule: Schedule, kind: str) -> Predict:
    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        point = StepPoint.of(schedule, step.clamp_max(schedule.steps - 1), x.ndim)
        shape = (-1, *[1] * (x.ndim - 1))
        time = schedule.t[step].reshape(shape)
        assert torch.equal(time, point.t), "a step beyond the schedule was asked for"
        return endpoints(x, network(x, time), kind, point.alpha, point.sigma)

    return predict


def solve(name: str, predict: Predict, x: Tensor, schedule: Schedule) -> list[Tensor]:
    path, history = [x], None
    for k in range(schedule.steps):
        x, history = solver_step(name, predict, x, torch.full((len(x),), k), schedule, history)
        path.append(x)
    return path


def start(seed: int = 0) -> Tensor:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", [sd3_schedule(10), variance_preserving(10)], ids=["flow", "vp"])
def test_euler_is_the_ode_kernel_bit_for_bit(schedule: Schedule) -> None:
    kind = "velocity" if float(schedule.alpha[0]) == 0 else "v"
    predict, x = predictor(schedule, kind), start()
    for k, after in enumerate(solve("euler", predict, x, schedule)[1:]):
        step = torch.full((3,), k)
        x, _ = transition("ode", 0.0, x, *predict(x, step), StepPoint.of(schedule, step, 3))
        assert torch.equal(x, after)


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_heun_equals_diffusers(steps: int) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    assert len(grid) == steps + 1 and len(scheduler.timesteps) == 2 * steps - 1
    schedule = Schedule(t=grid, alpha=1 - grid, sigma=grid)
    x = theirs = start()
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, timestep / 1000), timestep, theirs).prev_sample
    torch.testing.assert_close(
        solve("heun", predictor(schedule, "velocity"), x, schedule)[-1], theirs, atol=1e-5, rtol=0
    )


def dpm_scheduler(path: str, steps: int) -> tuple[object, Schedule, str]:
    from diffusers import DPMSolverMultistepScheduler

    options = {
        "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "epsilon": {"prediction_type": "epsilon", "beta_start": 0.00085, "beta_end": 0.012},
        "v": {"prediction_type": "v_prediction", "beta_start": 0.00085, "beta_end": 0.012},
    }[path]
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", beta_schedule="scaled_linear", **options
    )
    scheduler.set_timesteps(steps)
    ratio = scheduler.sigmas
    if path == "flow":
        return scheduler, Schedule(t=ratio, alpha=1 - ratio, sigma=ratio), "velocity"
    alpha = 1 / (ratio**2 + 1).sqrt()
    t = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)])
    return scheduler, Schedule(t=t, alpha=alpha, sigma=ratio * alpha), path


@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("path", ["flow", "epsilon", "v"])
def test_dpmpp_2m_equals_diffusers(path: str, steps: int) -> None:
    scheduler, schedule, kind = dpm_scheduler(path, steps)
    x = theirs = start()
    ours = solve("dpmpp_2m", predictor(schedule, kind), x, schedule)
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(network(theirs, schedule.t[k]), timestep, theirs).prev_sample
        torch.testing.assert_close(ours[k + 1], theirs, atol=1e-5, rtol=1e-5)


def gaussian_error(name: str, steps: int, first: float, last: float, s: float) -> float:
    """Error of x at the end of a uniform grid, started from x = 1, against the exact flow of N(0, s^2)."""
    data = Gaussian(0.0, s)
    schedule = flow_schedule(torch.linspace(first, last, steps + 1, dtype=torch.float64))

    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        time = schedule.t[step][:, None]
        return endpoints(x, data.velocity(x, time.double()), "velocity", 1 - time, time)

    got = solve(name, predict, torch.ones(1, 1), schedule)[-1]
    return abs(float(got) - float(data.ode_map(torch.ones(()), first, last)))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize(("first", "last"), [(0.9, 0.1), (1.0, 0.0)])
def test_order_of_convergence(name: str, order: int, first: float, last: float) -> None:
    errors = [gaussian_error(name, steps, first, last, 2.0) for steps in (20, 40, 80)]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    expected = [float(order)] * 2
    if name == "dpmpp_2m" and first == 1:
        # Even steps in t are of size 1 / k in log(alpha / sigma) near both ends: the error is log(N) / N^2.
        expected = [2 - math.log2(math.log(2 * n) / math.log(n)) for n in (20, 40)]
    assert slopes == pytest.approx(expected, abs=0.2)
    assert errors[-1] > 1e-6  # above the rounding of float32


def test_second_order_is_closer_than_euler_at_equal_calls() -> None:
    euler, heun, multistep = (
        gaussian_error(name, steps, 1.0, 0.0, 0.5) for name, steps in (("euler", 20), ("heun", 10), ("dpmpp_2m", 20))
    )
    assert heun < euler / 3 and multistep < euler / 3


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", [sd3_schedule(4), variance_preserving(3)], ids=["flow", "vp"])
def test_a_single_point_of_data_is_reached_exactly(name: str, schedule: Schedule) -> None:
    # The data estimate is constant and the path straight in (alpha, sigma): no solver may err, on any grid.
    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        point = StepPoint.of(schedule, step, x.ndim)
        return torch.full_like(x, 0.7), (x - point.alpha * 0.7) / point.sigma

    x = start()
    noise = (x - schedule.alpha[0] * 0.7) / schedule.sigma[0]
    for k, after in enumerate(solve(name, predict, x, schedule)):
        torch.testing.assert_close(after, schedule.alpha[k] * 0.7 + schedule.sigma[k] * noise, atol=3e-6, rtol=3e-6)


def test_heun_factor_on_gaussian_data() -> None:
    data, t, t_next = Gaussian(0.0, 0.5), 0.8, 0.5
    k, k_next = float(data.slope(t)), float(data.slope(t_next))
    schedule = flow_schedule([t, t_next, 0.2])

    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        time = schedule.t[step][:, None]
        return endpoints(x, data.velocity(x, time.double()), "velocity", 1 - time, time)

    x, history = solver_step("heun", predict, torch.ones(1, 1), torch.tensor([0]), schedule)
    assert x.item() == pytest.approx(1 - 0.3 * (k + k_next * (1 - 0.3 * k)) / 2, abs=1e-6)
    assert history is None


# Histories.


def two_steps(x: Tensor, schedule: Schedule) -> tuple[Tensor, History]:
    predict = predictor(schedule, "velocity")
    history = None
    for k in (0, 1):
        x, history = solver_step("dpmpp_2m", predict, x, torch.full((len(x),), k), schedule, history)
    return x, history


def test_rows_restart_at_first_order() -> None:
    schedule, step = uniform_schedule(6), torch.full((3,), 2)
    predict = predictor(schedule, "velocity")
    x, history = two_steps(start(), schedule)
    fresh, _ = solver_step("dpmpp_2m", predict, x, step, schedule, None)
    euler, _ = solver_step("euler", predict, x, step, schedule, None)
    going, _ = solver_step("dpmpp_2m", predict, x, step, schedule, history)
    assert torch.equal(fresh, euler)
    mixed, after = solver_step(
        "dpmpp_2m", predict, x, step, schedule, history.restart(torch.tensor([False, True, False]))
    )
    assert torch.equal(mixed[1], fresh[1]) and torch.equal(mixed[[0, 2]], going[[0, 2]])
    assert float((fresh - going).abs().max()) > 1e-3
    assert bool(after.log_snr.isfinite().all())


def test_a_forgotten_history_may_start_at_pure_noise() -> None:
    schedule, x, step = uniform_schedule(6), start(), torch.zeros(3, dtype=torch.int64)
    _, history = two_steps(x, schedule)
    predict = predictor(schedule, "velocity")
    got, _ = solver_step("dpmpp_2m", predict, x, step, schedule, history.restart(torch.ones(3, dtype=torch.bool)))
    assert torch.equal(got, solver_step("euler", predict, x, step, schedule)[0])


def test_rows_are_taken_out_of_a_history_and_put_back() -> None:
    schedule, step = uniform_schedule(6), torch.full((3,), 2)
    predict = predictor(schedule, "velocity")
    x, history = two_steps(start(), schedule)
    rows = torch.tensor([True, False, True])
    whole, _ = solver_step("dpmpp_2m", predict, x, step, schedule, history)
    part, left = solver_step("dpmpp_2m", predict, x[rows], step[rows], schedule, history[rows])
    assert torch.equal(part, whole[rows])
    back = left.spread(rows)
    assert torch.equal(back.x0_hat[rows], left.x0_hat) and torch.equal(back.log_snr[rows], left.log_snr)
    assert back.x0_hat.shape == x.shape and back.log_snr.flatten().tolist()[1] == -math.inf
    middle = torch.full((3,), 3)
    resumed, _ = solver_step("dpmpp_2m", predict, x, middle, schedule, back)
    alone, _ = solver_step("euler", predict, x, middle, schedule, None)
    assert torch.equal(resumed[1], alone[1]) and not torch.equal(resumed[0], alone[0])


def test_a_history_outlives_a_change_of_grid() -> None:
    # The steps after a window may be fewer: what counts is where the last estimate was made, not its index.
    whole, tail = flow_schedule([0.9, 0.7, 0.5, 0.2, 0.0]), flow_schedule([0.5, 0.2, 0.0])
    x, history = two_steps(start(), whole)
    long, _ = solver_step("dpmpp_2m", predictor(whole, "velocity"), x, torch.full((3,), 2), whole, history)
    short, _ = solver_step("dpmpp_2m", predictor(tail, "velocity"), x, torch.full((3,), 0), tail, history)
    assert torch.equal(long, short)


def test_steps_may_differ_within_a_batch() -> None:
    schedule = uniform_schedule(4)
    predict, x, step = predictor(schedule, "velocity"), start(), torch.tensor([1, 3, 0])
    for name in SOLVERS:
        together, _ = solver_step(name, predict, x, step, schedule)
        for k in range(3):
            alone, _ = solver_step(name, predict, x[k : k + 1], step[k : k + 1], schedule)
            torch.testing.assert_close(together[k : k + 1], alone, atol=1e-6, rtol=1e-6)
    heun, _ = solver_step("heun", predict, x, step, schedule)
    euler, _ = solver_step("euler", predict, x, step, schedule)
    assert torch.equal(heun[1], euler[1]) and not torch.equal(heun[0], euler[0])  # row 1 ends at the data


@pytest.mark.parametrize("name", SOLVERS)
def test_calls_are_counted(name: str) -> None:
    schedule, made = uniform_schedule(5), []
    inner = predictor(schedule, "velocity")

    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        made.append(step)
        return inner(x, step)

    solve(name, predict, start(), schedule)
    assert len(made) == 4 * calls(name) + calls(name, final=True)
    assert calls(name) == (2 if name == "heun" else 1) and calls(name, final=True) == 1


def test_half_precision_gives_float32() -> None:
    schedule, x = uniform_schedule(5), start().bfloat16()

    def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(end.bfloat16() for end in predictor(schedule, "velocity")(x, step))

    for name in SOLVERS:
        full, history = solver_step(name, predict, x, torch.full((3,), 1), schedule)
        assert full.dtype is torch.float32
        assert history is None or history.x0_hat.dtype is torch.float32


def test_what_cannot_be_is_refused() -> None:
    schedule = uniform_schedule(6)
    x, history = two_steps(start(), schedule)
    for step in (0, 1):
        with pytest.raises(ValueError, match="dpmpp_2m: the history was made at this time or a later one"):
            solver_step("dpmpp_2m", predictor(schedule, "velocity"), x, torch.full((3,), step), schedule, history)
    with pytest.raises(ValueError, match=r"rollout\.solver: unknown solver 'dpm'; .*use one of euler, heun, dpmpp_2m"):
        solver_step("dpm", predictor(schedule, "velocity"), x, torch.zeros(3), schedule)
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        calls("hen")
