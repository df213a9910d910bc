"""What the estimators on values of states share: reading, shaping, standardising; the conventions of ``step_values``.

Values are float64 [B, T], NaN where there is none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_share
from .inputs import check_mask, read_parts
from .moments import Reduce, batch_moments
from .record import Advantage
from .scans import last_step
from .segments import Groups, group_any
from .statistics import divide, drop_rounding, group_statistics, step_result
from .steps import reverse_scan

Shaping = Literal["value", "gain", "cumulative"]
Normaliser = Literal["per_step", "joint", "global"]


def check_shaping(shaping: str, gamma: float, start_value: Tensor | None) -> None:
    """Raise ValueError for an unknown shaping, gamma outside [0, 1], or a gain without the value to start from."""
    check_choice("shaping", shaping, ("value", "gain", "cumulative"))
    check_share("gamma", gamma)
    if shaping == "gain" and start_value is None:
        raise ValueError("start_value: needed for the gain of the first step, got None")


def read_values(
    step_value: Tensor, start_value: Tensor | None, mask: Tensor, group: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the values; return them as float64 [B, T] and [B], NaN where a row, a step or a value does not count."""
    check_mask(mask)
    if step_value.shape != mask.shape:
        raise ValueError(f"step_value: expected real {list(mask.shape)} like mask, got {list(step_value.shape)}")
    value, known = read_parts("step_value", torch.where(mask, step_value.detach(), torch.nan), "B, T", group, valid)
    value = torch.where(known, value, torch.nan)
    if start_value is None:
        return value, torch.full_like(value[:, 0], torch.nan)
    if start_value.shape != mask.shape[:1]:
        raise ValueError(f"start_value: expected real [{len(mask)}], got {list(start_value.shape)}")
    start, counted = read_parts("start_value", start_value, "B", group, valid)
    return value, torch.where(counted, start, torch.nan)


def before_step(value: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Value of the state before each unmasked step: that after the unmasked step before it, at first ``start``."""
    position = torch.arange(mask.shape[1], device=mask.device)
    upto = torch.where(mask, position, -1).cummax(dim=1).values
    at = torch.cat([torch.full_like(upto[:, :1], -1), upto[:, :-1]], dim=1)
    return torch.where(at >= 0, value.gather(1, at.clamp(min=0)), start[:, None])


def _cumulative(value: Tensor, mask: Tensor, gamma: float) -> Tensor:
    missing = mask & value.isnan()
    total = reverse_scan(value.nan_to_num(nan=0.0), gamma, mask)
    behind = missing if gamma == 0 else reverse_scan(missing.double(), 1.0) > 0
    return torch.where(behind, torch.nan, total)


def shaped(value: Tensor, start: Tensor, mask: Tensor, shaping: str, gamma: float) -> Tensor:
    """Shape read values, see ``shape_values``."""
    if shaping == "gain":
        found = value - before_step(value, start, mask)
    else:
        found = _cumulative(value, mask, gamma) if shaping == "cumulative" else value
    return torch.where(mask, found, 0.0)


def shape_values(
    step_value: Tensor, start_value: Tensor | None, mask: Tensor, shaping: Shaping, *, gamma: float = 1.0
) -> Tensor:
    """Turn values of states into a signal a step: float64 [B, T], NaN where it has none, 0 on masked steps.

    value: R_k. gain: R_k - R_{k-1}, which adds up to outcome minus start along a row without NaN. cumulative:
    Q_k = sum_{j >= k} gamma^{j-k} R_j with gamma in [0, 1] (it counts the same outcome many times over, so it is no
    return of an additive reward). start_value: needed by "gain" alone. Shapes and errors: see the module.
    """
    check_shaping(shaping, gamma, start_value)
    group = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    value, start = read_values(step_value, start_value, mask, group, None)
    return shaped(value, start, mask, shaping, gamma)


def standardise_steps(x: Tensor, group: Tensor, kept: Tensor, ddof: int, eps: float, size: Tensor) -> Tensor:
    """Standardise inside each (step, group); size: how large the numbers behind ``x`` are, for rounding."""
    index, columns = Groups.of(group).index, torch.arange(x.shape[1], device=x.device)
    return _within(x, index[:, None] * x.shape[1] + columns, kept, ddof, eps, size)


def _within(x: Tensor, ids: Tensor, kept: Tensor, ddof: int, eps: float, size: Tensor) -> Tensor:
    """Standardise the elements of ``kept`` that share an id: float64 [B, T]."""
    s = group_statistics(x.nan_to_num(nan=0.0).flatten(), ids.flatten(), kept.flatten(), ddof, "zero")
    centred = drop_rounding(s.centred, s.groups.max(size.flatten()).nan_to_num(nan=0.0))
    return divide(centred, s.scale.nan_to_num(nan=0.0), eps).view_as(x)


def normalise(
    x: Tensor, group: Tensor, kept: Tensor, size: Tensor, normaliser: str, ddof: int, eps: float, reduce: Reduce | None
) -> Tensor:
    """Standardise by a normaliser of ``step_credit``: float64 [B, T], of no meaning outside ``kept``."""
    if normaliser == "per_step":
        return standardise_steps(x, group, kept, ddof, eps, size)
    if normaliser == "joint":
        return _within(x, group[:, None].expand_as(x), kept, ddof, eps, size)
    mean, std = batch_moments(x, kept, ddof, reduce)
    return divide(drop_rounding(x - mean, torch.where(kept, size, 0.0).max()), std, eps)


def close(advantage: Tensor, kept: Tensor, outcome: Tensor, group: Tensor) -> Advantage:
    """Close the record: group statistics of the outcomes, live where the group has an advantage."""
    signal = (kept & (advantage != 0)).any(dim=1)
    s = group_statistics(outcome.nan_to_num(nan=0.0), group, ~outcome.isnan(), 0, "zero")
    return step_result(advantage, kept, group_any(signal, group), statistics=s)


def outcome_of(value: Tensor, mask: Tensor) -> Tensor:
    """Value at the last unmasked step: [B], NaN for none."""
    last = last_step(mask)
    found = value.gather(1, last.clamp(min=0)[:, None])[:, 0]
    return torch.where(last >= 0, found, torch.nan)


def size_of(value: Tensor, start: Tensor) -> Tensor:
    """Greatest magnitude of a row's values, spread over its steps."""
    return torch.cat([value, start[:, None]], 1).nan_to_num(nan=0.0).abs().amax(1, keepdim=True).expand_as(value)
