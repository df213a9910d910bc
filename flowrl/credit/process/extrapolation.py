"""Any outcome reward as a process reward: score an estimate of the finished sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowrl.credit.process.context import Outcome, ProcessContext
from flowrl.credit.values import ode_value
from flowrl.records import Prediction, ProcessScore, Prompted


class Extrapolation:
    """``r(decode(x0_hat))`` with x0_hat the end of ``ode_steps`` deterministic steps of the present policy.

    ode_steps: 1 is the one-step estimate, 0 takes every remaining step of the schedule. reward: a reward's name with its
    ``args``, or "" for the score of the run's own trained rewards. A latent at step k of T costs min(ode_steps, T - k)
    network calls, a decode and a score. It has no gradient: the picture is rounded on its way to the reward.
    """

    differentiable = False

    def __init__(self, *, ode_steps: int = 1, reward: str = "", args: Mapping[str, Any] | None = None) -> None:
        if ode_steps < 0:
            raise ValueError(f"ode_steps: expected a number >= 0 (0 is every remaining one), got {ode_steps}")
        if args and not reward:
            raise ValueError("args: these are of a reward of its own; name it by reward")
        self.ode_steps, self.reward, self.args = ode_steps, reward, dict(args or {})
        self.context: ProcessContext | None = None
        self.outcome: Outcome | None = None

    def bind(self, context: ProcessContext) -> None:
        self.context, self.outcome = context, context.outcome(self.reward, self.args)

    @torch.no_grad()
    def score(self, x: Tensor, t: Tensor, prompted: Prompted) -> ProcessScore:
        """Score latents at times of the run's schedule; ValueError for another time, or rows without their requests."""
        context, outcome = self.context, self.outcome
        if context is None or outcome is None:
            raise ValueError("x0: this process reward serves no run yet; call bind first")
        if len(prompted.requests) != len(x):
            raise ValueError("x0: an outcome reward scores what was asked for, and these latents come without requests")
        step = _step_of(t, context.schedule.t)

        def predict(x: Tensor, step: Tensor, rows: Tensor) -> Prediction:
            return context.predict(x, step, prompted[rows])

        x0, _ = ode_value(predict, x, step, context.schedule, self.ode_steps)
        return ProcessScore(*outcome(x0, prompted.requests))


def _step_of(t: Tensor, grid: Tensor) -> Tensor:
    """The index of each time in the schedule: int64 [B] on CPU."""
    away = (t.double().cpu()[:, None] - grid.double().cpu()).abs()
    nearest, step = away.min(1)
    if bool((nearest > 1e-5).any()):
        raise ValueError(f"x0: t = {float(t[nearest.argmax()]):g} is no time of the run's schedule")
    return step
