"""Policy losses that clip a step's importance ratio: PPO and its descendants.

Every loss takes ``log_prob`` (carries the gradient), ``old_log_prob`` and ``mask`` (bool), each [B, T], and
``advantage`` ([B, T] or [B], no gradient), and returns a ``PolicyLoss``: float32 or wider [B, T], to be minimised, 0 on
masked steps whatever they hold. d = clamp(log_prob - old_log_prob, -20, 20) and rho = exp(d). The coefficient of a
method is c in dL/dlog_prob = -c A; on-policy (rho = 1) it is 1. Averaging is ``aggregate``'s. Each raises ValueError,
naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_mask, read_rewards, read_steps
from .loss_record import PolicyLoss, read_loss_inputs
from .method import Method
from .moments import Reduce, total
from .policy_loss import clipped_high, clipped_low
from .segments import Groups
from .weighted_losses import dcpo_bounds, read_probability


def clip_between(
    ratio: Tensor, advantage: Tensor, lower: float | Tensor, upper: float | Tensor, dual: float | None = None
) -> PolicyLoss:
    """Form max(-A rho, -A clip(rho, lower, upper)), and with ``dual`` no more than -A dual where A < 0.

    ratio, advantage: [B, T]; lower, upper: bounds of the ratio itself, both numbers or both tensors that broadcast.
    With numbers and no ``dual`` it is ``policy_loss.clipped``.
    """
    bounded = torch.clamp(ratio, lower, upper)  # type: ignore[arg-type]
    loss = torch.maximum(-advantage * ratio, -advantage * bounded)
    low, high = (advantage < 0) & (ratio < lower), (advantage > 0) & (ratio > upper)
    if dual is not None:
        check_number("dual", dual, 1.0, strict=True)
        far = (advantage < 0) & (ratio > dual)
        loss, high = torch.where(far, -advantage * dual, loss), high | far
    return PolicyLoss(loss=loss, low=low, high=high)


def ppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_scale: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float | None = None,
    dual: float | None = None,
) -> PolicyLoss:
    """Take PPO's clipped surrogate: L = max(-A rho, -A clip(rho, 1 - low, 1 + high)).

    clip_scale: float [B, T] >= 0, multiplies low and high step by step (1 by default; ``Advantage.clip_scale`` of the
    methods that give one). high: ``low`` by default. dual: c > 1 bounds L by -A c where A < 0 (None: no bound). The
    coefficient is 0 where (A > 0, rho > 1 + high), (A < 0, rho < 1 - low) or (A < 0, rho > dual), else rho.

    Public code: verl always has dual 3.0 (recipes 10), TRL has none by default. PPO, 1707.06347 equation 7; dual clip,
    1912.09729 equation 5.

    On denoising steps: as it is; a ratio of dimension means needs ranges smaller by the number of dimensions.
    """
    high = low if high is None else high
    check_number("low", low, 0.0)
    check_number("high", high, 0.0)
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if clip_scale is None:
        return clip_between(d.exp(), a, 1.0 - low, 1.0 + high, dual)
    scale = read_steps("clip_scale", clip_scale, mask, d.dtype)
    if bool((scale < 0).any()):
        raise ValueError(f"clip_scale: expected numbers >= 0, got {float(scale.min()):.4g}")
    return clip_between(d.exp(), a, 1.0 - low * scale, 1.0 + high * scale, dual)


def dual_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_scale: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float | None = None,
    dual: float = 3.0,
) -> PolicyLoss:
    """Bound PPO's loss from above for negative advantages: L = min(ppo, -A dual) where A < 0.

    Without it a step of negative advantage whose ratio grew has a gradient of any size. ``ppo`` with ``dual`` set; see
    there for the arguments. Dual clip, 1912.09729 equation 5; verl has dual 3.0.

    On denoising steps: as it is.
    """
    return ppo(log_prob, old_log_prob, advantage, mask, clip_scale, low=low, high=high, dual=dual)


def dapo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip_scale: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = None,
) -> PolicyLoss:
    """Clip with a wider upper bound, so that unlikely steps can grow: ``ppo`` with low 0.2 and high 0.28.

    The other parts of the method: ``aggregate`` with step_mean, no KL term, ``live_groups`` to resample groups without
    signal, ``overlong_penalty``. The public recipe adds dual 10. DAPO, 2503.14476 equations 8 to 13.

    On denoising steps: clip-higher and the filter of groups as they are; the length penalty becomes one on a budget.
    """
    return ppo(log_prob, old_log_prob, advantage, mask, clip_scale, low=low, high=high, dual=dual)


def live_groups(rewards: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tell which rows have a group with signal (max > min): bool [B].

    DAPO (2503.14476, section 3.2) samples again until enough groups are live; the loop is the trainer's. rewards: [B],
    NaN for no value; group: int64 [B]; valid: bool [B], all by default. A row whose group has no value is not live.
    """
    value, known = read_rewards(rewards, group, valid)
    groups = Groups.of(group, known)
    return groups.max(value) > groups.min(value)


def overlong_penalty(length: Tensor, *, limit: float = 20480.0, buffer: float = 4096.0, factor: float = 1.0) -> Tensor:
    """Punish rows that come close to the length limit: factor clamp((limit - buffer - length) / buffer, -1, 0).

    length: real [B]. The result, float32 [B], is added to the reward. DAPO, 2503.14476 equation 13; the defaults are
    those of its recipe, whose code (verl) does not stop at -factor, as its rows end at the limit.

    On denoising steps: the length is constant; pass what varies instead (steps, network calls, seconds) as ``length``.
    """
    check_number("buffer", buffer, 0.0, strict=True)
    check_number("limit", limit, buffer)
    check_number("factor", factor, 0.0)
    if length.ndim != 1 or length.numel() == 0 or length.is_complex() or not bool(length.isfinite().all()):
        raise ValueError(f"length: expected finite real numbers [B], got {length.dtype} {list(length.shape)}")
    room = (limit - buffer - length.detach().double()) / buffer
    return (factor * room.clamp(-1.0, 0.0)).float()


def _grid(start: float, stop: float, step: float, device: torch.device) -> Tensor:
    """start, start + step, ... stop: float64, by integer multiples; the last one is ``stop`` itself."""
    number = math.ceil((stop - start) / step)
    return (start + step * torch.arange(number + 1, dtype=torch.float64, device=device)).clamp(max=stop)


def _binned(x: Tensor, bin_of: Tensor, number: int) -> Tensor:
    """Sum ``x`` over bins: float64 [number]."""
    zero = torch.zeros(number, dtype=torch.float64, device=x.device)
    return zero.index_add_(0, bin_of.flatten(), x.flatten())


def _shares(ratio: Tensor, advantage: Tensor, lowers: Tensor, uppers: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Sums of what positive advantages gain under each upper bound, and negative ones under each lower bound."""
    gain, loss = advantage.clamp(min=0.0), (-advantage).clamp(min=0.0)
    bin_of = torch.bucketize(ratio, uppers)  # ratio <= uppers[k] exactly where bin <= k
    inside = _binned(ratio * gain, bin_of, len(uppers) + 1).cumsum(0)[:-1]
    beyond = _binned(gain, bin_of, len(uppers) + 1).flip(0).cumsum(0).flip(0)[1:]
    bin_of = torch.bucketize(ratio, lowers, right=True)  # ratio >= lowers[k] exactly where bin > k
    above = _binned(ratio * loss, bin_of, len(lowers) + 1).flip(0).cumsum(0).flip(0)[1:]
    below = _binned(loss, bin_of, len(lowers) + 1).cumsum(0)[:-1]
    if metric == "live":
        return inside, above
    return inside + uppers * beyond, above + lowers * below


def bapo_bounds(
    ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    target: float = 1.0,
    metric: Literal["value", "live"] = "value",
    lower_start: float = 0.6,
    lower_stop: float = 0.8,
    upper_start: float = 1.2,
    upper_stop: float = 2.0,
    step: float = 0.05,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the bounds (lower, upper) of the ratio for a batch: float64 scalars, by the rule of ``bapo``.

    ratio, advantage: real [B, T]; mask: bool [B, T]. See ``bapo`` for the options. All pairs of the path are judged at
    once from sums over bins of the ratio, hence in the memory of the input.
    """
    if metric not in ("value", "live"):
        raise ValueError(f"metric: expected 'value' or 'live', got {metric!r}")
    check_number("target", target, 0.0)
    check_number("step", step, 0.0, strict=True)
    check_number("lower_start", lower_start, 0.0)
    check_number("lower_stop", lower_stop, lower_start)
    check_number("upper_start", upper_start, lower_stop)
    check_number("upper_stop", upper_stop, upper_start)
    check_mask(mask)
    rho = read_steps("ratio", ratio, mask, torch.float64)
    a = read_steps("advantage", advantage, mask, torch.float64)
    lowers = _grid(lower_start, lower_stop, step, rho.device)
    uppers = _grid(upper_start, upper_stop, step, rho.device)
    both = total(torch.cat(_shares(rho, a, lowers, uppers, metric)), reduce)
    gain, loss = both[: len(uppers)], both[len(uppers) :]
    # The path: lower bounds first, under the first upper bound; then upper bounds, over the last lower bound.
    gains = torch.cat([gain[:1].expand(len(lowers)), gain[1:]])
    losses = torch.cat([loss, loss[-1:].expand(len(uppers) - 1)])
    enough = gains >= target * losses
    at = torch.where(enough.any(), enough.int().argmax(), len(enough) - 1)
    return lowers[at.clamp(max=len(lowers) - 1)], uppers[(at - len(lowers) + 1).clamp(min=0)]


def bapo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    target: float = 1.0,
    metric: Literal["value", "live"] = "value",
    lower_start: float = 0.6,
    lower_stop: float = 0.8,
    upper_start: float = 1.2,
    upper_stop: float = 2.0,
    step: float = 0.05,
    reduce: Reduce | None = None,
) -> PolicyLoss:
    """Widen the clip bounds until positive advantages carry their share, then clip: L = max(-A rho, -A clip(rho)).

    The bounds are those of the ratio itself. pos = sum_{A >= 0} min(rho, upper) A and neg = sum_{A < 0} max(rho, lower)
    |A| over the unmasked steps; the first pair with pos >= target neg is taken, with lower from lower_start to
    lower_stop first and then upper from upper_start to upper_stop, both by ``step``; the last pair where none does, the
    first where no advantage is negative. target 1 is a positive share of 1/2 (a share s is s / (1 - s)).

    metric: "value" is the public code's statistic; under it a higher lower bound only adds to neg, so lower always ends
    at lower_stop before upper moves. "live" counts unclipped steps alone (A >= 0 and rho <= upper; A < 0 and rho >=
    lower), so that either bound moves the balance as the method intends. reduce: sums over data-parallel ranks; without
    it each rank has bounds of its own. Public code adds dual clip 3.0, and the paper goes to lower 0.9 and upper 3.0.

    BAPO, 2510.18927, and its repository WooooDyy/BAPO; not the BAPO of 2602.20722.

    On denoising steps: as it is; rescale the grid where the ratio is one of dimension means.
    """
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    ratio = d.exp()
    lower, upper = bapo_bounds(
        ratio,
        a,
        mask,
        target=target,
        metric=metric,
        lower_start=lower_start,
        lower_stop=lower_stop,
        upper_start=upper_start,
        upper_stop=upper_stop,
        step=step,
        reduce=reduce,
    )
    return clip_between(ratio, a, lower.to(ratio.dtype), upper.to(ratio.dtype))


def gppo(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    dual: float | None = 10.0,
) -> PolicyLoss:
    """Let a bounded gradient through where PPO would clip: bound beta rho / sg(rho) in place of the bound.

    The coefficient is beta_low (1 - low) where (A < 0, rho < 1 - low), beta_high (1 + high) where (A > 0, rho > 1 +
    high), 0 where (A < 0, rho > dual), else rho. beta 1: the value is PPO's; beta 0: the gradient is PPO's, and the
    value 0 where it clips. dual: as in ``ppo``, None for none.

    GPPO, 2508.07629 (Klear-Reasoner), both beta 1. CE-GPPO, 2509.20712: beta_low 0.25 or 0.5, beta_high 1.

    On denoising steps: as it is.
    """
    for name, number in (("low", low), ("high", high), ("beta_low", beta_low), ("beta_high", beta_high)):
        check_number(name, number, 0.0)
    lp, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    ratio = d.exp()
    base = clip_between(ratio, a, 1.0 - low, 1.0 + high, dual)
    one = (lp - lp.detach()).exp()
    loss = torch.where(clipped_low(ratio, a, low), -a * beta_low * (1.0 - low) * one, base.loss)
    loss = torch.where(clipped_high(ratio, a, high), -a * beta_high * (1.0 + high) * one, loss)
    return PolicyLoss(loss=loss, low=base.low, high=base.high)


def dcpo_dynamic(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    old_prob: Tensor | None = None,
    *,
    low: float = 0.16,
    high: float = 0.2,
    cap: float = 10.0,
    dual: float | None = 10.0,
) -> PolicyLoss:
    """Clip between bounds that depend on the step's old probability q: L = max(-A rho, -A clip(rho, lower(q), upper(q))).

    ``dcpo_bounds`` has the bounds: [0.8, 1.1708] at q = 1, [0.5, 5] at q = 0.01. old_prob: float [B, T] in [0, 1];
    exp(old_log_prob) by default, which must then be log-probabilities. dual: the public code's dual clip, None for
    none. The method's loss is averaged by ``aggregate`` with own_mean_sum; its advantages are a method of their own.

    DCPO (dynamic clipping), 2509.02333; repository lime-RL/DCPO. Other methods are called DCPO too.

    On denoising steps: a density is no probability; pass ``gaussian_probability`` of the step's noise as ``old_prob``.
    """
    _, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if old_prob is None:
        q = read_probability("old_log_prob", old_log_prob, mask, d.dtype)
    else:
        q = read_steps("old_prob", old_prob, mask, d.dtype)
    lower, upper = dcpo_bounds(q, low=low, high=high, cap=cap)
    return clip_between(d.exp(), a, lower, upper, dual)


_TESTS = "tests/advantage/test_clipping.py::"
_LOOP = "test_against_a_plain_loop"

METHODS: tuple[Method, ...] = tuple(
    Method(
        key=key,
        kind="reward" if key == "overlong" else "policy_loss",
        paper_id=paper_id,
        title=title,
        tier=2,
        evidence={label: _TESTS + test for label, test in evidence.items()},
        call=call,
        joint=key == "bapo",
    )
    for key, paper_id, title, call, evidence in (
        (
            "ppo",
            "1707.06347",
            "PPO's clipped surrogate, with separate lower and upper bounds",
            ppo,
            {"exact": "test_coefficient_table", "formula": _LOOP, "identity": "test_ppo_is_clipped"},
        ),
        (
            "dual_clip",
            "1912.09729",
            "Dual clip: PPO with a bound on negative advantages",
            dual_clip,
            {"exact": "test_dual_clip_bounds_the_loss", "formula": _LOOP},
        ),
        (
            "dapo",
            "2503.14476",
            "DAPO: PPO with a wider upper bound",
            dapo,
            {"formula": _LOOP, "identity": "test_dapo_is_ppo_with_a_wider_upper_bound"},
        ),
        (
            "overlong",
            "2503.14476",
            "DAPO's penalty on rows near the length limit",
            overlong_penalty,
            {"exact": "test_overlong_worked_numbers"},
        ),
        (
            "bapo",
            "2510.18927",
            "BAPO: bounds widened until positive advantages carry their share",
            bapo,
            {
                "exact": "test_bapo_worked_numbers",
                "formula": "test_bapo_against_a_search",
                "identity": "test_bapo_is_ppo",
            },
        ),
        (
            "gppo",
            "2508.07629",
            "GPPO: a bounded gradient where PPO clips (CE-GPPO by beta)",
            gppo,
            {"exact": "test_coefficient_table", "formula": _LOOP, "identity": "test_gppo_against_ppo"},
        ),
        (
            "dcpo_dynamic",
            "2509.02333",
            "DCPO: bounds by the step's old probability",
            dcpo_dynamic,
            {"exact": "test_dcpo_defaults", "formula": _LOOP},
        ),
    )
)
