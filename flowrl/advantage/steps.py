"""Primitives on [B, T]: segments of steps, backward accumulation, filling from boundaries, statistics of a group's steps.

A step is a token or a denoising transition. ``mask`` (bool [B, T]) marks the steps at which the policy acted; ``segment``
(int64 [B, T]) is 0, 1, ... along a row and -1 outside.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .moments import row_moments
from .scans import decayed_scan, next_step
from .segments import Groups

How = Literal["sum", "mean", "first", "last"]


def segment_reduce(x: Tensor, segment: Tensor, mask: Tensor, how: How = "sum", number: int | None = None) -> Tensor:
    """Reduce the unmasked steps of each segment of each row: [B, T] -> [B, S], sums and means in float64.

    S is ``number``, or the greatest segment id + 1. A segment without an unmasked step gives 0.
    """
    count = max(1, int(segment.max()) + 1) if number is None else number

    def reduced(x: Tensor, segment: Tensor, mask: Tensor) -> tuple[Tensor]:
        inside = mask & (segment >= 0)
        index = torch.where(inside, segment, count).long()  # one column more, thrown away, takes what is outside
        if how in ("first", "last"):
            return (_end_of_segment(x, index, count, how == "first"),)
        out = torch.zeros(len(x), count + 1, dtype=torch.float64, device=x.device)
        out.scatter_add_(1, index, torch.where(inside, x, 0.0).double())
        if how == "mean":
            out = out / torch.zeros_like(out).scatter_add_(1, index, inside.double()).clamp(min=1)
        return (out[:, :count],)

    return by_rows(reduced, x, segment, mask)[0]


def _end_of_segment(x: Tensor, index: Tensor, count: int, first: bool) -> Tensor:
    """Value at the first or last step of each of ``count`` segments of a row, 0 for a segment without steps."""
    steps = x.shape[1]
    position = torch.arange(steps, device=x.device).expand_as(index)
    at = torch.full((len(x), count + 1), steps if first else -1, dtype=torch.int64, device=x.device)
    at = at.scatter_reduce_(1, index, position, reduce="amin" if first else "amax")[:, :count]
    return x.gather(1, at.clamp(0, steps - 1)).masked_fill_((at < 0) | (at >= steps), 0)


def segment_gather(per_segment: Tensor, segment: Tensor) -> Tensor:
    """Give every step the value of its segment: [B, S] -> [B, T], 0 outside (segment -1)."""
    table = torch.cat([torch.zeros_like(per_segment[:, :1]), per_segment], dim=1)

    def gathered(segment: Tensor, table: Tensor) -> tuple[Tensor]:
        return (table.gather(1, segment.long() + 1),)

    return by_rows(gathered, segment, table)[0]


def spread_segments(table: Tensor, outside: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Give every step the value of its segment, ``outside`` where it has none or one from S on: float32 [B, T].

    table: real [B, S]; outside: real [B]; segment: int [B, T], -1 or more. Also bool [B]: whether a step of the row has
    another value than ``outside``. Nothing may be NaN.
    """
    edge = outside.detach().float()[:, None]
    beyond = max(int(segment.max()) + 1 - table.shape[1], 0)
    columns = torch.cat([edge, table.float(), edge.expand(-1, beyond)], dim=1)

    def spread(segment: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        value = columns.gather(1, segment.long() + 1)
        least, most = torch.aminmax(value, dim=1)
        return value, (least != columns[:, 0]) | (most != columns[:, 0])

    value, felt = by_rows(spread, segment, columns)
    return value, felt


def known_steps(table: Tensor, segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every step the value of its segment, where there is one: float32 [B, T], 0 elsewhere, and bool [B, T].

    table: real [B, S], NaN for a segment without a value; segment: int [B, T], -1 .. S - 1. Also bool [B]: whether a
    step of the row has a value other than 0.
    """
    columns = torch.cat([torch.full_like(table[:, :1], torch.nan), table], dim=1).float()

    def gathered(segment: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = columns.gather(1, segment.long() + 1)
        known = value == value
        value.nan_to_num_(nan=0.0)
        least, most = torch.aminmax(value, dim=1)
        return value, known, (least != 0) | (most != 0)

    value, known, felt = by_rows(gathered, segment, columns)
    return value, known, felt


def boundaries_to_segments(boundary: Tensor) -> Tensor:
    """Number the segments that start where ``boundary`` (bool [B, T]) holds: int64 [B, T], -1 before the first."""
    return boundary.long().cumsum(dim=1) - 1


def reverse_scan(x: Tensor, decay: float, mask: Tensor | None = None) -> Tensor:
    """Accumulate backwards: y_t = x_t + decay y_next, where next is the next unmasked step; [B, T], 0 on masked ones."""
    if decay != 1.0:
        shown = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        return decayed_scan(x, decay, shown)

    def scanned(x: Tensor, *mask: Tensor) -> tuple[Tensor]:
        y = (torch.where(mask[0], x, 0.0) if mask else x).flip(1).cumsum(1, dtype=torch.float64).flip(1).to(x.dtype)
        return (torch.where(mask[0], y, 0.0) if mask else y,)

    return by_rows(scanned, x, *(() if mask is None else (mask,)))[0]


def following_value(x: Tensor, mask: Tensor) -> Tensor:
    """Give every unmasked step the value at the next one: [B, T], 0 for a row's last one and on masked steps."""
    out = torch.zeros_like(x)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):  # there may be holes
        steps = x.shape[1]
        at = next_step(mask)
        out = torch.where(at < steps, x.gather(1, at.clamp(max=steps - 1)), 0.0)
    else:
        out[:, :-1] = torch.where(mask[:, 1:], x[:, 1:], 0.0)
    return torch.where(mask, out, 0.0)


def group_step_moments(x: Tensor, mask: Tensor, groups: Groups, ddof: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and count over all unmasked steps of all rows of a group: float64 [B] each, count by steps.

    Long rows weigh more. A group without an unmasked step has mean and deviation 0.
    """
    of_row, row_mean, row_square = row_moments(x, mask)

    def over_group(per_row: Tensor) -> Tensor:
        return groups.gather(torch.zeros_like(groups.size).index_add_(0, groups.index, per_row))

    count = over_group(of_row)
    mean = over_group(of_row * row_mean) / count.clamp(min=1)
    square = over_group(row_square + of_row * (row_mean - mean).square())
    return mean, (square / (count - ddof).clamp(min=1)).sqrt(), count
