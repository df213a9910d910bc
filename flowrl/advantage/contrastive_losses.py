"""Policy losses that compare the sequences of a group with one another.

Both give a loss a group. It is returned as PolicyLoss [B, T] whose unmasked elements share it out: the sum over the
steps of a group's rows is the group's loss. The mean over groups is therefore
``aggregate(loss, mask, "seq_sum_mean", denominator)`` with the number of groups that count (``contrasted_groups``,
summed over micro-batches and ranks). A group must not be cut by a micro-batch. Gradient flows into log_prob alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_flags, check_ids, check_mask, read_rewards, read_steps
from .loss_record import PolicyLoss, read_live_steps
from .method import Method
from .segments import Groups


def _row_sums(name: str, log_prob: Tensor, other_name: str, other: Tensor, mask: Tensor) -> Tensor:
    """Sum clamp(log_prob - other, -20, 20) over the unmasked steps: float32 or wider [B], gradient into log_prob."""
    check_mask(mask)
    kept = read_live_steps(name, log_prob, mask)
    return (kept - read_steps(other_name, other, mask, kept.dtype)).clamp(-20.0, 20.0).sum(1)


def _share_out(per_row: Tensor, mask: Tensor, dtype: torch.dtype) -> PolicyLoss:
    """Spread a row's loss over its unmasked steps, equally."""
    share = (per_row / mask.sum(1).clamp(min=1)).to(dtype)
    return PolicyLoss(loss=torch.where(mask, share[:, None], 0.0))


def contrasted_groups(group: Tensor, counts: Tensor) -> Tensor:
    """Count the distinct groups among the rows of ``counts`` (bool [B]): an int64 scalar; see ``copg``, ``real``."""
    check_ids("group", group, tuple(group.shape))
    check_flags("counts", counts, tuple(group.shape))
    return torch.tensor(len(torch.unique(group[counts])), device=group.device)


def copg_rows(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mark the rows that ``copg`` trains on: a reward, an unmasked step, and a partner in the group; bool [B]."""
    check_mask(mask, len(rewards))
    known = read_rewards(rewards, group, valid)[1] & mask.any(1)
    return known & (Groups.of(group, known).count() > 1)


def copg(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    beta: float = 0.1,
    scale: Literal["policy_gradient", "squared"] = "policy_gradient",
) -> PolicyLoss:
    """Regress regularised rewards onto each other, pair by pair: sum_{i>j} (Rb_i - Rb_j)^2 / (k - 1) a group.

    Rb_i = r_i - beta sum_t (log_prob - reference_log_prob), over the k rows of a group that have a reward and a step.
    Computed as k / (k - 1) sum_i (Rb_i - mean)^2, which is the same. The gradient in a row's log-prob is
    -2 beta RLOO(Rb)_i ("squared"); "policy_gradient" divides the loss by 2 beta, so that it is -RLOO(Rb)_i. No
    importance ratio: the samples may come from any policy.

    log_prob, reference_log_prob: floating [B, T]; differences are clamped to +-20 a step; mask: bool [B, T];
    rewards: [B], NaN for no value; group: int64 [B]; valid: bool [B]; beta: > 0 (default ours). Groups of one row give
    0. Where log_prob = reference_log_prob + r / beta + const in each group the loss is 0; two rows make a squared
    regression of the pair (IPO's shape). CoPG, 2406.19185. Raises ValueError, naming the argument, for a wrong shape,
    dtype or option.

    On denoising steps: as is, on sums of step log-ratios, or with ELBO differences in one column.
    """
    check_number("beta", beta, 0.0, strict=True, finite=False)
    if scale not in ("policy_gradient", "squared"):
        raise ValueError(f"scale: expected 'policy_gradient' or 'squared', got {scale!r}")
    drift = _row_sums("log_prob", log_prob, "reference_log_prob", reference_log_prob, mask)
    counts = copg_rows(rewards, group, mask, valid)
    groups = Groups.of(group, counts)
    value = torch.where(counts, rewards.detach().double(), 0.0) - beta * drift.double()
    centred = torch.where(counts, value - torch.where(counts, groups.mean(value), 0.0), 0.0)
    size = groups.count()
    loss = centred.square() * (size / (size - 1).clamp(min=1))
    return _share_out(loss / (2 * beta) if scale == "policy_gradient" else loss, mask, drift.dtype)


def real_rows(correct: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mark the rows that ``real`` trains on: valid, with an unmasked step, in a group with both classes; bool [B]."""
    check_mask(mask)
    check_flags("correct", correct, tuple(mask.shape[:1]))
    known = Groups.of(group, valid).valid & mask.any(1)
    check_ids("group", group, tuple(mask.shape[:1]))
    right, wrong = Groups.of(group, known & correct).count(), Groups.of(group, known & ~correct).count()
    return known & (right > 0) & (wrong > 0)


def _log_one_plus_sum(x: Tensor, group: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + sum over the group's members of exp(x)), and the members' number: float64 [B] each."""
    groups = Groups.of(group, member)
    top = groups.max(x.detach()).nan_to_num(nan=0.0).clamp(min=0.0)
    total = groups.sum((torch.where(member, x, 0.0) - top).exp())
    return ((-top).exp() + total).log() + top, groups.count()


def real(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    correct: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    tau: float = 0.5,
) -> PolicyLoss:
    """Classify right against wrong answers by the policy's own drift.

    A group's loss is log(1 + sum_right exp(-s / tau)) + log(1 + sum_wrong exp(s / tau)) with s_i the mean over unmasked
    steps of clamp(log_prob - old_log_prob, -20, 20). The weight of a row is at most 1 / tau, whatever its ratio. Groups
    without both classes are skipped.

    log_prob, old_log_prob: floating [B, T]; mask: bool [B, T]; correct: bool [B]; group: int64 [B]; valid: bool [B];
    tau: > 0. On-policy, with one right and one wrong row, the loss is 2 log 2 and the weights are 1 / (2 tau). REAL,
    2602.05630 (repository Red-RL/REAL; ms-swift). Raises ValueError, naming the argument, for a wrong shape, dtype or
    option.

    On denoising steps: make ``correct`` from a reward by a threshold or the group's median; s from step log-ratios
    or ELBO gaps.
    """
    check_number("tau", tau, 0.0, strict=True, finite=False)
    drift = _row_sums("log_prob", log_prob, "old_log_prob", old_log_prob, mask)
    counts = real_rows(correct, group, mask, valid)
    score = (drift / mask.sum(1).clamp(min=1)).double() / tau
    right, rights = _log_one_plus_sum(-score, group, counts & correct)
    wrong, wrongs = _log_one_plus_sum(score, group, counts & ~correct)
    per_row = torch.where(correct, right / rights.clamp(min=1), wrong / wrongs.clamp(min=1))
    return _share_out(torch.where(counts, per_row, 0.0), mask, drift.dtype)


_TESTS = "tests/advantage/test_contrastive_losses.py::"
_NO_RATIO = "no advantage enters: the gradient on-policy is that of a comparison inside the group"

METHODS: tuple[Method, ...] = (
    Method(
        key="copg",
        kind="policy_loss",
        paper_id="2406.19185",
        title="CoPG: squared differences of regularised rewards, off-policy without a ratio",
        tier=2,
        evidence={
            "exact": _TESTS + "test_copg_worked_numbers",
            "formula": _TESTS + "test_copg_against_a_plain_loop_over_pairs",
            "identity": _TESTS + "test_copg_gradient_is_rloo_of_the_regularised_rewards",
        },
        call=copg,
        joint=True,
        exempt={"on_policy": _NO_RATIO},
    ),
    Method(
        key="real",
        kind="policy_loss",
        paper_id="2602.05630",
        title="REAL: rewards as class labels, the drift of the log-prob as logit",
        tier=2,
        evidence={
            "exact": _TESTS + "test_real_worked_numbers",
            "formula": _TESTS + "test_real_against_a_plain_loop",
            "identity": _TESTS + "test_real_gradient_is_bounded_and_has_its_closed_form",
        },
        call=real,
        joint=True,
        exempt={"on_policy": _NO_RATIO},
    ),
)
