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

from typing import Literal

import torch
from torch import Tensor

from .inputs import read_rewards
from .method import Method
from .moments import Reduce, batch_moments
from .record import Advantage
from .segments import Groups
from .statistics import Singleton, check_policies, divide, group_result, group_statistics


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
    check_policies(ddof, eps, singleton)
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, ddof, singleton)
    return group_result(divide(s.centred, s.scale, eps), s.mask, s.live, s.mean, s.std)


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
    check_policies(ddof, eps, singleton)
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, ddof, singleton)
    return group_result(s.centred, s.mask, s.live, s.mean, s.std)


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
    check_policies(ddof, eps, singleton)
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, ddof, singleton)
    count = s.groups.count()
    factor = count / (count - 1).clamp(min=1)
    return group_result(s.centred * factor, s.mask, s.live, s.mean, s.std)


def lite_ppo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
    std_of: Literal["raw", "centred"] = "raw",
    reduce: Reduce | None = None,
) -> Advantage:
    """Take the group mean off and divide by one deviation of the whole batch: A_i = (r_i - mean_g) / (S + eps).

    Lite PPO, 2508.08221. S is the deviation over all valid samples of the raw rewards ("raw": TRL's "batch",
    Flow-GRPO's global_std) or of the centred ones ("centred": the REINFORCE++ family). Suits continuous scores, where
    the spread of a small group is noise. reduce: sums over data-parallel ranks; without it the batch is what is
    passed. Arguments and errors: see the module.
    """
    check_policies(ddof, eps, singleton)
    if std_of not in ("raw", "centred"):
        raise ValueError(f"std_of: expected 'raw' or 'centred', got {std_of!r}")
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, ddof, singleton)
    _, spread = batch_moments(s.value if std_of == "raw" else s.centred, s.mask, ddof, reduce)
    return group_result(divide(s.centred, spread, eps), s.mask, s.live, s.mean, s.std)


def gdpo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
    batch_norm: bool = True,
    reduce: Reduce | None = None,
) -> Advantage:
    """Standardise each reward channel inside each group, add the channels, standardise the sum over the batch.

    A_k = (r_k - mean_gk) / (std_gk + eps); s = sum_k w_k A_k; A = (s - mean_B s) / (std_B s + eps).

    GDPO, 2601.05242. rewards: [B, R], NaN where a channel does not apply (it adds 0); weights: [R], ones by default.
    reduce: sums over data-parallel ranks. Invariant, up to eps, to a positive scale of any one channel. With R = 1 and
    batch_norm off it is ``grpo``. group_mean is the weighted sum of the channels' group means and group_std the group
    deviation of s. Other arguments, errors: see the module.
    """
    check_policies(ddof, eps, singleton)
    value, mask = read_rewards(rewards, group, valid, channels=True)
    rows, channels = value.shape
    weight = torch.ones(channels) if weights is None else weights
    if weight.shape != (channels,) or not bool(weight.isfinite().all()):
        raise ValueError(
            f"weights: expected [{channels}] finite numbers, one a channel, got {list(weight.shape)} {weight}"
        )
    weight = weight.detach().to(device=value.device, dtype=torch.float64)
    # Every (group, channel) pair is a group of its own, so the channels share one pass.
    pair = Groups.of(group).index[:, None] * channels + torch.arange(channels, device=group.device)
    s = group_statistics(value.flatten(), pair.flatten(), mask.flatten(), ddof, singleton)
    total = divide(s.centred, s.scale, eps).view(rows, channels) @ weight
    kept = mask.any(dim=1)
    live = (s.live.view(rows, channels) & (weight != 0)).any(dim=1)
    groups = Groups.of(group, kept)
    mean = torch.where(groups.count() > 0, s.mean.view(rows, channels).nan_to_num(nan=0.0) @ weight, torch.nan)
    std = groups.std(total, ddof)
    if batch_norm:
        centre, spread = batch_moments(total, kept, ddof, reduce)
        total = divide(total - centre, spread, eps)
    return group_result(total, kept, live, mean, std)


_ESTIMATORS = "tests/advantage/test_estimators.py::"
_CHANNELS = "tests/advantage/test_gdpo.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="grpo",
        kind="estimator",
        paper_id="2402.03300",
        title="GRPO: rewards standardised inside their group",
        tier=1,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _ESTIMATORS + "test_grpo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_grpo_is_dr_grpo_over_its_deviation",
            "learned": "docs/results/learning/flow_grpo-0.json",
        },
        config="advantage.name=grpo",
        call=grpo,
    ),
    Method(
        key="dr_grpo",
        kind="estimator",
        paper_id="2503.20783",
        title="Dr.GRPO: group mean taken off, no division by the deviation",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _ESTIMATORS + "test_dr_grpo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
        },
        config="advantage.name=dr_grpo",
        call=dr_grpo,
    ),
    Method(
        key="rloo",
        kind="estimator",
        paper_id="2402.14740",
        title="RLOO: each reward against the mean of the others in its group",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _ESTIMATORS + "test_rloo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_rloo_is_dr_grpo_times_n_over_n_minus_one",
        },
        config="advantage.name=rloo",
        call=rloo,
    ),
    Method(
        key="lite_ppo",
        kind="estimator",
        paper_id="2508.08221",
        title="Lite PPO: group mean, deviation of the whole batch",
        tier=2,
        evidence={
            "exact": _ESTIMATORS + "test_lite_ppo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_lite_ppo_of_one_group_is_grpo",
        },
        config="advantage.name=lite_ppo",
        call=lite_ppo,
        exempt={"isolation": "the deviation is that of the whole batch"},
    ),
    Method(
        key="gdpo",
        kind="estimator",
        paper_id="2601.05242",
        title="GDPO: each reward channel standardised on its own before they are added",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _CHANNELS + "test_worked_numbers",
            "formula": _CHANNELS + "test_against_a_plain_loop",
            "identity": _CHANNELS + "test_one_channel_without_batch_norm_is_grpo",
        },
        config="advantage.name=gdpo",
        call=gdpo,
        exempt={"isolation": "the sum of the channels is standardised over the batch"},
    ),
)
