"""Backward scans over steps, and how the methods that use them read their steps.

One Python loop over steps works on all rows at a time, in float64, on blocks of columns turned into rows so that they
stay in the cache; a scan allocates its result and a few blocks. The next step is the next unmasked one: what is carried
backwards passes through a hole of the mask (text of a tool, deterministic solver steps) untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import check_mask, read_step_reward

_BLOCK = 64  # columns turned at a time


@dataclass(frozen=True)
class Path:
    """Checked steps. reward: float32 [B, T], 0 where there is none; kept: bool [B, T], unmasked steps of rows that have
    a value; live: bool [B], those rows."""

    reward: Tensor
    kept: Tensor
    live: Tensor


def read_path(step_reward: Tensor, mask: Tensor) -> Path:
    """Check step rewards and mask, and leave out rows without an unmasked step or with NaN on all of them."""
    check_mask(mask)
    reward = read_step_reward(step_reward, mask)
    if bool(step_reward.sum().isfinite()):  # no NaN: no row is left out
        return Path(reward=reward, kept=mask, live=mask.any(1))
    live = (mask & ~step_reward.isnan()).any(1)
    return Path(reward=reward, kept=mask & live[:, None], live=live)


def _turned(x: Tensor) -> Tensor:
    """[B, T] -> contiguous [T, B]; a part of a tensor is copied first, which is the faster way to turn it."""
    return x.contiguous().t().contiguous()


def last_step(mask: Tensor) -> Tensor:
    """Find the last unmasked step of each row: int64 [B], -1 where there is none."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, position, -1).amax(1)


def next_step(mask: Tensor) -> Tensor:
    """Find the first unmasked step after each step: int64 [B, T], T where there is none."""
    steps = mask.shape[1]
    position = torch.arange(steps, device=mask.device)
    here = torch.where(mask, position, steps).flip(1).cummin(1).values.flip(1)
    return torch.cat([here[:, 1:], torch.full_like(here[:, :1], steps)], dim=1)


def _run_back(x: Tensor, factor: Tensor, carried: Tensor) -> Tensor:
    """Overwrite the rows of ``x``, the last one first: x_t += factor_t x_{t+1}; return row 0."""
    for now, share in zip(reversed(x.unbind(0)), reversed(factor.unbind(0)), strict=True):
        carried = now.addcmul_(share, carried)
    return carried


def backward_scan(x: Tensor, factor: Tensor) -> Tensor:
    """Accumulate backwards with a factor of each step's own: y_t = x_t + factor_t y_{t+1}, y_T = 0; float64 [B, T].

    x, factor: real [B, T]. A step with x 0 and factor 1 hands on what is carried; factor 0 forgets it.
    """
    y = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    carried = y.new_zeros(len(x))
    for stop in range(x.shape[1], 0, -_BLOCK):
        part = slice(max(0, stop - _BLOCK), stop)
        rows = _turned(x[:, part]).double()
        carried = _run_back(rows, _turned(factor[:, part]).double(), carried)
        y[:, part] = rows.t()
    return y


def decayed_scan(
    x: Tensor,
    decay: float,
    mask: Tensor,
    value: Tensor | None = None,
    gamma: float = 1.0,
    after: Tensor | None = None,
) -> Tensor:
    """Accumulate backwards over unmasked steps: y_t = x_t + decay y_next + (gamma v_next - v_t); [B, T] like ``x``.

    The bracket is there where ``value`` (v, real [B, T]) is. ``after``: real [B], v after the last unmasked step, zeros
    by default. 0 on masked steps, whatever they held. Nothing is checked.
    """
    carried = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # decay y_next + gamma v_next
    if after is not None:
        carried = gamma * after.double()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for stop in range(x.shape[1], 0, -_BLOCK):
        part = slice(max(0, stop - _BLOCK), stop)
        here = _turned(mask[:, part])
        y, ahead = torch.where(here, _turned(x[:, part]), 0.0).double(), None
        if value is not None:
            ahead = torch.where(here, _turned(value[:, part]), 0.0).double()
            y, ahead = y.sub_(ahead), ahead.mul_(gamma)
        share = here.double()
        for t in range(len(y) - 1, -1, -1):
            now = y[t].add_(carried)
            passed = now * decay if ahead is None else torch.add(ahead[t], now, alpha=decay)
            carried = carried.lerp(passed, share[t])  # a masked step hands on what it was given
        out[:, part] = y.mul_(share).t()
    return out


def gae_scan(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, after: Tensor | None = None
) -> Tensor:
    """Run the recursion of ``gae`` without any check: float32 [B, T], 0 on masked steps whatever they held.

    after: [B], value of the state after the last unmasked step, zeros by default.
    """
    return decayed_scan(reward.float(), gamma * lam, mask, value, gamma, after)
