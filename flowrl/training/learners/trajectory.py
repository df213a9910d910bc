"""Policy gradients on denoising steps: the transitions of a rollout are replayed under the present weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowrl.objectives.flow_grpo import LossTerms
from flowrl.training import losses, metrics
from flowrl.training.batch import TrainingBatch
from flowrl.training.guards import self_check
from flowrl.training.learners.base import Bench, Learner
from flowrl.training.update import Further, accumulate, chunks, reference_values


class TrajectoryLearner(Learner):
    """Flow-GRPO and its kin: a ratio, a step weight and a loss on every trained transition."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.objective = losses.choose(self.config.objective)
        self.checked = False

    def records_needed(self) -> frozenset[str]:
        return losses.records_needed(self.objective)

    def learn(self, batch: TrainingBatch) -> dict[str, Any]:
        bench = self.bench
        if not self.checked and batch.first_chunk is not None:
            self._self_check(batch, batch.first_chunk)
        scale = losses.step_weights(self.objective, bench.policy, batch.trajectory, batch.element, bench.backend)
        return self._train(replace(batch, weight=batch.weight * scale))

    def load_state(self, state: dict[str, Any]) -> None:
        self.checked = False

    def _self_check(self, batch: TrainingBatch, rows: Tensor) -> None:
        bench = self.bench
        before = replace(bench.counter.counts)
        with bench.clock.phase("self_check"):
            exact = bench.adapter.device.type == "cpu" and self.config.model.dtype == "fp32"
            self_check(bench.policy, batch, rows, exact)
        bench.counter.counts = before
        self.checked = True

    def _train(self, batch: TrainingBatch, further: Further | None = None) -> dict[str, Any]:
        """Do the updates. further: a loss beside the objective's."""
        bench, objective = self.bench, self.config.objective
        with_kl = objective.kl.form != "none"
        skip = objective.skip_silent and not with_kl and further is None
        calls = _Calls(self, batch, skip, with_kl or (further is not None and further.reference))
        calls.prepare()
        seen: list[tuple[int, LossTerms]] = []
        norms: list[float] = []
        for _ in range(objective.passes):
            for m in range(objective.updates):
                here = batch.minibatch == m
                live = batch.element & here[:, None]
                count = bench.backend.total(live.sum())
                moving = batch.signal if further is None else batch.signal | further.signal
                signal = bench.backend.total((here & moving).sum())
                if not int(count) or not (with_kl or int(signal)):
                    continue  # nothing to learn from: an optimizer step would only spend momentum
                weight = torch.where(live, batch.weight, 0.0) / int(count)
                # Without a step taken yet the weights are those of the rollout.
                work = partial(self._gradients, calls, m, weight, not norms, further)
                with bench.clock.phase("update"):
                    seen += bench.micro.attempt("the update", work, calls.prepare)
                with bench.clock.phase("optimizer"):
                    norms.append(bench.step())
        return metrics.of_update(seen, norms, bench.rate, max(1, len(norms)), bench.backend)

    def _gradients(
        self, calls: _Calls, m: int, weight: Tensor, on_policy: bool, further: Further | None
    ) -> list[tuple[int, LossTerms]]:
        """The gradients of minibatch ``m``, in place of any that an earlier try has left."""
        bench = self.bench
        bench.optimizer.zero_grad(set_to_none=True)
        return list(
            accumulate(
                bench.policy, self.objective, calls.batch, calls.parts[m], weight, calls.references[m], on_policy, further,
                backward=bench.backend.backward,
            )
        )  # fmt: skip


class _Calls:
    """Which samples go into which call of the updates, and what the reference policy says of them, at one micro-batch."""

    def __init__(self, learner: TrajectoryLearner, batch: TrainingBatch, skip: bool, with_reference: bool) -> None:
        self.learner, self.batch, self.skip, self.with_reference = learner, batch, skip, with_reference
        self.size = 0
        self.parts: list[list[Tensor]] = []
        self.references: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = []

    def prepare(self) -> None:
        """Divide the batch anew where the micro-batch has changed since."""
        bench = self.learner.bench
        if self.size == bench.micro.size:
            return
        if not self.with_reference:
            self._divide()
            self.references = [{} for _ in self.parts]
            return
        if bench.reference is None:
            raise ValueError("objective.kl: this trainer was built without a reference policy")
        with bench.clock.phase("reference"), bench.reference():
            self.references = bench.micro.attempt("the reference policy's calls", self._refer, self._divide)

    def _divide(self) -> None:
        bench, updates = self.learner.bench, self.learner.config.objective.updates
        self.size = bench.micro.size
        self.parts = [chunks(self.batch, m, self.size, self.skip) for m in range(updates)]

    def _refer(self) -> list[dict[tuple[int, int], tuple[Tensor, Tensor]]]:
        steps = int(self.batch.trajectory.trained_mask[0].sum())
        policy = self.learner.bench.policy  # the reference already, around all of them
        return [reference_values(policy, self.batch, part, steps, nullcontext) for part in self.parts]
