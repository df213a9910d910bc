"""Guidance in a training run: which reward guides, what the metrics say of it, and the process advantage of Euphonium."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import Advantage, estimate
from flowrl.config.guide import takes_start, takes_values
from flowrl.config.schema import Config
from flowrl.credit.process import ProcessSet
from flowrl.distributed.backend import Backend
from flowrl.records import Trajectory
from flowrl.rollout.guided import Guide, effective_size, group_weights
from flowrl.training.collection import StateValues


def guide_of(config: Config, processes: ProcessSet | None) -> Guide | None:
    """The guide that ``rollout.guide`` asks for; None for none, and for a scale of 0, which asks the reward for nothing."""
    g = config.rollout.guide
    if not g.active or processes is None:
        return None
    last = config.rollout.steps - 1 if g.last is None else g.last
    return Guide(
        processes[g.reward], g.mode, scale=g.scale, first=g.first, last=last, gradient=g.gradient, radius=g.radius,
        draws=g.draws, unit=g.unit, log_prob=g.log_prob,
    )  # fmt: skip


def of_guide(trajectory: Trajectory, backend: Backend) -> dict[str, Any]:
    """Metrics of a guided rollout, nothing of another.

    ``guide/failed``: members that a failure of the process reward touched; ``guide/pull``: how far the trained steps were
    moved, root mean square over latent elements in units of std, mean over steps; ``guide/effective_size``: of the weights
    of langevin_weighted, as a part of the group, mean over groups.
    """
    if trajectory.sound is None or trajectory.pull is None or trajectory.log_weight is None:
        return {}
    sound = trajectory.sound
    parts = torch.stack(
        [(~sound).sum().double(), trajectory.pull[sound.to(trajectory.pull.device)].double().sum().cpu()]
    )
    failed, pull = backend.total(parts).tolist()
    count = float(backend.total(sound.sum().double())) * trajectory.pull.shape[1]
    row: dict[str, Any] = {"guide/failed": int(failed), "guide/pull": pull / count if count else None}
    if bool((trajectory.log_weight != 0).any()):
        weights = group_weights(trajectory.log_weight, trajectory.group_id, sound)
        groups = [weights[(trajectory.group_id == g) & sound] for g in torch.unique(trajectory.group_id)]
        shares = [float(effective_size(w)) / len(w) for w in groups if len(w)]
        row["guide/effective_size"] = sum(shares) / len(shares) if shares else None
    return row


def process_advantage(
    config: Config, values: StateValues | None, group: Tensor, credit: Advantage, backend: Backend
) -> Tensor | None:
    """A^P of Euphonium: the values of states, standardised by ``step_credit``; None where the objective reads none.

    values: of this process; group: int64 [B] of all processes; credit: the outcome's. float32 [B, K] of all processes'
    samples, 0 where a value is missing or nothing is trained.
    """
    if not takes_values(config) or values is None:
        return None
    e, mask = config.euphonium, credit.loss_mask
    start, step = backend.gather(values.start), backend.gather(values.step)
    own = torch.cat([start[:, None], step[:, :-1]], 1) if e.state == "before" else step
    if not bool((mask & own.isfinite()).any()):
        return torch.zeros(mask.shape)
    inputs: dict[str, Any] = {"step_value": torch.where(mask, own, 0.0), "group": group, "mask": mask}
    if takes_start(config) and e.shaping == "gain":
        inputs["start_value"] = start
    options = {"shaping": e.shaping, "normaliser": e.normaliser}
    made = estimate("step_credit", inputs, options, whiten="none", clip=config.advantage.clip).over_steps(mask)
    return torch.where(made.loss_mask, made.advantage, 0.0)
