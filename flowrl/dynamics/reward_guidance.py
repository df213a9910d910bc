"""How the gradient of a process reward R(x, t) moves one denoising step.

The mean of every kernel is its deterministic (ODE) step plus a part that follows the score, ``mean = ode + c score`` with
``c >= 0`` (``g^2 dt / 2`` for Euler-Maruyama, ``sigma sigma' (1 - rho)`` for mixing). Guidance with the temperature beta
adds ``a grad R / beta`` to the mean and leaves the std:

    langevin      a = c              the score becomes score + grad R / beta; the velocity stays. Euphonium's SDE
                                     dx = [v - (g^2 / 2) (score + grad R / beta)] dt + g dW
    exact_tilt    a = slope sigma / alpha      the velocity moves too, ``v - (sigma / alpha) grad R / beta``: with R = beta
                                     log E[exp(r / beta) | x_t] the chain is the one of the tilted data p exp(r / beta)

``slope = |d mean / d velocity|``. Either is what the plain step of another network would do, one whose velocity is
``v - kappa grad R / beta`` with ``kappa = a / slope``; distillation trains towards that network. For Flow-GRPO's kernel
kappa is ``(g^2 / 2) / (1 + g^2 (1 - t) / 2t)``, which grows to exact_tilt's ``t / (1 - t)`` with g.

Euphonium (2602.04928): the guided mean is that of its public trainer; kappa, exact_tilt, the form for mixing kernels and
the weights of langevin_weighted are reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm

from flowrl.dynamics.interpolants import prediction_from_endpoints
from flowrl.dynamics.kernels import KERNELS, StepPoint, mean_slope
from flowrl.records import PredictionKind

GuideMode = Literal["langevin", "exact_tilt", "langevin_weighted"]
Value = Callable[[Tensor], Tensor]
"""x [B, ...] -> value of each row, [B]; a row's value depends on that row alone."""


def score_part(kernel: str, noise: float, point: StepPoint) -> Tensor:
    """Return c of ``mean = ode mean + c score``: float32, shaped like point.t, 0 for the ode kernel.

    ``g^2 dt / 2`` for Euler-Maruyama, ``sigma sigma' (1 - rho)`` for mixing; where the schedule ends (sigma' = 0) mixing
    has 0. Read off the kernel itself in float64: the mean is linear, and a unit of x1_hat beside x0_hat = 0 is a score of
    ``-1 / sigma``.
    """
    wide = StepPoint(*(value.double() for value in vars(point).values()))
    zero, one = torch.zeros_like(wide.sigma), torch.ones_like(wide.sigma)
    mean, _ = KERNELS[kernel](noise, wide.sigma, zero, one, wide)
    straight, _ = KERNELS["ode"](noise, wide.sigma, zero, one, wide)
    return (wide.sigma * (straight - mean)).float()


def guidance_shift(mode: GuideMode, kernel: str, noise: float, point: StepPoint) -> Tensor:
    """Return a of ``guided mean = mean + a grad R / beta``, float32, shaped like point.t.

    langevin, langevin_weighted: ``score_part``. exact_tilt: ``slope sigma / alpha``, which no step at alpha = 0 (t = 1 of
    a flow) has: grad R is 0 there and its share undefined, so ValueError. ValueError for an unknown mode as well.
    """
    if mode == "exact_tilt":
        return mean_slope(kernel, noise, point) * exact_pull(point)
    _known(mode)
    return score_part(kernel, noise, point)


def velocity_pull(mode: GuideMode, kernel: str, noise: float, point: StepPoint) -> Tensor:
    """Return kappa: the velocity ``v - kappa grad R / beta`` has the guided mean under the plain kernel.

    float32, shaped like point.t. exact_tilt: ``sigma / alpha``, whatever the kernel; langevin: ``c / slope``, 0 for the
    ode kernel. Errors as in `guidance_shift`.
    """
    if mode == "exact_tilt":
        return exact_pull(point)
    _known(mode)
    return score_part(kernel, noise, point) / mean_slope(kernel, noise, point)


def exact_pull(point: StepPoint) -> Tensor:
    """``sigma / alpha``, t / (1 - t) on a flow. ValueError where alpha is 0."""
    if bool((point.alpha <= 0).any()):
        raise ValueError(
            "guidance mode exact_tilt: a step that starts from pure noise (alpha = 0) has no tilt of its own; let the "
            "guided steps begin one later"
        )
    return point.sigma / point.alpha


def pulled_value(value: Tensor, kind: PredictionKind, pull: Tensor, point: StepPoint) -> Tensor:
    """Move a network output by the velocity ``-pull``: what the student of a guided step has to predict.

    x stays, so x0_hat moves by ``sigma pull`` and x1_hat by ``-alpha pull``; the output is linear in both. value, pull:
    [B, ...], pull = kappa grad R / beta. Returns float32 [B, ...]; equal to value, bit for bit, where pull is 0.
    """
    return value.float() + prediction_from_endpoints(
        point.sigma * pull, -point.alpha * pull, kind, point.alpha, point.sigma
    )


def spsa_gradient(value: Value, x: Tensor, directions: Sequence[Tensor], radius: float) -> tuple[Tensor, Tensor]:
    """Estimate the gradient from values alone: mean over d of ``[R(x + c d) - R(x - c d)] / (2 c) d``, c = radius.

    directions: like x, of elements +1 and -1, at least one; two calls each. Unbiased for a linear R; its variance grows
    with the number of elements. Returns (mean of all values [B], gradient like x), which is R(x) for a linear R. Spall
    (1992, simultaneous perturbation). Raises ValueError for a value of another shape than [B], no direction, or a radius
    that is not above 0.
    """
    if not directions or radius <= 0:
        raise ValueError(f"spsa: expected a radius above 0 and directions, got {radius} and {len(directions)}")
    total = torch.zeros_like(x)
    middle = torch.zeros(len(x), device=x.device)
    for direction in directions:
        up, down = (value(x + sign * radius * direction) for sign in (1.0, -1.0))
        for found in (up, down):
            if found.shape != (len(x),):
                raise ValueError(f"value: expected [{len(x)}], got {list(found.shape)}")
        total += ((up - down) / (2 * radius)).reshape(-1, *[1] * (x.ndim - 1)) * direction
        middle += (up + down) / 2
    return middle / len(directions), total / len(directions)


def unit_gradient(gradient: Tensor) -> Tensor:
    """Divide each row by its norm over all elements; a row of zeros stays. [B, ...]."""
    norm: Tensor = vector_norm(gradient.flatten(1), dim=1)
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    return gradient / safe.reshape(-1, *[1] * (gradient.ndim - 1))


def _known(mode: str) -> None:
    if mode not in get_args(GuideMode):
        raise ValueError(f"guidance mode {mode!r} is not known; use one of {', '.join(get_args(GuideMode))}")
