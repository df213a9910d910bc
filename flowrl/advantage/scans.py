"""Backward scans over steps, and what the methods that use them share: reading steps, closing the record.

One Python loop over steps works on all rows at a time, in float64, on blocks of columns turned into rows so that they
stay in the cache; a scan allocates its result and a few blocks. The next step is the next unmasked one: what is carried
backwards passes through a hole of the mask (text of a tool, deterministic solver steps) untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import check_mask, read_step_reward
from .record import Advantage

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
    live = (mask & ~step_reward.isnan()).any(1)
    return Path(reward=reward, kept=mask & live[:, None], live=live)


def check_share(name: str, x: float) -> None:
    """Raise ValueError unless ``x`` is a number in [0, 1]."""
    if not 0 <= x <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {x}")


def check_choice(name: str, choice: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless ``choice`` is one of ``known``."""
    if choice not in known:
        raise ValueError(f"{name}: expected one of {known}, got {choice!r}")


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


def _as_rows(x: Tensor, part: slice) -> Tensor:
    """Copy some columns of [B, T] into the rows of a contiguous float64 tensor."""
    turned = x[:, part].t()
    return torch.empty(turned.shape, dtype=torch.float64, device=x.device).copy_(turned)


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
        rows = _as_rows(x, part)
        carried = _run_back(rows, _as_rows(factor, part), carried)
        y[:, part] = rows.t()
    return y


def gae_scan(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float, after: Tensor | None = None
) -> Tensor:
    """Run the recursion of ``gae`` without any check: float32 [B, T], 0 on masked steps whatever they held.

    after: [B], value of the state after the last unmasked step, zeros by default.
    """
    out = torch.empty(reward.shape, dtype=torch.float32, device=reward.device)
    carried = torch.zeros(len(reward), dtype=torch.float64, device=reward.device)
    ahead = carried if after is None else after.double()
    for stop in range(reward.shape[1], 0, -_BLOCK):
        part = slice(max(0, stop - _BLOCK), stop)
        hole = ~mask[:, part].t().contiguous()
        state = _as_rows(value, part).masked_fill_(hole, 0.0)
        following = torch.cat([state, ahead[None]])  # becomes the value of the first unmasked state at or after a step
        ahead = _run_back(following[:-1], hole.double(), ahead)
        delta = _as_rows(reward, part).add_(following[1:], alpha=gamma).sub_(state).masked_fill_(hole, 0.0)
        share = torch.full_like(delta, gamma * lam).masked_fill_(hole, 1.0)
        carried = _run_back(delta, share, carried).clone()
        out[:, part] = delta.masked_fill_(hole, 0.0).t()
    return out


def step_result(
    advantage: Tensor,
    kept: Tensor,
    live: Tensor,
    returns: Tensor | None = None,
    critic_mask: Tensor | None = None,
    channels: Mapping[str, Tensor] | None = None,
) -> Advantage:
    """Build the record of a [B, T] method that trains the steps of ``kept`` with weight 1."""
    return Advantage(
        advantage=advantage.float(),
        weight=kept.float(),
        loss_mask=kept,
        live=live,
        returns=None if returns is None else returns.float(),
        critic_mask=critic_mask,
        channels=channels or {},
    )
