"""The first half of an iteration: draw, roll out, decode, score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.config.schema import Config
from flowrl.credit.networks import pooled_text
from flowrl.credit.process import ProcessSet
from flowrl.credit.values import spread_values
from flowrl.data.pictures import references
from flowrl.data.sampler import Drawn
from flowrl.distributed.backend import Backend
from flowrl.dynamics.windows import WindowRule, group_windows
from flowrl.performance.timers import Stopwatch
from flowrl.protocols import PipelineAdapter
from flowrl.records import Prompted, PromptRow, Request, RewardBatch, Trajectory
from flowrl.rollout.guided import Guide, check_guide
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
from flowrl.rollout.sampling import Groups, RolloutPlan, concatenate, first_of_each, rollout
from flowrl.scoring.runtime import RewardRuntime, Scored, join
from flowrl.training import metrics
from flowrl.training.batch import Visit
from flowrl.training.critics import CreditCritic
from flowrl.training.micro import MicroBatch
from flowrl.training.process import credited_values, process_metrics
from flowrl.training.states import estimates, state_at, valued_states

STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StateValues:
    """Values of intermediate states, NaN where there is none. start: float64 [B]; step: float64 [B, K].

    post: float64 [B, K], of each transition's mean, where a critic gives it; open: whether credit may rest on them.
    """

    start: Tensor
    step: Tensor
    post: Tensor | None = None
    open: bool = True


@dataclass(frozen=True)
class Collected:
    """One process's rollout with its scores; ``row`` maps samples to rows of ``prompted``."""

    trajectory: Trajectory
    prompted: Prompted
    row: Tensor
    scored: Scored
    first_chunk: Tensor
    values: StateValues | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class _Waiting:
    """Finished latents on their way to the rewards. sizes: int64 [P], members of each group, where whole ones are asked."""

    def __init__(self, sizes: Tensor | None) -> None:
        self.ends = None if sizes is None else sizes.cumsum(0)
        self.start = self.done = 0
        self.x0: list[Tensor] = []
        self.group_id: list[Tensor] = []

    def add(self, x0: Tensor, group_id: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """Take rows in; returns those that can be scored as (number of the first, x0, group ids), None for none."""
        self.x0.append(x0)
        self.group_id.append(group_id)
        self.done += len(x0)
        whole = self.done if self.ends is None else int((self.ends * (self.ends <= self.done)).max())
        if whole <= self.start:
            return None
        first, count = self.start, whole - self.start
        latents, ids = torch.cat(self.x0), torch.cat(self.group_id)
        self.x0, self.group_id, self.start = [latents[count:]], [ids[count:]], whole
        return first, latents[:count], ids[:count]


class Collector:
    """Draws trajectories for given groups and scores what they end in, and what they pass through where asked.

    keep: further records of each transition that the update needs (see RolloutPlan). transitions: whether the rollout
    has stochastic steps and keeps them; else every step is deterministic and a trajectory is its x0. arrange: what a
    learner changes of every plan.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        rewards: RewardRuntime,
        rows: Sequence[PromptRow],
        backend: Backend,
        clock: Stopwatch,
        keep: frozenset[str],
        *,
        transitions: bool = True,
        arrange: Callable[[RolloutPlan], RolloutPlan] | None = None,
        micro: MicroBatch | None = None,
    ) -> None:
        self.config, self.policy, self.rewards, self.rows = config, policy, rewards, rows
        self.backend, self.clock = backend, clock
        self.transitions, self.arrange = transitions, arrange
        self.micro = micro or MicroBatch(config.batch.micro_batch, backend)
        self.guide: Guide | None = None
        self.keep = keep | ({"x0_hat"} if config.credit.values == "x0" else frozenset())
        if config.credit.values == "critic" and config.advantage.name == "pdppo":
            self.keep = self.keep | {"value"}  # the mean of a transition comes from it
        self.process: ProcessSet | None = None
        self.critics: CreditCritic | None = None

    @property
    def adapter(self) -> PipelineAdapter:
        return self.policy.adapter

    def collect(self, drawn: Sequence[Drawn], size: int | Tensor, visit: Visit) -> Collected:
        """Roll out and score the groups ``drawn`` of this process. size: members of each, or int64 [P]."""
        requests = [request_of(self.config, self.rows[d.prompt_id]) for d in drawn]
        prompt_id = torch.tensor([d.prompt_id for d in drawn])
        first, place = first_of_each(prompt_id)  # a prompt drawn twice is encoded once
        with self.clock.phase("encode"):
            prompted = self.policy.encode([requests[i] for i in first.tolist()])[place]
        groups = Groups(
            prompt_id=prompt_id,
            occurrence=torch.tensor([d.occurrence for d in drawn]),
            group_id=torch.tensor([d.group_id for d in drawn]),
            prompted=prompted,
            size=size,
        )
        row = torch.arange(len(drawn)).repeat_interleave(groups.sizes)
        text = pooled_text(prompted.positive)
        parts, pending = self.micro.attempt("the rollout", lambda: self._draw(groups, visit, requests, row, text))
        scored = self._wait(pending)
        trajectory = concatenate(parts)
        finite = metrics.finite_rows(trajectory.x0).numpy()
        self.rewards.check_failures(self.backend.gather(torch.from_numpy(scored.sound & finite)).numpy())
        scored = replace(scored, valid=scored.valid & finite)
        if self.guide is not None and trajectory.sound is not None:
            check_guide(self.guide, self.backend.gather(trajectory.sound), self.config.failures.max_invalid_fraction)
            scored = replace(scored, valid=scored.valid & trajectory.sound.numpy())
        facts: dict[str, Any] = {}
        values = (
            self._values(trajectory, prompted, row, requests, scored, facts)
            if self.config.credit.values != "none"
            else None
        )
        return Collected(trajectory, prompted, row, scored, torch.arange(len(parts[0])), values, facts)

    def _draw(
        self, groups: Groups, visit: Visit, requests: Sequence[Request], row: Tensor, text: Tensor
    ) -> tuple[list[Trajectory], list[Future[Scored]]]:
        """Roll out, and hand what is finished to the rewards while the rest is drawn."""
        parts: list[Trajectory] = []
        pending: list[Future[Scored]] = []
        self.rewards.begin_iteration()
        waiting = _Waiting(groups.sizes if self.rewards.needs_groups else None)
        made = rollout(self.policy, groups, self.plan(groups, visit))
        while True:
            with self.clock.phase("rollout"):
                part = next(made, None)
            if part is None:
                return parts, pending
            parts.append(part)
            ready = waiting.add(part.x0, part.group_id)
            if ready is not None:
                start, x0, group_id = ready
                asked = row[start : start + len(x0)]
                pending.append(self._submit(x0, group_id, [requests[i] for i in asked.tolist()], text[asked]))

    def plan(self, groups: Groups, visit: Visit) -> RolloutPlan:
        """What the rollout of ``groups`` follows at this iteration."""
        config, rollout_ = self.config, self.config.rollout
        stochastic = trained = torch.zeros(len(groups.group_id), rollout_.steps, dtype=torch.bool)
        if self.transitions:
            stochastic, trained = group_windows(
                WindowRule(**vars(rollout_.window)), rollout_.steps, visit.iteration, visit.seed,
                groups.prompt_id, groups.occurrence,
            )  # fmt: skip
        plan = RolloutPlan(
            shape=self.adapter.latent_shape(request_of(self.config, self.rows[0])), steps=(),
            shared=rollout_.share_prefix and self.transitions, chunk=self.micro.size,
            storage_dtype=STORAGE[rollout_.storage_dtype],
            reduction=config.objective.log_prob_reduction, seed=visit.seed, iteration=visit.iteration,
            policy_version=visit.policy_version, stochastic=stochastic, trained=trained, seeds=rollout_.seeds,
            splits=dict.fromkeys(rollout_.splits, rollout_.children), keep=self.keep, solver=rollout_.solver,
            guide=self.guide,
        )  # fmt: skip
        return plan if self.arrange is None else self.arrange(plan)

    def _submit(self, x0: Tensor, group_id: Tensor, requests: Sequence[Request], text: Tensor) -> Future[Scored]:
        with self.clock.phase("decode"):
            decoded = [self.pixels(part, requests[0]) for part in torch.split(x0, self.micro.size)]
            pixels = torch.cat(decoded).numpy()
        with self.clock.phase("reward"):
            return self.rewards.submit(
                RewardBatch(
                    images=pixels,
                    prompts=[r.prompt for r in requests],
                    metadata=[r.metadata for r in requests],
                    group_ids=group_id.tolist(),
                    latents=x0,
                    reference=references(requests),
                    text=text,
                )
            )

    def pixels(self, x0: Tensor, request: Request) -> Tensor:
        """uint8 [B, H, W, 3], or [B, F, H, W, 3] where the adapter decodes to [B, 3, F, H, W]; on CPU."""
        # A latent that is not finite shows as black; its sample is masked by finite_rows.
        images = self.adapter.decode(x0, request).nan_to_num(0.0)
        return (images * 255).round().to(torch.uint8).movedim(1, -1).contiguous().cpu()

    def _wait(self, pending: Sequence[Future[Scored]]) -> Scored:
        with self.clock.phase("reward"):
            return join([p.result() for p in pending])

    def _values(
        self,
        trajectory: Trajectory,
        prompted: Prompted,
        row: Tensor,
        requests: Sequence[Request],
        scored: Scored,
        facts: dict[str, Any],
    ) -> StateValues:
        """Value the states that the config asks for, each distinct state once; what was seen on the way goes to ``facts``."""
        where, with_start = valued_states(trajectory, self.config)
        outcome = torch.where(torch.from_numpy(scored.valid), torch.from_numpy(scored.scores).double(), torch.nan)
        if self.critics is not None:
            made = self.critics.values(trajectory, prompted, row)
            return StateValues(made.start, torch.cat([made.step, outcome[:, None]], 1), made.post, made.open)
        if self.process is not None and self.config.credit.values == "process":
            self.process.begin_iteration()
        columns = []
        for slot in range(len(where.states)):
            if slot == 0 and not with_start:
                columns.append(torch.full((len(trajectory),), torch.nan, dtype=torch.float64))
                continue
            if self.process is not None and self.config.credit.values == "process":
                columns.append(
                    self._process_at(self.process, slot, where.after, trajectory, prompted, row, outcome, facts)
                )
            else:
                columns.append(self._values_at(slot, where.after, trajectory, prompted, row, requests))
        if self.process is not None and self.config.credit.values == "process":
            facts |= process_metrics(self.process, self.backend)
        start, step = spread_values(torch.stack(columns, 1), outcome, where, "linear" if with_start else "hold")
        return StateValues(start, step)

    def _process_at(
        self, process: ProcessSet, slot: int, after: Sequence[int], trajectory: Trajectory, prompted: Prompted, row: Tensor,
        outcome: Tensor, facts: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """What the process rewards say of one state of every sample: float64 [B], NaN where one of them failed."""
        if trajectory.node is None or trajectory.state is None:
            raise ValueError("values: this trajectory does not say which samples share a state")
        x, step = state_at(trajectory, torch.arange(len(trajectory)), slot, after)
        ids = trajectory.state[:, 0] if slot == 0 else trajectory.node[:, after[slot - 1]]
        found = torch.full((len(trajectory),), torch.nan, dtype=torch.float64)
        with self.clock.phase("process"):
            for k in sorted(set(step.tolist())):  # groups with windows of their own are at different steps
                here = (step == k).nonzero().flatten()
                first, place = first_of_each(ids[here])
                rows = here[first]
                t = self.policy.schedule.t[k].expand(len(rows))
                found[here] = credited_values(
                    process, x[rows].float(), t, prompted[row[rows]], place, outcome[here], trajectory.group_id[here],
                    facts=facts, chunk=self.config.batch.micro_batch,
                )  # fmt: skip
        return found

    def _values_at(
        self,
        slot: int,
        after: Sequence[int],
        trajectory: Trajectory,
        prompted: Prompted,
        row: Tensor,
        requests: Sequence[Request],
    ) -> Tensor:
        """Rewards at one state of every sample: float64 [B], NaN where a reward failed."""
        if trajectory.state is None or trajectory.node is None:
            raise ValueError("values: this trajectory does not say which samples share a state")
        ids = trajectory.state[:, 0] if slot == 0 else trajectory.node[:, after[slot - 1]]
        first, place = first_of_each(ids)
        pending = []
        for rows in torch.split(first, self.config.batch.micro_batch):
            with self.clock.phase("rollout"):
                x0 = estimates(self.policy, self.config.credit, trajectory, prompted, row, rows, slot, after)
            asked = [requests[i] for i in row[rows].tolist()]
            text = pooled_text(prompted.positive[row[rows]])
            pending.append(self._submit(x0, trajectory.group_id[rows], asked, text))
        found = self._wait(pending)
        scores = torch.where(torch.from_numpy(found.valid), torch.from_numpy(found.scores).double(), torch.nan)
        return scores[place]
