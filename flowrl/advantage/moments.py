"""Mean and deviation over a whole batch, over all data-parallel ranks where a reduction is given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import by_rows

# Sums a float64 tensor over data-parallel ranks (an all-reduce); None: this rank is all there is.
Reduce = Callable[[Tensor], Tensor]


def total(x: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Sum a float64 tensor over the ranks: ``reduce(x)``, or ``x`` itself without a reduction."""
    return x if reduce is None else reduce(x)


def row_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared distances to the mean of each row's unmasked steps: float64 [B], 0 for none.

    x: real [B, T], anything on masked steps; mask: bool [B, T].
    """

    def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.where(mask, x, 0.0).double()
        count = mask.sum(1, dtype=torch.int32).double()
        mean = wide.sum(1) / count.clamp(min=1)
        apart = torch.where(mask, wide - mean[:, None], 0.0)
        return count, mean, torch.linalg.vecdot(apart, apart)

    count, mean, square = by_rows(moments, x, mask)
    return count, mean, square


def batch_moments(x: Tensor, mask: Tensor, ddof: int = 0, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Take mean and deviation of the elements of ``mask``: float64 scalars, 0 and 0 where there is none.

    x: real, any shape; mask: bool, the same shape; every element is one datum, so a [B, T] input is weighted by steps
    and a [B] input by samples. Two passes, hence no cancellation; with ``reduce`` both are over all ranks.
    """
    flat = (1, -1) if x.ndim < 2 else (len(x), -1)
    count, rows, square = row_moments(x.reshape(flat), mask.reshape(flat))
    return weighted_moments(rows, count, square.sum(), ddof, reduce)


def weighted_moments(
    x: Tensor, count: Tensor, inside: Tensor | None = None, ddof: int = 0, reduce: Reduce | None = None
) -> tuple[Tensor, Tensor]:
    """Take mean and deviation of data of which ``count`` each have the mean ``x``: float64 scalars, 0 for none.

    x, count: float64 [B]; inside: float64 scalar, sum of the squared distances of data to their own x, 0 by default.
    """
    first = total(torch.stack([(count * x).sum(), count.sum()]), reduce)
    mean = first[0] / first[1].clamp(min=1)
    square = (count * (x - mean).square()).sum()
    square = total(square if inside is None else square + inside, reduce)
    return mean, (square / (first[1] - ddof).clamp(min=1)).sqrt()


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8, reduce: Reduce | None = None
) -> Tensor:
    """Standardise the elements of ``mask``: (x - mean) / sqrt(var + eps), 0 elsewhere; float32 in the shape of ``x``.

    The mean is left in with ``shift_mean`` off. verl's masked_whiten has ddof 1 and eps 1e-8.
    """
    mean, std = batch_moments(x, mask, ddof, reduce)
    return standardise(x, mask, mean if shift_mean else torch.zeros_like(mean), (std.square() + eps).rsqrt())


def standardise(x: Tensor, mask: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    """(x - centre) factor on the elements of ``mask``, 0 elsewhere; float32; centre and factor: float64 scalars."""

    def moved(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (torch.where(mask, ((x.double() - centre) * factor).float(), 0.0),)

    flat = (1, -1) if x.ndim < 2 else (len(x), -1)
    return by_rows(moved, x.reshape(flat), mask.reshape(flat))[0].view(x.shape)
