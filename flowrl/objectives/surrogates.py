"""Policy losses for denoising steps that the engine does not hold, in the engine's form.

Each takes ``log_prob`` (carries the gradient), ``old_log_prob`` and ``mask`` (bool), each [B, T], and ``advantage``
([B, T] or [B], no gradient), and returns a ``PolicyLoss``: float32 or wider [B, T], to be minimised, 0 on masked steps
whatever they hold. d = clamp(log_prob - old_log_prob, -20, 20), rho = exp(d). ``surrogate_loss`` runs these and the
engine's by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import POLICY_LOSSES, PolicyLoss
from flowrl.advantage.checks import check_choice, check_number
from flowrl.advantage.inputs import read_steps
from flowrl.advantage.loss_record import read_loss_inputs
from flowrl.advantage.pipeline import policy_loss, run_method


def pcpo(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, margin: float = 0.2) -> PolicyLoss:
    """Use a hinge on the log ratio in place of the clip: L = max(0, margin |A| - A d).

    The gradient with respect to d is -A, and 0 once the ratio has moved ``margin`` the right way (A > 0 and
    d > margin, or A < 0 and d < -margin): PPO's regions with d for rho - 1, and without rho as a factor, which equal
    each other to first order. margin (the paper's xi) is in units of the log ratio and depends on the log-prob's
    reduction as a clip range does.

    PCPO (2509.25774), its base objective; reconstructed from notes on the paper. Its step weight for flows is
    ``dt_std_over_slope``, applied outside the hinge, so that the weight does not move the margin; for diffusion the
    paper changes the sampler's std instead.
    """
    check_number("margin", margin, 0.0)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    slack = margin * a.abs() - a * d
    moved = d.detach()
    return PolicyLoss(loss=slack.clamp(min=0.0), low=(a < 0) & (moved < -margin), high=(a > 0) & (moved > margin))


def flow_dppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    divergence: Tensor,
    *,
    threshold: float = 1e-5,
) -> PolicyLoss:
    """Drop the steps that are too far from the old policy and go further: L = -A rho keep.

    A step is dropped where divergence >= threshold and the update points outward: A > 0 and rho > 1, or A < 0 and
    rho < 1. Steps that come back are kept however far they are, and rho is not clipped. divergence: [B, T] >= 0, the
    step's exact KL in nats an element (``flowrl.objectives.ratios.divergence``); the threshold is in that unit, so it
    does not depend on the log-prob's reduction.

    Flow-DPPO (2606.11025, equations 14 and 18); repository Tencent-Hunyuan/UniRL. The engine's ``dppo`` differs: it
    keeps a step at the threshold, caps rho, and its value is -A rho log_prob; below the cap the gradients are equal.
    """
    check_number("threshold", threshold, 0.0)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    distance = read_steps("divergence", divergence, mask, d.dtype)
    if bool((distance < 0).any()):
        raise ValueError(f"divergence: expected numbers >= 0, got {float(distance.min()):.4g}")
    far, moved = distance >= threshold, d.detach()
    low, high = far & (a < 0) & (moved < 0), far & (a > 0) & (moved > 0)
    return PolicyLoss(loss=torch.where(low | high, 0.0, -a * d.exp()), low=low, high=high)


def dpok(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, bound: float | None = 0.2
) -> PolicyLoss:
    """Weigh a step's log-prob by its advantage, with a ratio that is cut on both sides: L = -A clamp(rho, 1 - b, 1 + b).

    Beyond the bounds b the gradient is 0 whatever the sign of A: a step that has left cannot come back by this loss,
    where PPO's lets it. bound None: L = -A log_prob, without a ratio. On policy both have the gradient -A.

    DPOK (2305.16381, policy gradient); the clamp is its public code's (google-research/dpok, bound 1e-4 with ``mean``).
    The method adds a penalty towards the pre-trained model and a learned value as baseline, which are not part of this.
    """
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if bound is None:
        return PolicyLoss(loss=-a * lp)
    check_number("bound", bound, 0.0)
    rho = d.exp()
    cut = rho.clamp(1.0 - bound, 1.0 + bound)
    return PolicyLoss(loss=-a * cut, low=mask & (rho.detach() < 1.0 - bound), high=mask & (rho.detach() > 1.0 + bound))


SURROGATES: Mapping[str, Callable[..., PolicyLoss]] = {"pcpo": pcpo, "flow_dppo": flow_dppo, "dpok": dpok}


def surrogate_loss(name: str, inputs: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> PolicyLoss:
    """Run a policy loss of this module or of the engine by name; inputs and errors as ``flowrl.advantage.policy_loss``."""
    if name in SURROGATES:
        made: PolicyLoss = run_method(name, SURROGATES[name], inputs, options or {}, None)
        return made
    check_choice("name", name, (*SURROGATES, *sorted(POLICY_LOSSES)))
    return policy_loss(name, inputs, options)
