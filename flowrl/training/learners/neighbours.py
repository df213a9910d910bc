"""Neighbor GRPO: deterministic samples from neighbouring noises, compared by their distances to a few anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.advantage import PolicyLoss
from flowrl.objectives.flow_grpo import LossTerms, surrogate_terms
from flowrl.objectives.neighbours import mean_squared_distance, neighbour_log_prob, quasi_norm_advantage
from flowrl.rollout.sampling import RolloutPlan
from flowrl.training import losses, metrics
from flowrl.training.batch import TrainingBatch
from flowrl.training.learners.base import Bench, Learner


class NeighbourLearner(Learner):
    """A surrogate policy at each trained step: leap from an anchor to any member of its group, by a softmax of distances.

    The steps of the window are trained; all are deterministic. An update costs one forward and one backward for each
    anchor and trained step, with whatever guidance adds.
    """

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.settings = self.config.neighbours
        self.objective = losses.choose(self.config.objective)

    def arrange(self, plan: RolloutPlan) -> RolloutPlan:
        if plan.trained is None:
            raise ValueError("neighbor_grpo: this plan has no window")
        return replace(
            plan, stochastic=torch.zeros_like(plan.trained), shared=False, seeds=1, splits={},
            neighbours=self.settings.sigma,
        )  # fmt: skip

    def learn(self, batch: TrainingBatch) -> dict[str, Any]:
        bench, objective, group = self.bench, self.config.objective, batch.trajectory.group_id
        columns = zip(batch.advantage.unbind(1), batch.element.unbind(1), strict=True)
        power = self.settings.power
        credit = torch.stack([quasi_norm_advantage(a, group, kept, power=power) for a, kept in columns], 1)
        batch = replace(batch, advantage=credit)
        anchors = self._anchors(batch)
        seen: list[tuple[int, LossTerms]] = []
        norms: list[float] = []
        for _ in range(objective.passes):
            for m in range(objective.updates):
                rows = anchors[batch.minibatch[anchors] == m]
                count = int(bench.backend.total(torch.tensor(self._elements(batch, rows))))
                signal = (batch.minibatch == m) & batch.signal
                if not count or not int(bench.backend.total(signal.sum())):
                    continue
                work = partial(self._gradients, batch, rows, 1 / count)
                with bench.clock.phase("update"):
                    seen += bench.micro.attempt("the update", work)
                with bench.clock.phase("optimizer"):
                    norms.append(bench.step())
        return metrics.of_update(seen, norms, bench.rate, max(1, len(norms)), bench.backend)

    def _gradients(self, batch: TrainingBatch, rows: Tensor, share: float) -> list[tuple[int, LossTerms]]:
        """The gradients of the anchors ``rows``, in place of any that an earlier try has left."""
        self.bench.optimizer.zero_grad(set_to_none=True)
        parts = torch.split(rows, self.bench.micro.size)
        return [terms for part in parts for terms in self._accumulate(batch, part, share)]

    def _anchors(self, batch: TrainingBatch) -> Tensor:
        """Rows of the anchors, a keyed choice among each group's trained members: int64 [N]."""
        t = batch.trajectory
        if batch.visit is None:
            raise ValueError("neighbor_grpo: this batch does not say which iteration it is of")
        trained = batch.mask & (batch.signal if self.config.objective.skip_silent else True)
        chosen = []
        for group in t.group_id.unique().tolist():  # type: ignore[no-untyped-call]
            rows = ((t.group_id == group) & trained).nonzero().flatten()
            if not len(rows):
                continue
            prompt, occurrence = int(t.prompt_id[rows[0]]), int(t.occurrence[rows[0]])
            key = rng.key(batch.visit.seed, batch.visit.iteration, prompt, occurrence, stream="sampler")
            order = torch.tensor(rng.permutation(key, len(rows)))
            chosen.append(rows[order[: self.settings.anchors]])
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)

    def _members(self, batch: TrainingBatch, group: int, k: int) -> Tensor:
        return ((batch.trajectory.group_id == group) & batch.element[:, k]).nonzero().flatten()

    def _elements(self, batch: TrainingBatch, anchors: Tensor) -> int:
        """How many (anchor, member, step) the loss is a mean over."""
        same = batch.trajectory.group_id[anchors][:, None] == batch.trajectory.group_id[None]
        return int((same.double() @ batch.element.double()).sum())

    def _accumulate(self, batch: TrainingBatch, anchors: Tensor, weight: float) -> Sequence[tuple[int, LossTerms]]:
        """Add the gradient of one chunk of anchors; returns (step of the schedule, terms) of each group and step."""
        t, policy = batch.trajectory, self.bench.policy
        if t.x is None or t.x_next is None or t.step is None:
            raise ValueError("neighbor_grpo: this rollout kept no latents")
        seen: list[tuple[int, LossTerms]] = []
        for k in range(t.x.shape[1]):
            prompted = batch.prompted[batch.row[anchors]]
            moved = policy.step(t.x[anchors, k].float(), t.step[anchors, k], prompted, kernel="ode").mean
            found = []
            for group in t.group_id[anchors].unique().tolist():  # type: ignore[no-untyped-call]
                members = self._members(batch, group, k)
                if not len(members):
                    continue
                here = (t.group_id[anchors] == group).nonzero().flatten()
                x = t.x_next[members, k].float()
                heat = self.settings.temperature or mean_squared_distance(x)
                now = neighbour_log_prob(x, moved[here], heat)
                old = neighbour_log_prob(x, t.x_next[anchors[here], k].float(), heat)
                advantage = batch.advantage[members, k].to(now.device).expand_as(now)
                share = torch.full_like(now, weight)
                terms = surrogate_terms(
                    now.flatten(), old.flatten(), advantage.flatten(), self._surrogate, None, 0.0,
                    share.flatten(),
                )  # fmt: skip
                found.append((int(t.step[members[0], k]), terms))
            if found:
                self.bench.backend.backward(torch.stack([terms.loss for _, terms in found]).sum())
            seen += found
        return seen

    def _surrogate(self, now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> PolicyLoss:
        return self.objective.surrogate(now, old, advantage, mask, None)
