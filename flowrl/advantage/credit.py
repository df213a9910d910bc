"""What per-step credit methods share: checks of options and segments, zeros for rounding, closing the record."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import check_flags, check_ids
from .record import Advantage
from .segments import Groups
from .statistics import GroupStatistics

_ROUNDING = 1e-12


def drop_rounding(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``x`` with 0 where it is no more than rounding of numbers as large as ``scale`` (1e-12 relative)."""
    return torch.where(x.abs() <= _ROUNDING * scale, 0.0, x)


def check_choice(name: str, got: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the option ``name`` is one of ``known``."""
    if got not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {got!r}")


def read_segments(segment: Tensor, mask: Tensor, number: int) -> Tensor:
    """Return ``segment`` with -1 on masked steps, whatever they held.

    Raises ValueError unless it is int64 like ``mask`` and in -1 .. number - 1 on unmasked steps.
    """
    if segment.dtype != torch.int64 or segment.shape != mask.shape:
        raise ValueError(
            f"segment: expected int64 {list(mask.shape)} like mask, got {segment.dtype} {list(segment.shape)}"
        )
    wrong = mask & ((segment < -1) | (segment >= number))
    if bool(wrong.any()):
        raise ValueError(f"segment: expected -1 .. {number - 1} on unmasked steps, got {int(segment[wrong][0])}")
    return torch.where(mask, segment, -1)


def step_result(
    advantage: Tensor,
    loss_mask: Tensor,
    live: Tensor,
    weight: Tensor | None = None,
    statistics: GroupStatistics | None = None,
) -> Advantage:
    """Close a [B, T] estimate: float32, zeros outside ``loss_mask``; weight 1 on it where none is given."""
    return Advantage(
        advantage=torch.where(loss_mask, advantage, 0.0).float(),
        weight=loss_mask.float() if weight is None else torch.where(loss_mask, weight, 0.0).float(),
        loss_mask=loss_mask,
        live=live,
        group_mean=None if statistics is None else statistics.mean.float(),
        group_std=None if statistics is None else statistics.std.float(),
    )


def group_any(flag: Tensor, group: Tensor) -> Tensor:
    """Tell every row whether ``flag`` (bool [B]) holds for a row of its group (int64 [B]): bool [B]."""
    return Groups.of(group).max(flag.double()) > 0


def read_parts(name: str, x: Tensor, axes: str, group: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a row's several rewards; return them as float64, 0 where they do not count, and the mask of those that do.

    axes: the shape that is asked for, such as "B, S". Raises ValueError, naming the argument, for another number of
    axes, an empty or complex tensor, ids or flags that do not match, an infinite value, or valid rows of NaN alone.
    """
    if x.ndim != axes.count(",") + 1 or x.numel() == 0 or x.is_complex():
        raise ValueError(f"{name}: expected real [{axes}], not empty, got {x.dtype} {list(x.shape)}")
    check_ids("group", group, x.shape[:1])
    asked = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    check_flags("valid", asked, x.shape[:1])
    rows = asked.view(-1, *[1] * (x.ndim - 1))
    value = x.detach().double()
    known = rows & ~value.isnan()
    value = torch.where(known, value, 0.0)
    if bool(value.isinf().any()):
        raise ValueError(f"{name}: infinite values among the valid rows")
    if bool(asked.any()) and not bool(known.any()):
        raise ValueError(f"{name}: every value of the valid rows is NaN; mark failed rows with valid=False")
    return value, known
