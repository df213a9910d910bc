"""Curricula, hints and prefixes: the labels, masks, replacements and schedules that the engine owns.

Rewriters, hint writers and stored traces are the caller's. A NaN reward is no value; a group without any is neither
solved nor failed. A prefix or a hint changes the states that a row starts from, so rows that differ in it must not
share a group: ``prefix_groups``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_flags, check_ids, check_mask, read_rewards
from .method import Method
from .segments import Groups

HARD, MEDIUM, EASY = 0, 1, 2


@dataclass(frozen=True)
class Difficulty:
    """What CLPO says of each row, all [B].

    label: int64 HARD, MEDIUM or EASY, -1 for a group without a valid row; train: bool, the row's own prompt is worth
    training on; rewrite: bool, the prompt goes to the rewriter (a hard one to be made simpler, a medium one to be
    varied); kl_scale: float32, the factor of the row's KL penalty.
    """

    label: Tensor
    train: Tensor
    rewrite: Tensor
    kl_scale: Tensor


def difficulty_label(accuracy: Tensor, *, hard: float = 0.3, easy: float = 0.7) -> Tensor:
    """Label accuracies: HARD (0) up to ``hard``, MEDIUM (1) up to ``easy``, EASY (2) above; int64, -1 for NaN.

    accuracy: floating, any shape, in [0, 1]; both bounds belong to the label below them, in the dtype of ``accuracy``
    (a float32 0.3 is hard). CLPO, 2509.25004.
    """
    if not 0 <= hard <= easy <= 1:
        raise ValueError(f"hard, easy: expected 0 <= hard <= easy <= 1, got {hard} and {easy}")
    if not accuracy.is_floating_point() or bool(((accuracy < 0) | (accuracy > 1)).any()):
        raise ValueError(f"accuracy: expected floating numbers in [0, 1], got {accuracy.dtype} {list(accuracy.shape)}")
    label = (accuracy > hard).long() + (accuracy > easy).long()
    return torch.where(accuracy.isnan(), -1, label)


def clpo(
    correct: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    hard: float = 0.3,
    easy: float = 0.7,
    hard_kl: float = 0.5,
) -> Difficulty:
    """Sort prompts by their accuracy: what to train on, what to rewrite, how tightly to hold the policy there.

    accuracy = share of correct rows of the group; label by ``difficulty_label``; train where 0 < accuracy < 1; rewrite
    where hard or medium; kl_scale = hard_kl where hard, else 1. correct: bool [B]; group: int64 [B]; valid: bool [B].

    CLPO, 2509.25004, repository csuking/CLPO; its scripts have hard_kl 0.5, its YAML default is 1. On denoising steps:
    as it is, a prompt rewriter works for images; correct is a reward above a threshold.
    """
    check_number("hard_kl", hard_kl, 0.0)
    groups = _read_correct(correct, group, valid)
    accuracy = groups.mean(correct)
    label = difficulty_label(accuracy, hard=hard, easy=easy)
    return Difficulty(
        label=label,
        train=groups.valid & (accuracy > 0) & (accuracy < 1),
        rewrite=(label == HARD) | (label == MEDIUM),
        kl_scale=torch.where(label == HARD, hard_kl, 1.0).float(),
    )


def _read_correct(correct: Tensor, group: Tensor, valid: Tensor | None) -> Groups:
    groups = Groups.of(group, valid)
    check_flags("correct", correct, tuple(group.shape))
    return groups


def all_fail(rewards: Tensor, group: Tensor, valid: Tensor | None = None, *, threshold: float = 0.0) -> Tensor:
    """Mark the rows of groups whose every valid reward is at most ``threshold``: bool [B].

    rewards: float [B], compared in their own dtype (a float32 0.2 is not above 0.2); group: int64 [B]. A group without
    a valid reward has not failed.
    """
    mask = read_rewards(rewards, group, valid)[1]
    groups = Groups.of(group, mask)
    return (groups.sum(rewards > threshold) == 0) & (groups.count() > 0)


@dataclass(frozen=True)
class Replacement:
    """Which rows a hinted rollout takes the place of, all [B].

    row: bool; level: int64, the hint level that it succeeded at, -1 elsewhere; source: int64, its place among the
    hinted rollouts flattened to [P L], -1 elsewhere: the index for ``replace_rows``.
    """

    row: Tensor
    level: Tensor
    source: Tensor


def pick_replacements(success: Tensor) -> Tensor:
    """Find the lowest hint level that led to success: bool [P, L] -> int64 [P], -1 where none did."""
    if success.dtype != torch.bool or success.ndim != 2 or success.shape[1] == 0:
        raise ValueError(f"success: expected bool [P, L] with L >= 1, got {success.dtype} {list(success.shape)}")
    return torch.where(success.any(1), success.long().argmax(1), -1)


def scaf_grpo(
    rewards: Tensor,
    group: Tensor,
    slot: Tensor,
    success: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.0,
    step: int | None = None,
    exempt_steps: int = 50,
) -> Replacement:
    """Give a group that failed throughout one success: its first valid row makes way for the least hinted one.

    rewards: float [B]; group: int64 [B]; slot: int64 [B], the row's place among the P prompts of ``success`` (one slot
    a group); success: bool [P, L], the rollout under each level of hints solved it (levels from the weakest: knowledge,
    planning, solution; 4 each in the source); threshold: as ``all_fail``; step: training step, None for past the
    exemption; exempt_steps: nothing is replaced before it (50 in the code, about 15% of training in the paper).
    Groups with a success of their own, and those that no hint helped, keep all rows.

    The row is trained under the prompt without the hint, so its old log-probs must be computed again under that
    prompt. Scaf-GRPO, 2510.19807. On denoising steps: a hint is a better start, such as a partly denoised reference.
    """
    check_ids("slot", slot, tuple(group.shape))
    level = pick_replacements(success)
    if bool(((slot < 0) | (slot >= len(success))).any()):
        raise ValueError(f"slot: expected 0 to {len(success) - 1}, got {int(slot.min())} to {int(slot.max())}")
    mask = read_rewards(rewards, group, valid)[1]
    place = torch.arange(len(group), device=group.device)
    first = place == Groups.of(group, mask).min(place)
    row = first & all_fail(rewards, group, valid, threshold=threshold) & (level[slot] >= 0)
    if step is not None and step < exempt_steps:
        row = torch.zeros_like(row)
    at = torch.where(row, level[slot], -1)
    return Replacement(row=row, level=at, source=torch.where(row, slot * success.shape[1] + at, -1))


def replace_rows(x: Tensor, source: Tensor, replacement: Tensor) -> Tensor:
    """Put rows of ``replacement`` into ``x``: x_i, or replacement[source_i] where source_i >= 0.

    x: [B, ...], any dtype (rewards, tokens, log-probs, masks); source: int64 [B]; replacement: [N, ...] of the same
    dtype and further shape.
    """
    check_ids("source", source, tuple(x.shape[:1]))
    if replacement.shape[1:] != x.shape[1:] or replacement.dtype != x.dtype or len(replacement) == 0:
        raise ValueError(
            f"replacement: expected {x.dtype} [N, *{list(x.shape[1:])}] with N >= 1, got {replacement.dtype} "
            f"{list(replacement.shape)}"
        )
    if bool((source >= len(replacement)).any()):
        raise ValueError(f"source: expected less than {len(replacement)}, got {int(source.max())}")
    chosen = (source >= 0).view(-1, *(1,) * (x.ndim - 1))
    return torch.where(chosen, replacement[source.clamp(min=0)], x)


def next_hint_ratio(fail: Tensor, hint_ratio: Tensor, *, stride: float = 0.25, maximum: float = 0.75) -> Tensor:
    """Lengthen the hint where all failed: min(ratio + stride, maximum), else the ratio as it is; float32.

    fail: bool, any shape; hint_ratio: float in [0, 1], the same shape, the share of the solution that is given away
    now. GHPO, 2507.10628: 25%, 50%, 75%.
    """
    if not (0 < stride <= 1 and 0 < maximum <= 1):
        raise ValueError(f"stride, maximum: expected numbers in (0, 1], got {stride} and {maximum}")
    check_flags("fail", fail, tuple(hint_ratio.shape))
    ratio = hint_ratio.detach().float()
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError("hint_ratio: expected numbers in [0, 1]")
    return torch.where(fail, (ratio + stride).clamp(max=maximum).maximum(ratio), ratio)


def ghpo(
    rewards: Tensor,
    group: Tensor,
    hint_ratio: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.0,
    stride: float = 0.25,
    maximum: float = 0.75,
) -> Tensor:
    """Say how much of the solution each row's next attempt is given: float32 [B], ``next_hint_ratio`` of its group.

    rewards: float [B]; group: int64 [B]; hint_ratio: float [B] in [0, 1], given in this attempt; threshold: as
    ``all_fail``. A group with any success keeps its ratio. GHPO, 2507.10628 (no KL penalty, from the first step on).
    On denoising steps: the share of the schedule that a reference has already been denoised (``prefix_rl``).
    """
    failed = all_fail(rewards, group, valid, threshold=threshold)
    if hint_ratio.shape != failed.shape:
        raise ValueError(f"hint_ratio: expected {list(failed.shape)}, got {list(hint_ratio.shape)}")
    return next_hint_ratio(failed, hint_ratio, stride=stride, maximum=maximum)


@dataclass(frozen=True)
class PrefixBatch:
    """group: int64 [B], rows of one prompt and one prefix share an id; mask: bool [B, T], steps after the prefix."""

    group: Tensor
    mask: Tensor


def sample_prefix(
    length: Tensor, uniform: Tensor, *, plain: float = 0.5, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Draw how many steps of a correct trace each row starts with: int64 [B], 0 for a plain row.

    A row is plain with probability ``plain``; else k = floor(length (low + (high - low) v)), v uniform, below length.
    length: float or int [B], >= 1, steps of the trace; uniform: float [B] in [0, 1), the only randomness.
    PrefixRL, 2601.18795.
    """
    if not (0 <= plain <= 1 and 0 <= low <= high <= 1):
        raise ValueError(f"plain, low, high: expected 0 <= plain, low <= high <= 1, got {plain}, {low}, {high}")
    if length.ndim != 1 or not bool((length >= 1).all()):
        raise ValueError(f"length: expected [B] numbers >= 1, got {list(length.shape)}")
    if uniform.shape != length.shape or not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError(f"uniform: expected {list(length.shape)} numbers in [0, 1), got {list(uniform.shape)}")
    steps, u = length.double(), uniform.double()
    share = low + (high - low) * (u - plain) / max(1 - plain, 1e-12)
    drawn = (steps * share).minimum(steps - 1).floor()
    return torch.where(u < plain, 0.0, drawn).long()


def suffix_mask(mask: Tensor, prefix: Tensor) -> Tensor:
    """Take the first ``prefix`` steps of each row out of ``mask``: bool [B, T]. prefix: int64 [B], >= 0."""
    check_mask(mask)
    check_ids("prefix", prefix, tuple(mask.shape[:1]))
    if bool((prefix < 0).any()):
        raise ValueError(f"prefix: expected numbers >= 0, got {int(prefix.min())}")
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= prefix[:, None])


def prefix_groups(group: Tensor, prefix_id: Tensor, prefix: Tensor) -> Tensor:
    """Split groups by prefix: rows of one prompt, one trace and one cut share an id; int64 [B], 0, 1, ...

    group: int64 [B]; prefix_id: int64 [B], the trace that the prefix was cut from; prefix: int64 [B], steps of it. All
    plain rows (prefix 0) of a prompt share an id, whatever their prefix_id.
    """
    check_ids("prefix_id", prefix_id, tuple(group.shape))
    check_ids("prefix", prefix, tuple(group.shape))
    trace = torch.where(prefix > 0, prefix_id, 0)
    index = Groups.of(group).index
    for part in (trace, prefix):  # two compactions of pairs, so that ids of any size fit in int64
        finer = Groups.of(part)
        index = Groups.of(index * finer.number + finer.index).index
    return index


def prefix_rl(group: Tensor, prefix_id: Tensor, prefix: Tensor, mask: Tensor) -> PrefixBatch:
    """Prepare rows that start from a stored prefix: no loss on it, and statistics per prompt and prefix.

    group, prefix_id, prefix: int64 [B], see ``prefix_groups``; mask: bool [B, T], columns from the row's first step,
    prefix included. Rows with an easier start would otherwise lift the baseline of the plain rows of their prompt.
    With prefix 0 everywhere: the same groups and mask. PrefixRL, 2601.18795. On denoising steps: the prefix is a
    good trajectory down to x_k, from which the row branches; the mask is the same.
    """
    return PrefixBatch(group=prefix_groups(group, prefix_id, prefix), mask=suffix_mask(mask, prefix))


def otc(
    correct: Tensor,
    cost: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    form: Literal["grpo", "ppo"] = "grpo",
    alpha: float = 1.0,
    smooth: float = 4.0,
) -> Tensor:
    """Pay a right answer more the fewer calls it took: r = alpha r_tool [correct], float32 [B].

    m is the row's cost and n the least cost among the valid correct rows of its group. grpo: r_tool = sin(f pi / 2n)
    with f = 2 n m / (m + n) where n > 0 (1 at m = n, falling towards 0), and the ppo form where n = 0. ppo: r_tool =
    cos(m pi / (2 m + smooth)), no group needed. correct: bool [B]; cost: float [B], >= 0 on valid rows (calls of a
    tool); group: int64 [B]; smooth: > 0, how slowly it falls (the source leaves it open). A wrong or invalid row
    has 0, so calls are never saved at the price of the answer.

    OTC, 2504.14870, whose r_tool is multiplied in. On denoising steps: the cost is the number of network calls.
    """
    if form not in ("grpo", "ppo"):
        raise ValueError(f"form: expected 'grpo' or 'ppo', got {form!r}")
    if not (math.isfinite(smooth) and smooth > 0 and math.isfinite(alpha)):
        raise ValueError(f"smooth, alpha: expected a number > 0 and a number, got {smooth} and {alpha}")
    right = _read_correct(correct, group, valid).valid & correct
    if cost.shape != correct.shape or not bool(((cost >= 0) & cost.isfinite())[right].all()):
        raise ValueError(f"cost: expected {list(correct.shape)} finite numbers >= 0, got {list(cost.shape)}")
    calls = torch.where(right, cost.detach().double(), 0.0)
    tool = (calls * math.pi / (2 * calls + smooth)).cos()
    if form == "grpo":
        least = Groups.of(group, right).min(calls)
        tool = torch.where(least > 0, (calls * math.pi / (calls + least)).sin(), tool)
    return torch.where(right, alpha * tool, 0.0).float()


def hierarchical_reward(
    rewards: Tensor,
    weights: Tensor | None = None,
    tier: Tensor | None = None,
    *,
    threshold: float = 0.5,
    count_gates: bool = True,
) -> Tensor:
    """Add reward channels tier by tier, each only where the tiers before it passed: float32 [B].

    r_i = sum_k w_k r_ik [every r_ij >= threshold with tier_j < tier_k]. rewards: float [B, R]; weights: float [R], ones
    by default; tier: int64 [R], by default channel 0 is the gate and the rest one tier behind it; count_gates: the
    channels of every tier but the last are added too, or only gate. NaN does not apply: it adds 0 and blocks nothing;
    a row of NaN has no value (NaN).

    RL-Struct, 2512.00319; reconstructed: only the abstract could be read, and the paper may have been withdrawn. On
    denoising steps: as it is; the gate is a validity check of the image.
    """
    if rewards.ndim != 2 or rewards.numel() == 0 or bool(rewards.isinf().any()):
        raise ValueError(f"rewards: expected [B, R] without infinities, B, R >= 1, got {list(rewards.shape)}")
    channels = rewards.shape[1]
    weight = torch.ones(channels, device=rewards.device) if weights is None else weights
    if weight.shape != (channels,) or not bool(weight.isfinite().all()):
        raise ValueError(f"weights: expected [{channels}] finite numbers, got {list(weight.shape)}")
    order = (torch.arange(channels, device=rewards.device) > 0).long() if tier is None else tier
    check_ids("tier", order, (channels,))
    value = rewards.detach().double()
    failed = torch.where(rewards < threshold, order, int(order.max()))
    counted = order <= failed.min(1, keepdim=True).values
    if not count_gates:
        counted = counted & (order == order.max())
    summed = torch.where(counted & ~value.isnan(), value * weight.double(), 0.0).sum(1)
    return torch.where(value.isnan().all(1), torch.nan, summed).float()


_CURRICULUM = "tests/advantage/test_curriculum.py::"


_ENTRIES: tuple[tuple[str, str, str, str, Callable[..., object], dict[str, str]], ...] = (
    ("clpo", "curriculum", "2509.25004", "CLPO: prompts by accuracy: train, rewrite, KL factor", clpo,
     {"exact": "test_difficulty_boundaries", "formula": "test_clpo_against_plain_loop"}),
    ("scaf_grpo", "curriculum", "2510.19807", "Scaf-GRPO: a failed group gets its least hinted success", scaf_grpo,
     {"exact": "test_scaf_grpo_worked_batch", "formula": "test_scaf_grpo_against_plain_loop",
      "identity": "test_without_success_nothing_is_replaced"}),
    ("ghpo", "curriculum", "2507.10628", "GHPO: a failed group is given more of the solution", ghpo,
     {"exact": "test_hint_ratio_steps"}),
    ("prefix_rl", "curriculum", "2601.18795", "PrefixRL: rows that start from a stored prefix", prefix_rl,
     {"exact": "test_groups_include_the_prefix", "formula": "test_prefix_groups_against_plain_loop",
      "identity": "test_no_prefix_changes_nothing"}),
    ("otc", "reward", "2504.14870", "OTC: a right answer earns more with fewer calls", otc,
     {"exact": "test_otc_worked_numbers", "formula": "test_otc_against_plain_loop"}),
    ("rl_struct", "reward", "2512.00319", "RL-Struct: reward tiers behind gates", hierarchical_reward,
     {"reconstructed": "test_hierarchical_reward_worked_numbers", "formula": "test_hierarchical_against_plain_loop",
      "identity": "test_open_gates_are_a_weighted_sum"}),
)  # fmt: skip


METHODS: tuple[Method, ...] = tuple(
    Method(
        key=key,
        kind=kind,
        paper_id=paper_id,
        title=title,
        tier=3 if "reconstructed" in evidence else 2,
        evidence={label: _CURRICULUM + test for label, test in evidence.items()},
        call=call,
    )
    for key, kind, paper_id, title, call, evidence in _ENTRIES
)
