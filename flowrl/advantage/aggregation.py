"""From a loss per step to one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .ratios import widen

# Each takes the masked loss [B, T] and the row lengths [B], gives the sum and its local divisor (None: undivided).
_Parts = tuple[Tensor, Tensor | None]


def _row_means(loss: Tensor, length: Tensor) -> Tensor:
    return loss.sum(dim=1) / length.clamp(min=1)


def _step_mean(loss: Tensor, length: Tensor) -> _Parts:
    return loss.sum(), length.sum()


def _step_sum(loss: Tensor, length: Tensor) -> _Parts:
    return loss.sum(), None


def _seq_sum_mean(loss: Tensor, length: Tensor) -> _Parts:
    return loss.sum(), torch.full_like(length[0], len(loss))


def _seq_sum_norm(loss: Tensor, length: Tensor) -> _Parts:
    return loss.sum(), torch.full_like(length[0], loss.numel())


def _seq_mean_mean(loss: Tensor, length: Tensor) -> _Parts:
    return _row_means(loss, length).sum(), (length > 0).to(length.dtype).sum()


def _length_scaled(loss: Tensor, length: Tensor) -> _Parts:
    return (_row_means(loss, length) * length).sum(), torch.full_like(length[0], len(loss))


def _own_mean_sum(loss: Tensor, length: Tensor) -> _Parts:
    return _row_means(loss, length).sum(), None


AGGREGATIONS: Mapping[str, Callable[[Tensor, Tensor], _Parts]] = {
    "step_mean": _step_mean,
    "step_mean_local": _step_mean,
    "step_sum": _step_sum,
    "seq_sum_mean": _seq_sum_mean,
    "seq_sum_norm": _seq_sum_norm,
    "seq_mean_mean": _seq_mean_mean,
    "length_scaled": _length_scaled,
    "own_mean_sum": _own_mean_sum,
}
_NO_DENOMINATOR = frozenset({"step_mean_local", "step_sum", "own_mean_sum"})


def aggregate(loss: Tensor, mask: Tensor, mode: str, denominator: float | Tensor | None = None) -> Tensor:
    """Reduce a loss per step to a scalar.

    | mode | value | default denominator |
    |---|---|---|
    | step_mean | sum(L M) / denominator | valid steps (the global count makes micro-batches add up; DAPO) |
    | step_mean_local | as step_mean, always by this call's count (TRL's "bnpo") | - |
    | step_sum | sum(L M) | - |
    | seq_sum_mean | sum of row sums / denominator | B |
    | seq_sum_norm | sum(L M) / denominator | B T (pass B C for a constant length C; Dr.GRPO) |
    | seq_mean_mean | sum of row means / denominator | rows with a valid step (GRPO) |
    | length_scaled | sum of row mean times row length / denominator | B (LUSPO; seq_sum_mean for a loss per step) |
    | own_mean_sum | sum of row means | - (DCPO) |

    loss: floating [B, T]; mask: bool [B, T], and what it excludes, NaN included, reaches neither value nor gradient;
    denominator: > 0, replaces the default, so that parts of a global batch add up exactly. The result is float32 or
    wider, 0 where nothing is valid. Raises ValueError, naming the argument, for a wrong shape or dtype, an unknown
    mode, or a denominator that the mode does not take.
    """
    if loss.ndim != 2 or loss.numel() == 0 or not loss.is_floating_point():
        raise ValueError(f"loss: expected floating [B, T] with B, T >= 1, got {loss.dtype} {list(loss.shape)}")
    if mask.dtype != torch.bool or mask.shape != loss.shape:
        raise ValueError(f"mask: expected bool {list(loss.shape)} like loss, got {mask.dtype} {list(mask.shape)}")
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode: unknown aggregation {mode!r}; expected one of {', '.join(AGGREGATIONS)}")
    if denominator is not None and mode in _NO_DENOMINATOR:
        raise ValueError(f"denominator: {mode} takes none")
    if isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"denominator: expected a number > 0, got {denominator}")
    kept = torch.where(mask, widen(loss), 0.0)
    total, local = AGGREGATIONS[mode](kept, mask.sum(dim=1).to(kept.dtype))
    if denominator is not None:
        return total / denominator
    return total if local is None else total / local.clamp(min=1)
