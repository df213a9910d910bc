"""Policy losses per element, to be minimised; averaging is ``aggregation``'s or the caller's.

low, high: how far below and above 1 the ratio may go before the gradient stops, in units of the ratio. They depend on
the log-prob's reduction over elements: a ratio of means needs a range smaller by the element count than a ratio of
sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _bounds(low: float, high: float | None) -> tuple[float, float]:
    high = low if high is None else high
    if not (low >= 0 and high >= 0):
        raise ValueError(f"low, high: expected numbers >= 0, got {low} and {high}")
    return 1.0 - low, 1.0 + high


def _check_shapes(ratio: Tensor, advantage: Tensor) -> None:
    if ratio.ndim != advantage.ndim:
        raise ValueError(
            f"advantage: expected as many dimensions as ratio {list(ratio.shape)}, got {list(advantage.shape)}; "
            "give a per-sample advantage a step dimension of 1"
        )


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float | None = None) -> Tensor:
    """Form the clipped surrogate: L = max(-A rho, -A clip(rho, 1 - low, 1 + high)).

    The gradient with respect to log rho is -A rho, and 0 where the ratio has already moved too far the right way (A >
    0 and rho > 1 + high, or A < 0 and rho < 1 - low). ratio: floating, any shape; advantage: the same number of
    dimensions, broadcast against it; high: ``low`` by default. PPO, 1707.06347 equation 7; separate bounds: DAPO,
    2503.14476. Raises ValueError for another number of dimensions or bounds out of range.
    """
    lower, upper = _bounds(low, high)
    _check_shapes(ratio, advantage)
    advantage = advantage.detach()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(lower, upper))


def clipped_low(ratio: Tensor, advantage: Tensor, low: float) -> Tensor:
    """Tell where the lower bound stops the gradient: A < 0 and rho < 1 - low. bool of the broadcast shape."""
    lower, _ = _bounds(low, None)
    _check_shapes(ratio, advantage)
    return (advantage < 0) & (ratio < lower)


def clipped_high(ratio: Tensor, advantage: Tensor, high: float) -> Tensor:
    """Tell where the upper bound stops the gradient: A > 0 and rho > 1 + high. bool of the broadcast shape."""
    _, upper = _bounds(0.0, high)
    _check_shapes(ratio, advantage)
    return (advantage > 0) & (ratio > upper)


def clip_fraction(ratio: Tensor, advantage: Tensor, low: float, high: float | None = None) -> Tensor:
    """Take the share of elements whose gradient is stopped by a bound: a float32 scalar in [0, 1], no gradient."""
    high = low if high is None else high
    return (clipped_low(ratio, advantage, low) | clipped_high(ratio, advantage, high)).float().mean()
