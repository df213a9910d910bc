"""Ask a process reward, and make a mask of whatever goes wrong."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowrl.protocols import ProcessReward
from flowrl.records import ProcessScore, Prompted


@dataclass(frozen=True)
class Asked:
    """An answer that keeps the contract. values: float32 [B], 0 where not valid; valid: bool [B]; gradient: like x, 0 where
    not valid, or None where none was asked; error: what went wrong first, or "".
    """

    values: Tensor
    valid: Tensor
    gradient: Tensor | None = None
    error: str = ""

    @property
    def invalid(self) -> int:
        return int((~self.valid).sum())


class _Failed(Exception):
    """One call gave nothing that can be used."""


@torch.no_grad()
def ask(label: str, reward: ProcessReward, x: Tensor, t: Tensor, prompted: Prompted) -> Asked:
    """Score latents. What is not finite, not marked valid, of the wrong length, or raised, is not valid.

    KeyboardInterrupt, SystemExit and the like pass through.
    """
    try:
        values, valid, error = _checked(label, _call(label, reward, x, t, prompted), len(x))
    except _Failed as failure:
        return _nothing(x, str(failure))
    return Asked(values.detach(), valid, None, error)


def ask_gradient(label: str, reward: ProcessReward, x: Tensor, t: Tensor, prompted: Prompted) -> Asked:
    """Score latents and differentiate: ``grad_x value``, each sample's own. A gradient that is not finite makes its sample
    invalid, with gradient 0. Raises ValueError for a reward that is not differentiable.
    """
    if not reward.differentiable:
        raise ValueError(f"{label}: this process reward has no gradient")
    point = x.detach().float().requires_grad_()
    try:
        with torch.enable_grad():
            values, valid, error = _checked(label, _call(label, reward, point, t, prompted), len(x))
            gradient = _gradient(label, values, valid, point)
    except _Failed as failure:
        return _nothing(x, str(failure), torch.zeros_like(x, dtype=torch.float32))
    finite = gradient.isfinite().flatten(1).all(1)
    if not error and not bool((finite | ~valid).all()):
        error = f"{label}: a gradient is not finite"
    valid = valid & finite
    shaped = valid.view(-1, *[1] * (x.ndim - 1))
    return Asked(torch.where(valid, values.detach(), 0.0), valid, torch.where(shaped, gradient, 0.0), error)


def _call(label: str, reward: ProcessReward, x: Tensor, t: Tensor, prompted: Prompted) -> object:
    try:
        return reward.score(x, t, prompted)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
        raise _Failed(f"{label}: {type(error).__name__}: {error}{place}") from error


def _gradient(label: str, values: Tensor, valid: Tensor, point: Tensor) -> Tensor:
    if not values.requires_grad:
        raise _Failed(f"{label}: calls itself differentiable, and no gradient reaches its latents")
    try:
        (gradient,) = torch.autograd.grad(torch.where(valid, values, 0.0).sum(), point, allow_unused=True)
    except RuntimeError as error:
        raise _Failed(f"{label}: its gradient failed: {error}") from error
    if gradient is None:
        raise _Failed(f"{label}: calls itself differentiable, and no gradient reaches its latents")
    return gradient.detach()


def _checked(label: str, found: object, count: int) -> tuple[Tensor, Tensor, str]:
    """Values with 0 where they are not valid, the mask, and what was wrong with the first that is not."""
    if not isinstance(found, ProcessScore):
        raise _Failed(f"{label}: score returned {type(found).__name__}; return a ProcessScore")
    for name, value in (("values", found.values), ("valid", found.valid)):
        if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise _Failed(f"{label}: {name} is {shape} for {count} latents; return [{count}]")
    values = found.values.float()
    valid = found.valid.bool() & values.detach().isfinite()
    wrong = "" if bool(valid.all()) else f"{label}: value {int((~valid).nonzero()[0])} is not valid or not finite"
    return torch.where(valid, values, 0.0), valid, wrong


def _nothing(x: Tensor, error: str, gradient: Tensor | None = None) -> Asked:
    blank = torch.zeros(len(x), device=x.device)
    return Asked(blank, blank.bool(), gradient, error)
