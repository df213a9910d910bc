"""From a rollout to advantages, with the estimator that the config names: the engine's ``estimate``, as for images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS, Advantage, estimate
from flowrl.advantage.pipeline import inputs_of
from flowrl.config.schema import Advantage as Settings
from flowrl.text.rollout import Sampled

# Estimators of two turns, (turn reward, outcome): the results before the answer are the first turn, the answer the second.
TWO_TURNS = frozenset({"mt_grpo"})


def needs_value(name: str) -> bool:
    """Tell whether an estimator reads the values of a critic."""
    return inputs_of(ESTIMATORS[name]).get("value", False)


def last_step(mask: Tensor) -> Tensor:
    """Mark the last unmasked step of each row: bool [B, T]."""
    return mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)


def inputs(name: str, made: Sampled, value: Tensor | None) -> dict[str, Any]:
    """Gather what a text run supplies to the estimator ``name``; the names are those of ``flowrl.advantage.INPUTS``.

    The outcome is the reward of the last token. ``segment`` is a chain's segment, a tree's level or the turn; for
    estimators of two turns it is 0 before the row's last result and 1 on it, and the turn reward is the share of right
    results before the answer. value: float32 [B, T] of the critic, None without one.
    """
    outcome, length = made.grades.outcome, made.mask.sum(1).float()
    found: dict[str, Any] = {
        "rewards": outcome,
        "group": made.group,
        "mask": made.mask,
        "step_reward": torch.where(last_step(made.mask), outcome[:, None], 0.0),
        "stage_reward": made.grades.turn_reward,
        "segment": made.segment,
        "old_log_prob": made.old_log_prob,
        "entropy": made.entropy,
        "token": made.tokens,
        "length": length,
        "cost": length,
        "trajectory": torch.arange(len(outcome)),
        "correct": outcome > 0,
        "value": value,
        "segment_value": made.segment_value,
        "node_path": made.node_path,
    }
    if name in TWO_TURNS:
        turn = made.grades.turn
        found["rewards"] = torch.stack([made.grades.share, outcome], dim=1)
        found["segment"] = torch.where(made.mask, (turn == turn.amax(1, keepdim=True)).long(), -1)
        single = turn.amax(1) == 0
        found["segment"][single] = found["segment"][single].clamp(max=0)
    return {key: x for key, x in found.items() if x is not None}


def assign(settings: Settings, made: Sampled, value: Tensor | None = None) -> Advantage:
    """Give every token its advantage: the engine's record, [B, T]."""
    a = settings
    return estimate(a.name, inputs(a.name, made, value), a.options, whiten=a.whiten, clip=a.clip).over_steps(made.mask)
