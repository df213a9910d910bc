"""The policy loss that a config names, as the update runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import PolicyLoss
from flowrl.advantage.catalogue import JOINT_LOSSES
from flowrl.config.schema import Objective
from flowrl.distributed.backend import Backend
from flowrl.dynamics.kernels import StepPoint, mean_slope
from flowrl.objectives.forms import FORMS, Form
from flowrl.objectives.policy_flow import policy_flow_log_ratio
from flowrl.objectives.ratios import noise_pair
from flowrl.objectives.step_weights import normalise_weights, step_weight
from flowrl.objectives.surrogates import surrogate_loss
from flowrl.records import LogProbReduction, Trajectory
from flowrl.rollout.policy import Policy, Step
from flowrl.training.batch import TrainingBatch

CLIP_OPTION = {"ppo": "low", "pcpo": "margin", "dpok": "bound"}
"""The option of a loss that ``objective.clip_range`` is."""


@dataclass(frozen=True)
class Chosen:
    """An objective with its options bound.

    form: its parts; surrogate: (log_prob, old_log_prob, advantage, mask, divergence or None), each [N, K] -> PolicyLoss.
    joint: the loss of one transition depends on others, so it needs all log-probs at once.
    """

    settings: Objective
    form: Form
    surrogate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], PolicyLoss]
    joint: bool

    def surrogate_of_step(self, now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> PolicyLoss:
        """The surrogate of a loss that looks at one transition at a time and needs no divergence."""
        return self.surrogate(now, old, advantage, mask, None)


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


def form_of(objective: Objective) -> Form:
    """The parts of a named objective, with those that the config overrides."""
    form: Form = FORMS[objective.name]
    changes: dict[str, Any] = {}
    if objective.ratio:
        changes["ratio"] = objective.ratio
    if objective.step_weight:
        changes["step_weight"] = objective.step_weight
    if objective.loss and objective.loss != form.loss:
        changes |= {"loss": objective.loss, "loss_options": {}}
    return replace(form, **changes)


def choose(objective: Objective) -> Chosen:
    """Bind a named objective to its options; clip_range is the bound of ppo, the margin of pcpo, the cut of dpok."""
    form = form_of(objective)
    own = CLIP_OPTION.get(form.loss)
    options = ({own: objective.clip_range} if own else {}) | dict(form.loss_options) | dict(objective.loss_options)

    def surrogate(
        now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, divergence: Tensor | None = None
    ) -> PolicyLoss:
        inputs = {"log_prob": now, "old_log_prob": old, "advantage": advantage, "mask": mask}
        if divergence is not None:
            inputs["divergence"] = divergence
        return surrogate_loss(form.loss, inputs, options)

    return Chosen(objective, form, surrogate, form.loss in JOINT_LOSSES)


def records_needed(chosen: Chosen) -> frozenset[str]:
    """What the rollout must keep of each transition for this objective."""
    return frozenset({"value"}) if "old_value" in chosen.form.needs else frozenset()


def pair(
    chosen: Chosen,
    made: Step,
    old: Step | None,
    x_next: Tensor,
    scores: tuple[Tensor, Tensor],
    reduction: LogProbReduction,
) -> tuple[Tensor, Tensor]:
    """The two log-probs whose difference is the objective's log ratio: float32 [N] twice.

    made, old: the transition under the present weights and under those that drew it; scores: plain (log_prob,
    old_log_prob).
    """
    if chosen.form.ratio == "plain":
        return scores
    if old is None:
        raise ValueError(f"objective {chosen.settings.name}: the rollout kept no network output to compare with")
    if chosen.form.ratio == "policy_flow":
        return policy_flow_log_ratio(made.value, old.value, x_next, old.mean, made.std, made.point, reduction)
    transform = chosen.form.transforms
    if transform is None:
        raise ValueError(f"objective {chosen.settings.name}: its ratio {chosen.form.ratio!r} has no update here")
    return noise_pair(transform, made.mean, old.mean, x_next, made.std, reduction)


def step_weights(chosen: Chosen, policy: Policy, trajectory: Trajectory, element: Tensor, backend: Backend) -> Tensor:
    """Weight of every trained transition by its step: float32 [B, K], of mean 1 over the trained ones where the form says so."""
    if chosen.form.step_weight == "none" or trajectory.step is None or trajectory.std is None:
        return torch.ones(element.shape)
    steps = trajectory.step.flatten()
    point = StepPoint.of(policy.schedule, steps, 1)
    slope = mean_slope(policy.kernel, policy.noise, point).cpu()
    weight = step_weight(chosen.form.step_weight, trajectory.std.flatten().cpu(), point.length.cpu(), slope)
    weight = weight.reshape(element.shape)
    if not chosen.form.mean_one:
        return weight
    # PCPO shares out the credit that the steps have anyway, so the total of weight times gradient scale stays.
    scale = slope / trajectory.std.flatten().cpu() if chosen.form.step_weight == "dt_std_over_slope" else None
    held = None if scale is None else scale.reshape(element.shape)
    return normalise_weights(weight, element, scale=held, reduce=backend.total)


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
        made = method.surrogate(leaf, old[rows], batch.advantage[rows], mask, None)
        (gradient,) = torch.autograd.grad((made.loss * weight[rows]).sum(), leaf)

    def over_batch(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(now.shape, dtype=x.dtype).index_copy_(0, rows, x.detach())

    loss = torch.zeros_like(now).index_copy_(0, rows, made.loss.detach())
    return Joint(
        coefficient=torch.zeros_like(now).index_copy_(0, rows, gradient),
        made=PolicyLoss(loss, over_batch(made.low), over_batch(made.high)),
    )
