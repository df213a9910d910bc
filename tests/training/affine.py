"""Policies with known optima for differentiable rewards: exact velocities, a learned part a step, a reference that is off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowrl.records import Request
from flowrl.scoring.by_value import ScoredByValue
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config


class Affine(torch.nn.Module):
    """v = exact velocity of N(mean, spread^2) + shift[step] + slope[step] x; without the learned part while ``off``."""

    def __init__(self, times: Tensor, mean: float, spread: float) -> None:
        super().__init__()
        self.times, self.mean, self.spread, self.off = times, mean, spread, False
        self.shift = torch.nn.Parameter(torch.zeros(len(times) - 1))
        self.tilt = torch.nn.Parameter(torch.zeros(len(times) - 1))

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t - (1 - t) * self.spread**2) / ((1 - t) ** 2 * self.spread**2 + t**2)
        return -self.mean + k * (x - (1 - t) * self.mean)

    def learned(self, x: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.shift[step].reshape(shape) + self.tilt[step].reshape(shape) * x

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        made = self.exact(x, t.reshape(shape))
        step = (self.times[None, :-1] - t[:, None]).abs().argmin(1)
        return made if self.off else made + self.learned(x, step, shape)


CENTRES, WEIGHTS, WIDTH = torch.tensor([-1.0, 0.2, 1.1]), torch.tensor([0.5, 0.2, 0.3]), 0.35


class Mixture(Affine):
    """Data of three components; the learned part is a sum of bumps at each step."""

    def __init__(self, times: Tensor) -> None:
        super().__init__(times, 0.0, 1.0)
        del self.tilt, self.shift
        self.bumps = torch.linspace(-3, 3, 25)
        self.height = torch.nn.Parameter(torch.zeros(len(times) - 1, 25))

    def exact(self, x: Tensor, t: Tensor) -> Tensor:
        d = (1 - t) ** 2 * WIDTH**2 + t**2
        away = x[..., None] - (1 - t)[..., None] * CENTRES
        share = torch.softmax(WEIGHTS.log() - away**2 / (2 * d[..., None]), -1)
        k = ((t - (1 - t) * WIDTH**2) / d)[..., None]
        return (share * (-CENTRES + k * away)).sum(-1)

    def learned(self, x: Tensor, step: Tensor, shape: tuple[int, ...]) -> Tensor:
        bumps = torch.exp(-((x[..., None] - self.bumps) ** 2) / (2 * 0.25**2))
        return (bumps * self.height[step].reshape(*shape, 25)).sum(-1)


class AffineAdapter(GaussianAdapter):
    """Latents of independent elements, each of them one draw of the toy; ``reference`` is the policy's pre-trained part."""

    def __init__(self, network: Affine, shape: tuple[int, ...] = (1, 8, 8)) -> None:
        super().__init__(len(network.times) - 1, shape=shape)
        self.grid, self.network = network.times, network

    @contextmanager
    def reference(self) -> Iterator[None]:
        before, self.network.off = self.network.off, True
        try:
            yield
        finally:
            self.network.off = before


class Linear(ScoredByValue):
    """r = b sum x0."""

    name, differentiable = "linear", "latents"

    def __init__(self, b: float = 1.0) -> None:
        self.b = b

    def value(self, x: Tensor, requests: list[Request]) -> Tensor:
        return self.b * x.flatten(1).sum(1)


class Quadratic(ScoredByValue):
    """r = -sum (x0 - centre)^2 / 2q."""

    name, differentiable = "quadratic", "latents"

    def __init__(self, centre: float, q: float) -> None:
        self.centre, self.q = centre, q

    def value(self, x: Tensor, requests: list[Request]) -> Tensor:
        return -((x - self.centre) ** 2).flatten(1).sum(1) / (2 * self.q)


class Wavy(ScoredByValue):
    """r = sum sin 2x0 + 0.4 x0^2 / (1 + x0^2)."""

    name, differentiable = "wavy", "latents"

    def value(self, x: Tensor, requests: list[Request]) -> Tensor:
        return wavy(x).flatten(1).sum(1)


def wavy(x: Tensor) -> Tensor:
    return torch.sin(2 * x) + 0.4 * x**2 / (1 + x**2)


def make_trainer(network: Affine, reward: str, args: dict | None = None, **changes) -> Trainer:
    """The real trainer with a direct objective on a toy policy, 16 samples of 64 elements an iteration."""
    base = {
        "rollout.steps": len(network.times) - 1, "rollout.kernel.name": "memoryless", "batch.groups": 2,
        "batch.group_size": 8, "batch.micro_batch": 16,
        "rewards": [{"name": f"tests.training.affine:{reward}", "args": args or {}}], "optimizer.lr": 0.2,
        "optimizer.betas": (0.8, 0.95), "optimizer.schedule": "linear", "optimizer.max_grad_norm": 1e9,
    }  # fmt: skip
    adapter = AffineAdapter(network)
    config = toy_config(**(base | changes))
    return Trainer(config, adapter, LatentReward(lambda x0: x0), rows(2), reference=adapter.reference)


def chain(network: Affine, off: bool = False) -> list[tuple[float, float, float]]:
    """(factor, constant, std) of every memoryless step, x' = factor x + constant + std noise, in float64."""
    t, found = network.times.double().tolist(), []
    for k, (now, after) in enumerate(itertools.pairwise(t)):
        shift, tilt = (0.0, 0.0) if off else (float(network.shift.detach()[k]), float(network.tilt.detach()[k]))
        rho = after * (1 - now) / (now * (1 - after))
        ends = []
        for x in (0.0, 1.0):
            exact = network.exact(torch.tensor(x, dtype=torch.float64), torch.tensor(now, dtype=torch.float64))
            v = float(exact) + shift + tilt * x
            ends.append((1 - after) * (x - now * v) + after * rho * (x + (1 - now) * v))
        found.append((ends[1] - ends[0], ends[0], after * (1 - rho**2) ** 0.5))
    return found


def moments(network: Affine, off: bool = False) -> tuple[float, float]:
    """Mean and variance of x0 under memoryless sampling, exact for an affine policy."""
    mean, variance = 0.0, 1.0
    for factor, constant, std in chain(network, off):
        mean, variance = factor * mean + constant, factor**2 * variance + std**2
    return mean, variance


def quadratic_optimum(network: Affine, centre: float, q: float) -> tuple[float, float]:
    """Mean and variance of x0 under the best means for E[-(x0 - centre)^2 / 2q] - sum KL, stds held: a Riccati recursion.

    The value before step k is -P x^2 / 2 + h x; a step to mean mu costs (mu - a x - b)^2 / 2 std^2.
    """
    steps, p, h, best = chain(network, off=True), 1 / q, centre / q, []
    for factor, constant, std in reversed(steps):
        shrink = 1 / (1 + std**2 * p)
        best.append((factor * shrink, (constant + std**2 * h) * shrink, std))
        p, h = factor**2 * p * shrink, factor * (h - p * constant) * shrink
    mean, variance = 0.0, 1.0
    for factor, constant, std in reversed(best):
        mean, variance = factor * mean + constant, factor**2 * variance + std**2
    return mean, variance
