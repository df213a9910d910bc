"""Policy gradients on denoising steps: the transitions of a rollout are replayed under the present weights."""

from __future__ import annotations

from dataclasses import replace
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
        bench, objective, size = self.bench, self.config.objective, self.config.batch.micro_batch
        with_kl = objective.kl.form != "none"
        skip = objective.skip_silent and not with_kl and further is None
        steps = int(batch.trajectory.trained_mask[0].sum())
        parts = [chunks(batch, m, size, skip) for m in range(objective.updates)]
        references: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in parts]
        if with_kl or (further is not None and further.reference):
            if bench.reference is None:
                raise ValueError("objective.kl: this trainer was built without a reference policy")
            with bench.clock.phase("reference"):
                references = [reference_values(bench.policy, batch, p, steps, bench.reference) for p in parts]
        seen: list[tuple[int, LossTerms]] = []
        norms: list[float] = []
        for _ in range(objective.passes):
            for m, rows in enumerate(parts):
                here = batch.minibatch == m
                live = batch.element & here[:, None]
                count = bench.backend.total(live.sum())
                moving = batch.signal if further is None else batch.signal | further.signal
                signal = bench.backend.total((here & moving).sum())
                if not int(count) or not (with_kl or int(signal)):
                    continue  # nothing to learn from: an optimizer step would only spend momentum
                weight = torch.where(live, batch.weight, 0.0) / int(count)
                on_policy = not norms  # no step taken yet: the weights are those of the rollout
                with bench.clock.phase("update"):
                    seen += accumulate(
                        bench.policy, self.objective, batch, rows, weight, references[m], on_policy, further
                    )
                with bench.clock.phase("optimizer"):
                    norms.append(bench.step())
        return metrics.of_update(seen, norms, bench.rate, max(1, len(norms)), bench.backend)
