"""A policy's sampling chain as a function of its start: what methods that differentiate through it walk along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl import rng
from flowrl.records import Prompted
from flowrl.rollout.policy import Policy, Step

Penalty = Callable[[Step, Step], Tensor]
"""(step of the policy, step of the reference from the same latent) -> [B]."""


@dataclass(frozen=True)
class Members:
    """Samples by the key of their noise. prompt_id, occurrence, member: one int each a sample; seed, iteration: the visit."""

    seed: int
    iteration: int
    prompt_id: Sequence[int]
    occurrence: Sequence[int]
    member: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_id)

    def noise(self, shape: Sequence[int], step: int, stream: str) -> Tensor:
        """Standard normal float32 [B, *shape]; the start of a chain is (0, "initial"), as in a rollout."""
        keys = [
            rng.key(self.seed, self.iteration, prompt, occurrence, member, step, stream)
            for prompt, occurrence, member in zip(self.prompt_id, self.occurrence, self.member, strict=True)
        ]
        return rng.normal(keys, shape)


@dataclass(frozen=True)
class PolicyChain:
    """Samples of one chunk on their way from noise to x0.

    shape: of one latent; stochastic: bool a step, whether it draws noise by the policy's kernel (else the ODE step).
    penalty with reference: what each step is charged for leaving the reference policy; ``charged`` names the steps. The
    reference's own dependence on the latent is differentiated too, as the exact gradient of the penalty has it. closes: the
    reference walks the last step: it draws no noise, so leaving the reference there would cost nothing.
    """

    policy: Policy
    prompted: Prompted
    members: Members
    shape: tuple[int, ...]
    stochastic: Sequence[bool]
    penalty: Penalty | None = None
    reference: Callable[[], AbstractContextManager[None]] | None = None
    charged: Sequence[bool] = ()
    closes: bool = False

    def start(self) -> Tensor:
        return self.members.noise(self.shape, 0, "initial").to(self.policy.adapter.device)

    def transition(self, x: Tensor, k: int) -> Step:
        """The Gaussian of step k from x [B, ...]."""
        step = torch.full((len(x),), k)
        return self.policy.step(x, step, self.prompted, kernel=None if self.stochastic[k] else "ode")

    def draw(self, made: Step, k: int) -> Tensor:
        """The next latent: the mean, and noise by key where the step is stochastic."""
        if not self.stochastic[k]:
            return made.mean
        noise = self.members.noise(self.shape, k, "step").to(made.mean.device)
        return made.mean + made.std * noise

    def step(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(x_(k+1), penalty [B]), as `flowrl.rollout.differentiable` walks it."""
        free = torch.zeros(len(x), device=x.device)
        if self.penalty is None or self.reference is None or not (self.charged[k] or self._last(k)):
            return self.draw(self.transition(x, k), k), free
        with self.reference():  # first, so that weights swapped in and out do not change what the policy saved
            expected = self.transition(x, k)
        if self._last(k):
            return expected.mean, free
        made = self.transition(x, k)
        return self.draw(made, k), self.penalty(made, expected)

    def _last(self, k: int) -> bool:
        return self.closes and k == len(self.stochastic) - 1

    @torch.no_grad()
    def walk(self, x: Tensor, steps: int) -> Tensor:
        """From the start latent to the one before step ``steps``, without gradient and without penalties."""
        for k in range(steps):
            x = self.draw(self.transition(x, k), k)
        return x
