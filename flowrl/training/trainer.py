"""The trainer: one iteration is draw, roll out, score, assign credit, update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowrl.config.schema import Config
from flowrl.data.sampler import draw_groups
from flowrl.distributed.backend import Backend
from flowrl.dynamics.kernels import check_kernel
from flowrl.objectives.flow_grpo import LossTerms
from flowrl.performance.counting import CallCounter
from flowrl.performance.timers import Stopwatch
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow, Schedule
from flowrl.rollout.policy import Policy
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training import losses, metrics
from flowrl.training.batch import TrainingBatch
from flowrl.training.budget import Budget
from flowrl.training.collection import Collected, Collector, Visit, request_of
from flowrl.training.credit import assign, gather, takes_channels
from flowrl.training.guards import SkippedUpdates, self_check
from flowrl.training.update import Reference, accumulate, chunks, reference_values
from flowrl.training.weights import Weights


class Trainer:
    """Flow-GRPO on any adapter. ``iterate`` does one iteration and returns its metrics; the rest is state.

    rows: the prompts; row_weights: how likely each is drawn (None: one pass after another). reference: a context manager
    within which the network is the reference policy.
    """

    def __init__(
        self,
        config: Config,
        adapter: PipelineAdapter,
        rewards: RewardRuntime,
        rows: Sequence[PromptRow],
        *,
        row_weights: Sequence[float] | None = None,
        reference: Reference | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.config, self.adapter, self.rewards, self.rows = config, adapter, rewards, rows
        self.row_weights, self.reference = row_weights, reference
        self.backend = backend or Backend()
        self.iteration = self.updates = self.restarts = 0
        self.skipped = SkippedUpdates()
        self.weights = Weights(adapter.trainable(), config.ema.decay, config.ema.every)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.weights.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )
        kernel = config.rollout.kernel
        schedule = adapter.schedule(config.rollout.steps, request_of(config, rows[0]))
        check_kernel(kernel.name, kernel.noise, schedule)
        on_device = Schedule(*(v.to(adapter.device) for v in (schedule.t, schedule.alpha, schedule.sigma)))
        self.policy = Policy(
            adapter, on_device, kernel.name, kernel.noise, config.rollout.guidance, config.rollout.cfg_gradient
        )
        self.counter, self.clock = CallCounter(adapter.trainable()), Stopwatch()
        self.budget = Budget(config.batch, len(rows))
        self.objective = losses.choose(config.objective)
        self.collector = Collector(
            config, self.policy, rewards, rows, self.backend, self.clock, losses.records_needed(self.objective)
        )
        self._checked = False

    @property
    def seed(self) -> int:
        """The run's seed; a rollback after bad updates moves on to fresh noise."""
        return self.config.seed + (self.restarts << 32)

    # -- one iteration ---------------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, Any]:
        """Do one iteration; returns the metrics row (design section 4)."""
        self.clock.reset()
        self.counter.reset()
        collected = self._collect()
        row: dict[str, Any] = {"iteration": self.iteration + 1}
        with self.clock.phase("advantage"):
            batch, credit = self._credit(collected)
            row |= metrics.of_rewards(collected.scored, credit, self.backend)
            row |= metrics.of_shares(collected.scored, collected.trajectory.group_id, self.backend)
        if not self._checked:
            self._self_check(batch, collected.first_chunk)
        row |= self._train(batch)
        self.iteration += 1
        row |= self.counter.as_metrics() | self.clock.as_metrics() | metrics.of_memory()
        row |= {"update/skipped": self.skipped.total, "update/count": self.updates}
        return row

    def _collect(self) -> Collected:
        """Decide for all processes what is drawn, then draw this one's part."""
        config = self.config
        drawn = draw_groups(self.seed, self.iteration, config.batch.groups, len(self.rows), self.row_weights)
        drawn = self.budget.draw(drawn, self.seed, self.iteration)
        sizes = self.budget.sizes(drawn)
        mine = list(self.backend.share(len(drawn)))
        visit = Visit(self.seed, self.iteration, self.updates)
        return self.collector.collect([drawn[i] for i in mine], sizes[mine], visit)

    def _credit(self, collected: Collected) -> tuple[TrainingBatch, Any]:
        """Advantages from all processes' scores, cut back to this process's samples."""
        config, trajectory = self.config, collected.trajectory
        channels = takes_channels(config.advantage.name)
        weights = {label: w for label, w in self.rewards.weights.items() if w} if channels else {}
        gathered = gather(collected.scored, trajectory, config, self.backend)
        credit = assign(config, collected, gathered, weights, self.backend)
        self.budget.learn(self.backend.gather(trajectory.prompt_id), gathered.scores, gathered.valid)
        mine = self.backend.mine(len(trajectory))
        element = credit.loss_mask[mine] & gathered.chosen[mine, None]
        scale = losses.step_weights(self.objective, self.policy, trajectory, element, self.backend)
        place = trajectory.group_id - trajectory.group_id.min()
        part = place * config.objective.updates // (config.batch.groups // self.backend.world)
        return TrainingBatch(
            trajectory, collected.prompted, collected.row, credit.advantage[mine], credit.weight[mine] * scale, element,
            part,
        ), credit  # fmt: skip

    def _self_check(self, batch: TrainingBatch, rows: Tensor) -> None:
        before = replace(self.counter.counts)
        with self.clock.phase("self_check"):
            exact = self.adapter.device.type == "cpu" and self.config.model.dtype == "fp32"
            self_check(self.policy, batch, rows, exact)
        self.counter.counts = before
        self._checked = True

    def _train(self, batch: TrainingBatch) -> dict[str, Any]:
        objective, size = self.config.objective, self.config.batch.micro_batch
        with_kl = objective.kl.form != "none"
        skip = objective.skip_silent and not with_kl
        steps = int(batch.trajectory.trained_mask[0].sum())
        parts = [chunks(batch, m, size, skip) for m in range(objective.updates)]
        references: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in parts]
        if with_kl:
            if self.reference is None:
                raise ValueError("objective.kl: this trainer was built without a reference policy")
            with self.clock.phase("reference"):
                references = [reference_values(self.policy, batch, p, steps, self.reference) for p in parts]
        seen: list[tuple[int, LossTerms]] = []
        norms: list[float] = []
        for _ in range(objective.passes):
            for m, rows in enumerate(parts):
                here = batch.minibatch == m
                live = batch.element & here[:, None]
                count = self.backend.total(live.sum())
                signal = self.backend.total((here & batch.signal).sum())
                if not int(count) or not (with_kl or int(signal)):
                    continue  # nothing to learn from: an optimizer step would only spend momentum
                weight = torch.where(live, batch.weight, 0.0) / int(count)
                on_policy = not norms  # no step taken yet: the weights are those of the rollout
                with self.clock.phase("update"):
                    seen += accumulate(self.policy, self.objective, batch, rows, weight, references[m], on_policy)
                with self.clock.phase("optimizer"):
                    norms.append(self._step())
        return metrics.of_update(seen, norms, self.optimizer.param_groups[0]["lr"], max(1, len(norms)), self.backend)

    def _step(self) -> float:
        """Clip, check, step, average; returns the gradient norm. A norm that is not finite changes no weight."""
        parameters, o = self.weights.parameters, self.config.optimizer
        self.backend.add_gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, o.max_grad_norm))
        finite = norm == norm and norm != float("inf")
        self.skipped.note(finite)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.updates)
            self.optimizer.step()
            self.updates += 1
            self.weights.average(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as nested tensors and numbers."""
        return {
            **self.weights.state(),
            **self.budget.state(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {
                "iteration": self.iteration, "updates": self.updates, "restarts": self.restarts,
                "skipped": self.skipped.state(),
            },
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights.load(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.budget.load(state)
        progress = state["progress"]
        self.iteration, self.updates, self.restarts = (progress[k] for k in ("iteration", "updates", "restarts"))
        self.skipped.load(progress["skipped"])
        self._checked = False


def learning_rate(config: Config, update: int) -> float:
    """Rate of update number ``update`` (from 0): warm-up times constant, or times a linear fall to 0 over the run."""
    o = config.optimizer
    total = config.iterations * config.objective.updates * config.objective.passes
    rate = o.lr * min(1.0, (update + 1) / o.warmup) if o.warmup else o.lr
    return rate * max(0.0, 1 - update / total) if o.schedule == "linear" else rate
