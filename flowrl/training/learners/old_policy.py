"""A lagging copy of the trained weights: the policy that draws the samples, or the one that holds the trained one back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flowrl.config.forward import Forward
from flowrl.training.weights import Weights


class OldPolicy:
    """``old <- decay old + (1 - decay) weights`` after every iteration, decay = min(rate (updates - delay), limit).

    It holds the trained weights alone: LoRA's, or all of them. Without a rate there is no copy: old are the weights at
    the start of the iteration.
    """

    def __init__(self, weights: Weights, forward: Forward) -> None:
        self.weights, self.forward = weights, forward
        self.values = [p.detach().clone() for p in weights.parameters] if forward.old_rate > 0 else []

    def __bool__(self) -> bool:
        return bool(self.values)

    def decay(self, updates: int) -> float:
        """The decay after ``updates`` optimizer steps, in [0, limit]."""
        f = self.forward
        return min(max(f.old_rate * (updates - f.old_delay), 0.0), f.old_limit)

    def follow(self, updates: int) -> None:
        """Move towards the weights after an iteration that ended with ``updates`` optimizer steps in all."""
        if self.values:
            torch._foreach_lerp_(self.values, [p.detach() for p in self.weights.parameters], 1 - self.decay(updates))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run with the copy's weights; the live ones return afterwards, bit for bit."""
        if not self.values:
            yield
            return
        with self.weights.holding(self.values):
            yield

    def state(self) -> dict[str, Any]:
        return {"old": self.weights.whole(self.values)} if self.values else {}

    def load(self, state: dict[str, Any]) -> None:
        """Copy the values in; ValueError where they do not fit, before anything changes."""
        if not self.values:
            return
        found = self.weights.parts(
            state.get("old", {}),
            "checkpoint: it holds no old policy that fits; were objective.name or forward.old_rate changed since the run "
            "began?",
        )
        for value, kept in zip(self.values, found, strict=True):
            value.copy_(kept)
