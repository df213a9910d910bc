"""What every policy loss returns, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ratios import log_ratio, widen


@dataclass(frozen=True)
class PolicyLoss:
    """A loss per step, to be minimised; ``aggregate`` makes one number of it.

    loss: float32 or wider [B, T], 0 on masked steps, which carry no gradient whatever they hold. low, high: bool
    [B, T], unmasked steps whose ratio is beyond the lower (upper) bound on the side where the method acts on it; None
    for a method without bounds.
    """

    loss: Tensor
    low: Tensor | None = None
    high: Tensor | None = None


def read_loss_inputs(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs of a policy loss; return (log_prob, d, advantage), each [B, T], 0 on masked steps.

    d = clamp(log_prob - old_log_prob, -20, 20), float32 or wider, carries the gradient of log_prob; so does the
    returned log_prob. advantage: [B] or [B, T]; the returned one is detached. What masked steps hold, NaN included,
    reaches neither value nor gradient. Raises ValueError, naming the argument, for a wrong shape or dtype.
    """
    if log_prob.ndim != 2 or log_prob.numel() == 0 or not log_prob.is_floating_point():
        raise ValueError(
            f"log_prob: expected floating [B, T] with B, T >= 1, got {log_prob.dtype} {list(log_prob.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != log_prob.shape:
        raise ValueError(
            f"mask: expected bool {list(log_prob.shape)} like log_prob, got {mask.dtype} {list(mask.shape)}"
        )
    if advantage.shape not in (log_prob.shape, log_prob.shape[:1]):
        raise ValueError(
            f"advantage: expected {list(log_prob.shape)} or {list(log_prob.shape[:1])}, got {list(advantage.shape)}"
        )
    if old_log_prob.shape != log_prob.shape:
        raise ValueError(f"old_log_prob: expected {list(log_prob.shape)} like log_prob, got {list(old_log_prob.shape)}")
    kept = torch.where(mask, log_prob, 0.0)
    d = log_ratio(kept, torch.where(mask, old_log_prob.detach(), 0.0))
    wide = advantage.detach().to(d.dtype)
    return kept.to(d.dtype), d, torch.where(mask, wide if wide.ndim == 2 else wide[:, None], 0.0)


def read_live_steps(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider with its gradient, 0 on masked steps.

    Raises ValueError unless it is floating [B, T] like ``mask``.
    """
    if x.shape != mask.shape or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating {list(mask.shape)} like mask, got {x.dtype} {list(x.shape)}")
    return widen(torch.where(mask, x, 0.0))
