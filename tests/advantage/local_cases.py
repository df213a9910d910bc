"""Ragged batches as plain lists, and the loops that the tests of outcome-plus-local methods compare with."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAN = math.nan


@dataclass
class Case:
    """A ragged batch as plain lists; ``rewards`` has holes, ``mask`` too, and ids have any spacing."""

    rewards: list[float]
    group: list[int]
    mask: list[list[bool]]
    segment: list[list[int]]
    valid: list[bool]
    draw: random.Random

    def __post_init__(self) -> None:
        self.rows, self.steps = len(self.group), len(self.mask[0])
        self.used = [v and not math.isnan(r) for r, v in zip(self.rewards, self.valid, strict=True)]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.tensor(self.rewards, dtype=torch.float64),
            torch.tensor(self.group),
            torch.tensor(self.mask),
            torch.tensor(self.segment),
        )

    def table(self, columns: int, holes: float = 0.0) -> list[list[float]]:
        cells = [[self.draw.gauss(0, 1) for _ in range(columns)] for _ in range(self.rows)]
        return [[NAN if self.draw.random() < holes else x for x in row] for row in cells]

    def size(self, row: int, segment: int) -> int:
        """Trained steps of one segment."""
        if not self.used[row]:
            return 0
        return sum(m and s == segment for m, s in zip(self.mask[row], self.segment[row], strict=True))


def ragged(seed: int, rewards: tuple[float, ...] = (0.0, 1.0)) -> Case:
    draw = random.Random(seed)
    rows, steps = draw.randint(6, 16), draw.randint(5, 9)
    group = [draw.choice([7_000_000_000, -3, 11]) for _ in range(rows)]
    group[0] = 500  # a group of one
    mask, segment = [], []
    for _ in range(rows):
        length, now, ids = draw.randint(0, steps), 0, []
        for t in range(steps):
            now += draw.random() < 0.4
            ids.append(now if t < length else -1)
        mask.append([t < length and draw.random() < 0.8 for t in range(steps)])
        segment.append(ids)
    outcome = [NAN if draw.random() < 0.1 else draw.choice([*rewards, draw.gauss(0, 1)]) for _ in range(rows)]
    outcome[1], group[1] = 1.0, 11
    return Case(outcome, group, mask, segment, [i == 1 or draw.random() < 0.85 for i in range(rows)], draw)


def standardise(x: list[tuple[Any, float, float]], ddof: int, eps: float, factor: float | None = None) -> list[float]:
    """(key, value, weight) -> (value - mean) / (std + eps) over equal keys; with ``factor`` no division."""
    out = []
    for key, value, _ in x:
        pool = [(v, w) for k, v, w in x if k == key and w > 0]
        size = sum(w for _, w in pool)
        if len({v for v, _ in pool}) <= 1 or size <= 1:
            out.append(0.0)
            continue
        mean = math.fsum(v * w for v, w in pool) / size
        std = math.sqrt(math.fsum(w * (v - mean) ** 2 for v, w in pool) / (size - ddof))
        out.append((value - mean) / (std + eps) if factor is None else (value - mean) * size**factor)
    return out


def outcome_loop(case: Case, ddof: int, eps: float, rewards: list[float] | None = None) -> list[float]:
    values = case.rewards if rewards is None else rewards
    keyed = [(g, 0.0 if math.isnan(r) else r, float(u)) for g, r, u in zip(case.group, values, case.used, strict=True)]
    return [x if u else 0.0 for x, u in zip(standardise(keyed, ddof, eps), case.used, strict=True)]


def close(tensor: Tensor, values: Any, tolerance: float = 1e-4) -> None:
    assert torch.allclose(tensor.double(), torch.tensor(values, dtype=torch.float64), atol=tolerance, rtol=0), tensor


def defaults(call: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only options of a method."""
    found = inspect.signature(call).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}


def on_steps(case: Case, value: Any) -> list[list[float]]:
    """value(row, step) on trained steps, 0 elsewhere."""
    return [
        [value(b, t) if case.used[b] and case.mask[b][t] else 0.0 for t in range(case.steps)] for b in range(case.rows)
    ]
