"""From scores to advantages, with the estimator that the config names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS, Advantage, drop_thin_groups, estimate
from flowrl.advantage.pipeline import inputs_of, options_of
from flowrl.config.schema import Config
from flowrl.config.trajectory import reads_start
from flowrl.distributed.backend import Backend
from flowrl.records import Trajectory
from flowrl.scoring.runtime import Scored
from flowrl.training.budget import chosen_members
from flowrl.training.collection import Collected, StateValues


def takes_channels(name: str) -> bool:
    """Tell whether an estimator takes several rewards a sample, with their weights, instead of the score."""
    return "weights" in inputs_of(ESTIMATORS[name])


@dataclass(frozen=True)
class Gathered:
    """All processes' samples, in rank order, all [B]. valid: without groups that have too few; chosen: to be trained."""

    scores: Tensor
    valid: Tensor
    group: Tensor
    chosen: Tensor


def gather(scored: Scored, trajectory: Trajectory, config: Config, backend: Backend) -> Gathered:
    """Bring the scores of all processes together."""
    scores = backend.gather(torch.from_numpy(scored.scores).double())
    group = backend.gather(trajectory.group_id)
    valid = drop_thin_groups(backend.gather(torch.from_numpy(scored.valid)), group, config.failures.min_valid)
    return Gathered(scores, valid, group, chosen_members(config.batch.selection, scores, group, valid))


def _of_values(config: Config, values: StateValues, mask: Tensor, backend: Backend) -> dict[str, Tensor]:
    """What estimators read of the values of states: by step, before it, at the cuts between steps."""
    start, step = backend.gather(values.start), backend.gather(values.step)
    found = {
        "step_value": torch.where(mask, step, 0.0),
        "stage_reward": step,
        "value": torch.cat([start[:, None], step[:, :-1]], 1),
        "segment_value": torch.cat([start[:, None], step], 1),
    }
    if values.post is not None:
        found["value_post"] = torch.where(mask, backend.gather(values.post), 0.0)
    found["probe"] = found["value"][:, -1]  # of the latest state that is not yet decided
    return found | ({"start_value": start} if reads_start(config) else {})


def assign(
    config: Config, collected: Collected, gathered: Gathered, weights: Mapping[str, float], backend: Backend
) -> Advantage:
    """Give every trained transition of all processes' samples its advantage: a record of [B, K] tensors.

    weights: reward label -> weight, the channels of estimators that take several rewards; the others take the score.
    Samples are in the order of the ranks. What is passed to the estimator: ``flowrl.config.engine.SUPPLIED``.
    """
    a, trajectory, scored = config.advantage, collected.trajectory, collected.scored
    group, valid = gathered.group, gathered.valid
    steps = max(1, int(trajectory.trained_mask[0].sum()))  # without transitions a whole sample counts as one
    mask = valid[:, None].expand(-1, steps)
    inputs: dict[str, Any] = {
        "rewards": gathered.scores,
        "group": group,
        "valid": valid,
        "mask": mask,
        "trajectory": torch.arange(len(group)),
        "length": torch.full((len(group),), float(steps)),
        "cost": torch.full((len(group),), float(config.rollout.steps)),
        "seed_group": backend.gather(trajectory.parent),
    }
    for name in ("step", "node", "old_log_prob"):
        stored = vars(trajectory)[name]
        if stored is not None:
            inputs[name] = backend.gather(stored.cpu())
    if takes_channels(a.name):
        per_reward = [torch.from_numpy(scored.channel(label)) for label in weights]
        inputs["rewards"] = backend.gather(torch.stack(per_reward, 1).double())
        inputs["weights"] = torch.tensor(list(weights.values()), dtype=torch.float64)
    else:
        # The outcome is the reward of the last trained transition; a failed reward has no value there.
        last = torch.zeros(mask.shape, dtype=torch.float64)
        last[:, -1] = torch.where(valid, gathered.scores, 0.0)
        inputs["step_reward"] = last
    wanted = inputs_of(ESTIMATORS[a.name])
    if collected.values is not None and not collected.values.open:  # a critic that may not be used yet
        outcome = {"rewards": gathered.scores, "group": group, "valid": valid, "mask": mask}
        return estimate("grpo", outcome, {}, whiten=a.whiten, clip=a.clip).over_steps(mask)
    if wanted.get("truncated", False):
        inputs["truncated"] = torch.zeros_like(valid)  # every row runs to its end
    if trajectory.state is not None and trajectory.node is not None:
        inputs["anchor"] = backend.gather(trajectory.state)
        inputs["node_path"] = backend.gather(torch.cat([trajectory.parent[:, None], trajectory.node], 1))
    inputs["segment"] = torch.arange(steps).expand(len(group), -1)  # one transition a segment, its nodes one level
    if collected.values is not None:
        inputs |= _of_values(config, collected.values, mask, backend)
        if not {"step_value"} & set(wanted):  # these take no gaps: a sample whose value failed leaves
            whole = inputs["segment_value"].isfinite().all(1) if reads_start(config) else mask[:, 0]
            inputs["valid"] = valid = valid & whole & inputs["stage_reward"].isfinite().all(1)
            inputs["mask"] = mask = mask & valid[:, None]
            for name in {"value", "segment_value", "stage_reward", "step_reward"} & set(inputs):
                inputs[name] = torch.where(valid[:, None], inputs[name], 0.0)
            inputs["probe"] = torch.where(valid, inputs["probe"], 0.0)
    options = dict(a.options)
    if "steps" in options_of(ESTIMATORS[a.name]):
        options.setdefault("steps", config.rollout.steps)  # the length of the schedule, for estimators that ask
    given = {name: value for name, value in inputs.items() if name in wanted or name == "mask"}  # whitening reads it
    return estimate(a.name, given, options, whiten=a.whiten, clip=a.clip).over_steps(mask)
