"""Random values of states, and plain loops that shape and standardise them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

NAN = math.nan
Rows = list[list[float]]


def draw_case(seed: int, missing: float = 0.15) -> dict[str, Tensor]:
    """Ragged rows with holes that hold junk, unequal groups in mixed order, missing values, rows that do not count."""
    draw = torch.Generator().manual_seed(seed)
    rows, steps = 14, 6
    mask = torch.rand(rows, steps, generator=draw) < 0.8
    mask[:, 0] = True
    value = 0.1 + torch.rand(rows, steps, generator=draw, dtype=torch.float64)
    value[torch.rand(rows, steps, generator=draw) < missing] = NAN
    value[~mask] = 99.0
    start = 0.1 + torch.rand(rows, generator=draw, dtype=torch.float64)
    start[torch.rand(rows, generator=draw) < missing] = NAN
    valid = torch.ones(rows, dtype=torch.bool)
    valid[3] = False
    group = torch.tensor([70, -5, 70, 70, 70, -5, 8_000_000_000, -5, 70, -5, -5, 70, 11, 11])
    return {"step_value": value, "start_value": start, "group": group, "mask": mask, "valid": valid}


def _loop_shape(value: list[float], start: float, mask: list[bool], shaping: str, gamma: float) -> list[float]:
    out, steps = [0.0] * len(value), [t for t, on in enumerate(mask) if on]
    for place, t in enumerate(steps):
        if shaping == "value":
            out[t] = value[t]
        elif shaping == "gain":
            out[t] = value[t] - (value[steps[place - 1]] if place else start)
        else:
            later = steps[place : place + 1] if gamma == 0 else steps[place:]
            out[t] = sum(gamma**i * value[j] for i, j in enumerate(later))
    return out


def standardise(x: Rows, mask: Rows, cells: dict[tuple[int, int], Any], ddof: int, eps: float) -> Rows:
    """Standardise the cells (row, step) that share a key; 0 elsewhere."""
    out = [[0.0] * len(row) for row in x]
    for key in set(cells.values()):
        mine = [(b, t) for (b, t), k in cells.items() if k == key and mask[b][t] and not math.isnan(x[b][t])]
        values = [x[b][t] for b, t in mine]
        if len(set(values)) < 2:
            continue
        mean = statistics.fmean(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))
        for b, t in mine:
            out[b][t] = (x[b][t] - mean) / (std + eps)
    return out


def cells(group: list[int], steps: int, normaliser: str) -> dict[tuple[int, int], Any]:
    key = {"per_step": lambda b, t: (group[b], t), "joint": lambda b, t: group[b], "global": lambda b, t: 0}[normaliser]
    return {(b, t): key(b, t) for b in range(len(group)) for t in range(steps)}


def loop_shapes(case: dict[str, Tensor], shaping: str, gamma: float) -> tuple[Rows, Rows]:
    """Shaped values of rows that count, NaN for the others, and the mask as lists."""
    mask = case["mask"].tolist()
    x = []
    for b, row in enumerate(case["step_value"].tolist()):
        kept = row if bool(case["valid"][b]) else [NAN] * len(row)
        x.append(_loop_shape(kept, float(case["start_value"][b]), mask[b], shaping, gamma))
    return x, mask


def check(result: Any, expected: Rows, x: Rows, mask: Rows) -> None:
    known = [[bool(on) and not math.isnan(v) for v, on in zip(a, b, strict=True)] for a, b in zip(x, mask, strict=True)]
    assert result.loss_mask.tolist() == known
    assert torch.equal(result.weight, result.loss_mask.float()) and result.advantage.dtype == torch.float32
    assert torch.allclose(result.advantage, torch.tensor(expected), atol=1e-5)
