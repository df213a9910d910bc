"""The analytic bench: data N(m, s^2) in each dimension, where every sampler has an exact answer, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.dynamics import KERNELS, StepPoint, endpoints, mean_slope, transition
from flowrl.records import Schedule

Velocity = Callable[[Tensor, float], Tensor]


def flow_schedule(times: Sequence[float] | Tensor) -> Schedule:
    """A flow's schedule (alpha = 1 - t, sigma = t) on the given times."""
    t = torch.as_tensor(times, dtype=torch.float64)
    return Schedule(t=t.float(), alpha=(1 - t).float(), sigma=t.float())


def uniform_schedule(steps: int, start: float = 1.0) -> Schedule:
    return flow_schedule(torch.linspace(start, 0, steps + 1, dtype=torch.float64))


def sd3_schedule(steps: int, shift: float = 3.0) -> Schedule:
    """The grid of a shifted Euler flow scheduler: the shift acts on the smallest sigma and again on the whole grid."""

    def shifted(u: Tensor | float) -> Tensor | float:
        return shift * u / (1 + (shift - 1) * u)

    grid = torch.linspace(1, float(shifted(1 / 1000)), steps, dtype=torch.float64)
    return flow_schedule(torch.cat([torch.as_tensor(shifted(grid)), torch.zeros(1, dtype=torch.float64)]))


@dataclass(frozen=True)
class Gaussian:
    """Data N(m, s^2): the marginals, the exact velocity and the exact transitions of a flow."""

    m: float = 0.0
    s: float = 1.0

    def variance(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return (1 - t) ** 2 * self.s**2 + t**2

    def slope(self, t: Tensor | float) -> Tensor:
        """dv/dx."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return (t - (1 - t) * self.s**2) / self.variance(t)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return (-self.m + self.slope(t) * (x - (1 - t) * self.m)).to(x.dtype)

    def score(self, x: Tensor, t: float) -> Tensor:
        return -(x - (1 - t) * self.m) / self.variance(t)

    def ode_map(self, x: Tensor, t: float, t_next: float) -> Tensor:
        """The exact deterministic flow from t to t_next."""
        scale = (self.variance(t_next) / self.variance(t)).sqrt()
        return (1 - t_next) * self.m + scale * (x - (1 - t) * self.m)

    def sde_step(self, x: Tensor, t: float, t_next: float, a: float) -> tuple[Tensor, Tensor]:
        """Exact mean and std of the continuous SDE with g = a sqrt(t / (1 - t))."""
        d, d_next = self.variance(t), self.variance(t_next)
        memory = ((1 - t) * d_next.sqrt() / ((1 - t_next) * d.sqrt())) ** (a**2 / 2)
        mean = (1 - t_next) * self.m + (d_next / d).sqrt() * memory * (x - (1 - t) * self.m)
        return mean, (d_next * (1 - memory**2)).sqrt()


@dataclass(frozen=True)
class Chain:
    """A sampler on Gaussian data is affine: x_(k+1) = factor_k x_k + constant + std_k noise. float64 [T]."""

    factor: Tensor
    std: Tensor
    slope: Tensor

    def variance(self, start: float = 1.0) -> list[float]:
        """Variances [T + 1] along the chain, from ``start``."""
        values = [start]
        for factor, std in zip(self.factor.tolist(), self.std.tolist(), strict=True):
            values.append(factor**2 * values[-1] + std**2)
        return values

    def tail(self) -> Tensor:
        """prod_(j > k) factor_j, [T]."""
        return torch.tensor([float(self.factor[k + 1 :].prod()) for k in range(len(self.factor))], dtype=torch.float64)

    @property
    def memory(self) -> float:
        """d x0 / d x1."""
        return float(self.factor.prod())

    @property
    def correlation(self) -> float:
        """corr(x0, x1)."""
        return self.memory / math.sqrt(self.variance()[-1])


def affine_chain(kernel: str, noise: float, schedule: Schedule, s: float) -> Chain:
    """Read a chain's factors off the real kernels, all steps in one batch, with the exact velocity of N(0, s^2)."""
    point = StepPoint.of(schedule, torch.arange(schedule.steps), 2)
    x = torch.ones(schedule.steps, 1)
    velocity = Gaussian(0.0, s).velocity(x, point.t.double())
    mean, std = transition(kernel, noise, x, x - point.sigma * velocity, x + point.alpha * velocity, point)
    slope = mean_slope(kernel, noise, point)
    return Chain(*(value.double().flatten() for value in (mean, std.expand_as(mean), slope)))


def sample(
    kernel: str, noise: float, schedule: Schedule, x: Tensor, velocity: Velocity, generator: torch.Generator
) -> Tensor:
    """Draw the whole chain from x [n, 1] with the real kernels."""
    for k in range(schedule.steps):
        point = StepPoint.of(schedule, torch.tensor([k]), 2)
        ends = endpoints(x, velocity(x, float(schedule.t[k])), "velocity", point.alpha, point.sigma)
        mean, std = transition(kernel, noise, x, *ends, point)
        x = mean + std * torch.randn(x.shape, generator=generator)
    return x


def double_points(times: Tensor) -> StepPoint:
    """All steps of a flow's grid at once in float64, [T, 1]: the kernels compute in whatever they are given."""
    t = times.double()[:, None]
    first, last = t[1].expand_as(t[1:]), t[-1].expand_as(t[1:])
    return StepPoint(t[:-1], 1 - t[:-1], t[:-1], t[1:], 1 - t[1:], t[1:], first, last)


def double_chain(kernel: str, noise: float, times: Tensor, data: Gaussian) -> tuple[Tensor, Tensor, Tensor]:
    """Factor, constant and std of each step, float64 [T], off the real kernels, with the exact velocity of ``data``."""
    point = double_points(times)

    def mean_at(value: float) -> tuple[Tensor, Tensor]:
        x = torch.full_like(point.t, value)
        return KERNELS[kernel](noise, x, *endpoints_in_double(x, data.velocity(x, point.t), point), point)

    (constant, std), (moved, _) = mean_at(0.0), mean_at(1.0)
    return (moved - constant).flatten(), constant.flatten(), torch.as_tensor(std).expand_as(constant).flatten()


def endpoints_in_double(x: Tensor, velocity: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    return x - point.t * velocity, x + (1 - point.t) * velocity


def moments(kernel: str, noise: float, times: Tensor, data: Gaussian) -> tuple[Tensor, Tensor]:
    """Mean and variance of a chain at each time, float64 [T + 1], started from the exact marginal."""
    start = float(times[0])
    means, variances = [(1 - start) * data.m], [float(data.variance(start))]
    for factor, constant, std in zip(*(v.tolist() for v in double_chain(kernel, noise, times, data)), strict=True):
        means.append(factor * means[-1] + constant)
        variances.append(factor**2 * variances[-1] + std**2)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def variance_preserving(steps: int) -> Schedule:
    t = torch.linspace(0.98, 0.0, steps + 1)
    return Schedule(t=t, alpha=torch.cos(t * math.pi / 2), sigma=torch.sin(t * math.pi / 2))
