"""Advantages from rewards and groups, in stages: read, baseline, normalise, finish.

Shapes: B samples, R reward channels. Every estimator takes ``rewards`` ([B], or [B, R] where it says so), ``group``
(int64 [B], any spacing and order) and ``valid`` (bool [B], None for all), and the same keywords:

ddof: 0 divides a variance by n, 1 by n - 1. eps: added to a standard deviation before dividing by it. singleton: a
group with one value gets 0 ("zero"), or its reward against mean 0 and deviation 1 ("raw"). Public code bases disagree
on all three (ddof 0: Flow-GRPO; 1: TRL, verl, DanceGRPO).

A NaN reward is no value: like ``valid`` False it leaves every statistic, and its sample gets advantage 0 and
loss_mask False. A group without signal (its greatest and least value are equal) gets exactly 0 and live False.
Statistics are float64; results are float32 and carry no gradient. Raises ValueError, naming the argument, for a wrong
shape or dtype, an infinite reward, an empty batch, or valid rewards that are all NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .segments import Groups

Singleton = Literal["zero", "raw"]


@dataclass(frozen=True)
class Advantage:
    """What an estimator returns. Weights are kept apart: nothing is folded into the advantage.

    advantage: float32 [B], 0 where masked or without signal; weight: float32 [B], 0 where masked; loss_mask: bool
    [B], the samples that have a reward; live: bool [B], the sample's group has signal; group_mean, group_std: float32
    [B], statistics of the group's rewards (NaN for a group without any).
    """

    advantage: Tensor
    weight: Tensor
    loss_mask: Tensor
    live: Tensor
    group_mean: Tensor
    group_std: Tensor


@dataclass(frozen=True)
class _Statistics:
    """Rewards after the first two stages, float64 [B]: ``centred`` has the baseline taken off, 0 where masked."""

    groups: Groups
    value: Tensor
    centred: Tensor
    mean: Tensor
    std: Tensor
    scale: Tensor
    live: Tensor

    @property
    def mask(self) -> Tensor:
        return self.groups.valid


def _check_policies(ddof: int, eps: float, singleton: str) -> None:
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
    if singleton not in ("zero", "raw"):
        raise ValueError(f"singleton: expected 'zero' or 'raw', got {singleton!r}")


def _read(rewards: Tensor, group: Tensor, valid: Tensor | None, channels: bool = False) -> tuple[Tensor, Tensor]:
    """Check the input; return float64 rewards and the bool mask of values that count, both shaped like ``rewards``."""
    dims, wanted = (2, "[B, R]") if channels else (1, "[B]")
    if rewards.ndim != dims or rewards.numel() == 0:
        raise ValueError(f"rewards: expected {wanted} with at least one value, got {list(rewards.shape)}")
    if rewards.is_complex():
        raise ValueError(f"rewards: expected real numbers, got {rewards.dtype}")
    if group.dtype != torch.int64 or group.shape != rewards.shape[:1]:
        raise ValueError(
            f"group: expected int64 [{len(rewards)}], one id a reward, got {group.dtype} {list(group.shape)}"
        )
    if valid is None:
        valid = torch.ones_like(group, dtype=torch.bool)
    if valid.dtype != torch.bool or valid.shape != group.shape:
        raise ValueError(f"valid: expected bool [{len(rewards)}], got {valid.dtype} {list(valid.shape)}")
    value = rewards.detach().double()
    asked = valid[:, None].expand_as(value) if channels else valid
    if bool((asked & value.isinf()).any()):
        raise ValueError("rewards: infinite values among the valid samples; mark failed rewards with valid=False")
    mask = asked & ~value.isnan()
    if bool(asked.any()) and not bool(mask.any()):
        raise ValueError("rewards: every valid sample is NaN; mark failed rewards with valid=False")
    return value, mask


def _statistics(value: Tensor, group: Tensor, mask: Tensor, ddof: int, singleton: str) -> _Statistics:
    """Group statistics and the group-mean baseline. ``scale`` is the deviation to divide by, before eps."""
    groups = Groups.of(group, mask)
    mean, std = groups.mean(value), groups.std(value, ddof)
    live = groups.max(value) > groups.min(value)
    baseline, scale = mean, std
    if singleton == "raw":
        single = groups.count() == 1
        baseline = torch.where(single, 0.0, mean)
        scale = torch.where(single, 1.0, std)
        live = live | single
    centred = torch.where(mask & live, value - baseline, 0.0)
    return _Statistics(groups=groups, value=value, centred=centred, mean=mean, std=std, scale=scale, live=live)


def _divide(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / (scale + eps), and 0 where there is nothing to divide by."""
    divisor = scale + eps
    return torch.where(divisor > 0, x / torch.where(divisor > 0, divisor, 1.0), 0.0)


def _batch_std(x: Tensor, mask: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the samples of the batch (sample-weighted), float64 scalars."""
    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count.clamp(min=1)
    square = torch.where(mask, (x - mean) ** 2, 0.0).sum()
    return mean, (square / (count - ddof).clamp(min=1)).sqrt()


def _finish(advantage: Tensor, mask: Tensor, live: Tensor, mean: Tensor, std: Tensor) -> Advantage:
    return Advantage(
        advantage=torch.where(mask & live, advantage, 0.0).float(),
        weight=mask.float(),
        loss_mask=mask,
        live=live,
        group_mean=mean.float(),
        group_std=std.float(),
    )


def grpo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Standardise rewards inside each group: A_i = (r_i - mean_g) / (std_g + eps).

    GRPO, 2402.03300, outcome supervision; Flow-GRPO 2505.05470 equation 4 (ddof 0, eps 1e-4). Rewards of any range;
    invariant to a shift of a group and, up to eps, to a positive scale. Arguments and errors: see the module.
    """
    _check_policies(ddof, eps, singleton)
    value, mask = _read(rewards, group, valid)
    s = _statistics(value, group, mask, ddof, singleton)
    return _finish(_divide(s.centred, s.scale, eps), s.mask, s.live, s.mean, s.std)


def dr_grpo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Take the group mean off and divide by nothing: A_i = r_i - mean_g.

    Dr.GRPO, 2503.20783: without the division, groups of small spread are not blown up. In the units of the reward.
    ddof only sets the reported group_std; eps has no effect. Arguments and errors: see the module.
    """
    _check_policies(ddof, eps, singleton)
    value, mask = _read(rewards, group, valid)
    s = _statistics(value, group, mask, ddof, singleton)
    return _finish(s.centred, s.mask, s.live, s.mean, s.std)


def rloo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Compare each reward with the mean of the others: A_i = r_i - mean_{j != i} r_j = n/(n-1) (r_i - mean_g).

    RLOO, 2402.14740 (leave-one-out baseline, unbiased). In the units of the reward; n counts valid members. ddof only
    sets the reported group_std; eps has no effect. Arguments and errors: see the module.
    """
    _check_policies(ddof, eps, singleton)
    value, mask = _read(rewards, group, valid)
    s = _statistics(value, group, mask, ddof, singleton)
    count = s.groups.count()
    factor = count / (count - 1).clamp(min=1)
    return _finish(s.centred * factor, s.mask, s.live, s.mean, s.std)


def lite_ppo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
    std_of: Literal["raw", "centred"] = "raw",
) -> Advantage:
    """Take the group mean off and divide by one deviation of the whole batch: A_i = (r_i - mean_g) / (S + eps).

    Lite PPO, 2508.08221. S is the deviation over all valid samples of the raw rewards ("raw": TRL's "batch",
    Flow-GRPO's global_std) or of the centred ones ("centred": the REINFORCE++ family). Suits continuous scores, where
    the spread of a small group is noise. The batch is what is passed: gather it over processes first. Arguments and
    errors: see the module.
    """
    _check_policies(ddof, eps, singleton)
    if std_of not in ("raw", "centred"):
        raise ValueError(f"std_of: expected 'raw' or 'centred', got {std_of!r}")
    value, mask = _read(rewards, group, valid)
    s = _statistics(value, group, mask, ddof, singleton)
    _, spread = _batch_std(s.value if std_of == "raw" else s.centred, s.mask, ddof)
    return _finish(_divide(s.centred, spread, eps), s.mask, s.live, s.mean, s.std)


def gdpo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
    weights: Tensor | None = None,
    batch_norm: bool = True,
) -> Advantage:
    """Standardise each reward channel inside each group, add the channels, standardise the sum over the batch.

    A_k = (r_k - mean_gk) / (std_gk + eps); s = sum_k w_k A_k; A = (s - mean_B s) / (std_B s + eps).

    GDPO, 2601.05242. rewards: [B, R], NaN where a channel does not apply (it adds 0); weights: [R], ones by default.
    Invariant, up to eps, to a positive scale of any one channel. With R = 1 and batch_norm off it is ``grpo``.
    group_mean is the weighted sum of the channels' group means and group_std the group deviation of s. Other
    arguments, errors: see the module.
    """
    _check_policies(ddof, eps, singleton)
    value, mask = _read(rewards, group, valid, channels=True)
    rows, channels = value.shape
    weight = torch.ones(channels) if weights is None else weights
    if weight.shape != (channels,) or not bool(weight.isfinite().all()):
        raise ValueError(
            f"weights: expected [{channels}] finite numbers, one a channel, got {list(weight.shape)} {weight}"
        )
    weight = weight.detach().to(device=value.device, dtype=torch.float64)
    # Every (group, channel) pair is a group of its own, so the channels share one pass.
    pair = Groups.of(group).index[:, None] * channels + torch.arange(channels, device=group.device)
    s = _statistics(value.flatten(), pair.flatten(), mask.flatten(), ddof, singleton)
    total = _divide(s.centred, s.scale, eps).view(rows, channels) @ weight
    kept = mask.any(dim=1)
    live = (s.live.view(rows, channels) & (weight != 0)).any(dim=1)
    groups = Groups.of(group, kept)
    mean = torch.where(groups.count() > 0, s.mean.view(rows, channels).nan_to_num(nan=0.0) @ weight, torch.nan)
    std = groups.std(total, ddof)
    if batch_norm:
        centre, spread = _batch_std(total, kept, ddof)
        total = _divide(total - centre, spread, eps)
    return _finish(total, kept, live, mean, std)


ESTIMATORS: Mapping[str, Callable[..., Advantage]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "lite_ppo": lite_ppo,
    "gdpo": gdpo,
}
CHANNEL_ESTIMATORS = frozenset({"gdpo"})


def estimate(
    name: str,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    clip: float = 0.0,
    singleton: Singleton = "zero",
    weights: Tensor | None = None,
) -> Advantage:
    """Run the estimator ``name`` (a key of ESTIMATORS) and clip its advantages to +-``clip`` (0 is off).

    weights: [R], only for the estimators in CHANNEL_ESTIMATORS, which take rewards [B, R]; the others take [B]. Raises
    ValueError for an unknown name, a negative clip, weights where there are no channels, and as the estimator does.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: unknown estimator {name!r}; expected one of {', '.join(sorted(ESTIMATORS))}")
    if not clip >= 0:
        raise ValueError(f"clip: expected a number >= 0 (0 is off), got {clip}")
    run = ESTIMATORS[name]
    if name in CHANNEL_ESTIMATORS:
        result = run(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton, weights=weights)
    elif weights is not None:
        raise ValueError(f"weights: {name} takes one reward a sample; combine the channels first or use gdpo")
    else:
        result = run(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton)
    return replace(result, advantage=result.advantage.clamp(-clip, clip)) if clip > 0 else result
