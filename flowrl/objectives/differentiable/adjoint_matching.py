"""Adjoint Matching: regress the control of a memoryless chain on lean adjoints (2409.08861).

The chain ``x_(k+1) = mean_k(x_k) + std_k noise`` runs from noise (k = 0) to data (k = T). With the reward r and a
temperature lambda the goal is

    max E[r(x_T)] / lambda - sum_k ||mean_k - mean_ref_k||^2 / (2 std_k^2),

whose optimum moves each mean by ``-std_k^2 E[a_(k+1) | x_k]``, where a is the adjoint of the *reference* chain on the
path that was drawn:

    a_T = -grad r(x_T) / lambda,        a_k = (d mean_ref_k / dx_k)^T a_(k+1).

It is lean because the control's own derivative is left out; at the optimum that part has mean zero. Where the chain
forgets its start (memoryless noise, g^2 = 2t / (1 - t)) the optimum is the data law tilted by exp(r / lambda).

With Euler-Maruyama steps (kernel flow_sde, a = sqrt 2) this is the paper's discretisation:
``mean_ref_k = x + dt b(x)``, ``b = -2 v - x / (1 - t)``, and the loss below is dt times its
``||(2 / g) (v - v_ref) - g a||^2``. The kernel memoryless solves the same equation exactly over a step and is finite
at t = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pull = Callable[[int, Tensor], Tensor]
"""(k, a [B, ...]) -> (d mean_ref_k / dx_k)^T a [B, ...], at the latent before step k of the path."""


def terminal_adjoint(reward_gradient: Tensor, temperature: float) -> Tensor:
    """``a_T = -grad r(x_T) / lambda``. reward_gradient: [B, ...]. Raises ValueError unless temperature is above 0."""
    if not temperature > 0:
        raise ValueError(f"adjoint matching: temperature is {temperature}; use more than 0")
    return -reward_gradient / temperature


def lean_adjoints(pull: Pull, terminal: Tensor, steps: int) -> list[Tensor]:
    """Sweep the adjoint from the end of a path to after its first step: [a_1, ..., a_T], each [B, ...].

    Entry k is what step k is trained on, a_(k+1). One call of ``pull`` a step, for k = T - 1 down to 1.
    """
    found = [terminal]
    for k in range(steps - 1, 0, -1):
        found.append(pull(k, found[-1]))
    return found[::-1]


def adjoint_matching_loss(mean: Tensor, mean_ref: Tensor, std: Tensor, adjoint: Tensor) -> Tensor:
    """``||(mean - mean_ref) / std + std a||^2``, a mean over latent elements. float32 [B].

    mean: [B, ...] with gradient; mean_ref, adjoint (a_(k+1)): [B, ...] without; std: [B, 1, ..., 1]. Raises ValueError
    where std is not above 0: a step without noise has no control.
    """
    if not bool((std > 0).all()):
        raise ValueError("adjoint_matching_loss: a step with std 0 has no control; leave the last step out")
    std = std.float()
    residual = (mean.float() - mean_ref.detach().float()) / std + std * adjoint.detach().float()
    return residual.square().flatten(1).mean(1)


def velocity_target(adjoint: Tensor, std: Tensor, slope: Tensor) -> Tensor:
    """The change of velocity at which the loss is 0: ``(std^2 / |d mean / dv|) a``, on flow paths.

    It tends to ``(g^2 / 2) a = (t / (1 - t)) a`` for short steps. slope: as `flowrl.dynamics.mean_slope` gives it.
    """
    return std**2 / slope * adjoint


def keep_below_quantile(loss: Tensor, quantile: float) -> Tensor:
    """Which samples to train on: bool [N], those whose loss does not exceed the quantile of [N]; 1 keeps all.

    The paper's public code drops losses above the quantile .9: an adjoint can explode on a bad path. Losses that are not
    finite are dropped and left out of the quantile.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"keep_below_quantile: quantile is {quantile}; use more than 0 and at most 1")
    finite = torch.isfinite(loss)
    if quantile == 1 or not bool(finite.any()):
        return finite
    return finite & (loss <= torch.quantile(loss[finite].detach().float(), quantile))
