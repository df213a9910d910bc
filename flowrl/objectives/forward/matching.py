"""Losses of single re-noised samples: DiffusionNFT, advantage weighted matching, reward weighting, reward-adjusted matching.

Rows N are samples at one draw of (t, noise). value: the network's output under the trained weights [N, ...], the only
argument with a gradient; target: the output that leads back to the sample; old, reference: the outputs of the policy that
drew the samples and of the pre-trained model; advantage: [N]. Each returns [N], to be minimised.

``C = Cov(r, u | x)`` below is the covariance of reward and target among the samples that could have led to x. The optimum of
``E[r] - lambda KL`` is ``v_ref + C_tilted / lambda``, which for Gaussian data and a linear reward is ``v_ref + C / lambda``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.advantage.checks import check_choice, check_number
from flowrl.objectives.forward.errors import mean_square, self_normalised


def optimality(advantage: Tensor, limit: float) -> Tensor:
    """Map advantages to DiffusionNFT's optimality in [0, 1]: ``clip(1/2 + A / (2 limit), 0, 1)``."""
    return (0.5 + advantage / (2 * limit)).clamp(0, 1)


def nft(
    value: Tensor,
    target: Tensor,
    old: Tensor,
    advantage: Tensor,
    x0_scale: Tensor,
    *,
    beta: float = 1.0,
    limit: float = 5.0,
    space: Literal["x0", "output"] = "x0",
) -> Tensor:
    """Fit an implicit positive policy to good samples and an implicit negative one to bad ones, without guidance.

    ``v+ = old + beta (v - old)``, ``v- = old - beta (v - old)``, ``r = optimality(A, limit)``,
    ``L = (limit / beta) (r e(v+ - u) + (1 - r) e(v- - u))``

    space: output, ``e = mean d^2``; x0, the clean estimate's error over its own size (``self_normalised``), as public code
    has it. In output space the optimum is ``old + (2 / beta) Cov(r, u | x)``, that is ``old + Cov(A, u | x) / (beta limit)``
    where nothing is clipped; a larger beta moves less. With r = 1/2 the gradient is 0 at v = old.

    DiffusionNFT (2509.16117), section 3; repository NVlabs/DiffusionNFT for the factor and the x0 space.
    """
    check_number("beta", beta, 0.0, strict=True)
    check_number("limit", limit, 0.0, strict=True)
    check_choice("space", space, ("x0", "output"))
    old, r = old.detach(), optimality(advantage, limit)
    moved = beta * (value.float() - old.float())
    positive, negative = old.float() + moved - target, old.float() - moved - target
    if space == "x0":
        good, bad = self_normalised(positive, x0_scale), self_normalised(negative, x0_scale)
    else:
        good, bad = mean_square(positive), mean_square(negative)
    return (limit / beta) * (r * good + (1 - r) * bad)


def awm(error: Tensor, advantage: Tensor) -> Tensor:
    """Weigh the denoising error by the advantage: ``L = A e``.

    This is the policy gradient with ``-e`` for the log-prob. With a policy loss of the engine in its place
    (``objective.loss``: ppo clips the ratio ``exp(e_old - e)``, bgpo bounds it by a sum over draws) the same draws of
    (t, noise) serve both policies. error: [N], ``matching_error``. A negative advantage pushes the error up without
    bound: a clip or a KL term holds it.

    Advantage Weighted Matching (2509.25050); its public code has the ratio form.
    """
    return advantage.detach() * error


def orw(error: Tensor, advantage: Tensor, *, temperature: float = 1.0, limit: float = 0.0) -> Tensor:
    """Weigh the denoising error exponentially: ``L = exp(A / temperature) e``.

    limit: A / temperature is clipped to +-limit, 0 for no clip. Without a penalty the optimum is
    ``E[w u | x] / E[w | x]``: one round tilts the samples' distribution by ``exp(A / temperature)``, and rounds that draw
    from the result collapse to the best sample. The method's Wasserstein term is ``objective.kl.form=velocity``: with
    weight a the optimum is ``(E[w u | x] + a v_ref) / (E[w | x] + a)``.

    ORW-CFM-W2 (2502.06061), equation of the online loss; there w = exp(r / temperature) of the raw reward, which is
    ``advantage.name=dr_grpo`` up to a factor each group (its mean reward).
    """
    check_number("temperature", temperature, 0.0, strict=True)
    exponent = advantage.detach() / temperature
    return torch.exp(exponent.clamp(-limit, limit) if limit else exponent) * error


def ram(value: Tensor, target: Tensor, reference: Tensor, advantage: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Regress on the reference plus the advantage times what the sample adds to the present output.

    ``L = mean(v - sg(v_ref + (A / temperature) (u - v)))^2``. For samples of the present policy the fixed point is
    ``v_ref + Cov(A, u | x) / temperature``: the optimum of ``E[r] - temperature KL`` where tilting leaves that covariance
    alone (Gaussian data with a linear reward), and a first-order one elsewhere. With A = 0 it pulls to v_ref.

    RAM (2605.10759), reconstructed: from a description of the paper, not its text.
    """
    check_number("temperature", temperature, 0.0, strict=True)
    now = value.detach().float()
    share = (advantage / temperature).reshape(-1, *[1] * (value.ndim - 1))
    return mean_square(value - (reference.detach().float() + share * (target - now)))
