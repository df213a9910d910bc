"""Several rewards into one score, and how much each of them decides. Pure functions of arrays.

Shapes: B samples, R rewards. At reward level the score is a weighted sum; at advantage level (``gdpo``) the channels are
standardised one by one, and the sum here only reports.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flowrl.scoring.shaping import Groups, Values, rows_of


def weighted_sum(channels: Values, weights: Sequence[float]) -> Values:
    """Return ``sum_r w_r x_br``, float64 [B]; NaN where a reward of weight other than 0 has no value.

    channels: float64 [B, R], NaN for none; weights: R numbers.
    """
    total = np.zeros(len(channels))
    for column, weight in zip(channels.T, weights, strict=True):
        if weight:
            total += weight * column
    return total


def variance_parts(channels: Values, weights: Sequence[float], group: Groups) -> tuple[Values, float]:
    """Return (parts [R], whole): how much each reward moves the score within groups; ``parts / whole`` sums to 1.

    ``parts_r = sum_b w_r (x_br - mean_g x_r) (s_b - mean_g s)``, ``whole = sum_b (s_b - mean_g s)^2``, with s the weighted
    sum and the means over the members of b's group that have a score. Parts of several processes add up as long as
    groups are whole. A share is negative where a reward pulls against the others; all are 0 where the score never varies.

    channels: float64 [B, R]; group: int64 [B]. Samples without a score are left out.
    """
    weighted = channels * np.asarray(weights, np.float64)
    weighted = weighted[:, np.asarray(weights) != 0]
    parts = np.zeros(len(weights))
    whole = 0.0
    score = weighted.sum(1)
    for rows in rows_of(group):
        mine = rows[np.isfinite(score[rows])]
        if not len(mine):
            continue
        s = score[mine] - score[mine].mean()
        x = weighted[mine] - weighted[mine].mean(0)
        parts[np.asarray(weights) != 0] += s @ x
        whole += float(s @ s)
    return parts, whole


def in_float32(total: Values, valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Cast a score to float32 [B], NaN where not valid; what lies beyond float32 becomes infinite."""
    with np.errstate(over="ignore"):
        return np.where(valid, total, np.nan).astype(np.float32)
