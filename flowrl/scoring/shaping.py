"""Shaping: from a reward's own scale to the values that are trained on. Pure functions of float64 arrays.

NaN stands for "no value": it stays NaN in its place and touches no other sample. Shapes: B samples; ``group`` int64 [B]
says whose members samples are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from flowrl.config.rewards import Shape

Values = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def affine(values: Values, scale: float, offset: float) -> Values:
    """Return ``scale * x + offset``. values: float64 [B]; NaN stays NaN."""
    return scale * values + offset


def clip(values: Values, low: float, high: float) -> Values:
    """Return ``min(max(x, low), high)``. values: float64 [B]; NaN stays NaN. Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"clip: low {low} must be below high {high}")
    return np.clip(values, low, high)


def sigmoid(values: Values, centre: float, width: float) -> Values:
    """Return ``1 / (1 + exp(-(x - centre) / width))``, in [0, 1] and without overflow.

    values: float64 [B]; NaN stays NaN. Raises ValueError unless width > 0.
    """
    if not width > 0:
        raise ValueError(f"sigmoid: width {width} must be above 0")
    z = (values - centre) / width
    # exp of a negative number alone: the larger of both forms is never needed.
    small = np.exp(-np.abs(z))
    found: Values = np.where(z >= 0, 1.0, small) / (1.0 + small)
    return found


def rank(values: Values, group: Groups) -> Values:
    """Return each member's place in its group, from 0 (lowest) to 1; equal values share the mean of their places.

    ``(r - 1) / (n - 1)`` with r the mean rank (from 1) among the n members of the group that have a value; 1/2 where
    n = 1. values: float64 [B], NaN stays NaN and does not count; group: int64 [B].
    """
    placed = np.full(values.shape, np.nan)
    for rows in rows_of(group):
        mine = rows[~np.isnan(values[rows])]
        found = values[mine]
        below = (found[None, :] < found[:, None]).sum(1)
        equal = (found[None, :] == found[:, None]).sum(1)
        # Mean of the ranks below + 1 .. below + equal, from 0.
        place = below + (equal - 1) / 2
        placed[mine] = place / (len(mine) - 1) if len(mine) > 1 else 0.5
    return placed


def gate(values: Values, by: Values, at_least: float, at_most: float, otherwise: float | None) -> tuple[Values, Mask]:
    """Let values through where another reward lies within bounds; returns (values, closed).

    ``x`` where ``at_least <= by <= at_most``, else ``otherwise`` (0 multiplies by an indicator), or no value (NaN) where
    otherwise is None: the sample then leaves the statistics and the loss. closed: bool [B], where it was shut. Where
    ``by`` is NaN nobody knows, so the result is NaN and not closed. values, by: float64 [B].
    """
    unknown = np.isnan(by)
    closed = ~unknown & ~((by >= at_least) & (by <= at_most))
    shut = np.nan if otherwise is None else otherwise
    # A sample whose own value is missing stays missing, gate or no gate.
    through = np.where(closed & ~np.isnan(values), shut, values)
    return np.where(unknown, np.nan, through), closed


def rows_of(group: Groups) -> list[npt.NDArray[np.int64]]:
    """The rows of each group, in order of first appearance; rows of a group need not stand together."""
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    return [np.flatnonzero(inverse == index) for index in np.argsort(first)]


def shape(values: Values, steps: Sequence[Shape], group: Groups, others: Mapping[str, Values]) -> tuple[Values, Mask]:
    """Apply steps in order; returns (values, masked). masked: bool [B], left out by a gate that was closed.

    values: float64 [B] on the reward's own scale, NaN for none; others: the scores, on their own scale, of the rewards
    that gates ask.
    """
    masked = np.zeros(values.shape, np.bool_)
    for step in steps:
        if step.kind == "affine":
            values = affine(values, *step.numbers)
        elif step.kind == "clip":
            values = clip(values, *step.numbers)
        elif step.kind == "sigmoid":
            values = sigmoid(values, *step.numbers)
        elif step.kind == "rank":
            values = rank(values, group)
        else:
            had = ~np.isnan(values)
            values, closed = gate(values, others[step.by], step.at_least, step.at_most, step.otherwise)
            if step.otherwise is None:
                masked |= closed & had
    return values, masked
