"""Euphonium: policy gradients on guided samples, from outcome and process advantages, and the guidance's distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowrl.dynamics.kernels import StepPoint
from flowrl.dynamics.reward_guidance import pulled_value, velocity_pull
from flowrl.objectives.flow_grpo import surrogate_terms
from flowrl.rollout.guided import group_weights
from flowrl.training.batch import TrainingBatch
from flowrl.training.learners.base import Bench
from flowrl.training.learners.trajectory import TrajectoryLearner
from flowrl.training.update import Further, Replayed


class EuphoniumLearner(TrajectoryLearner):
    """Dual-reward GRPO (2602.04928): ``outcome L(rho, A^O) + process L(rho, A^P)``, two clipped surrogates.

    With ``process`` and ``distil`` at 0, and no guidance, it is Flow-GRPO, bit for bit. What the rollout's guidance asks
    for: old log-probs of the guided Gaussian (log_prob=guided), members counted by their weights (langevin_weighted).
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.spent: dict[str, float] = {}

    def records_needed(self) -> frozenset[str]:
        e = self.config.euphonium
        own = {"reward_gradient"} if e.distil else set()
        return super().records_needed() | own | ({"value"} if e.distil and e.target == "rollout" else set())

    def _train(self, batch: TrainingBatch, further: Further | None = None) -> dict[str, Any]:
        e, g = self.config.euphonium, self.config.rollout.guide
        self.spent = {}
        batch = replace(self._guided(batch), advantage=batch.advantage * e.outcome)
        process = batch.process_advantage
        dual = e.process > 0 and process is not None
        if dual or (e.distil > 0 and g.active):
            signal = torch.zeros_like(batch.mask)
            if e.distil > 0:
                signal = batch.mask
            elif process is not None:
                signal = ((process != 0) & (batch.weight != 0) & batch.element).any(1)
            further = Further(lambda made: self._further(batch, made), signal, e.distil > 0 and e.target == "reference")
        return super()._train(batch, further) | self.spent

    def _guided(self, batch: TrainingBatch) -> TrainingBatch:
        """What the rollout's guidance changes of the batch."""
        g, trajectory = self.config.rollout.guide, batch.trajectory
        if g.log_prob == "guided" and trajectory.behaviour_log_prob is not None:
            batch = replace(batch, trajectory=replace(trajectory, old_log_prob=trajectory.behaviour_log_prob))
        if g.mode == "langevin_weighted" and trajectory.log_weight is not None:
            share = group_weights(trajectory.log_weight, trajectory.group_id, batch.mask)
            batch = replace(batch, weight=batch.weight * share[:, None])
        return batch

    def _further(self, batch: TrainingBatch, made: Replayed) -> Tensor:
        """The process surrogate and the distance to the guided step, of one transition of some samples."""
        e, rows, k = self.config.euphonium, made.rows, made.k
        total = made.weight.new_zeros(())
        if e.process > 0 and batch.process_advantage is not None:
            advantage = e.process * batch.process_advantage[rows, k].to(made.weight.device)
            now, old = made.scores
            terms = surrogate_terms(now, old, advantage, self.objective.surrogate_of_step, None, 0.0, made.weight)
            self._note("euphonium/process_loss", terms.loss)
            total = total + terms.loss
        if e.distil > 0:
            loss = (made.weight * self._distance(batch, made)).sum()
            self._note("euphonium/distil_loss", loss)
            total = total + e.distil * loss
        return total

    def _distance(self, batch: TrainingBatch, made: Replayed) -> Tensor:
        """``||v - (v_target - kappa grad R / beta)||^2``, a mean over latent elements: float32 [N]."""
        g, trajectory, rows, k = self.config.rollout.guide, batch.trajectory, made.rows, made.k
        if trajectory.step is None or trajectory.reward_gradient is None:
            raise ValueError("euphonium: the rollout kept no gradients to learn")
        policy = self.bench.policy
        if made.reference is not None:
            target = made.reference[1]
        elif trajectory.value is not None:
            target = trajectory.value[rows, k]
        else:
            raise ValueError("euphonium: there is no velocity to aim from")
        last = policy.schedule.steps - 1 if g.last is None else g.last
        step = trajectory.step[rows, k]
        on = ((step >= g.first) & (step <= last)).nonzero().flatten()
        gradient = trajectory.reward_gradient[rows, k].to(target.device)
        pull = torch.zeros_like(gradient)
        if len(on):
            point = StepPoint.of(policy.schedule, step[on], gradient.ndim)
            pull[on] = g.scale * velocity_pull(g.mode, policy.kernel, policy.noise, point) * gradient[on]
        aim = pulled_value(target, trajectory.kind, pull, made.step.point).detach()
        return (made.step.value.float() - aim).square().flatten(1).mean(1)

    def _note(self, name: str, loss: Tensor) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + float(loss.detach())
