"""AC-Flow: flow matching on a policy's own samples, weighted by a critic's advantage (2510.18072). Reconstructed.

Of the paper only the ingredients could be read: shaped rewards, clipped advantages, critic warm-up, generalised critic
weights, Wasserstein regularisation. How they are put together here, and every default, is ours; what is open is an option.
Its parent is ORW-CFM-W2 (2502.06061), which it is for a constant critic; ADRPO is a sibling of both.

With ``u = x1 - x0`` and ``x_t = (1 - t) x0 + t x1``, the pointwise optimum of `ac_flow_loss` is
``v* = (E[w u | x_t] + alpha v_ref) / (E[w | x_t] + alpha)``. A weight of (x_t, t) alone therefore leaves the optimum where
it is when alpha is 0: a critic changes the variance, and which states the capacity goes to, never the direction.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from flowrl.advantage.method import Method

Weighting = Literal["exponential", "linear", "critic_only"]
Regulariser = Literal["fixed", "adaptive"]


def shaped_reward(
    reward: Tensor,
    group: Tensor,
    *,
    limit: float = 3.0,
    eps: float = 1e-4,
    scale: tuple[float, float] | None = None,
) -> Tensor:
    """Bring rewards to a scale that a critic can be regressed to: ``clip((r - mean) / (std + eps), +-limit)``.

    reward: float [B], NaN where there is none, which stays NaN; group: int64 [B]; mean and std (over n) are those of the
    group, or ``scale`` = (mean, std), running ones, say. limit 0: no clip. A group of one, or of equal rewards, gives 0.
    Returns float32 [B]. Raises ValueError for a negative limit or eps.
    """
    if limit < 0 or eps < 0:
        raise ValueError(f"limit, eps: expected numbers >= 0, got {limit}, {eps}")
    value = reward.double()
    known = value.isfinite()
    if scale is not None:
        made = (value - scale[0]) / (scale[1] + eps)
    else:
        _, place = torch.unique(group, return_inverse=True)
        filled = torch.where(known, value, 0.0)

        def sums(x: Tensor) -> Tensor:
            return torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, x)

        count = sums(known.double()).clamp(min=1)
        apart = torch.where(known, value - (sums(filled) / count)[place], 0.0)
        std = (sums(apart.square()) / count).sqrt()[place]
        made = torch.where(std > 0, apart / (std + eps).clamp(min=1e-12), 0.0)
    clipped = made.clamp(-limit, limit) if limit else made
    return torch.where(known, clipped, torch.nan).float()


def critic_advantage(shaped: Tensor, value: Tensor, *, limit: float = 1.0) -> Tensor:
    """How much better a sample ended than the critic expected of its noised latent: ``clip(r - V(x_t, t), +-limit)``.

    shaped, value: float [B]; limit 0: no clip. Returns float32 [B], without gradient.
    """
    if limit < 0:
        raise ValueError(f"limit: expected a number >= 0, got {limit}")
    made = (shaped - value).detach().float()
    return made.clamp(-limit, limit) if limit else made


def critic_weight(
    advantage: Tensor, value: Tensor, *, weighting: Weighting = "exponential", temperature: float = 1.0
) -> Tensor:
    """Weigh the flow-matching loss of each sample, tau = ``temperature``.

    exponential: ``e^(tau A)``; linear: ``1 + tau A``, negative for A < -1 / tau; critic_only: ``e^(tau V)``, which depends on
    (x_t, t) alone and so moves no optimum (see the module). advantage, value: float [B]. Returns float32 [B], without
    gradient. Raises ValueError for an unknown weighting.
    """
    match weighting:
        case "exponential":
            weight = (temperature * advantage.double()).exp()
        case "linear":
            weight = 1 + temperature * advantage.double()
        case "critic_only":
            weight = (temperature * value.double()).exp()
        case _:
            raise ValueError(f"weighting: expected exponential, linear or critic_only, got {weighting!r}")
    return weight.detach().float()


def ac_flow_loss(
    velocity: Tensor,
    target: Tensor,
    weight: Tensor,
    reference: Tensor | None = None,
    *,
    alpha: float = 0.0,
    regulariser: Regulariser = "fixed",
) -> Tensor:
    """Weighted flow matching with a Wasserstein term towards the reference: float [B].

    fixed:    ``w ||v - u||^2 + alpha ||v - v_ref||^2``
    adaptive: ``(w - 1) ||v - u||^2 + (alpha - (w - 1)) ||v - v_ref||^2``, ADRPO's form with w - 1 for its advantage: what
              is better is regularised less. Its optimum is ``v_ref + Cov(w, u | x_t) / alpha`` for any critic.

    velocity, target u, reference: [B, ...]; weight: [B]; norms are means over latent elements. alpha >= 0; the integral over
    t of the second term bounds the squared Wasserstein distance, ``W2^2 <= e^(2 L) int ||v - v_ref||^2 dt`` with the
    velocity's Lipschitz constant L. Raises ValueError for alpha without a reference, or adaptive with alpha 0.
    """
    if alpha < 0 or (alpha > 0 and reference is None):
        raise ValueError(f"alpha: {alpha} needs to be >= 0, and a reference velocity where it is not 0")
    if regulariser == "adaptive" and not alpha > 0:
        raise ValueError("alpha: the adaptive regulariser shares it out, so it must be more than 0")
    fit = (velocity.float() - target.float()).square().flatten(1).mean(1)
    if reference is None or alpha == 0:
        return weight * fit
    away = (velocity.float() - reference.float()).square().flatten(1).mean(1)
    if regulariser == "adaptive":
        return (weight - 1) * fit + (alpha - (weight - 1)) * away
    return weight * fit + alpha * away


def ac_flow(
    value: Tensor,
    target: Tensor,
    reference: Tensor,
    advantage: Tensor,
    *,
    weighting: Weighting = "exponential",
    temperature: float = 1.0,
    alpha: float = 0.3,
    regulariser: Regulariser = "fixed",
) -> Tensor:
    """Run `ac_flow_loss` with the weights of `critic_weight`, as the update calls it: float [N].

    value: the network's output [N, ...]; target: the output that leads back to the sample; reference: that of the
    pre-trained model; advantage: float [N], of `critic_advantage`, or the critic's value with critic_only weights.
    """
    weight = critic_weight(advantage, advantage, weighting=weighting, temperature=temperature)
    return ac_flow_loss(value, target, weight, reference, alpha=alpha, regulariser=regulariser)


def centred_advantage(advantage: Tensor, total: float, count: float, temperature: float) -> Tensor:
    """Subtract what makes exponential weights have mean 1: ``A - log(mean e^(tau A)) / tau``.

    total, count: sum of e^(tau A) and number of rows over the whole update. A constant changes no optimum where alpha is
    0, and keeps alpha's meaning where it is not. Raises ValueError where the mean is not finite and above 0.
    """
    mean = total / count if count else math.nan
    if not (math.isfinite(mean) and mean > 0):
        raise ValueError(f"weights: their mean is {mean}; lower the temperature, or clip advantages")
    return advantage - math.log(mean) / temperature


_TESTS = "tests/objectives/test_actor_critic.py::"
METHODS = (
    Method(
        key="ac_flow",
        kind="objective",
        paper_id="2510.18072",
        title="AC-Flow: flow matching on own samples, weighted by a latent critic's clipped advantage",
        tier=3,
        evidence={
            "exact": _TESTS + "test_linear_weights_reach_the_tilt_of_their_temperature",
            "formula": _TESTS + "test_loss_and_weights_against_a_plain_loop",
            "identity": _TESTS + "test_a_constant_critic_is_orw",
            "reconstructed": _TESTS + "test_pointwise_optimum_is_invariant_to_the_critic",
            "learned": "docs/results/forward/main.json",
        },
        config="objective.name=ac_flow",
    ),
)
