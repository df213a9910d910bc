"""Primitives on [B, T]: segments of steps, backward accumulation, filling from boundaries, statistics of a group's steps.

A step is a token or a denoising transition. ``mask`` (bool [B, T]) marks the steps at which the policy acted; ``segment``
(int64 [B, T]) is 0, 1, ... along a row and -1 outside.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .segments import Groups

How = Literal["sum", "mean", "first", "last"]


def segment_reduce(x: Tensor, segment: Tensor, mask: Tensor, how: How = "sum", number: int | None = None) -> Tensor:
    """Reduce the unmasked steps of each segment of each row: [B, T] -> [B, S], in the dtype of ``x``.

    S is ``number``, or the greatest segment id + 1. A segment without an unmasked step gives 0.
    """
    count = max(1, int(segment.max()) + 1) if number is None else number
    inside = mask & (segment >= 0)
    index = torch.where(inside, segment, count)  # one column more, thrown away, takes what is outside
    out = x.new_zeros(len(x), count + 1)
    if how in ("sum", "mean"):
        out.scatter_add_(1, index, torch.where(inside, x, 0.0))
        if how == "mean":
            size = torch.zeros_like(out).scatter_add_(1, index, inside.to(x.dtype))
            out = out / size.clamp(min=1)
    else:
        position = torch.arange(x.shape[1], device=x.device).expand_as(segment)
        first = how == "first"
        start = x.shape[1] if first else -1
        at = torch.full_like(out, start, dtype=torch.int64)
        at.scatter_reduce_(1, index, position, reduce="amin" if first else "amax")
        found = (at >= 0) & (at < x.shape[1])
        out = torch.where(found, x.gather(1, at.clamp(0, x.shape[1] - 1)), 0.0)
    return out[:, :count]


def segment_gather(per_segment: Tensor, segment: Tensor) -> Tensor:
    """Give every step the value of its segment: [B, S] -> [B, T], 0 outside (segment -1)."""
    return torch.where(segment >= 0, per_segment.gather(1, segment.clamp(min=0)), torch.zeros_like(per_segment[:, :1]))


def boundaries_to_segments(boundary: Tensor) -> Tensor:
    """Number the segments that start where ``boundary`` (bool [B, T]) holds: int64 [B, T], -1 before the first."""
    return boundary.long().cumsum(dim=1) - 1


def reverse_scan(x: Tensor, decay: float, mask: Tensor | None = None) -> Tensor:
    """Accumulate backwards: y_t = x_t + decay y_next, where next is the next unmasked step; [B, T], 0 on masked ones."""
    kept = x if mask is None else torch.where(mask, x, 0.0)
    if decay == 1.0:
        y = kept.flip(1).cumsum(1).flip(1)
    else:
        columns, carried = list(kept.unbind(1)), torch.zeros_like(kept[:, 0])
        for t in range(len(columns) - 1, -1, -1):
            now = columns[t] + decay * carried
            carried = now if mask is None else torch.where(mask[:, t], now, carried)
            columns[t] = now
        y = torch.stack(columns, dim=1)
    return y if mask is None else torch.where(mask, y, 0.0)


def fill_from_next(x: Tensor, boundary: Tensor) -> Tensor:
    """Give every step the value at the first boundary at or after it: [B, T], 0 after the last boundary."""
    steps = x.shape[1]
    position = torch.arange(steps, device=x.device).expand_as(boundary)
    at = torch.where(boundary, position, steps).flip(1).cummin(1).values.flip(1)
    return torch.where(at < steps, x.gather(1, at.clamp(max=steps - 1)), 0.0)


def group_step_moments(x: Tensor, mask: Tensor, groups: Groups, ddof: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and count over all unmasked steps of all rows of a group: float64 [B] each, count by steps.

    Long rows weigh more. A group without an unmasked step has mean and deviation 0.
    """
    wide = torch.where(mask, x.double(), 0.0)

    def over_group(per_row: Tensor) -> Tensor:
        zero = torch.zeros(groups.number, dtype=torch.float64, device=x.device)
        return groups.gather(zero.index_add_(0, groups.index, per_row))

    count = over_group(mask.sum(1).double())
    mean = over_group(wide.sum(1)) / count.clamp(min=1)
    square = over_group(torch.where(mask, wide - mean[:, None], 0.0).square().sum(1))
    return mean, (square / (count - ddof).clamp(min=1)).sqrt(), count
