"""The trainer: one iteration is draw, roll out, score, assign credit, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from flowrl.config.schema import Config
from flowrl.data.sampler import draw_groups
from flowrl.distributed.backend import Backend
from flowrl.distributed.replicas import check_models, check_replicas
from flowrl.dynamics.kernels import check_kernel
from flowrl.performance.counting import CallCounter
from flowrl.performance.timers import Stopwatch
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow, Schedule
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training import learners, metrics
from flowrl.training.batch import TrainingBatch, Visit, update_of
from flowrl.training.budget import Budget
from flowrl.training.collection import Collected, Collector
from flowrl.training.credit import assign, gather, takes_channels
from flowrl.training.critics import build_critics
from flowrl.training.guards import SkippedUpdates
from flowrl.training.guidance import guide_of, of_guide, process_advantage
from flowrl.training.learners import Bench, Draw, Reference
from flowrl.training.loss_scale import LossScale
from flowrl.training.micro import MicroBatch
from flowrl.training.process import build_process, process_memory, reward_memory
from flowrl.training.weights import Weights, adamw

Observer = Callable[[Collected, TrainingBatch], dict[str, Any]]
"""Looks at a rollout with its credit before the update, on each process; what it returns joins the metrics."""


class Trainer:
    """Any objective on any adapter. ``iterate`` does one iteration and returns its metrics; the rest is state.

    How weights change is the learner's part (``flowrl.training.learners``), chosen by ``objective.name``.

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
        self.weights = Weights(adapter.trainable(), config.ema.decay, config.ema.every, self.backend.sharded)
        self.scale = LossScale.around(adapter) if config.model.dtype == "fp16" else None
        self.optimizer = self.backend.optimizer(lambda: adamw(config.optimizer, self.weights.parameters))
        kernel = config.rollout.kernel
        schedule = adapter.schedule(config.rollout.steps, request_of(config, rows[0]))
        check_kernel(kernel.name, kernel.noise, schedule)
        on_device = Schedule(*(v.to(adapter.device) for v in (schedule.t, schedule.alpha, schedule.sigma)))
        self.policy = Policy(
            adapter, on_device, kernel.name, kernel.noise, config.rollout.guidance, config.rollout.cfg_gradient,
            config.rollout.guidance_low,
        )  # fmt: skip
        self.counter, self.clock = CallCounter(adapter.trainable()), Stopwatch()
        self.budget = Budget(config.batch, len(rows))
        micro = MicroBatch(config.batch.micro_batch, self.backend)
        self.learner = learners.build(
            Bench(
                config, self.policy, rewards, rows, self.weights, self.optimizer, reference, self.backend, self.clock,
                self.counter, lambda: self._step(), micro,
            )
        )  # fmt: skip
        self.collector = Collector(
            config, self.policy, rewards, rows, self.backend, self.clock, self.learner.records_needed(),
            transitions=self.learner.needs_transitions, arrange=self.learner.arrange, micro=micro,
        )  # fmt: skip
        self.process = build_process(config, self.policy, rewards, self.collector.pixels, reference)
        self.critics = build_critics(config, self.policy, rows, self.backend, reference)
        self.collector.process, self.collector.critics = self.process, self.critics
        self.collector.guide = guide_of(config, self.process)
        self.observer: Observer | None = None
        if self.backend.sharded is None:  # else checked before it was split
            check_models(dict(adapter.trainable().named_parameters()), self.backend)

    @property
    def seed(self) -> int:
        """The run's seed; a rollback after bad updates moves on to fresh noise."""
        return self.config.seed + (self.restarts << 32)

    # -- one iteration ---------------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, Any]:
        """Do one iteration; returns the metrics row (design section 4)."""
        self.clock.reset()
        self.counter.reset()
        row: dict[str, Any] = {"iteration": self.iteration + 1}
        row |= self._from_rollout() if self.learner.needs_rollout else self.learner.learn_from(self._draw())
        check_replicas(self.replicas(), self.backend)
        self.backend.check_shards(self.iteration)
        self.iteration += 1
        row |= self.counter.as_metrics() | self.clock.as_metrics() | metrics.of_memory()
        row |= process_memory(self.process) | reward_memory(self.rewards)
        row |= {"update/skipped": self.skipped.total, "update/count": self.updates}
        row |= {} if self.scale is None else {"update/gradient_scale": self.scale.value}
        return row

    def _from_rollout(self) -> dict[str, Any]:
        """Roll out, score, assign credit, learn."""
        row: dict[str, Any] = {}
        collected = self._collect()
        with self.clock.phase("advantage"):
            batch, credit = self._credit(collected)
            row |= metrics.of_rewards(collected.scored, credit, self.backend)
            row |= metrics.of_shares(collected.scored, collected.trajectory.group_id, self.backend)
            row |= of_guide(collected.trajectory, self.backend)
            row |= metrics.of_credit(batch, self.backend)
        if self.observer is not None:
            row |= self._observe(collected, batch, self.observer)
        row |= collected.facts
        row |= self._train(batch)
        if self.critics is not None and batch.score is not None and batch.visit is not None:
            with self.clock.phase("critic"):
                row |= self.critics.learn(
                    collected.trajectory, collected.prompted, collected.row, batch.score, batch.visit
                )
        return row

    def _draw(self) -> Draw:
        """Decide for all processes what the iteration is about; returns this one's part."""
        config = self.config
        drawn = draw_groups(self.seed, self.iteration, config.batch.groups, len(self.rows), self.row_weights)
        drawn = self.budget.draw(drawn, self.seed, self.iteration)
        sizes = self.budget.sizes(drawn)
        mine = list(self.backend.share(len(drawn), config.objective.updates))
        return Draw([drawn[i] for i in mine], sizes[mine], Visit(self.seed, self.iteration, self.updates))

    def _collect(self) -> Collected:
        """Draw this process's samples by the learner's policy, and score them."""
        draw = self._draw()
        with self.learner.behaviour():
            return self.collector.collect(draw.groups, draw.sizes, draw.visit)

    def _credit(self, collected: Collected) -> tuple[TrainingBatch, Any]:
        """Advantages from all processes' scores, cut back to this process's samples."""
        config, trajectory = self.config, collected.trajectory
        channels = takes_channels(config.advantage.name)
        weights = {label: w for label, w in self.rewards.weights.items() if w} if channels else {}
        gathered = gather(collected.scored, trajectory, config, self.backend)
        credit = assign(config, collected, gathered, weights, self.backend)
        self.budget.learn(self.backend.gather(trajectory.prompt_id), gathered.scores, gathered.valid)
        process = process_advantage(config, collected.values, gathered.group, credit, self.backend)
        mine = self.backend.mine(len(trajectory))
        element = credit.loss_mask[mine] & gathered.chosen[mine, None]
        if collected.values is not None and not collected.values.open and config.critic.closed == "wait":
            element = torch.zeros_like(element)
        part = update_of(trajectory.group_id, config.batch, config.objective.updates)
        score = torch.where(gathered.valid, gathered.scores, torch.nan)[mine]
        return TrainingBatch(
            trajectory, collected.prompted, collected.row, credit.advantage[mine], credit.weight[mine], element, part,
            score, collected.first_chunk, Visit(self.seed, self.iteration, self.updates),
            None if process is None else process[mine],
        ), credit  # fmt: skip

    def _observe(self, collected: Collected, batch: TrainingBatch, observer: Observer) -> dict[str, Any]:
        """Show a rollout to the observer; its network calls are not the training's, its time is."""
        before = replace(self.counter.counts)
        with self.clock.phase("pictures"), self.learner.behaviour():
            found = observer(collected, batch)
        self.counter.counts = before
        return found

    def _train(self, batch: TrainingBatch) -> dict[str, Any]:
        with self.backend.updating():
            return self.learner.learn(batch)

    def _step(self) -> float:
        """Clip, check, step, average; returns the gradient norm. A norm that is not finite changes no weight."""
        parameters, o = self.weights.parameters, self.config.optimizer
        self.backend.add_gradients(parameters)
        norm = self.backend.clip_gradients(parameters, o.max_grad_norm)
        finite = norm == norm and norm != float("inf")
        blamed = self.scale is not None and self.scale.note(finite)
        self.skipped.note(finite or blamed)  # a factor that was too large says nothing of the weights
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.updates)
            self.optimizer.step()
            self.updates += 1
            self.weights.average(self.updates)
            self.weights.changed()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def replicas(self) -> dict[str, torch.Tensor]:
        """Trained tensors of which every process has a copy, by name: weights, their average, critics."""
        own, sharded = self.weights, self.backend.sharded
        averages = {f"average of {name}": shadow for name, shadow in zip(own.names, own.shadow, strict=False)}
        critics = {} if self.critics is None else self.critics.replicas()
        found = dict(zip(own.names, own.parameters, strict=True)) | averages
        if sharded is not None:
            found = {name: tensor for name, tensor in found.items() if not sharded.is_shard(name.rpartition(" ")[2])}
        return found | critics | self.learner.replicas()

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as nested tensors and numbers."""
        own = self.learner.state()
        return {
            **self.weights.state(),
            **self.budget.state(),
            "optimizer": self.weights.optimizer_state(self.optimizer),
            "progress": {
                "iteration": self.iteration, "updates": self.updates, "restarts": self.restarts,
                "skipped": self.skipped.state(),
            },
            **({"learner": own} if own else {}),
            **({"scale": self.scale.state()} if self.scale is not None else {}),
            **({"process": self.process.state()} if self.process is not None else {}),
            **({"critic": self.critics.state()} if self.critics is not None else {}),
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights.load(state)
        self.optimizer.load_state_dict(self.weights.own_optimizer_state(state["optimizer"]))
        self.budget.load(state)
        progress = state["progress"]
        self.iteration, self.updates, self.restarts = (progress[k] for k in ("iteration", "updates", "restarts"))
        self.skipped.load(progress["skipped"])
        self.learner.load_state(state.get("learner", {}))
        if self.scale is not None and "scale" in state:
            self.scale.load(state["scale"])
        if self.process is not None:
            self.process.load(state.get("process", {}))
        if self.critics is not None:
            self.critics.load(state.get("critic", {}))


def learning_rate(config: Config, update: int) -> float:
    """Rate of update number ``update`` (from 0): warm-up times constant, or times a linear fall to 0 over the run."""
    o = config.optimizer
    total = config.iterations * config.objective.updates * config.objective.passes
    rate = o.lr * min(1.0, (update + 1) / o.warmup) if o.warmup else o.lr
    return rate * max(0.0, 1 - update / total) if o.schedule == "linear" else rate
