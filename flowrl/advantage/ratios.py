"""Importance ratios between the policy that is trained and the one that drew the samples."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def widen(x: Tensor) -> Tensor:
    """Return half-precision ``x`` as float32 and anything wider as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Take the log of the importance ratio: d = clamp(log_prob - old_log_prob, -20, 20).

    Both of one shape and one reduction over latent elements; the result has that shape, float32 or wider. No gradient
    flows into old_log_prob, nor where the clamp holds (it keeps the exponential finite). NaN stays NaN. Raises
    ValueError where the shapes differ: broadcasting here is always a mistake.
    """
    if log_prob.shape != old_log_prob.shape:
        raise ValueError(f"old_log_prob: expected {list(log_prob.shape)} like log_prob, got {list(old_log_prob.shape)}")
    return (widen(log_prob) - widen(old_log_prob.detach())).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Take the importance ratio rho = exp(log_ratio), exactly 1 where the log-probs are equal. See ``log_ratio``."""
    return log_ratio(log_prob, old_log_prob).exp()
