"""The path between data and noise, ``x_t = alpha x0 + sigma x1``, and what a network's output says about its two ends.

x0 is data, x1 is standard normal noise; t = 1 is noise. Flow models have ``alpha = 1 - t, sigma = t``;
variance-preserving models have ``alpha^2 + sigma^2 = 1``. Everything is computed and returned in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from flowrl.records import PredictionKind

if TYPE_CHECKING:
    from torch import Tensor


def interpolate(x0: Tensor, x1: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Mix data and noise: ``x = alpha x0 + sigma x1``.

    x0, x1: [B, ...]; alpha, sigma: broadcastable to them. Returns float32 [B, ...].
    """
    return alpha * x0.float() + sigma * x1.float()


def endpoints(x: Tensor, value: Tensor, kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate both ends of the path from a network's output.

    velocity (``x1 - x0``; flow paths): ``x0 = x - sigma value``, ``x1 = x + alpha value``
    epsilon (``x1``): ``x0 = (x - sigma value) / alpha``; alpha must not be 0
    v (``alpha x1 - sigma x0``; variance-preserving): ``x0 = alpha x - sigma value``, ``x1 = sigma x + alpha value``
    x0: ``x1 = (x - alpha value) / sigma``; sigma must not be 0

    x, value: any float type, [B, ...]; alpha, sigma: broadcastable to x. Returns (x0_hat, x1_hat), float32 [B, ...].
    Raises ValueError for an unknown kind. The v form is Salimans and Ho (2202.00512), appendix D.
    """
    x, value = x.float(), value.float()
    match kind:
        case "velocity":
            return x - sigma * value, x + alpha * value
        case "epsilon":
            return (x - sigma * value) / alpha, value
        case "v":
            return alpha * x - sigma * value, sigma * x + alpha * value
        case "x0":
            return value, (x - alpha * value) / sigma
    raise _unknown(kind)


def prediction_from_endpoints(x0: Tensor, x1: Tensor, kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Give the output that a network of this kind would have at the ends (x0, x1): the inverse of `endpoints`.

    It is also the regression target of a denoiser. Shapes and errors as in `endpoints`; float32 [B, ...].
    """
    x0, x1 = x0.float(), x1.float()
    match kind:
        case "velocity":
            return x1 - x0
        case "epsilon":
            return x1
        case "v":
            return alpha * x1 - sigma * x0
        case "x0":
            return x0
    raise _unknown(kind)


def score(x1_hat: Tensor, sigma: Tensor) -> Tensor:
    """Turn a noise estimate into the score of the marginal: ``grad log p_t(x) = -x1_hat / sigma``; sigma must not
    be 0.
    """
    return -x1_hat.float() / sigma


def _unknown(kind: str) -> ValueError:
    return ValueError(
        f"prediction kind {kind!r} is not known; an adapter's predict must return one of {get_args(PredictionKind)}"
    )
