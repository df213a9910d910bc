"""Process rewards whose value and gradient are known, and a rollout of the Gaussian toy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowrl.credit.process import ProcessMember
from flowrl.records import ProcessScore, Request
from flowrl.rollout.guided import Guide
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import Groups, RolloutPlan, concatenate, rollout
from tests.training.toy import GaussianAdapter


@dataclass
class Linear:
    """R(x, t) = b (E[x0 | x] - shift): the exact value of the reward b x0 on N(m, s^2), up to its constant in x.

    slope None: that of the posterior mean, s^2 (1 - t) / D; else ``slope(t)``.
    """

    b: float = 1.0
    m: float = 0.0
    s: float = 1.0
    slope: object = None
    differentiable: bool = True
    seen: list = field(default_factory=list)

    def weight(self, t: Tensor) -> Tensor:
        if self.slope is not None:
            return self.b * self.slope(t)
        return self.b * self.s**2 * (1 - t) / ((1 - t) ** 2 * self.s**2 + t**2)

    def score(self, x: Tensor, t: Tensor, prompted) -> ProcessScore:
        self.seen.append((len(x), float(t[0])))
        values = self.weight(t) * (x.flatten(1).sum(1) - (1 - t) * self.m)
        return ProcessScore(values, torch.ones(len(x), dtype=torch.bool))


@dataclass
class Zero:
    """A reward that depends on x and says 0."""

    differentiable: bool = True

    def score(self, x: Tensor, t: Tensor, prompted) -> ProcessScore:
        return ProcessScore((x * 0).flatten(1).sum(1), torch.ones(len(x), dtype=torch.bool))


@dataclass
class Faulty:
    """Fails for latents whose first element lies above ``above``, in the way ``how``."""

    how: str
    above: float = 0.5
    differentiable: bool = True

    def score(self, x: Tensor, t: Tensor, prompted) -> ProcessScore:
        bad = x.detach().flatten(1)[:, 0] > self.above
        values, valid = x.flatten(1).sum(1), torch.ones(len(x), dtype=torch.bool)
        if self.how == "nan":
            values = torch.where(bad, torch.nan, values)
        elif self.how == "invalid":
            valid = ~bad
        elif self.how == "gradient":  # a finite value, an infinite slope
            values = values + torch.where(bad, x.flatten(1)[:, 0] - x.detach().flatten(1)[:, 0], 1.0).sqrt()
        elif self.how == "length" and bool(bad.any()):
            values = values[:-1]
        return ProcessScore(values, valid)


def guide_by(reward, *args, **settings) -> Guide:
    return Guide(ProcessMember("toy", reward), *args, **settings)


def toy_policy(steps: int = 10, kernel: str = "precise", noise: float = 0.7, **data) -> Policy:
    adapter = GaussianAdapter(steps, **data)
    return Policy(adapter, adapter.schedule(steps, None), kernel, noise)


def draw(policy: Policy, guide=None, groups: int = 2, size: int = 4, **changes):
    """One rollout of the toy with a full window, or as ``changes`` of the plan say."""
    ids = torch.arange(groups)
    requests = [Request(f"prompt {i}", i, 8, 8) for i in range(groups)]
    held = Groups(ids, torch.zeros_like(ids), ids, policy.encode(requests), size)
    settings = {
        "shape": policy.adapter.shape, "steps": range(policy.schedule.steps - 1), "shared": False, "chunk": 4096,
        "storage_dtype": torch.float32, "reduction": "sum", "seed": 0, "iteration": 0,
    }  # fmt: skip
    plan = RolloutPlan(**(settings | changes), guide=guide)
    return concatenate(list(rollout(policy, held, plan)))


ASKED: list[int] = []
"""Latents that ``latent_mean`` was asked about, a call an entry."""


def latent_mean(x: Tensor, t: Tensor, prompted) -> Tensor:
    """A process reward for configs, as a plain function: the mean of the latent."""
    ASKED.append(len(x))
    return x.flatten(1).mean(1)
