"""The denoising error of re-noised samples: what objectives without trajectories use in place of a log-prob.

A finished sample x0 is noised anew, ``x = alpha x0 + sigma x1`` at time t, and the network's output there is compared
with the one that would lead back to x0 (for flow models ``u = x1 - x0``). Minus the error, weighted in time, bounds the
log-likelihood of x0 (with the weight ``elbo``) or stands in for it (with the others).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from flowrl.advantage.checks import check_choice
from flowrl.records import PredictionKind

ErrorWeight = Literal["uniform", "t", "t2", "elbo", "x0", "self"]
ERROR_WEIGHTS: tuple[str, ...] = get_args(ErrorWeight)
FLOOR = 1e-5


def x0_scale(kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How far the clean estimate moves for a unit of the network's output: sigma for velocity and v, sigma / alpha for
    epsilon, 1 for x0. alpha, sigma: any one shape.
    """
    match kind:
        case "velocity" | "v":
            return sigma
        case "epsilon":
            return sigma / alpha
        case "x0":
            return torch.ones_like(sigma)


def mean_square(difference: Tensor) -> Tensor:
    """Mean over latent elements of the square: [N, ...] -> [N], in float32 or wider."""
    wide = difference if difference.dtype == torch.float64 else difference.float()
    return wide.flatten(1).square().mean(1)


def self_normalised(difference: Tensor, scale: Tensor) -> Tensor:
    """Squared error of the clean estimate over its own mean absolute error: ``s mean(d^2) / mean|d|``, [N].

    difference: network output minus target [N, ...]; scale: [N], ``x0_scale``. The denominator ``s mean|d|`` carries no
    gradient and is at least 1e-5. Repository DiffusionNFT (its loss in x0-space).
    """
    with torch.no_grad():
        size = (scale * difference.flatten(1).abs().float().mean(1)).clamp(min=FLOOR)
    return scale.square() * mean_square(difference) / size


def matching_error(difference: Tensor, t: Tensor, scale: Tensor, weight: ErrorWeight) -> Tensor:
    """Weighted squared error of each row: [N].

    difference: network output minus target [N, ...]; t: [N] in [0, 1]; scale: [N], ``x0_scale``. weight: uniform 1; t;
    t2 (t squared); elbo ``(1 - t) / t``, with which, for flow models and uniform t, minus the sum over latent elements is
    the evidence bound up to a constant; x0 (the error of the clean estimate, ``scale^2``); self (``self_normalised``).
    """
    check_choice("weight", weight, ERROR_WEIGHTS)
    if weight == "self":
        return self_normalised(difference, scale)
    factor = {"uniform": torch.ones_like(t), "t": t, "t2": t**2, "x0": scale**2}.get(weight)
    return ((1 - t) / t if factor is None else factor) * mean_square(difference)
