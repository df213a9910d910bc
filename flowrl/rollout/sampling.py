"""Rollouts: deterministic steps outside the window, stochastic ones inside, noise drawn by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.dynamics.kernels import next_latent
from flowrl.dynamics.log_prob import log_prob
from flowrl.records import LogProbReduction, Trajectory
from flowrl.rollout.policy import Policy, Prompted


@dataclass(frozen=True)
class Groups:
    """The groups of one rollout on this process, all with ``size`` members.

    prompt_id, occurrence, group_id: int64 [P]; prompted: conditioning of P rows.
    """

    prompt_id: Tensor
    occurrence: Tensor
    group_id: Tensor
    prompted: Prompted
    size: int


@dataclass(frozen=True)
class RolloutPlan:
    """What is common to all groups: latent shape, stochastic steps, storage, and where the noise comes from.

    shared: one start noise a group, deterministic steps before the first stochastic one computed once a group.
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


def _noise(plan: RolloutPlan, groups: Groups, group: Tensor, member: Tensor, step: int, stream: str) -> Tensor:
    keys = [
        rng.key(plan.seed, plan.iteration, prompt, occurrence, m, step, stream)
        for prompt, occurrence, m in zip(
            groups.prompt_id[group].tolist(), groups.occurrence[group].tolist(), member.tolist(), strict=True
        )
    ]
    return rng.normal(keys, plan.shape)


def _walk(policy: Policy, x: Tensor, steps: range, prompted: Prompted) -> Tensor:
    """Deterministic steps."""
    for k in steps:
        x = policy.step(x, torch.full((len(x),), k), prompted, kernel="ode").mean
    return x


@torch.no_grad()
def rollout(policy: Policy, groups: Groups, plan: RolloutPlan) -> Iterator[Trajectory]:
    """Draw every member of every group, ``plan.chunk`` samples at a time, and yield each chunk as it finishes.

    Rows come ordered by group, then member. Latents are rounded to the storage type before their log-prob is taken, and the
    update reads the same rounded values.
    """
    device, count = policy.adapter.device, len(groups.group_id)
    first = plan.steps[0] if plan.shared else 0
    prefix = None
    if plan.shared:
        everyone = torch.arange(count)
        parts = []
        for rows in torch.split(everyone, plan.chunk):
            x = _noise(plan, groups, rows, torch.zeros_like(rows), 0, "initial").to(device)
            parts.append(_walk(policy, x, range(first), groups.prompted[rows]))
        prefix = torch.cat(parts)
    group = torch.arange(count).repeat_interleave(groups.size)
    member = torch.arange(groups.size).repeat(count)
    for rows in torch.split(torch.arange(len(group)), plan.chunk):
        g, m = group[rows], member[rows]
        start = _noise(plan, groups, g, m, 0, "initial").to(device) if prefix is None else prefix[g]
        yield _chunk(policy, groups, plan, start, first, g, m)


def _chunk(
    policy: Policy, groups: Groups, plan: RolloutPlan, x: Tensor, first: int, group: Tensor, member: Tensor
) -> Trajectory:
    prompted, size, total = groups.prompted[group], len(x), policy.schedule.steps
    kept: dict[str, list[Tensor]] = {"x": [], "x_next": [], "old_log_prob": [], "std": []}
    for k in range(first, total):
        if k not in plan.steps:
            x = _walk(policy, x, range(k, k + 1), prompted)
            continue
        here = x.to(plan.storage_dtype)
        step = policy.step(here.float(), torch.full((size,), k), prompted)
        noise = _noise(plan, groups, group, member, k, "step").to(x.device)
        after = next_latent(step.mean, step.std, noise, plan.storage_dtype)
        kept["x"].append(here)
        kept["x_next"].append(after)
        kept["old_log_prob"].append(log_prob(after, step.mean, step.std, plan.reduction))
        kept["std"].append(step.std.flatten())
        x = after.float()
    mask = torch.zeros(size, total, dtype=torch.bool)
    mask[:, list(plan.steps)] = True
    return Trajectory(
        prompt_id=groups.prompt_id[group],
        occurrence=groups.occurrence[group],
        group_id=groups.group_id[group],
        member=member,
        policy_version=plan.policy_version,
        schedule=policy.schedule,
        kernel=policy.kernel,
        log_prob_reduction=plan.reduction,
        storage_dtype=plan.storage_dtype,
        x0=x,
        stochastic_mask=mask,
        trained_mask=mask.clone(),
        parent=groups.group_id[group] * groups.size if plan.shared else groups.group_id[group] * groups.size + member,
        step=torch.tensor(list(plan.steps)).expand(size, -1).clone(),
        **{name: torch.stack(values, 1) for name, values in kept.items()},
    )


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
    return _walk(policy, x.to(policy.adapter.device), range(policy.schedule.steps), prompted)
