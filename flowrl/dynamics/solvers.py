"""Deterministic steps of first and second order, for the part of a rollout where no noise is drawn.

All of them solve the probability-flow ODE ``dx = x0_hat d alpha + x1_hat d sigma``, which holds on any path
``x = alpha x0 + sigma x1``, and see the network only through its two endpoint estimates. The functions keep no state:
what a multistep solver remembers is a `History`, handed from step to step. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor

from flowrl.dynamics.kernels import StepPoint, mixing
from flowrl.records import Schedule

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, ...], step int64 [B]) -> (x0_hat, x1_hat), any float type [B, ...], at the times ``schedule.t[step]``."""


@dataclass(frozen=True)
class History:
    """What dpmpp_2m remembers of the step before: its data estimate and where on the path that was made.

    x0_hat: float32 [B, ...]. log_snr: ``log(alpha / sigma)``, float64 [B, 1, ..., 1]; -inf means "nothing remembered",
    as pure noise is infinitely far away, and makes the row's next step one of first order.
    """

    x0_hat: Tensor
    log_snr: Tensor

    def __getitem__(self, rows: Tensor) -> History:
        """Take some rows: a bool mask [B] or int64 indices."""
        return History(self.x0_hat[rows], self.log_snr[rows])

    def restart(self, rows: Tensor) -> History:
        """Forget the rows of a bool mask [B], those whose last step drew noise."""
        mask = rows.to(self.log_snr.device).reshape(self.log_snr.shape)
        return replace(self, log_snr=self.log_snr.masked_fill(mask, -torch.inf))

    def spread(self, rows: Tensor) -> History:
        """Place these rows where a bool mask [batch] is set; the other rows of the batch remember nothing."""
        rows = rows.to(self.x0_hat.device)
        x0_hat = self.x0_hat.new_zeros(len(rows), *self.x0_hat.shape[1:])
        log_snr = self.log_snr.new_full((len(rows), *self.log_snr.shape[1:]), -torch.inf)
        x0_hat[rows], log_snr[rows.to(log_snr.device)] = self.x0_hat, self.log_snr
        return History(x0_hat, log_snr)


Solver = Callable[[Predict, Tensor, Tensor, Schedule, History | None], tuple[Tensor, History | None]]


def euler(
    predict: Predict, x: Tensor, step: Tensor, schedule: Schedule, history: History | None
) -> tuple[Tensor, History | None]:
    """First order, one call: ``x' = alpha' x0_hat + sigma' x1_hat``, the ode kernel itself (DDIM with eta = 0)."""
    return _first_order(_ends(predict, x, step), StepPoint.of(schedule, step, x.ndim)), None


def heun(
    predict: Predict, x: Tensor, step: Tensor, schedule: Schedule, history: History | None
) -> tuple[Tensor, History | None]:
    """Second order, two calls: the trapezoidal rule on an Euler step's both ends (Karras et al. 2206.00364, algorithm 1).

    ``x' = x + (alpha' - alpha) (x0_hat + x0_hat') / 2 + (sigma' - sigma) (x1_hat + x1_hat') / 2``; on a flow,
    ``x - dt (v + v') / 2``. A step that ends at sigma' = 0 stays an Euler step with one call, as no network is asked
    about finished data.
    """
    point = StepPoint.of(schedule, step, x.ndim)
    ends = _ends(predict, x, step)
    first = _first_order(ends, point)
    inner = point.sigma_next > 0
    if not bool(inner.any()):
        return first, None
    # Rows that end at the data take any legal step; their result is not used.
    after = _ends(predict, first, torch.where(inner.flatten().to(step.device), step + 1, step))
    x0, x1 = ((a + b) / 2 for a, b in zip(ends, after, strict=True))
    second = x.float() + (point.alpha_next - point.alpha) * x0 + (point.sigma_next - point.sigma) * x1
    return torch.where(inner, second, first), None


def dpmpp_2m(
    predict: Predict, x: Tensor, step: Tensor, schedule: Schedule, history: History | None
) -> tuple[Tensor, History | None]:
    """Second order, one call: DPM-Solver++(2M), multistep in the data prediction (2211.01095, algorithm 2).

    With ``lambda = log(alpha / sigma)``, ``h = lambda' - lambda`` and h_0 the same of the step before,
    ``x' = (sigma' / sigma) x + alpha' (1 - e^-h) [x0_hat + (h / 2 h_0) (x0_hat - x0_hat_before)]``.
    It is an Euler step wherever the bracket has no correction: with no history, after a step from t = 1 (h_0 is
    infinite) and to sigma' = 0 (h is infinite). diffusers' lower_order_final with less than 15 steps is the same where
    the schedule ends at 0. Raises ValueError where the history is not of an earlier time.
    """
    point = StepPoint.of(schedule, step, x.ndim)
    x0_hat, x1_hat = _ends(predict, x, step)
    here, there = _log_snr(point.alpha, point.sigma), _log_snr(point.alpha_next, point.sigma_next)
    after = _first_order((x0_hat, x1_hat), point)
    if history is not None:
        if bool((history.log_snr >= here).logical_and(history.log_snr > -torch.inf).any()):
            raise ValueError(
                "dpmpp_2m: the history was made at this time or a later one; pass the history of the step before, or "
                "None where a trajectory starts"
            )
        h, before = there - here, here - history.log_snr
        # inf / inf only where a step both starts at pure noise and remembers nothing.
        weight = torch.where(h.isfinite() & before.isfinite(), h / (2 * before), 0.0).float()
        # alpha' (1 - e^-h), in a form that is finite at both ends of the path.
        fresh = point.alpha_next - point.sigma_next / point.sigma * point.alpha
        after = after + fresh * weight * (x0_hat - history.x0_hat)
    return after, History(x0_hat, here)


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
_CALLS = {"euler": 1, "heun": 2, "dpmpp_2m": 1}


def solver_step(
    name: str, predict: Predict, x: Tensor, step: Tensor, schedule: Schedule, history: History | None = None
) -> tuple[Tensor, History | None]:
    """Move x from ``schedule.t[step]`` to the next time without noise.

    name: euler, heun or dpmpp_2m. predict: see `Predict`. x: any float type, [B, ...]; step: int64 [B], each row's own.
    history: what the step before returned, or None at the start and after a stochastic step (some rows: their
    `History.restart`). Returns (float32 [B, ...], history for the next step). Raises ValueError for an unknown name.
    """
    return SOLVERS[_known(name)](predict, x, step, schedule, history)


def calls(name: str, final: bool = False) -> int:
    """Count the predictions of one step; ``final``: the step to sigma = 0. Raises ValueError for an unknown name."""
    return 1 if final else _CALLS[_known(name)]


def _known(name: str) -> str:
    if name not in SOLVERS:
        near = get_close_matches(name, SOLVERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"rollout.solver: unknown solver {name!r}; {hint}use one of {', '.join(SOLVERS)}")
    return name


def _ends(predict: Predict, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    x0_hat, x1_hat = predict(x, step)
    return x0_hat.float(), x1_hat.float()


def _first_order(ends: tuple[Tensor, Tensor], point: StepPoint) -> Tensor:
    # What the ode kernel does, bit for bit.
    return mixing(*ends, point.alpha_next, point.sigma_next, 1.0)[0]


def _log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    # float64: differences of neighbouring values follow.
    return alpha.double().log() - sigma.double().log()
