"""Flow-GRPO's update: the clipped surrogate over stochastic denoising steps, with a penalty towards a reference.

2505.05470 equations 5 and 6. One element is one trained transition of one sample. Any loss of the engine can take the
place of the clipped surrogate: ``surrogate_terms`` for those that look at one transition at a time,
``coefficient_terms`` for those that look at a whole trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.advantage import PolicyLoss, clipped, clipped_high, clipped_low, k1, ratio

Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], PolicyLoss]


@dataclass(frozen=True)
class LossTerms:
    """A loss and what to report about it; all scalars, and only ``loss`` carries a gradient.

    Sums over the call (they add up over micro-batches): loss = policy_loss + kl_weight * kl, policy_loss, kl, and
    count, the elements with weight. Means over those elements: ratio_mean; clip_fraction and its two parts (ratio too
    low with a negative advantage, too high with a positive one); approx_kl, the k1 estimate of KL(old || new).
    ratio_max_deviation is the greatest |ratio - 1|. Means and maximum are 0 where count is 0.
    """

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor
    count: Tensor
    ratio_mean: Tensor
    ratio_max_deviation: Tensor
    clip_fraction: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    approx_kl: Tensor


_SUMS = ("loss", "policy_loss", "kl", "count")


def _check_shapes(shape: torch.Size, others: Mapping[str, Tensor | None]) -> None:
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"log_prob: expected [N] with N >= 1, one element a trained transition, got {list(shape)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)} like log_prob, got {list(tensor.shape)}")


def flow_grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    kl: Tensor | None,
    kl_weight: float,
    weight: Tensor,
    clip_high: float | None = None,
) -> LossTerms:
    """Sum the clipped surrogate and the penalty: loss = sum_n w_n (max(-A rho, -A clip(rho)) + kl_weight kl_n).

    rho = exp(log_prob - old_log_prob), clipped to [1 - clip_range, 1 + clip_high] (clip_high: clip_range by default).
    It is exactly 1 at the first update. log_prob, old_log_prob, advantage, weight: [N]; kl: [N] or None, a divergence
    from the reference that carries its own gradient; half precision is computed in float32.

    weight carries the whole normalisation: 1 / (trained transitions of the global batch), and 0 for a masked member.
    The loss and its gradient then add up exactly over steps, micro-batches and processes. What an element of weight 0
    holds, NaN included, reaches neither value nor gradient; its own graph must still be finite, since 0 times
    infinity further up is NaN. NaN in an element with weight makes the loss NaN, for the caller's guard to see. A kl
    given with kl_weight 0 is reported and not trained on. Raises ValueError where a shape differs from log_prob's or
    a bound is out of range.
    """

    def surrogate(now: Tensor, old: Tensor, advantage: Tensor, mask: Tensor) -> PolicyLoss:
        rho = ratio(now, old)
        high = clip_range if clip_high is None else clip_high
        return PolicyLoss(
            loss=clipped(rho, advantage, clip_range, clip_high),
            low=clipped_low(rho, advantage, clip_range),
            high=clipped_high(rho, advantage, high),
        )

    return surrogate_terms(log_prob, old_log_prob, advantage, surrogate, kl, kl_weight, weight)


def surrogate_terms(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    surrogate: Surrogate,
    kl: Tensor | None,
    kl_weight: float,
    weight: Tensor,
) -> LossTerms:
    """Sum any loss that looks at one transition at a time: loss = sum_n w_n (L_n + kl_weight kl_n).

    surrogate: (log_prob, old_log_prob, advantage, mask), each [N, 1], -> PolicyLoss, as the engine's losses are. The
    rest as ``flow_grpo_loss``, which is this with PPO's surrogate.
    """
    _check_shapes(log_prob.shape, {"old_log_prob": old_log_prob, "advantage": advantage, "kl": kl, "weight": weight})
    weight = weight.detach()
    live = weight != 0
    # Selected before any arithmetic: 0 * NaN is NaN, in the value and in the backward pass.
    log_prob = torch.where(live, log_prob, 0.0)
    old_log_prob = torch.where(live, old_log_prob.detach(), 0.0)
    advantage = torch.where(live, advantage.detach(), 0.0)
    made = surrogate(log_prob[:, None], old_log_prob[:, None], advantage[:, None], live[:, None])
    return _terms((weight * made.loss[:, 0]).sum(), log_prob, old_log_prob, made, kl, kl_weight, weight)


def coefficient_terms(
    log_prob: Tensor,
    old_log_prob: Tensor,
    coefficient: Tensor,
    made: PolicyLoss,
    kl: Tensor | None,
    kl_weight: float,
    weight: Tensor,
) -> LossTerms:
    """Carry the gradient of a loss over whole trajectories to one of its steps.

    A loss L(l_1 ... l_K) that looks at several steps or rows together has the gradient sum_k (dL/dl_k) grad l_k. With
    ``coefficient`` = dL/dl_k (float32 [N], weights included) at the present weights, sum_n c_n l_n has that gradient
    step by step. made: the step's part of the loss, [N, 1], reported as the value. The rest as ``flow_grpo_loss``.
    """
    _check_shapes(
        log_prob.shape, {"old_log_prob": old_log_prob, "coefficient": coefficient, "kl": kl, "weight": weight}
    )
    weight, coefficient = weight.detach(), coefficient.detach()
    live = weight != 0
    log_prob = torch.where(live, log_prob, 0.0)
    old_log_prob = torch.where(live, old_log_prob.detach(), 0.0)
    carried = (torch.where(live, coefficient, 0.0) * log_prob).sum()
    value = (weight * made.loss[:, 0].detach()).sum()
    policy_loss = value + (carried - carried.detach())
    return _terms(policy_loss, log_prob, old_log_prob, made, kl, kl_weight, weight)


def _terms(
    policy_loss: Tensor,
    log_prob: Tensor,
    old_log_prob: Tensor,
    made: PolicyLoss,
    kl: Tensor | None,
    kl_weight: float,
    weight: Tensor,
) -> LossTerms:
    live = weight != 0
    loss, penalty = policy_loss, torch.zeros_like(policy_loss)
    if kl is not None:
        penalty = (weight * torch.where(live, kl, 0.0)).sum()
        loss = policy_loss + kl_weight * penalty if kl_weight else policy_loss
    with torch.no_grad():
        rho = ratio(log_prob, old_log_prob)
        count = live.sum()
        share = live / count.clamp(min=1)
        low, high = (
            torch.zeros_like(share.sum()) if bound is None else (share * bound[:, 0]).sum()
            for bound in (made.low, made.high)
        )
        return LossTerms(
            loss=loss,
            policy_loss=policy_loss.detach(),
            kl=penalty.detach(),
            count=count,
            ratio_mean=(share * rho).sum(),
            ratio_max_deviation=torch.where(live, (rho - 1).abs(), 0.0).amax(),
            clip_fraction=low + high,
            clip_fraction_low=low,
            clip_fraction_high=high,
            approx_kl=(share * k1(old_log_prob, log_prob)).sum(),
        )


def merge_terms(parts: Sequence[LossTerms]) -> LossTerms:
    """Combine the terms of micro-batches into those of the whole: sums added, means weighted by count, detached.

    parts: at least one, else ValueError.
    """
    if not parts:
        raise ValueError("parts: expected at least one LossTerms")

    def stacked(name: str) -> Tensor:
        return torch.stack([vars(part)[name].detach() for part in parts])

    count = stacked("count")
    share = count / count.sum().clamp(min=1)
    merged = {}
    for name in LossTerms.__dataclass_fields__:
        values = stacked(name)
        if name in _SUMS:
            merged[name] = values.sum()
        elif name == "ratio_max_deviation":
            merged[name] = values.amax()
        else:
            merged[name] = (share * values).sum()
    return LossTerms(**merged)
