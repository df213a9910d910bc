"""How different pictures of one prompt are: mean pairwise distance (spread) and the Vendi score, from their features.

Distances: ``cosine``, 1 - cos(x, y), in [0, 2], for embeddings of a network; ``rms``, the root mean square of x - y, for
features whose size means something. The Vendi score (2210.02410) of n pictures is exp(H) of the eigenvalues of K / n, the
effective number of different pictures, 1 for equal ones to n for pictures that have nothing in common; the similarity K is
cos(x, y), or exp(-d^2 / (2 RMS_WIDTH^2)) of the rms distance d.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from flowrl.evaluation.distances import unit_rows

Features = npt.NDArray[np.float64]
Metric = Literal["cosine", "rms"]

METRICS = ("cosine", "rms")
RMS_WIDTH = 0.1
"""The rms distance at which the similarity of two pictures has fallen to 0.61: a tenth of the range of a channel."""


def pairwise(features: npt.ArrayLike, metric: Metric = "cosine") -> Features:
    """Distances of all pairs, float64 [N, N], of features float [N, D]. Raises ValueError for bad shapes or values."""
    values = _checked(features, metric)
    if metric == "rms":
        squares = np.stack([((values - row) ** 2).mean(1) for row in values])
        distances: Features = np.sqrt(squares)
        return distances
    unit = unit_rows(values, "diversity")
    cosine: Features = 1.0 - (unit @ unit.T).clip(-1.0, 1.0)
    np.fill_diagonal(cosine, 0.0)
    return cosine


def similarity(features: npt.ArrayLike, metric: Metric = "cosine") -> Features:
    """The positive semi-definite kernel of the Vendi score with ones on its diagonal, float64 [N, N]."""
    distances = pairwise(features, metric)
    if metric == "cosine":
        return 1.0 - distances
    near: Features = np.exp(-(distances**2) / (2 * RMS_WIDTH**2))
    return near


def vendi(kernel: npt.ArrayLike, order: float = 1.0) -> float:
    """Return the Vendi score of a similarity matrix, in [1, N].

    With l the eigenvalues of K / N: exp(-sum l log l) at order 1, (sum l^q)^(1 / (1 - q)) at order q, 1 / max l at infinity
    (2310.12952). Small orders count rare pictures as much as common ones, large ones only what is common.

    kernel: symmetric positive semi-definite float [N, N] with ones on its diagonal. Raises ValueError for another matrix and
    for an order below 0.
    """
    values = np.asarray(kernel, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not len(values):
        raise ValueError(f"vendi: expected a square matrix, got {list(values.shape)}")
    if not np.allclose(np.diag(values), 1.0) or not np.allclose(values, values.T):
        raise ValueError("vendi: the matrix must be symmetric, with ones on its diagonal")
    if not order >= 0:
        raise ValueError(f"vendi: order is {order}; use 0 or more")
    share = np.linalg.eigvalsh(values / len(values))
    if share[0] < -1e-6:
        raise ValueError(f"vendi: the matrix has the eigenvalue {share[0] * len(values):g}; none may be below 0")
    share = share[share > 1e-12]
    if math.isinf(order):
        return float(1.0 / share[-1])
    if order == 1.0:
        return float(np.exp(-(share * np.log(share)).sum()))
    return float((share**order).sum() ** (1.0 / (1.0 - order)))


def by_group(
    features: npt.ArrayLike, groups: npt.ArrayLike, metric: Metric = "cosine", order: float = 1.0
) -> tuple[Features, Features]:
    """Return each picture's mean distance from the others of its group, and its group's Vendi score, both float64 [N].

    NaN for a picture alone in its group. features: float [N, D]; groups: int [N].
    """
    values, ids = _checked(features, metric), np.asarray(groups)
    if ids.shape != values.shape[:1]:
        raise ValueError(f"diversity: {len(values)} pictures and groups of shape {list(ids.shape)}")
    spread, score = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for group in np.unique(ids):
        rows = np.flatnonzero(ids == group)
        if len(rows) < 2:
            continue
        spread[rows] = pairwise(values[rows], metric).sum(1) / (len(rows) - 1)
        score[rows] = vendi(similarity(values[rows], metric), order)
    return spread, score


def _checked(features: npt.ArrayLike, metric: str) -> Features:
    values = np.asarray(features, np.float64)
    if metric not in METRICS:
        raise ValueError(f"diversity: metric is {metric!r}; use {', '.join(METRICS)}")
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"diversity: expected features [N, D], got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError("diversity: the features hold values that are not finite")
    return values
