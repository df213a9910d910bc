"""What a critic is trained by: squared, Huber and HL-Gauss losses, lambda-returns, and how much it explains. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.advantage.scans import gae_scan

Kind = Literal["squared", "huber", "hl_gauss"]


def bin_edges(low: float, high: float, bins: int) -> Tensor:
    """Edges of ``bins`` equal bins over [low, high]: float32 [bins + 1]. Raises ValueError for fewer than 2 or low >= high."""
    if bins < 2 or not low < high:
        raise ValueError(f"bins: expected at least 2 over low < high, got {bins} over {low:g} .. {high:g}")
    return torch.linspace(low, high, bins + 1)


def hl_gauss_target(target: Tensor, edges: Tensor, spread: float = 0.75) -> Tensor:
    """Turn a number into a histogram: the mass of N(target, (spread width)^2) in each bin, normalised over the range.

    target: float [B], clamped to the range; edges: [K + 1]; spread: in bin widths. Returns float [B, K], rows adding to 1.
    Source: HL-Gauss of 2403.03950, with its ratio of 0.75.
    """
    width = edges[1] - edges[0]
    z = (edges - target.clamp(float(edges[0]), float(edges[-1]))[:, None]) / (spread * width * math.sqrt(2))
    mass = torch.special.erf(z).diff(dim=1)
    made: Tensor = mass / mass.sum(1, keepdim=True)
    return made


def critic_value(kind: Kind, output: Tensor, edges: Tensor | None = None) -> Tensor:
    """Read a critic's output as a number: its only column, or the mean of its histogram over bin centres. float [B]."""
    if kind != "hl_gauss":
        return output[:, 0]
    if edges is None:
        raise ValueError("hl_gauss: needs the edges of its bins")
    return output.softmax(1) @ ((edges[1:] + edges[:-1]) / 2).to(output.device)


def critic_loss(
    kind: Kind, output: Tensor, target: Tensor, *, delta: float = 1.0, edges: Tensor | None = None
) -> Tensor:
    """Loss of each row against its target: float [B].

    squared: ``(V - y)^2 / 2``; huber: linear beyond ``delta``; hl_gauss: cross-entropy with `hl_gauss_target`.
    output: [B, 1], of hl_gauss [B, K]; target: [B]. Raises ValueError for an unknown kind.
    """
    if kind == "squared":
        return (output[:, 0] - target).square() / 2
    if kind == "huber":
        return F.huber_loss(output[:, 0], target, reduction="none", delta=delta)
    if kind == "hl_gauss" and edges is not None:
        goal = hl_gauss_target(target, edges.to(target.device))
        return -(goal * output.log_softmax(1)).sum(1)
    raise ValueError(f"critic loss {kind!r}: expected squared, huber, or hl_gauss with edges")


def explained_variance(value: Tensor, target: Tensor) -> float | None:
    """``1 - Var(target - value) / Var(target)``: 1 is perfect, 0 no better than a constant; None where targets are alike.

    value, target: float [N]; rows that are not finite are left out. A constant added to the value changes nothing. A
    value that is not finite itself gives minus infinity where its target is finite.
    """
    known = target.isfinite()
    value, target = value[known].double(), target[known].double()
    if len(target) < 2 or float(target.var(unbiased=False)) <= 1e-12:
        return None
    if not bool(value.isfinite().all()):
        return -math.inf
    return 1 - float((target - value).var(unbiased=False) / target.var(unbiased=False))


def lambda_returns(value: Tensor, outcome: Tensor, lam: float) -> Tensor:
    """What the state before each step is regressed to: ``V + A`` of generalised advantages, without discount.

    value: float [B, K], of the state before each step; outcome: float [B], the reward of the finished sample. lam 1: the
    outcome itself; lam 0: the value of the next state. Returns float32 [B, K].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam: expected 0 to 1, got {lam}")
    reward = torch.zeros_like(value, dtype=torch.float32)
    reward[:, -1] = outcome.float()
    return gae_scan(reward, value.float(), torch.ones_like(reward, dtype=torch.bool), 1.0, lam) + value.float()


def mean_of(values: Sequence[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None
