"""Gradients through a network that computes in fp16: larger inside it, true outside.

fp16 holds nothing below 6e-8, and the gradient of a mean over latents is often smaller. So a gradient is multiplied by a
power of two where it enters the network (at the prediction) and divided by it where it leaves (at the inputs, and at each
trained weight before it adds up). Losses, learners and autograd.grad know nothing of it. The factor halves
where a gradient overflows and doubles after many good updates: 2 ** 16 and 2,000 at first, as in torch.amp.GradScaler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from flowrl.protocols import PipelineAdapter
from flowrl.records import Conditioning, Prediction

LARGEST, SMALLEST = 2.0**24, 1.0


class _Scaled(torch.autograd.Function):
    """The identity; its gradient is multiplied by the factor, or divided, as the factor is when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: LossScale, into: bool) -> torch.Tensor:
        ctx.scale, ctx.into = scale, into
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        factor = ctx.scale.value
        return gradient * factor if ctx.into else gradient / factor, None, None


class LossScale:
    """The factor, and what a resumed run needs of it. growth: good updates in a row before it doubles."""

    def __init__(self, value: float = 2.0**16, growth: int = 2000) -> None:
        self.value, self.growth, self.good = value, growth, 0

    @classmethod
    def around(cls, adapter: PipelineAdapter) -> Self:
        """Scale the gradients within ``adapter.predict`` from now on. Its trained weights must be float32."""
        scale, plain = cls(), adapter.predict

        def predict(
            x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
        ) -> Prediction:
            given = Conditioning({name: scale._leaving(value) for name, value in conditioning.tensors.items()})
            made = plain(scale._leaving(x), t, given, features)
            hidden = {name: scale._entering(value) for name, value in made.features.items()}
            return replace(made, value=scale._entering(made.value), features=hidden)

        adapter.predict = predict  # type: ignore[method-assign]
        for parameter in adapter.trainable().parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / scale.value)  # type: ignore[no-untyped-call]
        return scale

    def _entering(self, x: torch.Tensor) -> torch.Tensor:
        return _Scaled.apply(x, self, True) if x.requires_grad else x  # type: ignore[no-untyped-call]

    def _leaving(self, x: torch.Tensor) -> torch.Tensor:
        return _Scaled.apply(x, self, False) if x.requires_grad else x  # type: ignore[no-untyped-call]

    def note(self, finite: bool) -> bool:
        """Learn from an update; returns whether the factor may be why its gradient is not finite."""
        if finite:
            self.good += 1
            if self.good >= self.growth:
                self.value, self.good = min(self.value * 2, LARGEST), 0
            return False
        self.good, before = 0, self.value
        self.value = max(self.value / 2, SMALLEST)
        return before > SMALLEST

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good": self.good}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.good = float(state["value"]), int(state["good"])
