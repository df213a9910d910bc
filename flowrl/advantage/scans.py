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


def turned(x: Tensor) -> Tensor:
    """[B, T] -> contiguous [T, B]; a part of a tensor is copied first, which is the faster way to turn it."""
    return x.contiguous().t().contiguous()


def column_blocks(steps: int) -> list[slice]:
    """Cut the columns 0 .. ``steps`` - 1 into blocks, the last one first."""
    return [slice(max(0, stop - _BLOCK), stop) for stop in range(steps, 0, -_BLOCK)]


def first_step(mask: Tensor) -> Tensor:
    """Find the first unmasked step of each row: int64 [B], T where there is none."""
    return torch.where(mask.any(1), mask.view(torch.uint8).argmax(1), mask.shape[1])


def last_step(mask: Tensor) -> Tensor:
    """Find the last unmasked step of each row: int64 [B], -1 where there is none."""
    position = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    return torch.where(mask, position, -1).amax(1).long()


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
    for part in column_blocks(x.shape[1]):
        rows = turned(x[:, part]).double()
        carried = _run_back(rows, turned(factor[:, part]).double(), carried)
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
    for part in column_blocks(x.shape[1]):
        here = turned(mask[:, part])
        y, ahead = torch.where(here, turned(x[:, part]), 0.0).double(), None
        if value is not None:
            ahead = torch.where(here, turned(value[:, part]), 0.0).double()
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


def two_level_scan(
    reward: Tensor,
    low_value: Tensor,
    high_value: Tensor,
    start: Tensor,
    kept: Tensor,
    cut: Tensor,
    decays: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the three recursions of ``hae``: low, high and the return of what is left of the segment, float32 [B, T].

    What an unmasked step hands to the one before it: gamma V_high at a start, where a segment ends before it, else its
    own return, or value and advantage, discounted.
    """
    gamma, lam_turn, lam_seg = decays
    found = [torch.empty_like(reward) for _ in range(3)]
    rest = low = gamma * cut.double()
    high = torch.zeros_like(rest)
    for part in column_blocks(reward.shape[1]):
        here, begins = turned(kept[:, part]), turned(start[:, part])
        r, v, top = (turned(x[:, part]).double() for x in (reward, low_value, high_value))
        share, jump, over = here.double(), gamma * top, gamma * torch.where(begins, lam_seg, 1.0).double()
        rests, lows, highs = (torch.empty_like(r) for _ in range(3))
        for t in range(len(r) - 1, -1, -1):
            now, gain = torch.add(r[t], rest, out=rests[t]), torch.add(r[t] - v[t], low, out=lows[t])
            above = torch.where(begins[t], now - top[t], 0.0).addcmul_(over[t], high)
            rest = rest.lerp(torch.where(begins[t], jump[t], gamma * now), share[t])
            low = low.lerp(torch.where(begins[t], jump[t], gamma * v[t].add(gain, alpha=lam_turn)), share[t])
            high = high.lerp(above, share[t])
            highs[t] = above
        for whole, made, shown in zip(found, (lows, highs, rests), (here, begins, here), strict=True):
            whole[:, part] = torch.where(shown, made, 0.0).t()
    return found[0], found[1], found[2]
