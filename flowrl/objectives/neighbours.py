"""Neighbor GRPO: policy gradients on deterministic sampling, from the distances to the other members of a group.

A group starts from neighbouring noises and is drawn by any ODE solver. At a step, an anchor's next latent under the
present weights is compared with the next latents of all G members: the surrogate policy of "leaping" to member i is a
softmax of minus the squared distance. Its log-probs [K, G] of K anchors go into a policy loss as rows and steps, with the
members' advantages in every row; no noise is needed, at training or afterwards. 2511.16955, equations 7, 8, 9 and 11;
reconstructed from notes on the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl.advantage.checks import check_number, check_share
from flowrl.advantage.inputs import check_ids
from flowrl.advantage.segments import Groups


def neighbour_noise(base: Tensor, fresh: Tensor, sigma: float = 0.3) -> Tensor:
    """Draw the group's initial noises near one: eps_i = sqrt(1 - sigma^2) base + sigma fresh_i.

    base: [...], or [G, ...] where members are of several groups; fresh: [G, ...], both standard normal; sigma in [0, 1]:
    0 gives G copies of base, 1 independent members, and two members have the correlation 1 - sigma^2. Every member is
    standard normal. Returns float32 [G, ...]. 2511.16955 equation 7. Raises ValueError for another shape or sigma.
    """
    check_share("sigma", sigma)
    if fresh.ndim < 2 or base.shape not in (fresh.shape, fresh.shape[1:]):
        raise ValueError(f"fresh: expected [G, ...] over base {list(base.shape)}, got {list(fresh.shape)}")
    return math.sqrt((1 - sigma) * (1 + sigma)) * base.float() + sigma * fresh.float()


def neighbour_log_prob(members: Tensor, anchor: Tensor, temperature: float = 1.0) -> Tensor:
    """Take the log-prob of leaping from each anchor to each member: log softmax_i(-|x_i - x_anchor|^2 / temperature).

    The gradient pulls the anchor towards what is weighed up: d/d anchor log p_i = (2 / temperature)
    (x_i - sum_j p_j x_j). members: [G, ...], next latents of the group as the rollout drew them (no gradient); anchor:
    [K, ...], next latents of K members recomputed by one ODE step. Returns float32 [K, G]; rows sum to 1 in
    probability. The squared distance is summed over latent elements, so in high dimension nearly all probability lies
    on the nearest member; a temperature near 2 sigma^2 D evens it out. temperature > 0; the paper has 1. 2511.16955
    equation 8. Raises ValueError for another shape or temperature.
    """
    check_number("temperature", temperature, 0.0, strict=True)
    if members.ndim < 2 or anchor.ndim < 2 or members.shape[1:] != anchor.shape[1:] or not len(members) * len(anchor):
        raise ValueError(
            f"members, anchor: expected [G, ...] and [K, ...] of one latent shape, got {list(members.shape)} and "
            f"{list(anchor.shape)}"
        )
    apart = anchor.float()[:, None] - members.detach().float()[None]
    return torch.log_softmax(-apart.square().flatten(2).sum(2) / temperature, dim=1)


def mean_squared_distance(members: Tensor) -> float:
    """Take the mean of |x_i - x_j|^2 over all pairs i != j of a group: a temperature at which none is out of reach.

    members: [G, ...]. Equal to twice the sum over elements of their variance (ddof 1). 1.0 for a group of one, or of equal
    members, where any temperature gives the same.
    """
    if len(members) < 2:
        return 1.0
    found = float(2 * members.detach().double().flatten(1).var(0).sum())
    return found or 1.0


def quasi_norm_advantage(
    advantage: Tensor, group: Tensor, valid: Tensor | None = None, *, power: float = 0.8
) -> Tensor:
    """Divide advantages by their group's quasi-norm: A_i / (sum_k |A_k|^p)^(1/p).

    At equal spread, a group whose advantages are many and moderate comes out smaller than one with a few that stand
    out; scaling a group's rewards changes nothing. p = 2 is the usual normalisation but for a factor 1 / sqrt G.

    advantage: [B], centred (``grpo``'s for instance); group: int64 [B]; valid: bool [B], members that count, all by
    default; power in (0, 2]. Returns float32 [B] (float64 for float64), 0 for members that do not count and in groups
    without a difference. 2511.16955 equation 11. Raises ValueError for a wrong shape or dtype, or another power.
    """
    if not 0 < power <= 2:
        raise ValueError(f"power: expected a number in (0, 2], got {power}")
    check_ids("group", group, tuple(advantage.shape))
    groups = Groups.of(group, valid)
    kept = torch.where(groups.valid, advantage.detach().double(), 0.0)
    if not bool(kept.isfinite().all()):
        raise ValueError("advantage: expected finite numbers for the members that count")
    # Divided by the greatest first, so that small advantages do not underflow to a norm of 0.
    greatest = groups.max(kept.abs())
    relative = torch.where(groups.valid & (greatest > 0), kept / greatest, 0.0)
    norm = groups.sum(relative.abs() ** power) ** (1 / power)
    made = torch.where(relative != 0, relative / norm, 0.0)
    return made.to(torch.promote_types(advantage.dtype, torch.float32))
