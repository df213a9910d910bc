"""Mean and deviation over a whole batch, over all data-parallel ranks where a reduction is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a float64 tensor over data-parallel ranks (an all-reduce); None: this rank is all there is.
Reduce = Callable[[Tensor], Tensor]


def total(x: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Sum a float64 tensor over the ranks: ``reduce(x)``, or ``x`` itself without a reduction."""
    return x if reduce is None else reduce(x)


def batch_moments(x: Tensor, mask: Tensor, ddof: int = 0, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Take mean and deviation of the elements of ``mask``: float64 scalars, 0 and 0 where there is none.

    x: real, any shape; mask: bool, the same shape; every element is one datum, so a [B, T] input is weighted by steps
    and a [B] input by samples. Two passes, hence no cancellation; with ``reduce`` both are over all ranks.
    """
    wide = torch.where(mask, x.double(), 0.0)
    first = total(torch.stack([wide.sum(), mask.sum().double()]), reduce)
    mean = first[0] / first[1].clamp(min=1)
    square = total(torch.where(mask, wide - mean, 0.0).square().sum(), reduce)
    return mean, (square / (first[1] - ddof).clamp(min=1)).sqrt()


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """Standardise the elements of ``mask``: (x - mean) / sqrt(var + eps), 0 elsewhere; float32 in the shape of ``x``.

    The mean is left in with ``shift_mean`` off. verl's masked_whiten has ddof 1 and eps 1e-8.
    """
    mean, std = batch_moments(x, mask, ddof, reduce)
    scale = (std.square() + eps).rsqrt()
    centred = x.double() - (mean if shift_mean else torch.zeros_like(mean))
    return torch.where(mask, centred * scale, 0.0).float()
