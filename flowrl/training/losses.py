"""The policy loss that a config names, as the update runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.advantage import PolicyLoss, policy_loss
from flowrl.advantage.catalogue import JOINT_LOSSES
from flowrl.config.engine import loss_name
from flowrl.config.schema import Objective
from flowrl.objectives.flow_grpo import Surrogate

if TYPE_CHECKING:
    from flowrl.training.update import TrainingBatch


@dataclass(frozen=True)
class Chosen:
    """A policy loss. joint: the loss of one transition depends on others, so it needs all log-probs at once."""

    surrogate: Surrogate
    joint: bool


@dataclass(frozen=True)
class Joint:
    """A loss over whole trajectories, taken apart. coefficient: float32 [B, K], dL/dlog_prob, weights included."""

    coefficient: Tensor
    made: PolicyLoss

    def of(self, rows: Tensor, k: int, device: torch.device) -> tuple[Tensor, PolicyLoss]:
        """Return the coefficients [N] and the loss record [N, 1] of transition ``k`` of ``rows``."""

        def part(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows, k, None].to(device)

        loss = self.made.loss[rows, k, None].to(device)
        return self.coefficient[rows, k].to(device), PolicyLoss(loss, part(self.made.low), part(self.made.high))


def choose(objective: Objective) -> Chosen:
    """Bind the options of ``objective.loss``; clip_range is PPO's bound where its options name none."""
    name, options = loss_name(objective), dict(objective.loss_options)
    if name == "ppo":
        options = {"low": objective.clip_range} | options

    def surrogate(now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> PolicyLoss:
        inputs = {"log_prob": now, "old_log_prob": old, "advantage": advantage, "mask": mask}
        return policy_loss(name, inputs, options)

    return Chosen(surrogate, name in JOINT_LOSSES)


def whole(method: Chosen, now: Tensor, batch: TrainingBatch, parts: Sequence[Tensor], weight: Tensor) -> Joint:
    """Differentiate the loss with respect to the log-probs of all transitions of a minibatch.

    now: float32 [B, K]; weight: float32 [B, K]. Elements of no part, and of weight 0, are masked.
    """
    rows = torch.cat(list(parts))
    leaf = now[rows].detach().requires_grad_()
    mask = weight[rows] != 0
    old = batch.trajectory.old_log_prob
    if old is None:
        raise ValueError("update: this trajectory holds no log-probs")
    with torch.enable_grad():
        made = method.surrogate(leaf, old[rows], batch.advantage[rows], mask)
        (gradient,) = torch.autograd.grad((made.loss * weight[rows]).sum(), leaf)

    def over_batch(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(now.shape, dtype=x.dtype).index_copy_(0, rows, x.detach())

    loss = torch.zeros_like(now).index_copy_(0, rows, made.loss.detach())
    return Joint(
        coefficient=torch.zeros_like(now).index_copy_(0, rows, gradient),
        made=PolicyLoss(loss, over_batch(made.low), over_batch(made.high)),
    )
