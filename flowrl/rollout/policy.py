"""A pipeline with a kernel is a policy: one function gives the transition, for rollout and update alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowrl.dynamics.guidance import guide
from flowrl.dynamics.interpolants import endpoints
from flowrl.dynamics.kernels import StepPoint, transition
from flowrl.errors import UserError
from flowrl.protocols import PipelineAdapter
from flowrl.records import Conditioning, Prediction, PredictionKind, Prompted, Request, Schedule


@dataclass(frozen=True)
class Step:
    """The Gaussian of one step and the (guided) network output behind it.

    mean, value: [B, ...]; x0_hat, x1_hat: one-step estimates of picture and noise, alike; std: [B, 1, ..., 1]; kind: of
    the output.
    """

    mean: Tensor
    std: Tensor
    value: Tensor
    x0_hat: Tensor
    x1_hat: Tensor
    point: StepPoint
    kind: PredictionKind

    def __getitem__(self, rows: Tensor) -> Step:
        """Rows int64 [N] of every tensor; a row may come several times."""
        point = StepPoint(*(value[rows] for value in vars(self.point).values()))
        return Step(
            self.mean[rows], self.std[rows], self.value[rows], self.x0_hat[rows], self.x1_hat[rows], point, self.kind
        )


@dataclass(frozen=True)
class Policy:
    """An adapter on one schedule, with a kernel for its stochastic steps and guidance.

    cfg_gradient: "full" differentiates both guidance branches, "conditional" detaches the unconditional one. guidance_low:
    the scale below the adapter's ``guidance_boundary``, None for one scale (Wan 2.2 has two). Where guidance is embedded
    in the network, the scale is a conditioning tensor of its own. Raises UserError for a second scale that no range has.
    """

    adapter: PipelineAdapter
    schedule: Schedule
    kernel: str
    noise: float
    guidance: float = 1.0
    cfg_gradient: Literal["full", "conditional"] = "full"
    guidance_low: float | None = None

    def __post_init__(self) -> None:
        if self.guidance_low is not None and self.adapter.guidance_boundary is None:
            raise UserError(
                f"guidance_low: {self.guidance_low:g} belongs to a second range of times, and this model has one; remove it"
            )

    def encode(self, requests: Sequence[Request]) -> Prompted:
        positive = self.adapter.encode(requests)
        if self.adapter.guidance_rule == "embedded":
            scale = torch.full((len(requests),), float(self.guidance), device=self.adapter.device)
            return Prompted(Conditioning({**positive.tensors, "guidance": scale}), None, tuple(requests))
        guided = {self.guidance, self.guidance if self.guidance_low is None else self.guidance_low} != {1}
        negative = self.adapter.encode(requests, negative=True) if guided else None
        return Prompted(positive, negative, tuple(requests))

    def _scale(self, t: Tensor) -> float | Tensor:
        """Guidance at times t [B]: one number, or [B] where there are two ranges."""
        boundary = self.adapter.guidance_boundary if self.guidance_low is not None else None
        if self.guidance_low is None or boundary is None:
            return self.guidance
        low = t < boundary
        return torch.where(low, torch.full_like(t, self.guidance_low), torch.full_like(t, self.guidance))

    def predict(self, x: Tensor, step: Tensor, prompted: Prompted) -> Prediction:
        """The guided prediction at each sample's own step. x: [B, ...]; step: int64 [B]."""
        t = self.schedule.t[step]
        conditional = self.adapter.predict(x, t, prompted.positive)
        if prompted.negative is None:
            return conditional
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg_gradient == "full"):
            unconditional = self.adapter.predict(x, t, prompted.negative)
        value = guide(conditional.value, unconditional.value, self._scale(t), self.adapter.guidance_rule)
        return replace(conditional, value=value)

    def step(self, x: Tensor, step: Tensor, prompted: Prompted, kernel: str | None = None) -> Step:
        """The transition from x at ``step``, by this policy's kernel or the named one."""
        prediction = self.predict(x, step, prompted)
        return self.made_of(x, step, prediction.value, prediction.kind, kernel)

    def made_of(self, x: Tensor, step: Tensor, value: Tensor, kind: PredictionKind, kernel: str | None = None) -> Step:
        """The transition that a network output means: no network call, so a stored output gives back its transition."""
        point = StepPoint.of(self.schedule, step, x.ndim)
        x0_hat, x1_hat = endpoints(x, value, kind, point.alpha, point.sigma)
        mean, std = transition(kernel or self.kernel, self.noise, x, x0_hat, x1_hat, point)
        return Step(mean, std, value, x0_hat, x1_hat, point, kind)
