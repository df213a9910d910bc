"""Problems with known answers for the real trainer: Gaussian data with the exact velocity and one learned offset a step."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch

from flowrl.config.schema import Config
from flowrl.records import Conditioning, Prediction, PromptRow, Request, RewardBatch, RewardResult, Schedule
from flowrl.scoring.runtime import Scored


class Offsets(torch.nn.Module):
    """v(x, t) = -m + k(t) (x - (1 - t) m) + delta[step]: the exact velocity of N(m, s^2) plus one offset a step."""

    def __init__(self, times: torch.Tensor, mean: float, spread: float) -> None:
        super().__init__()
        self.times, self.mean, self.spread = times, mean, spread
        self.delta = torch.nn.Parameter(torch.zeros(len(times) - 1))

    def slope(self, t: torch.Tensor) -> torch.Tensor:
        variance = (1 - t) ** 2 * self.spread**2 + t**2
        return (t - (1 - t) * self.spread**2) / variance

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        step = (self.times[None, :-1] - t[:, None]).abs().argmin(1)
        shape = (-1, *[1] * (x.ndim - 1))
        tt = t.reshape(shape)
        exact = -self.mean + self.slope(tt) * (x - (1 - tt) * self.mean)
        return exact + self.delta[step].reshape(shape)


class GaussianAdapter:
    """A pipeline adapter of that policy; its pictures are black, rewards read the latents."""

    guidance_rule = "linear"
    device = torch.device("cpu")

    def __init__(self, steps: int, mean: float = 0.0, spread: float = 1.0, shape: tuple[int, ...] = (1, 1, 1)) -> None:
        self.grid = torch.linspace(1, 0, steps + 1)
        self.network = Offsets(self.grid, mean, spread)
        self.shape = shape

    def encode(self, requests, negative: bool = False) -> Conditioning:
        return Conditioning({"id": torch.tensor([r.prompt_id for r in requests])})

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.shape

    def schedule(self, steps: int, request: Request) -> Schedule:
        assert steps == len(self.grid) - 1
        return Schedule(self.grid, 1 - self.grid, self.grid)

    def predict(self, x, t, conditioning, features=()) -> Prediction:
        return Prediction(self.network(x, t), "velocity")

    def decode(self, x0: torch.Tensor, request: Request) -> torch.Tensor:
        return torch.zeros(len(x0), 3, 2, 2)

    def trainable(self) -> torch.nn.Module:
        return self.network


class LatentReward:
    """A reward runtime whose score is a function of x0; no pictures, no threads."""

    needs_groups, nbytes = False, 0

    def __init__(self, function) -> None:
        self.function = function

    def submit(self, batch: RewardBatch):
        scores = self.function(batch.latents).float().numpy()
        valid = np.isfinite(scores)
        result = RewardResult(scores, valid, [None] * len(scores))
        scored = Scored(scores, valid, [None] * len(scores), {"latent": result}, 0.0)

        class Done:
            def result(self):
                return scored

        return Done()

    def begin_iteration(self) -> None:
        return None

    def check_failures(self, sound) -> None:
        return None

    def close(self) -> None:
        return None


def rows(count: int) -> list[PromptRow]:
    return [PromptRow(f"prompt {i}", i) for i in range(count)]


def reference_offsets(network: Offsets):
    """The reference policy: all offsets at 0."""

    class Zeroed:
        def __enter__(self):
            self.saved = network.delta.detach().clone()
            network.delta.data.zero_()

        def __exit__(self, *_):
            network.delta.data.copy_(self.saved)

    return Zeroed if network is not None else nullcontext


def toy_config(**changes) -> Config:
    from flowrl.config import load

    base = {
        "model.train": "full", "rollout.steps": 10, "rollout.kernel.name": "precise", "rollout.kernel.noise": 0.7,
        "rollout.window.kind": "full", "rollout.share_prefix": True, "batch.groups": 4, "batch.group_size": 64,
        "batch.micro_batch": 64, "advantage.name": "dr_grpo", "advantage.clip": 0.0, "objective.log_prob_reduction": "sum",
        "objective.clip_range": 0.99, "optimizer.weight_decay": 0.0, "ema.decay": 0.0,
    }  # fmt: skip
    tree: dict = {"rewards": [{"name": "compositional"}]}
    for key, value in (base | changes).items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return load(tree)
