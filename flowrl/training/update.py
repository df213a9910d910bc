"""The update: from trajectories and advantages to optimizer steps.

Gradients add up over chunks of samples and over steps; each loss term carries 1 / (trained transitions of the whole
minibatch), so neither the micro-batch nor the process count changes the gradient beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowrl.advantage import PolicyLoss
from flowrl.dynamics.log_prob import log_prob, reference_kl
from flowrl.objectives.flow_grpo import LossTerms, coefficient_terms, surrogate_terms
from flowrl.objectives.ratios import divergence
from flowrl.records import Trajectory
from flowrl.rollout.policy import Policy, Step
from flowrl.rollout.sampling import first_of_each
from flowrl.training import losses
from flowrl.training.batch import TrainingBatch

Reference = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Replayed:
    """Transition ``k`` of samples ``rows`` [N] under the present weights. scores: (log_prob, old_log_prob) of its ratio, [N];
    weight: [N]; reference: (mean, value) of the reference policy where the update has them.
    """

    step: Step
    rows: Tensor
    k: int
    scores: tuple[Tensor, Tensor]
    weight: Tensor
    reference: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Further:
    """A loss beside the objective's, added up over transitions. signal: bool [B], samples it learns from; reference: it
    needs the reference policy's outputs.
    """

    loss: Callable[[Replayed], Tensor]
    signal: Tensor
    reference: bool


def replay(policy: Policy, batch: TrainingBatch, rows: Tensor, k: int) -> Step:
    """Transition number ``k`` of samples ``rows`` under the present weights.

    Samples that share a latent share its network call; the gradient of the call is the sum of theirs.
    """
    trajectory = batch.trajectory
    if trajectory.x is None or trajectory.step is None:
        raise ValueError("update: this trajectory holds no transitions; use a kernel with noise and a window")
    if trajectory.state is None:
        return policy.step(trajectory.x[rows, k].float(), trajectory.step[rows, k], batch.prompted[batch.row[rows]])
    first, place = first_of_each(trajectory.state[rows, k])
    source = rows[first]
    made = policy.step(trajectory.x[source, k].float(), trajectory.step[source, k], batch.prompted[batch.row[source]])
    return made if len(first) == len(rows) else made[place]


def replay_log_prob(policy: Policy, batch: TrainingBatch, rows: Tensor, k: int) -> Tensor:
    """Log-prob of the stored transitions number ``k`` of samples ``rows`` under the present weights: float32 [N]."""
    made = replay(policy, batch, rows, k)
    return log_prob(_next(batch.trajectory, rows, k), made.mean, made.std, batch.trajectory.log_prob_reduction)


def _next(trajectory: Trajectory, rows: Tensor, k: int) -> Tensor:
    if trajectory.x_next is None:
        raise ValueError("update: this trajectory holds no transitions; use a kernel with noise and a window")
    return trajectory.x_next[rows, k]


def chunks(batch: TrainingBatch, minibatch: int, size: int, skip_silent: bool) -> list[Tensor]:
    """Row indices of one minibatch in calls of ``size``; with ``skip_silent`` only rows that carry a gradient."""
    chosen = batch.mask & (batch.minibatch == minibatch)
    if skip_silent:
        chosen = chosen & batch.signal
        # Splitting nothing gives one empty part, and a process without a live row has nothing to call.
        return [part for part in torch.split(chosen.nonzero().flatten(), size) if len(part)]
    # Whole chunks as the rollout made them: equal batch shapes give equal numbers, and masked rows weigh nothing.
    rows = (batch.minibatch == minibatch).nonzero().flatten()
    return [part for part in torch.split(rows, size) if bool(chosen[part].any())]


@torch.no_grad()
def reference_values(
    policy: Policy, batch: TrainingBatch, parts: Sequence[Tensor], steps: int, reference: Reference
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """(mean, value) of the reference policy for every part and step; once a rollout, whatever the number of passes."""
    found = {}
    with reference():
        for number, rows in enumerate(parts):
            for k in range(steps):
                made = replay(policy, batch, rows, k)
                found[number, k] = (made.mean, made.value)
    return found


def accumulate(
    policy: Policy,
    method: losses.Chosen,
    batch: TrainingBatch,
    parts: Sequence[Tensor],
    weight: Tensor,
    references: dict[tuple[int, int], tuple[Tensor, Tensor]],
    on_policy: bool,
    further: Further | None = None,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Iterator[tuple[int, LossTerms]]:
    """Add the gradients of one minibatch to the parameters; yield (step of the schedule, terms) for each call.

    weight: float32 [B, K], the credit's weight over the trained elements of the minibatch on all processes, 0 for what
    is not trained. on_policy: the weights are still those of the rollout, so its log-probs are the present ones.
    further: a loss that is added to the objective's. backward: takes the loss of each call.
    """
    trajectory = batch.trajectory
    if trajectory.old_log_prob is None or trajectory.step is None:
        raise ValueError(
            "update: this trajectory holds no log-probs; forward-process methods have updates of their own"
        )
    objective = method.settings
    joint = None
    if method.joint and parts:
        joint = losses.whole(method, policy_log_probs(policy, batch, parts, on_policy), batch, parts, weight)
    for number, rows in enumerate(parts):
        for k in range(trajectory.old_log_prob.shape[1]):
            made = replay(policy, batch, rows, k)
            x_next, old = _next(trajectory, rows, k), trajectory.old_log_prob[rows, k]
            now = log_prob(x_next, made.mean, made.std, trajectory.log_prob_reduction)
            kl = None
            if objective.kl.form != "none":
                mean_ref, value_ref = references[number, k]
                kl = reference_kl(objective.kl.form, made.mean, mean_ref, made.std, made.point, made.value, value_ref)
            drawn = _drawn(policy, trajectory, rows, k)
            scores = losses.pair(method, made, drawn, x_next, (now, old.to(now.device)), trajectory.log_prob_reduction)
            w = weight[rows, k].to(now.device)
            found = []
            for step, part in _by_step(trajectory.step[rows, k]):
                new, stored = scores[0][part], scores[1][part]
                penalty = None if kl is None else kl[part]
                if joint is None:
                    advantage = batch.advantage[rows[part], k].to(now.device)
                    apart = None
                    if drawn is not None and "divergence" in method.form.needs:
                        apart = divergence(made.mean, drawn.mean, made.std)[part, None]
                    surrogate = partial(_with, method, apart)
                    terms = surrogate_terms(new, stored, advantage, surrogate, penalty, objective.kl.weight, w[part])
                else:
                    coefficient, share = joint.of(rows[part], k, now.device)
                    terms = coefficient_terms(new, stored, coefficient, share, penalty, objective.kl.weight, w[part])
                found.append((step, terms))
            parts_of_loss = [terms.loss for _, terms in found]
            if further is not None:
                parts_of_loss.append(further.loss(Replayed(made, rows, k, scores, w, references.get((number, k)))))
            backward(torch.stack(parts_of_loss).sum())
            yield from found


def _with(
    method: losses.Chosen, divergence: Tensor | None, now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor
) -> PolicyLoss:
    return method.surrogate(now, old, advantage, mask, divergence)


def _by_step(step: Tensor) -> list[tuple[int, Tensor | slice]]:
    """Rows of each step of the schedule; all of them, unindexed, where they are at one step, as most windows have it."""
    distinct = sorted(set(step.tolist()))
    if len(distinct) == 1:
        return [(distinct[0], slice(None))]
    return [(s, (step == s).nonzero().flatten()) for s in distinct]


def _drawn(policy: Policy, trajectory: Trajectory, rows: Tensor, k: int) -> Step | None:
    """The transition as the rollout drew it, from the network output that it kept; None where it kept none."""
    if trajectory.value is None or trajectory.x is None or trajectory.step is None:
        return None
    x, step = trajectory.x[rows, k].float(), trajectory.step[rows, k]
    return policy.made_of(x, step, trajectory.value[rows, k], trajectory.kind)


@torch.no_grad()
def policy_log_probs(policy: Policy, batch: TrainingBatch, parts: Sequence[Tensor], on_policy: bool) -> Tensor:
    """Log-probs of all trained transitions under the present weights: float32 [B, K], 0 in rows of no part.

    A loss over whole trajectories needs them before any of its gradients. On policy they are those of the rollout, and
    no call is spent.
    """
    stored = batch.trajectory.old_log_prob
    if stored is None:
        raise ValueError("update: this trajectory holds no log-probs")
    if on_policy:
        return stored.clone()
    now = torch.zeros_like(stored)
    for rows in parts:
        for k in range(stored.shape[1]):
            now[rows, k] = replay_log_prob(policy, batch, rows, k).to(now.device)
    return now
