"""Methods that weigh, mask or tilt: by entropy, by a branch point, by what a sample cost.

``rewards`` float [B], ``group`` int64 [B], ``valid`` bool [B] (None for all) and singleton are those of ``estimators``;
``base`` names the estimator of the outcome advantage, with its own defaults ("grpo", "dr_grpo", "rloo"). For any other
outcome advantage there is ``modulate_by_entropy``, which takes it as an argument. mask: bool [B, T]. Statistics are
float64, results float32 without a gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_number
from .estimators import dr_grpo, grpo, rloo
from .inputs import check_flags, check_ids, check_mask, read_rewards, read_rows, read_steps
from .method import Method
from .moments import Reduce, batch_moments, total
from .record import Advantage
from .segments import Groups
from .statistics import Singleton, check_policies, group_statistics, step_result
from .steps import following_value, segment_gather, segment_reduce

Base = Literal["grpo", "dr_grpo", "rloo"]
_BASES = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def outcome_advantage(
    rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None, base: str
) -> tuple[Advantage, Tensor]:
    """Outcome advantage [B], and ``mask`` without the rows that have no value."""
    if base not in _BASES:
        raise ValueError(f"base: expected one of {sorted(_BASES)}, got {base!r}")
    outcome = _BASES[base](rewards, group, valid)
    check_mask(mask, len(rewards))
    return outcome, mask if bool(outcome.loss_mask.all()) else mask & outcome.loss_mask[:, None]


def spread_advantage(advantage: Tensor, mask: Tensor) -> Tensor:
    """Advantage [B] or [B, T] as float32 [B, T], 0 on masked steps."""
    check_mask(mask)
    if advantage.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantage: expected {list(mask.shape)} or {list(mask.shape[:1])}, got {list(advantage.shape)}"
        )
    wide = advantage if advantage.ndim == 2 else advantage[:, None].expand_as(mask)
    return read_steps("advantage", wide, mask)


def _tilt(
    start: Tensor,
    level: Tensor,
    kept: Tensor,
    coefficients: tuple[float, float, float],
    entropy_range: tuple[float, float] | None,
    reduce: Reduce | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(A g + zeta f less its mean, g, f), all in the shape of ``kept`` and 0 outside it."""
    k, k_future, zeta = coefficients
    low, high = entropy_range if entropy_range is not None else _extremes(level, kept)
    width = high - low + 1e-8

    def weigh(level: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = (level - low) / width
        damped = torch.where(kept, torch.exp(-k * unit), 0.0)
        clear = damped if k_future == k else torch.exp(-k_future * unit)
        return damped, following_value(clear, kept), damped.double().sum(1)

    def tilt(start: Tensor, kept: Tensor, gain: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
        tilted = torch.where(kept, start * gain + zeta * future, 0.0)
        return tilted, tilted.double().sum(1)

    number = kept.sum(1, dtype=torch.int32).sum().double()
    damped, future, of_row = by_rows(weigh, level, kept)
    first = total(torch.stack([of_row.sum(), number]), reduce)
    gain = damped.mul_(torch.where(first[0] > 0, first[1] / first[0], 1.0))
    tilted, of_row = by_rows(tilt, start, kept, gain, future)
    centre = total(of_row.sum(), reduce) / first[1].clamp(min=1)
    return torch.where(kept, tilted.sub_(centre), 0.0), gain, future


def _extremes(level: Tensor, kept: Tensor) -> tuple[float, float]:
    """Least and greatest level of the unmasked steps; infinite where there is none."""

    def ends(level: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(kept, level, torch.inf).amin(1), torch.where(kept, level, -torch.inf).amax(1)

    low, high = by_rows(ends, level, kept)
    return float(low.min()), float(high.max())


def modulate_by_entropy(
    advantage: Tensor,
    entropy: Tensor,
    mask: Tensor,
    segment: Tensor | None = None,
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
    entropy_range: tuple[float, float] | None = None,
    reduce: Reduce | None = None,
) -> Advantage:
    """Amplify the advantage of confident steps and reward a clear next step; see ``empg``, whose second half it is.

    advantage: float [B] or [B, T], finite on unmasked steps. live: the row has an unmasked step.
    """
    start = spread_advantage(advantage, mask)
    level = read_steps("entropy", entropy, mask)
    for name, number in (("k", k), ("k_future", k_future), ("zeta", zeta)):
        check_number(name, number)
    if entropy_range is not None and not entropy_range[0] <= entropy_range[1]:
        raise ValueError(f"entropy_range: expected (least, greatest), got {entropy_range}")
    coefficients = (k, k_future, zeta)
    if segment is None:
        result, gain, future = _tilt(start, level, mask, coefficients, entropy_range, reduce)
    else:
        check_ids("segment", segment, tuple(mask.shape))
        if bool((mask & (segment < 0)).any()):
            raise ValueError("segment: expected ids >= 0 on unmasked steps, got -1 on some")
        kept = segment_reduce(torch.ones_like(level), segment, mask) > 0
        start = segment_reduce(start, segment, mask, "mean")
        level = segment_reduce(level, segment, mask, "mean")
        parts = _tilt(start, level, kept, coefficients, entropy_range, reduce)
        result, gain, future = (torch.where(mask, segment_gather(x.float(), segment), 0.0) for x in parts)
    return Advantage(
        advantage=result.float(),
        weight=mask.float(),
        loss_mask=mask,
        live=mask.any(dim=1),
        channels={"gain": gain.float(), "future": future.float()},
    )


def empg(
    rewards: Tensor,
    group: Tensor,
    entropy: Tensor,
    mask: Tensor,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    base: Base = "grpo",
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
    entropy_range: tuple[float, float] | None = None,
    reduce: Reduce | None = None,
) -> Advantage:
    """Modulate the outcome advantage by entropy: A_t = A g(H_t) + zeta f(H_{t+1}), less its mean over all steps.

    H is scaled to [0, 1] by its least and greatest value over the steps of the batch (divisor + 1e-8);
    g(H) = exp(-k H) / mean_batch exp(-k H), of mean 1; f(H) = exp(-k_future H), 0 after the last step; the next step is
    the next unmasked one. entropy: float [B, T], any uncertainty. segment: int64 [B, T], to make one step of many
    tokens (an agent's turn): H is then the mean over the segment's tokens, and every segment counts once. entropy_range:
    least and greatest H over all ranks, which the sums of ``reduce`` cannot give; those of this rank without it.
    channels "gain" and "future" are g and f. A group without signal has A = 0, but keeps the future term and the
    centring; live is that of the outcome advantage. A NaN reward takes its row out.

    Special cases: constant entropy is g = 1, f = 1; k = zeta = 0 is the outcome advantage less its mean over the steps.
    EMPG, 2509.09265; k = k_future = 1 and zeta = 0.1 are those of a third-party implementation, the paper searches
    them. On denoising steps: the entropy of a Gaussian step is set by the schedule and is the same for all samples;
    give another uncertainty instead, such as the spread of the predicted clean image over the group (reconstructed).
    """
    outcome, kept = outcome_advantage(rewards, group, mask, valid, base)
    result = modulate_by_entropy(
        outcome.advantage,
        entropy,
        kept,
        segment,
        k=k,
        k_future=k_future,
        zeta=zeta,
        entropy_range=entropy_range,
        reduce=reduce,
    )
    return replace(result, live=outcome.live, group_mean=outcome.group_mean, group_std=outcome.group_std)


def _log_average(value: Tensor, groups: Groups, tau: float) -> Tensor:
    """tau (logsumexp(r / tau) - log n) over each group, float64 [B]."""
    peak = groups.max(value)
    return peak + tau * groups.mean(((value - peak) / tau).exp()).log()


def r3l(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    pivot: Tensor,
    valid: Tensor | None = None,
    *,
    baseline: Literal["mean", "log_avg_exp"] = "mean",
    tau: float = 1.0,
    alpha: float = 3.0,
    max_rule: Literal["code", "docs", "none"] = "code",
    max_reward: float = 1.0,
    singleton: Singleton = "raw",
) -> Advantage:
    """Train a retry from its branch point on, and amplify what succeeded: A = r - base, times alpha where A >= 0.

    base: the group's mean, or tau (logsumexp(r / tau) - log n), which is the mean as tau grows and the maximum as it
    goes to 0. max_rule: rows of r >= max_reward get A = 1 ("code": the repository), A = alpha ("docs": its
    documentation), or nothing special; such a row is live even in a group without signal. Only steps t >= pivot are
    trained: pivot int64 [B] >= 0 counts columns, 0 for a rollout that was not branched, and the columns before it are
    the prefix that it shares. [B, T]. singleton "raw" (the repository): base 0 for a group of one.

    Special cases: alpha = 1, pivot = 0, max_rule "none" is Dr.GRPO. R3L, 2601.03715, repository shiweijiezero/R3L; the
    reflection that finds the pivot is the caller's. On denoising steps: pivot is the step at which the retry was
    branched (its latent noised anew); the shared steps before it are not trained twice.
    """
    check_policies(singleton=singleton)
    if baseline not in ("mean", "log_avg_exp") or max_rule not in ("code", "docs", "none"):
        raise ValueError(f"baseline, max_rule: got {baseline!r}, {max_rule!r}; expected those of the signature")
    if not (math.isfinite(tau) and tau > 0 and math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"tau, alpha: expected finite numbers > 0 and >= 0, got {tau}, {alpha}")
    value, counted = read_rewards(rewards, group, valid)
    check_mask(mask, len(value))
    check_ids("pivot", pivot, tuple(value.shape))
    if bool((pivot < 0).any()):
        raise ValueError(f"pivot: expected columns >= 0, got {int(pivot.min())}")
    s = group_statistics(value, group, counted, 0, singleton)
    centred, live = s.centred, s.live
    if baseline == "log_avg_exp":
        # a group of one keeps the baseline of its policy; rows without a value are masked below
        centred = torch.where(s.groups.count() > 1, value - _log_average(value, s.groups, tau), centred)
    scaled = torch.where(centred >= 0, alpha * centred, centred)
    if max_rule != "none":
        perfect = counted & (value >= max_reward)
        scaled = torch.where(perfect, 1.0 if max_rule == "code" else alpha, scaled)
        live = live | (s.groups.max(perfect.double()) > 0)
    first = torch.where(counted, pivot, mask.shape[1])  # a row without a value is not trained
    trained = mask & (torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32) >= first.int()[:, None])
    return step_result(scaled.float()[:, None], trained, live, statistics=s)


def intervention(mask: Tensor, pivot: Tensor, intervened: Tensor, segment: Tensor | None = None) -> Tensor:
    """Mark what is imitated of a corrected rollout: the steps before its first error, and the correction; bool [B, T].

    mask_t and (step_t < pivot or intervened_t). pivot: int64 [B], the first wrong step, 0 for none before it; step_t is
    the column, or ``segment`` (int64 [B, T]) where a step has many tokens; intervened: bool [B, T], tokens of the
    proposed correction. What follows is left out: the rollout goes on from there by ordinary RL. Special cases: pivot
    0 is the correction alone; a pivot beyond the end without a correction is ``mask``. InT, 2601.14209; the mask is
    reconstructed from the abstract. On denoising steps: the corrected latent (the best of several branches) at block
    ``pivot`` is a regression target, the steps before it keep their own.
    """
    check_mask(mask)
    check_ids("pivot", pivot, tuple(mask.shape[:1]))
    check_flags("intervened", intervened, tuple(mask.shape))
    if segment is None:
        before = torch.arange(mask.shape[1], device=mask.device) < pivot[:, None]
    else:
        check_ids("segment", segment, tuple(mask.shape))
        before = (segment >= 0) & (segment < pivot[:, None])
    return mask & (before | intervened)


def duration(cost: Tensor, valid: Tensor | None = None, *, power: float = 1.0, reduce: Reduce | None = None) -> Tensor:
    """Weigh a sample by what it cost to produce: w_i = cost_i^power / mean(cost^power), of mean 1 over the batch.

    cost: float [B] >= 0 (> 0 for a negative power), seconds, network calls or steps; valid: bool [B], the rows that
    count, the others get 0. float32 [B]. The mean is over all ranks with ``reduce``. power 0, and equal costs: 1 for
    all; 0.5 weakens the effect. The result multiplies a loss (``Advantage.weight``), not an advantage. A rule of thumb
    without a single source. On denoising steps: cost is the number of network calls or the seconds of the row's
    rollout.
    """
    if cost.ndim != 1 or len(cost) == 0:
        raise ValueError(f"cost: expected [B] with B >= 1, got {list(cost.shape)}")
    check_number("power", power)
    counted = torch.ones_like(cost, dtype=torch.bool) if valid is None else valid
    check_flags("valid", counted, tuple(cost.shape))
    mass = torch.where(counted, read_rows("cost", cost, counted, lowest=0.0).pow(power), 0.0)
    mean, _ = batch_moments(mass, counted, reduce=reduce)
    if not bool(mean.isfinite()) or (bool(counted.any()) and not bool(mean > 0)):
        raise ValueError(f"cost: expected values whose powers {power:g} have a finite mean > 0, got {float(mean):g}")
    return (mass / torch.where(mean > 0, mean, 1.0)).float()


_TESTS = "tests/advantage/test_weighting.py::"
_BATCH = "statistics over the steps of the whole batch"

METHODS: tuple[Method, ...] = (
    Method(
        key="empg",
        kind="estimator",
        paper_id="2509.09265",
        title="EMPG: advantage modulated by the step's entropy, with a term for a clear next step",
        tier=2,
        evidence={
            "exact": _TESTS + "test_empg_worked_numbers",
            "formula": _TESTS + "test_empg_against_a_plain_loop",
            "identity": _TESTS + "test_empg_without_coefficients_is_the_centred_advantage",
        },
        call=empg,
        exempt={
            "isolation": _BATCH,
            "constant": "the future term and the centring reach groups without signal",
            "scale": "the future term keeps its size",
        },
    ),
    Method(
        key="r3l",
        kind="estimator",
        paper_id="2601.03715",
        title="R3L: retries trained from their branch point, successes amplified",
        tier=2,
        evidence={
            "exact": _TESTS + "test_r3l_worked_numbers",
            "formula": _TESTS + "test_r3l_against_a_plain_loop",
            "identity": _TESTS + "test_r3l_reduces_to_dr_grpo",
        },
        call=r3l,
        exempt={
            "constant": "rows of the greatest reward get a fixed advantage (max_rule)",
            "shift": "the rule for the greatest reward compares with a fixed number",
            "scale": "the rule for the greatest reward compares with a fixed number, and nothing divides by a deviation",
        },
    ),
    Method(
        key="intervention",
        kind="weight",
        paper_id="2601.14209",
        title="InT: which steps of a corrected rollout are imitated",
        tier=3,
        evidence={"reconstructed": _TESTS + "test_intervention_against_a_plain_loop"},
        call=intervention,
    ),
    Method(
        key="duration",
        kind="weight",
        paper_id="",
        title="Duration-aware weights: a sample counts by what it cost to produce",
        tier=2,
        evidence={
            "exact": _TESTS + "test_duration_worked_numbers",
            "formula": _TESTS + "test_duration_against_a_plain_loop",
        },
        call=duration,
        exempt={"isolation": "the weights have mean 1 over the whole batch"},
    ),
)
