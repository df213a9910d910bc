"""Losses that compare the members of a group at one draw: diffusion DPO, DGPO, centred reward distillation.

Rows N are samples at one draw of (t, noise); error, old_error, reference_error: [N] denoising errors (``matching_error``)
under the trained weights, those that drew the samples and the pre-trained ones; advantage: [N]; group: int64 [N], all
members present. Each returns [N], to be minimised; gradient only into error.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from flowrl.advantage.checks import check_choice, check_number


def best_and_worst(advantage: Tensor, group: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (best int64 [P], worst int64 [P]) of every group whose live members differ in advantage.

    advantage: [N]; group: int64 [N]; live: bool [N]. Of equal ones the first counts.
    """
    _, place = torch.unique(group, return_inverse=True)
    count = int(place.max()) + 1 if len(place) else 0
    rows = torch.arange(len(group), device=group.device)

    def extreme(values: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
        top = top.scatter_reduce(0, place, values, "amax")
        first = torch.full((count,), len(rows), device=group.device)
        return top, first.scatter_reduce(0, place, torch.where(values == top[place], rows, len(rows)), "amin")

    worth = advantage.double()
    high, best = extreme(torch.where(live, worth, -torch.inf))
    low, worst = extreme(torch.where(live, -worth, -torch.inf))
    kept = torch.isfinite(high) & torch.isfinite(low) & (high > -low)
    return best[kept], worst[kept]


def dpo(error: Tensor, reference_error: Tensor, advantage: Tensor, group: Tensor, *, beta: float = 2000.0) -> Tensor:
    """Prefer the best member of a group to its worst: diffusion DPO.

    ``L = -log sigmoid(-(beta / 2) ((e_w - e_w_ref) - (e_l - e_l_ref)))``, log 2 at the reference; both rows of a pair
    carry it, so that the mean over the rows of pairs is that over pairs, and other rows 0. The members of a group must have the
    same (t, noise). beta is in units of a mean over latent elements.

    Diffusion-DPO (2311.12908), equation 14, on flow models; pairs are given, or ranked among a group's samples.
    """
    check_number("beta", beta, 0.0, strict=True)
    best, worst = best_and_worst(advantage, group, torch.isfinite(advantage))
    change = error - reference_error.detach()
    loss = -functional.logsigmoid(-(beta / 2) * (change[best] - change[worst]))
    return torch.zeros_like(error).index_add(0, torch.cat([best, worst]), torch.cat([loss, loss]))


def dgpo(error: Tensor, reference_error: Tensor, advantage: Tensor, group: Tensor, *, beta: float = 100.0) -> Tensor:
    """Weigh ``A e`` by how far a group is from being ordered by its advantages.

    ``L = w A e``, ``w = sigmoid(beta / G sum_i A_i (e_i - e_i_ref))`` over the group, without gradient: 1/2 at the
    reference, towards 0 once the errors of good members are below the reference's and those of bad ones above.

    DGPO (2510.08425), as its public code has it (repository Luo-Yihong/DGPO); its ratio clip is left out.
    """
    check_number("beta", beta, 0.0)
    a = advantage.detach()
    _, place = torch.unique(group, return_inverse=True)
    count = torch.bincount(place)
    change = (a * (error - reference_error)).detach()
    total = torch.zeros(len(count), dtype=change.dtype, device=change.device).index_add(0, place, change)
    return torch.sigmoid(beta * total / count)[place] * a * error


def crd(
    error: Tensor,
    old_error: Tensor,
    advantage: Tensor,
    group: Tensor,
    *,
    beta: float = 1.0,
    form: Literal["mse", "bce"] = "mse",
) -> Tensor:
    """Make the implicit reward equal the given one, both centred within the group.

    ``r = e_old - e``; mse: ``L = (beta (r - mean r) - (A - mean A))^2``; bce: cross-entropy of
    ``sigmoid(beta (r - mean r))`` against ``sigmoid(A - mean A)``. The mean of r carries no gradient; under mse that
    changes nothing, as the residuals of a group add up to 0.

    Centred reward distillation, as public code has it with uniform weights (repository X-GenGroup/Flow-Factory, crd).
    """
    check_number("beta", beta, 0.0, strict=True)
    check_choice("form", form, ("mse", "bce"))
    _, place = torch.unique(group, return_inverse=True)
    count = torch.bincount(place)

    def centred(x: Tensor) -> Tensor:
        total = torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add(0, place, x.detach())
        return x - (total / count)[place]

    implicit, given = beta * centred(old_error.detach() - error), centred(advantage.detach().to(error.dtype))
    if form == "mse":
        return (implicit - given).square()
    return functional.binary_cross_entropy_with_logits(implicit, torch.sigmoid(given), reduction="none")
