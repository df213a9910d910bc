"""The stages that estimators share: statistics and baseline, division, closing the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .record import Advantage
from .segments import Groups

Singleton = Literal["zero", "raw"]
_ROUNDING = 1e-12


@dataclass(frozen=True)
class GroupStatistics:
    """Rewards after the first two stages, float64 [B]: ``centred`` has the baseline taken off, 0 where masked.

    scale is the deviation to divide by, before eps; live: bool [B], the group has signal.
    """

    groups: Groups
    value: Tensor
    centred: Tensor
    mean: Tensor
    std: Tensor
    scale: Tensor
    live: Tensor

    @property
    def mask(self) -> Tensor:
        return self.groups.valid


def check_policies(ddof: int = 0, eps: float = 0.0, singleton: str = "zero") -> None:
    """Raise ValueError for a numeric policy out of range; see ``estimators``."""
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof}")
    check_number("eps", eps, 0.0)
    if singleton not in ("zero", "raw"):
        raise ValueError(f"singleton: expected 'zero' or 'raw', got {singleton!r}")


def group_statistics(value: Tensor, group: Tensor, mask: Tensor, ddof: int, singleton: str) -> GroupStatistics:
    """Take group statistics and the group-mean baseline of float64 rewards [B] (bool mask [B]: those that count)."""
    groups = Groups.of(group, mask)
    mean, std = groups.mean(value), groups.std(value, ddof)
    live = groups.max(value) > groups.min(value)
    baseline, scale = mean, std
    if singleton == "raw":
        single = groups.count() == 1
        baseline = torch.where(single, 0.0, mean)
        scale = torch.where(single, 1.0, std)
        live = live | single
    centred = torch.where(mask & live, value - baseline, 0.0)
    return GroupStatistics(groups=groups, value=value, centred=centred, mean=mean, std=std, scale=scale, live=live)


def divide(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / (scale + eps), and 0 where there is nothing to divide by."""
    divisor = scale + eps
    return torch.where(divisor > 0, x / torch.where(divisor > 0, divisor, 1.0), 0.0)


def drop_rounding(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``x`` with 0 where it is no more than rounding of numbers as large as ``scale`` (1e-12 relative)."""
    return torch.where(x.abs() <= _ROUNDING * scale, 0.0, x)


def group_result(advantage: Tensor, mask: Tensor, live: Tensor, mean: Tensor, std: Tensor) -> Advantage:
    """Close a [B] estimate: zeros where masked or without signal, float32, weight 1 on what counts."""
    return Advantage(
        advantage=torch.where(mask & live, advantage, 0.0).float(),
        weight=mask.float(),
        loss_mask=mask,
        live=live,
        group_mean=mean.float(),
        group_std=std.float(),
    )


def step_result(
    advantage: Tensor,
    kept: Tensor,
    live: Tensor,
    returns: Tensor | None = None,
    critic_mask: Tensor | None = None,
    channels: Mapping[str, Tensor] | None = None,
    *,
    weight: Tensor | None = None,
    statistics: GroupStatistics | None = None,
) -> Advantage:
    """Close a [B, T] estimate that trains the steps of ``kept``: float32, zeros outside them, weight 1 on them."""
    return Advantage(
        advantage=torch.where(kept, advantage, 0.0).float(),
        weight=kept.float() if weight is None else torch.where(kept, weight, 0.0).float(),
        loss_mask=kept,
        live=live,
        group_mean=None if statistics is None else statistics.mean.float(),
        group_std=None if statistics is None else statistics.std.float(),
        returns=None if returns is None else returns.float(),
        critic_mask=critic_mask,
        channels=channels or {},
    )
