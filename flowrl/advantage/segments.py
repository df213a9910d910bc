"""Reductions over groups of a batch, gathered back to the batch.

Group ids are int64 of any spacing, order and size. Sums run in float64 and in two passes for spreads, so a statistic
does not depend on the order of the batch beyond 1e-12 relative. Members with ``valid`` False are left out: whatever
they hold, NaN included, reaches no result. A group without a valid member has no mean, spread, minimum or maximum:
NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Group ids of a batch, compacted once and used for many reductions.

    index: int64 [B] in 0 .. number - 1; number: distinct ids; valid: bool [B]; size: float64 [number], valid members.
    """

    index: Tensor
    number: int
    valid: Tensor
    size: Tensor

    @classmethod
    def of(cls, group: Tensor, valid: Tensor | None = None) -> Groups:
        """Compact ``group`` (int64 [B], B >= 1); ``valid`` bool [B], None for all.

        Raises ValueError, naming the argument, for an empty batch, another dtype or another shape.
        """
        if group.ndim != 1 or len(group) == 0 or group.dtype != torch.int64:
            raise ValueError(f"group: expected int64 [B] with B >= 1, got {group.dtype} {list(group.shape)}")
        if valid is None:
            valid = torch.ones_like(group, dtype=torch.bool)
        if valid.dtype != torch.bool or valid.shape != group.shape:
            raise ValueError(
                f"valid: expected bool {list(group.shape)} like group, got {valid.dtype} {list(valid.shape)}"
            )
        ids, index = torch.unique(group, return_inverse=True)
        size = torch.zeros(len(ids), dtype=torch.float64, device=group.device).index_add_(0, index, valid.double())
        return cls(index=index, number=len(ids), valid=valid, size=size)

    def gather(self, per_group: Tensor) -> Tensor:
        """Give every member the value of its group: [number] -> [B]."""
        return per_group[self.index]

    def _sum(self, x: Tensor) -> Tensor:
        """float64 [number]: sum over valid members."""
        kept = torch.where(self.valid, x.double(), 0.0)
        return torch.zeros_like(self.size).index_add_(0, self.index, kept)

    def _extreme(self, x: Tensor, kind: str) -> Tensor:
        """float64 [number]: "amin" or "amax" over valid members, NaN where there is none."""
        start = float("inf") if kind == "amin" else float("-inf")
        kept = torch.where(self.valid, x.double(), start)
        per_group = torch.full_like(self.size, start).scatter_reduce_(0, self.index, kept, reduce=kind)
        return torch.where(self.size > 0, per_group, torch.nan)

    def count(self) -> Tensor:
        """int64 [B]: valid members of the group."""
        return self.gather(self.size).long()

    def sum(self, x: Tensor) -> Tensor:
        """float64 [B]: sum over the group."""
        return self.gather(self._sum(x))

    def mean(self, x: Tensor) -> Tensor:
        """float64 [B]: mean over the group."""
        return self.gather(self._sum(x) / self.size)

    def std(self, x: Tensor, ddof: int = 0) -> Tensor:
        """float64 [B]: sqrt(sum (x - mean)^2 / (n - ddof)); 0 where n <= ddof."""
        spread = self._sum((x.double() - self.mean(x)) ** 2) / (self.size - ddof).clamp(min=1)
        return self.gather(torch.where(self.size > 0, spread.sqrt(), torch.nan))

    def min(self, x: Tensor) -> Tensor:
        """float64 [B]: least value of the group."""
        return self.gather(self._extreme(x, "amin"))

    def max(self, x: Tensor) -> Tensor:
        """float64 [B]: greatest value of the group."""
        return self.gather(self._extreme(x, "amax"))


def number_ids(ids: Tensor) -> tuple[Tensor, int]:
    """Number ids (int64, any shape) from 0, equal ones alike: int64 in their shape, and a bound of the numbers.

    Ids that lie close together keep their distances; others are sorted.
    """
    low, high = (int(x) for x in torch.aminmax(ids))
    if high - low < 4 * ids.numel():
        return ids if low == 0 else ids - low, high - low + 1
    found, index = torch.unique(ids, return_inverse=True)
    return index, len(found)


def _checked(x: Tensor, group: Tensor, valid: Tensor | None) -> Groups:
    if not x.is_floating_point() or x.shape != group.shape:
        raise ValueError(f"x: expected floating {list(group.shape)} like group, got {x.dtype} {list(x.shape)}")
    return Groups.of(group, valid)


def _like(x: Tensor, result: Tensor) -> Tensor:
    """Return float64 for float64 input and float32 for any other."""
    return result.to(torch.promote_types(x.dtype, torch.float32))


def group_count(group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Count the valid members of each member's group: int64 [B]."""
    return Groups.of(group, valid).count()


def group_sum(x: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum ``x`` (floating [B]) over each member's group: [B], 0 for a group without a valid member."""
    return _like(x, _checked(x, group, valid).sum(x))


def group_mean(x: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average ``x`` (floating [B]) over each member's group: [B]."""
    return _like(x, _checked(x, group, valid).mean(x))


def group_std(x: Tensor, group: Tensor, valid: Tensor | None = None, ddof: int = 0) -> Tensor:
    """Take the standard deviation of ``x`` (floating [B]) over each member's group: [B], 0 where n <= ddof."""
    return _like(x, _checked(x, group, valid).std(x, ddof))


def group_any(flag: Tensor, group: Tensor) -> Tensor:
    """Tell every row whether ``flag`` (bool [B]) holds for a row of its group (int64 [B]): bool [B]."""
    return Groups.of(group).max(flag.double()) > 0


def group_min(x: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Take the least ``x`` (floating [B]) of each member's group: [B]."""
    return _like(x, _checked(x, group, valid).min(x))


def group_max(x: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Take the greatest ``x`` (floating [B]) of each member's group: [B]."""
    return _like(x, _checked(x, group, valid).max(x))


def drop_thin_groups(valid: Tensor, group: Tensor, min_valid: int) -> Tensor:
    """Return ``valid`` (bool [B]) with every group of fewer than ``min_valid`` valid members switched off."""
    return valid & (group_count(group, valid) >= min_valid)
