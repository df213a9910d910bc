"""Rollouts that follow the gradient of a process reward: where it acts, what it moves, who is left out.

The arithmetic is ``flowrl.dynamics.reward_guidance``'s. A latent whose value or gradient fails (not finite, invalid, of the
wrong length) is not moved from there on, and every member that passes through it is marked, so that it is never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowrl.credit.process.combine import ProcessMember
from flowrl.dynamics.reward_guidance import GuideMode, guidance_shift, spsa_gradient, unit_gradient
from flowrl.errors import UserError
from flowrl.records import Prompted
from flowrl.rollout.policy import Policy, Step

EVERY_STEP = frozenset({"exact_tilt", "langevin_weighted"})
"""Modes that act on deterministic steps too; langevin moves the noise of a step, and there is none."""


@dataclass(frozen=True)
class Guide:
    """A process reward at work on the steps ``first`` .. ``last`` of the schedule, both inclusive.

    scale: 1 / beta >= 0. gradient: autograd, or spsa with ``draws`` pairs of calls at the distance ``radius``. unit: the
    gradient of each latent is divided by its norm. log_prob: whose mean the stored behaviour log-prob takes (the policy's
    own log-prob is stored in either case). errors: the first one of each call that failed, since they were last cleared.
    """

    reward: ProcessMember
    mode: GuideMode = "langevin"
    scale: float = 1.0
    first: int = 0
    last: int = 1 << 30
    gradient: Literal["autograd", "spsa"] = "autograd"
    radius: float = 0.01
    draws: int = 1
    unit: bool = False
    log_prob: Literal["unguided", "guided"] = "unguided"
    errors: list[str] = field(default_factory=list)

    def acts(self, k: int, drawn: bool) -> bool:
        """Whether the reward is asked at step k, with noise (``drawn``) or without."""
        return self.scale != 0 and self.first <= k <= self.last and (drawn or self.mode in EVERY_STEP)

    def begins(self, steps: int) -> int:
        """The first step at which a latent without noise to come is moved; ``steps`` where none is."""
        return min(self.first, steps) if self.mode in EVERY_STEP and self.scale != 0 else steps

    def note(self, error: str) -> None:
        if error:
            self.errors.append(error)

    def calls(self) -> int:
        """Calls of the reward at a latent: one with gradient, or a pair for each draw; and one more for the weights."""
        return (1 if self.gradient == "autograd" else 2 * self.draws) + (self.mode == "langevin_weighted")


@dataclass(frozen=True)
class Pull:
    """What the reward says at N latents. gradient: float32 [N, ...], 0 where not valid; value: [N]; valid: bool [N]."""

    gradient: Tensor
    value: Tensor
    valid: Tensor


def pull_at(guide: Guide, x: Tensor, t: Tensor, prompted: Prompted, direction: Callable[[int], Tensor]) -> Pull:
    """Ask the reward for its gradient at x [N, ...]. t: float32 [N]; direction: number of a draw -> +-1 like x."""
    x = x.detach().float()
    if guide.gradient == "autograd":
        found = guide.reward.ask_gradient(x, t, prompted)
        values, valid, gradient = found.values, found.valid, found.gradient
        guide.note(found.error)
    else:
        valid = torch.ones(len(x), dtype=torch.bool, device=x.device)

        def value(at: Tensor) -> Tensor:
            nonlocal valid
            asked = guide.reward.ask(at, t, prompted)
            valid = valid & asked.valid
            guide.note(asked.error)
            return asked.values

        values, gradient = spsa_gradient(value, x, [direction(i) for i in range(guide.draws)], guide.radius)
    if gradient is None:
        raise ValueError("guide: the process reward gave no gradient")
    if guide.unit:
        gradient = unit_gradient(gradient)
    return Pull(torch.where(_like(valid, x), gradient, 0.0), torch.where(valid, values, 0.0), valid)


@dataclass(frozen=True)
class Moved:
    """What is added to the means of N latents: by the policy's kernel, and by the step without noise; and why."""

    drawn: Tensor
    straight: Tensor
    pull: Pull

    def __getitem__(self, rows: Tensor) -> Moved:
        pull = self.pull
        return Moved(
            self.drawn[rows],
            self.straight[rows],
            Pull(pull.gradient[rows], pull.value[rows], pull.valid[rows]),
        )


class Guiding:
    """A guide on one chunk of a rollout. sound: bool [N], members that no failure touched; log_weight: float32 [N], the
    weight under which langevin samples stand for the tilted marginals p_t exp(R / beta).
    """

    def __init__(self, guide: Guide, policy: Policy, count: int) -> None:
        self.guide, self.policy = guide, policy
        self.sound = torch.ones(count, dtype=torch.bool)
        self.log_weight = torch.zeros(count)

    def move(
        self,
        source: Step,
        x: Tensor,
        step: Tensor,
        prompted: Prompted,
        direction: Callable[[int], Tensor],
        rows: Tensor,
        place: Tensor,
    ) -> Moved:
        """Guide the step of latents x [n, ...], which serve the members ``rows`` [m]: latent ``place`` [m] each.

        source: the policy's own step from x. A member that failed before is not moved.
        """
        guide, policy = self.guide, self.policy
        pull = pull_at(guide, x, policy.schedule.t[step], prompted, direction)
        point = source.point
        shift = guide.scale * guidance_shift(guide.mode, policy.kernel, policy.noise, point) * pull.gradient
        straight = guide.scale * guidance_shift(guide.mode, "ode", policy.noise, point) * pull.gradient
        moved = Moved(shift, straight, pull)[place]
        if guide.mode == "langevin_weighted":
            self._weigh(source, x, step, prompted, pull, rows, place)
        self.sound[rows] &= moved.pull.valid.cpu()
        here = _like(self.sound[rows].to(x.device), x)
        return Moved(torch.where(here, moved.drawn, 0.0), torch.where(here, moved.straight, 0.0), moved.pull)

    def _weigh(
        self, source: Step, x: Tensor, step: Tensor, prompted: Prompted, pull: Pull, rows: Tensor, place: Tensor
    ) -> None:
        """Add ``[R(x after the ODE step, t') - R(x, t)] / beta``, and R / beta of the first guided latent.

        It is the Feynman-Kac weight ``d log w = (d_tau R - v . grad R) d tau / beta``, integrated along the ODE step.
        """
        first = int(step[0]) == self.guide.first
        carried = self.policy.made_of(x, step, source.value, source.kind, kernel="ode").mean
        after = self.guide.reward.ask(carried, self.policy.schedule.t[step + 1], prompted)
        self.guide.note(after.error)
        gain = after.values - (0.0 if first else pull.value)
        self.sound[rows] &= after.valid[place].cpu()
        self.log_weight[rows] += torch.where(after.valid & pull.valid, self.guide.scale * gain, 0.0)[place].cpu()


def check_guide(guide: Guide, sound: Tensor, limit: float) -> None:
    """Raise UserError where the process reward failed for more than the part ``limit`` of an iteration's members.

    sound: bool [B], of all processes. Forgets the errors that were noted.
    """
    first, failed = (guide.errors[:1] or ["in another process, see its log"])[0], int((~sound).sum())
    guide.errors.clear()
    if failed > limit * len(sound):
        raise UserError(
            f"rollout.guide: the process reward failed for {failed} of {len(sound)} members, more than "
            f"failures.max_invalid_fraction ({limit:g}) allows; first error: {first}; mend it, or take another reward"
        )


def group_weights(log_weight: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Normalise weights within groups to mean 1 over the valid members: n softmax(log w); 0 for the others.

    log_weight: float [B]; group: int64 [B]; valid: bool [B]. float32 [B].
    """
    made = torch.zeros(len(log_weight), dtype=torch.float64)
    for g in torch.unique(group).tolist():
        rows = (valid & (group == g)).nonzero().flatten()
        if len(rows):
            made[rows] = len(rows) * log_weight[rows].double().softmax(0)
    return made.float()


def effective_size(weights: Tensor) -> Tensor:
    """Effective sample size ``(sum w)^2 / sum w^2`` over the last dimension, 1 to its length; weights >= 0, not all 0."""
    w = weights.double()
    return w.sum(-1).square() / w.square().sum(-1)


def rademacher(noise: Tensor) -> Tensor:
    """Signs of keyed normal noise: +1 and -1 with equal chance, like noise."""
    return torch.where(noise >= 0, 1.0, -1.0)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
