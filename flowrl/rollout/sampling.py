"""Rollouts: deterministic steps outside the window, stochastic ones inside, noise drawn by key.

A group is a tree whose leaves are its members. Members that share a latent share the network call that starts from it:
plain rollouts share nothing, a shared prefix is one stem that fans out at the first stochastic step, and branching
methods name the steps at which it forks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.dynamics.kernels import next_latent
from flowrl.dynamics.log_prob import log_prob
from flowrl.dynamics.solvers import History, solver_step
from flowrl.objectives.neighbours import neighbour_noise
from flowrl.records import LogProbReduction, PredictionKind, Prompted, Trajectory
from flowrl.rollout.guided import Guide, Guiding, Moved, rademacher
from flowrl.rollout.policy import Policy, Step

MEMBERS = 1 << 20
"""More than any group has; ``group_id * MEMBERS + member`` names a latent across groups and processes."""


@dataclass(frozen=True)
class Groups:
    """The groups of one rollout on this process. size: members of every group, or int64 [P] with each group's own.

    prompt_id, occurrence, group_id: int64 [P]; prompted: conditioning of P rows.
    """

    prompt_id: Tensor
    occurrence: Tensor
    group_id: Tensor
    prompted: Prompted
    size: int | Tensor

    @property
    def sizes(self) -> Tensor:
        """int64 [P]."""
        return torch.as_tensor(self.size).expand(len(self.group_id))


@dataclass(frozen=True)
class RolloutPlan:
    """What is common to all groups: latent shape, stochastic steps, storage, and where the noise comes from.

    steps: the stochastic steps, all trained; or ``stochastic`` and ``trained``, bool [P, T], when each group has its own
    (every group trains equally many). shared: members share start noise and latents until they part: at the first
    stochastic step, or step by step at ``splits`` (step -> children of every latent). seeds: start noises a shared group.
    keep: further records of each transition, "value", "x0_hat" and "reward_gradient". solver: of the deterministic steps
    after the last stochastic one. guide: a process reward whose gradient moves the steps. neighbours: the members' start
    noises lie near one of their group, at this sigma of ``objectives.neighbours``; trained steps are then deterministic.
    """

    shape: tuple[int, ...]
    steps: Sequence[int]
    shared: bool
    chunk: int
    storage_dtype: torch.dtype
    reduction: LogProbReduction
    seed: int
    iteration: int
    policy_version: int = 0
    stochastic: Tensor | None = None
    trained: Tensor | None = None
    seeds: int = 1
    splits: Mapping[int, int] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()
    solver: str = "euler"
    guide: Guide | None = None
    neighbours: float | None = None

    def masks(self, groups: int, total: int) -> tuple[Tensor, Tensor]:
        """(stochastic, trained), bool [P, T]."""
        if self.stochastic is not None and self.trained is not None:
            return self.stochastic, self.trained
        mask = torch.zeros(groups, total, dtype=torch.bool)
        mask[:, list(self.steps)] = True
        return mask, mask


def block_sizes(sizes: Tensor, stochastic: Tensor, shared: bool, seeds: int, splits: Mapping[int, int]) -> Tensor:
    """How many members share one latent before each step: int64 [P, T + 1].

    sizes: int64 [P]; stochastic: bool [P, T]. Raises ValueError where a group does not divide evenly, or is not fully
    parted at the end.
    """
    groups, total = stochastic.shape
    block = torch.ones(groups, total + 1, dtype=torch.int64)
    if not shared:
        return block
    if bool((sizes % seeds).any()):
        raise ValueError(f"rollout.seeds: groups of {sizes.tolist()} members do not share out over {seeds} seeds")
    block[:, 0] = sizes // seeds
    first = stochastic.int().argmax(1)
    for k in range(total):
        width = torch.where(first == k, block[:, k], 1) if not splits else torch.full_like(first, splits.get(k, 1))
        if bool((block[:, k] % width).any()):
            raise ValueError(f"rollout.tree: {block[:, k].tolist()} members cannot part into {splits[k]} at step {k}")
        block[:, k + 1] = block[:, k] // width
    if bool((block[:, total] != 1).any()):
        raise ValueError(
            f"rollout.tree: splits {dict(splits)} leave {int(block[:, total].max())} members in one place; "
            "the widths times the seeds must give the group size"
        )
    return block


@dataclass(frozen=True)
class _Rows:
    """Leaves of one chunk. group: index [N] of the group; member: int64 [N]; head: int64 [N, T + 1], the first member
    that shares the latent before each step."""

    group: Tensor
    member: Tensor
    head: Tensor

    def __getitem__(self, index: Tensor) -> _Rows:
        return _Rows(self.group[index], self.member[index], self.head[index])

    def distinct(self, k: int) -> tuple[Tensor, Tensor]:
        """(one row of each latent before step k, which of those each row is)."""
        return first_of_each(self.group * MEMBERS + self.head[:, k])


def first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Split equal ids: (index of the first row of each id, in order of appearance; its place for every row)."""
    _, inverse = torch.unique(ids, return_inverse=True)
    place = torch.full((int(inverse.max()) + 1,), len(ids)).scatter_reduce_(
        0, inverse, torch.arange(len(ids)), reduce="amin"
    )
    first, order = place.sort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return first, rank[inverse]


def _noise(plan: RolloutPlan, groups: Groups, group: Tensor, member: Tensor, step: int, stream: str) -> Tensor:
    keys = [
        rng.key(plan.seed, plan.iteration, prompt, occurrence, m, step, stream)
        for prompt, occurrence, m in zip(
            groups.prompt_id[group].tolist(), groups.occurrence[group].tolist(), member.tolist(), strict=True
        )
    ]
    return rng.normal(keys, plan.shape)


def _starts(plan: RolloutPlan, groups: Groups, group: Tensor, member: Tensor) -> Tensor:
    """Start noise of members that share nothing, or only the neighbourhood of one noise, that of member 0's key."""
    if plan.neighbours is None:
        return _noise(plan, groups, group, member, 0, "initial")
    base = _noise(plan, groups, group, torch.zeros_like(member), 0, "initial")
    return neighbour_noise(base, _noise(plan, groups, group, member, 0, "perturb"), plan.neighbours)


def _ode(policy: Policy, x: Tensor, k: int, prompted: Prompted) -> Step:
    return policy.step(x, torch.full((len(x),), k), prompted, kernel="ode")


@torch.no_grad()
def rollout(policy: Policy, groups: Groups, plan: RolloutPlan) -> Iterator[Trajectory]:
    """Draw every member of every group, ``plan.chunk`` samples at a time, and yield each chunk as it finishes.

    Rows come ordered by group, then member. Latents are rounded to the storage type before their log-prob is taken, and the
    update reads the same rounded values.
    """
    count, sizes, total = len(groups.group_id), groups.sizes, policy.schedule.steps
    stochastic, trained = plan.masks(count, total)
    block = block_sizes(sizes, stochastic, plan.shared, plan.seeds, plan.splits)
    start = _stems_end(stochastic, plan) if plan.shared else torch.zeros(count, dtype=torch.int64)
    group = torch.arange(count).repeat_interleave(sizes)
    member = torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group]
    rows = _Rows(group, member, member[:, None] // block[group] * block[group])
    stems, place = rows.distinct(0)
    shared = _stems(policy, groups, plan, rows[stems], start) if plan.shared else None
    for part in torch.split(torch.arange(len(group)), plan.chunk):
        here = rows[part]
        if shared is None:
            x = _starts(plan, groups, here.group, here.member).to(policy.adapter.device)
        else:
            x = shared[place[part]]
        yield _Chunk(policy, groups, plan, here, stochastic, trained).run(x, start[here.group])


def _stems_end(stochastic: Tensor, plan: RolloutPlan) -> Tensor:
    """First step of each group at which something is drawn or parts: int64 [P]."""
    first = stochastic.int().argmax(1)
    first = first.clamp(max=min(plan.splits)) if plan.splits else first
    return first if plan.guide is None else first.clamp(max=plan.guide.begins(stochastic.shape[1]))


def _stems(policy: Policy, groups: Groups, plan: RolloutPlan, stems: _Rows, start: Tensor) -> Tensor:
    """The deterministic steps that whole stems share, each computed once: latents at ``start`` of each stem."""
    made = []
    for rows in torch.split(torch.arange(len(stems.group)), plan.chunk):
        part = stems[rows]
        x = _noise(plan, groups, part.group, part.head[:, 0], 0, "initial").to(policy.adapter.device)
        end = start[part.group]
        for k in range(int(end.max())):
            on = (end > k).nonzero().flatten()
            x[on] = _ode(policy, x[on], k, groups.prompted[part.group[on]]).mean
        made.append(x)
    return torch.cat(made)


class _Chunk:
    """One chunk of leaves on their way from the stems' ends to x0."""

    def __init__(
        self, policy: Policy, groups: Groups, plan: RolloutPlan, rows: _Rows, stochastic: Tensor, trained: Tensor
    ) -> None:
        self.policy, self.groups, self.plan, self.rows = policy, groups, plan, rows
        self.stochastic, self.trained = stochastic[rows.group], trained[rows.group]
        self.slot = self.trained.int().cumsum(1) - 1
        walked = self.stochastic | self.trained
        self.last = int((walked.int() * torch.arange(1, self.stochastic.shape[1] + 1)).max()) - 1
        self.history: History | None = None
        self.kept: dict[str, Tensor] = {}
        self.kind: PredictionKind = "velocity"
        self.guiding = None if plan.guide is None else Guiding(plan.guide, policy, len(rows.group))

    def run(self, x: Tensor, start: Tensor) -> Trajectory:
        x = x.clone()
        for k in range(int(start.min()), self.policy.schedule.steps):
            on = (start <= k).nonzero().flatten()
            x[on] = self._step(x[on], k, on)
        return self._trajectory(x)

    def _step(self, x: Tensor, k: int, on: Tensor) -> Tensor:
        """Move rows ``on`` over step k: those that share a latent by one network call."""
        rows, drawn = self.rows[on], self.stochastic[on, k]
        kept = x.to(self.plan.storage_dtype)
        x = torch.where(_like(drawn | self.trained[on, k], x), kept.float(), x)
        first, place = rows.distinct(k)
        steps, prompted = torch.full((len(first),), k), self.groups.prompted[rows.group[first]]
        if not bool(drawn.any()) and self.plan.solver != "euler" and k > self.last:
            return self._solve(x, k, on)
        if not bool(drawn.any()):
            source = self.policy.step(x[first], steps, prompted, kernel="ode")
            made, moved = source[place], self._guided(source, x[first], k, on)
            self._keep_estimate(made, k, on)
            straight = made.mean if moved is None else made.mean + moved.straight
            return self._keep_straight(kept, straight, k, on)
        source = self.policy.step(x[first], steps, prompted)
        made, moved = source[place], self._guided(source, x[first], k, on)
        mean = made.mean if moved is None else made.mean + moved.drawn
        after = self._draw(mean, made.std, rows, k)
        self._keep_estimate(made, k, on)
        self._keep(made, kept, after, k, on)
        self._keep_guided(made, mean, moved, after, k, on)
        if bool(drawn.all()):
            return after.float()
        straight = self.policy.made_of(x[first], steps, source.value, source.kind, kernel="ode")[place].mean
        straight = straight if moved is None else straight + moved.straight
        return torch.where(_like(drawn, x), after.float(), straight)

    def _guided(self, source: Step, x: Tensor, k: int, on: Tensor) -> Moved | None:
        """What guidance adds to the means of rows ``on``, or None; x and source: of their distinct latents."""
        drawn = self.stochastic[on, k]
        if self.guiding is None or not self.guiding.guide.acts(k, bool(drawn.any())):
            return None
        rows, total = self.rows[on], self.policy.schedule.steps
        first, place = rows.distinct(k)
        group, member = rows.group[first], rows.head[first, k]

        def direction(draw: int) -> Tensor:
            noise = _noise(self.plan, self.groups, group, member, k + draw * total, "perturb")
            return rademacher(noise).to(x.device)

        prompted, steps = self.groups.prompted[group], torch.full((len(first),), k)
        return self.guiding.move(source, x, steps, prompted, direction, on, place)

    def _solve(self, x: Tensor, k: int, on: Tensor) -> Tensor:
        """One deterministic step of a higher-order solver, where every row is past its last stochastic step."""
        policy, prompted = self.policy, self.groups.prompted[self.rows.group[on]]
        first = True

        def predict(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal first
            made = policy.step(x, step, prompted, kernel="ode")
            if first:
                self._keep_estimate(made, k, on)
            first = False
            return made.x0_hat, made.x1_hat

        steps = torch.full((len(x),), k)
        after, self.history = solver_step(self.plan.solver, predict, x, steps, policy.schedule, self.history)
        return after

    def _draw(self, mean: Tensor, std: Tensor, rows: _Rows, k: int) -> Tensor:
        first, place = rows.distinct(k + 1)  # members that stay together draw one noise
        noise = _noise(self.plan, self.groups, rows.group[first], rows.head[first, k + 1], k, "step")
        return next_latent(mean, std, noise.to(mean.device)[place], self.plan.storage_dtype)

    def _keep(self, made: Step, x: Tensor, after: Tensor, k: int, on: Tensor) -> None:
        which = self.trained[on, k].nonzero().flatten()
        rows = on[which]
        scores = log_prob(after, made.mean, made.std, self.plan.reduction)
        found = {"x": x, "x_next": after, "old_log_prob": scores, "std": made.std.flatten()}
        if "value" in self.plan.keep:
            found["value"] = made.value.float()
            self.kind = made.kind
        for name, values in found.items():
            self._write(name, rows, self.slot[rows, k], values[which])

    def _keep_straight(self, x: Tensor, after: Tensor, k: int, on: Tensor) -> Tensor:
        """Write down trained steps that draw no noise: latents alone. Returns the next latents, rounded as they are kept."""
        which = self.trained[on, k].nonzero().flatten()
        if not len(which):
            return after
        rounded = after.to(self.plan.storage_dtype)
        for name, values in (("x", x), ("x_next", rounded)):
            self._write(name, on[which], self.slot[on[which], k], values[which])
        return torch.where(_like(self.trained[on, k], after), rounded.float(), after)

    def _keep_guided(self, made: Step, mean: Tensor, moved: Moved | None, after: Tensor, k: int, on: Tensor) -> None:
        """Records of the trained transitions of a guided rollout; ``mean`` is the one that was drawn around."""
        if self.guiding is None:
            return
        which = self.trained[on, k].nonzero().flatten()
        rows = on[which]
        found = {"behaviour_log_prob": log_prob(after, mean, made.std, self.plan.reduction)}
        found["pull"] = ((mean - made.mean) / made.std).flatten(1).square().mean(1).sqrt()
        if "reward_gradient" in self.plan.keep:
            found["reward_gradient"] = torch.zeros_like(mean) if moved is None else moved.pull.gradient
        for name, values in found.items():
            self._write(name, rows, self.slot[rows, k], values[which])

    def _keep_estimate(self, made: Step, k: int, on: Tensor) -> None:
        """x0_hat before the first trained transition (slot 0) and after each but the last (slots 1 to K - 1)."""
        if "x0_hat" not in self.plan.keep:
            return
        trained, slot = self.trained[on], self.slot[on]
        begins = trained[:, k] & (slot[:, k] == 0)
        follows = trained[:, k - 1] & (slot[:, k - 1] + 1 < trained.sum(1)) if k else torch.zeros_like(begins)
        for wanted, place in ((begins, torch.zeros_like(slot[:, k])), (follows, slot[:, max(k - 1, 0)] + 1)):
            which = wanted.nonzero().flatten()
            self._write("x0_hat", on[which], place[which], made.x0_hat[which])

    def _write(self, name: str, rows: Tensor, slot: Tensor, values: Tensor) -> None:
        if name not in self.kept:
            size = (len(self.rows.group), int(self.trained[0].sum()), *values.shape[1:])
            self.kept[name] = torch.zeros(size, dtype=values.dtype, device=values.device)
        self.kept[name][rows, slot] = values

    def _trajectory(self, x0: Tensor) -> Trajectory:
        rows, groups, plan = self.rows, self.groups, self.plan
        kept = int(self.trained[0].sum())
        step = self.trained.nonzero()[:, 1].reshape(len(rows.group), kept)
        own = groups.group_id[rows.group]
        return Trajectory(
            prompt_id=groups.prompt_id[rows.group],
            occurrence=groups.occurrence[rows.group],
            group_id=own,
            member=rows.member,
            policy_version=plan.policy_version,
            schedule=self.policy.schedule,
            kernel=self.policy.kernel,
            log_prob_reduction=plan.reduction,
            storage_dtype=plan.storage_dtype,
            x0=x0,
            stochastic_mask=self.stochastic,
            trained_mask=self.trained.clone(),
            parent=own * MEMBERS + rows.head[:, 0],
            step=step if kept else None,
            state=own[:, None] * MEMBERS + rows.head.gather(1, step) if kept else None,
            node=own[:, None] * MEMBERS + rows.head.gather(1, step + 1) if kept else None,
            kind=self.kind,
            **({} if self.guiding is None else {"log_weight": self.guiding.log_weight, "sound": self.guiding.sound}),
            **self.kept,
        )


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)


def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of all rows, in order; schedule, kernel and the like are those of the first."""
    merged: dict[str, Any] = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(Trajectory)
        if isinstance(getattr(parts[0], f.name), Tensor)
    }
    return replace(parts[0], **merged)


@torch.no_grad()
def sample(policy: Policy, prompted: Prompted, x: Tensor) -> Tensor:
    """Deterministic sampling from start noise x [B, ...] to x0."""
    x = x.to(policy.adapter.device)
    for k in range(policy.schedule.steps):
        x = _ode(policy, x, k, prompted).mean
    return x
