"""From scores to advantages, with the estimator that the config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowrl.advantage import ESTIMATORS, Advantage, drop_thin_groups, estimate
from flowrl.advantage.pipeline import inputs_of
from flowrl.config.schema import Config
from flowrl.distributed.backend import Backend
from flowrl.records import Trajectory
from flowrl.scoring.runtime import Scored


def takes_channels(name: str) -> bool:
    """Tell whether an estimator takes several rewards a sample, with their weights, instead of the score."""
    return "weights" in inputs_of(ESTIMATORS[name])


def assign(
    config: Config, scored: Scored, trajectory: Trajectory, weights: Mapping[str, float], backend: Backend
) -> Advantage:
    """Give every trained transition of all processes' samples its advantage: a record of [B, K] tensors.

    weights: reward label -> weight, the channels of estimators that take several rewards; the others take the score.
    Samples are in the order of the ranks. What is passed to the estimator: ``flowrl.config.engine.SUPPLIED``.
    """
    a = config.advantage
    channels = takes_channels(a.name)
    per_reward = [torch.from_numpy(scored.per_reward[label].scores) for label in weights] if channels else []
    scores = torch.stack(per_reward, 1) if channels else torch.from_numpy(scored.scores)
    rewards = backend.gather(scores.double())
    valid = backend.gather(torch.from_numpy(scored.valid))
    group = backend.gather(trajectory.group_id)
    valid = drop_thin_groups(valid, group, config.failures.min_valid)
    steps = int(trajectory.trained_mask[0].sum())
    mask = valid[:, None].expand(-1, steps)
    inputs: dict[str, Any] = {
        "rewards": rewards,
        "group": group,
        "valid": valid,
        "mask": mask,
        "trajectory": torch.arange(len(group)),
        "length": torch.full((len(group),), float(steps)),
        "cost": torch.full((len(group),), float(config.rollout.steps)),
    }
    if channels:
        inputs["weights"] = torch.tensor(list(weights.values()), dtype=torch.float64)
    else:
        # The outcome is the reward of the last trained transition; a failed reward has no value there.
        last = torch.zeros(mask.shape, dtype=torch.float64)
        last[:, -1] = torch.where(valid, rewards, 0.0)
        inputs["step_reward"] = last
    return estimate(a.name, inputs, a.options, whiten=a.whiten, clip=a.clip).over_steps(mask)
