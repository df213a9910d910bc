"""Problems on which scripts/toy_study.py runs the real trainer: data of known velocity, and a policy that may leave it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.config import load
from flowrl.config.schema import Config
from flowrl.dynamics import StepPoint
from flowrl.records import Conditioning, Prediction, PromptRow, Request, RewardBatch, RewardResult, Schedule
from flowrl.rollout.policy import Policy
from flowrl.scoring.runtime import Scored
from flowrl.training.trainer import Trainer
from flowrl.training.weights import Weights, snapshot_reference

Function = Callable[[Tensor], Tensor]


class Affine(torch.nn.Module):
    """v(x, t) = exact velocity of N(mean, spread^2) in each dimension + offset[step] + gain[step] (x - (1 - t) mean).

    Sampling is then an affine chain, so means, variances and KL are exact. x: [B, D]; t: [B]; offset, gain: [T, D].
    """

    def __init__(self, times: Tensor, size: int, mean: float, spread: float) -> None:
        super().__init__()
        self.times, self.mean, self.spread = times, mean, spread
        self.offset = torch.nn.Parameter(torch.zeros(len(times) - 1, size))
        self.gain = torch.nn.Parameter(torch.zeros(len(times) - 1, size))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        step = (self.times[None, :-1] - t[:, None]).abs().argmin(1)
        s = t[:, None]
        variance = (1 - s) ** 2 * self.spread**2 + s**2
        slope = (s - (1 - s) * self.spread**2) / variance
        apart = x - (1 - s) * self.mean
        return -self.mean + (slope + self.gain[step]) * apart + self.offset[step]


class Mixture(torch.nn.Module):
    """v(x, t) = exact velocity of an equal mixture of N(centre_i, spread^2) in the plane + a small network that starts at 0."""

    def __init__(self, centres: Tensor, spread: float, seed: int) -> None:
        super().__init__()
        self.centres, self.spread = centres, spread
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.more = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
        torch.nn.init.zeros_(self.more[2].weight)
        torch.nn.init.zeros_(self.more[2].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = t[:, None]
        variance = (1 - s) ** 2 * self.spread**2 + s**2
        apart = x[:, None] - (1 - s)[:, None] * self.centres  # [B, modes, 2]
        weight = torch.softmax(-apart.square().sum(2) / (2 * variance), 1)
        slope = (s - (1 - s) * self.spread**2) / variance
        exact = (weight[..., None] * (slope[:, None] * apart - self.centres)).sum(1)
        return exact + self.more(torch.cat([x, s], 1))


class ToyAdapter:
    """A pipeline adapter of one of these policies; its pictures are black, rewards read the latents."""

    guidance_rule = "linear"
    device = torch.device("cpu")

    def __init__(self, network: torch.nn.Module, times: Tensor, size: int) -> None:
        self.network, self.grid, self.size = network, times, size

    def encode(self, requests: Any, negative: bool = False) -> Conditioning:
        return Conditioning({"id": torch.tensor([r.prompt_id for r in requests])})

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return (self.size,)

    def schedule(self, steps: int, request: Request | None = None) -> Schedule:
        return Schedule(self.grid, 1 - self.grid, self.grid)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, features: tuple[str, ...] = ()) -> Prediction:
        return Prediction(self.network(x, t), "velocity")

    def decode(self, x0: Tensor, request: Request) -> Tensor:
        return torch.zeros(len(x0), 3, 2, 2)

    def trainable(self) -> torch.nn.Module:
        return self.network


class LatentRewards:
    """A reward runtime whose score is a function of x0; it counts what it scores."""

    needs_groups, nbytes = False, 0

    def __init__(self, function: Function) -> None:
        self.function, self.scored = function, 0
        self.weights = {"latent": 1.0}

    def submit(self, batch: RewardBatch) -> Any:
        if batch.latents is None:
            raise ValueError("toys: rewards read latents, and this batch has none")
        scores = self.function(batch.latents.float()).numpy().astype(np.float32)
        self.scored += len(scores)
        valid = np.isfinite(scores)
        none: list[str | None] = [None] * len(scores)
        made = Scored(scores, valid, none, {"latent": RewardResult(scores, valid, none)}, 0.0)

        class Done:
            def result(self) -> Scored:
                return made

        return Done()

    def begin_iteration(self) -> None:
        return None

    def check_failures(self, sound: Any) -> None:
        return None

    def close(self) -> None:
        return None


BASE: dict[str, Any] = {
    "model.train": "full", "rollout.steps": 10, "rollout.kernel.name": "flow_sde", "rollout.kernel.noise": 0.7,
    "rollout.window.kind": "full", "rollout.share_prefix": False, "batch.groups": 4, "batch.group_size": 16,
    "batch.micro_batch": 512, "optimizer.weight_decay": 0.0, "optimizer.max_grad_norm": 1e9, "ema.decay": 0.0,
}  # fmt: skip


def configure(changes: Mapping[str, Any]) -> Config:
    """A config of dotted keys over BASE. Its reward only satisfies the checks; LatentRewards takes its place."""
    tree: dict[str, Any] = {"rewards": [{"name": "compositional"}]}
    for key, value in (BASE | dict(changes)).items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return load(tree)


def uniform(steps: int = 10) -> Tensor:
    return torch.linspace(1, 0, steps + 1)


def double_shifted(steps: int = 10, shift: float = 3.0) -> Tensor:
    """Stable Diffusion 3's grid: the shift acts on the smallest time and again on the whole grid."""

    def shifted(u: Tensor | float) -> Any:
        return shift * u / (1 + (shift - 1) * u)

    grid = torch.linspace(1, shifted(0.001), steps, dtype=torch.float64)
    return torch.cat([shifted(grid), torch.zeros(1, dtype=torch.float64)]).float()


@dataclass(frozen=True)
class Law:
    """Where an affine chain ends, exactly. mean, variance: float64 [D]; path_kl: sum over steps and dimensions of the KL
    between its transitions and those of the start weights, along its own path; 0 for a chain without noise."""

    mean: Tensor
    variance: Tensor
    path_kl: float

    def kl_from(self, other: Law) -> float:
        """KL(self || other) of the two end laws, summed over dimensions."""
        ratio = self.variance / other.variance
        return float((0.5 * (ratio - 1 - ratio.log() + (self.mean - other.mean).square() / other.variance)).sum())

    def shape_cost(self, spread: float) -> float:
        """KL of the end law from data of the same mean, a dimension: what spread too wide or too narrow costs."""
        ratio = self.variance / spread**2
        return float((0.5 * (ratio - 1 - ratio.log())).mean())


@torch.no_grad()
def law(adapter: ToyAdapter, kernel: str, noise: float) -> Law:
    """Follow mean and variance of an Affine policy's chain through the real transitions; the last step is the ODE's."""
    network = adapter.network
    assert isinstance(network, Affine)
    policy = Policy(adapter, adapter.schedule(0), kernel, noise)
    size, still = adapter.size, [torch.zeros_like(network.offset), torch.zeros_like(network.gain)]
    mean, variance, kl = torch.zeros(size).double(), torch.ones(size).double(), 0.0
    steps = len(adapter.grid) - 1
    for k in range(steps):
        name = kernel if k < steps - 1 else "ode"
        x = torch.stack([torch.zeros(size), torch.ones(size)])
        at, t = torch.full((2,), k), adapter.grid[k].expand(2)
        made = policy.made_of(x, at, network(x, t), "velocity", name)
        live = [network.offset.clone(), network.gain.clone()]
        network.offset.copy_(still[0]), network.gain.copy_(still[1])
        base = policy.made_of(x, at, network(x, t), "velocity", name)
        network.offset.copy_(live[0]), network.gain.copy_(live[1])
        constant, factor = made.mean[0].double(), (made.mean[1] - made.mean[0]).double()
        std = float(made.std.flatten()[0])
        apart, slope = constant - base.mean[0].double(), factor - (base.mean[1] - base.mean[0]).double()
        if std > 0:
            kl += float(((apart + slope * mean).square() + slope.square() * variance).sum()) / (2 * std**2)
        mean, variance = factor * mean + constant, factor.square() * variance + std**2
    return Law(mean, variance, kl)


@torch.no_grad()
def draw(adapter: ToyAdapter, kernel: str, noise: float, count: int, seed: int) -> tuple[Tensor, float]:
    """Draw x0 [count, D] with the real kernels, and the path KL from the start weights, a mean over the samples."""
    network = adapter.network
    policy = Policy(adapter, adapter.schedule(0), kernel, noise)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, adapter.size, generator=generator)
    total, steps = torch.zeros(count), len(adapter.grid) - 1
    for k in range(steps):
        name = kernel if k < steps - 1 else "ode"
        at, t = torch.full((count,), k), adapter.grid[k].expand(count)
        made = policy.made_of(x, at, network(x, t), "velocity", name)
        if float(made.std.max()) > 0 and isinstance(network, Mixture):
            start = network(x, t) - network.more(torch.cat([x, t[:, None]], 1))
            other = policy.made_of(x, at, start, "velocity", name)
            total += ((made.mean - other.mean) ** 2).sum(1) / (2 * made.std.flatten() ** 2)
        x = made.mean + made.std * torch.randn(x.shape, generator=generator)
    return x, float(total.mean())


@dataclass
class Run:
    """One training: the trainer, what it has spent, and its rows so far."""

    trainer: Trainer
    adapter: ToyAdapter
    rewards: LatentRewards
    rows: list[dict[str, Any]]
    seconds: float = 0.0

    def go(self, iterations: int) -> None:
        started = time.process_time()
        self.rows += [self.trainer.iterate() for _ in range(iterations)]
        self.seconds += time.process_time() - started

    def costs(self) -> dict[str, float]:
        forward, backward = (sum(r[f"calls/{n}_samples"] for r in self.rows) for n in ("forward", "backward"))
        return {
            "reward_calls": self.rewards.scored, "forward_samples": forward, "backward_samples": backward,
            "cpu_seconds": round(self.seconds, 2),
        }  # fmt: skip


def begin(network: torch.nn.Module, times: Tensor, size: int, reward: Function, changes: Mapping[str, Any]) -> Run:
    """A run of the real trainer on a toy, not yet started."""
    config = configure(changes)
    adapter, rewards = ToyAdapter(network, times, size), LatentRewards(reward)
    rows = [PromptRow(f"prompt {i}", i) for i in range(config.batch.groups)]
    reference = snapshot_reference(Weights(network))
    return Run(Trainer(config, adapter, rewards, rows, reference=reference), adapter, rewards, [])  # type: ignore[arg-type]


def above(limit: float, found: Law, axis: int = 0) -> float:
    """P(x0 > limit) in one dimension."""
    z = (limit - float(found.mean[axis])) / math.sqrt(float(found.variance[axis]))
    return 0.5 * math.erfc(z / math.sqrt(2))


def points(schedule: Schedule) -> StepPoint:
    """All steps of a schedule at once, for x of shape [T, D]."""
    return StepPoint.of(schedule, torch.arange(schedule.steps), 2)
