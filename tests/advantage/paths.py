"""Steps with holes and missing values, and plain-loop references, for the tests of returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl.advantage import Advantage

NAN = math.nan


def row(*x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float32)


def flags(*x: int) -> Tensor:
    return torch.tensor([x], dtype=torch.bool)


def case(seed: int, steps: int, rows: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards with NaN, two critics and a mask with holes; row 2 is masked, row 3 has NaN on every unmasked step, and
    masked steps hold junk where that is allowed."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, steps, generator=draw) < 0.7
    mask[0], mask[1, steps // 2 :], mask[2] = True, False, False
    mask[1, 0] = mask[3, 0] = True
    reward, value, post = (torch.randn(rows, steps, generator=draw) for _ in range(3))
    reward[torch.rand(rows, steps, generator=draw) < 0.1] = NAN
    reward[0, 0] = 1.0
    reward[3] = NAN
    reward = torch.where(mask, reward, torch.where(reward.isnan(), NAN, 0.0))
    value[~mask], post[~mask] = NAN, math.inf
    return reward, value, post, mask


def loop_gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, after: list[float]) -> Tensor:
    """A_t as the sum of (gamma lam)^l delta_{t+l}, one row and one step at a time, over unmasked steps alone."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        if all(math.isnan(reward[b, t]) for t in at):
            continue
        r = [0.0 if math.isnan(reward[b, t]) else float(reward[b, t]) for t in at]
        v = [float(value[b, t]) for t in at] + [after[b]]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
        for i, t in enumerate(at):
            out[b, t] = math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(at)))
    return out


def kept_of(reward: Tensor, mask: Tensor) -> Tensor:
    return mask & (mask & ~reward.isnan()).any(1, keepdim=True)


def close(got: Tensor | None, wanted: Tensor, tolerance: float = 2e-6) -> None:
    assert got is not None and got.dtype == torch.float32
    assert got.shape == wanted.shape
    gap = (got.double() - wanted.double()).abs() - tolerance * (1 + wanted.double().abs())
    assert bool((gap <= 0).all()), f"beyond the tolerance by {float(gap.max())}"


def same(a: Advantage, b: Advantage) -> None:
    assert torch.equal(a.advantage, b.advantage) and torch.equal(a.loss_mask, b.loss_mask)
    assert a.returns is not None and b.returns is not None and torch.equal(a.returns, b.returns)


def whitened(x: Tensor, kept: Tensor, ddof: int, eps: float) -> Tensor:
    values = [float(v) for v in x[kept]]
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - ddof)
    return torch.where(kept, (x.double() - mean) / math.sqrt(variance + eps), 0.0)
