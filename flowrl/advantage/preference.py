"""Losses on preference pairs, with the regularisers that tie them to data or to fresh samples; resets to data.

A pair is two rows of the batch: chosen[p] is preferred to rejected[p] (int64 [P] row indices, repeats allowed). With
x_i = sum over unmasked steps of (log_prob - reference_log_prob), the margin of a pair is D = x_chosen - x_rejected, and
DPO's loss -log sigmoid(beta D). Gradient flows into log_prob alone; losses are float32 or wider. Everything raises
ValueError, naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import check_number, check_share
from .inputs import check_flags, check_ids, check_mask, read_steps
from .loss_record import read_live_steps
from .method import Method
from .ratios import widen


@dataclass(frozen=True)
class PairLoss:
    """loss: [P], one a pair, to be averaged. regulariser: [B, T] to be averaged over steps and added, or None."""

    loss: Tensor
    regulariser: Tensor | None = None


def _rows(log_prob: Tensor, reference_log_prob: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Check rows; return log_prob with its gradient and the reference without, both 0 on masked steps."""
    check_mask(mask)
    kept = read_live_steps("log_prob", log_prob, mask)
    return kept, read_steps("reference_log_prob", reference_log_prob, mask, kept.dtype)


def _check_pairs(chosen: Tensor, rejected: Tensor, rows: int) -> None:
    for name, index in (("chosen", chosen), ("rejected", rejected)):
        check_ids(name, index, (chosen.numel(),))
        if not bool(((index >= 0) & (index < rows)).all()):
            raise ValueError(f"{name}: expected row indices 0 to {rows - 1}, got {index.tolist()[:8]}")


def rpo(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.01,
    eta: float = 0.005,
    sft_reduce: Literal["sum", "mean"] = "sum",
) -> PairLoss:
    """Add a supervised term on the chosen row to DPO: L = -log sigmoid(beta D) - eta LP(chosen).

    The supervised term is what remains of a max-min over uncertain rewards. LP: sum of log_prob over unmasked steps,
    or their mean ("mean": TRL's rpo_alpha). log_prob, reference_log_prob: [B, T]; mask: bool [B, T]; chosen, rejected:
    int64 [P]; beta: > 0; eta: >= 0 (published: 0.01, 0.005). eta = 0 is DPO. RPO, 2405.16436.

    On denoising steps: Diffusion-DPO's margin from denoising losses, plus the denoising loss of the winner.
    """
    check_number("beta", beta, 0.0, strict=True, finite=False)
    if not eta >= 0 or sft_reduce not in ("sum", "mean"):
        raise ValueError(f"eta, sft_reduce: expected >= 0 and sum or mean, got {eta} and {sft_reduce!r}")
    kept, reference = _rows(log_prob, reference_log_prob, mask)
    _check_pairs(chosen, rejected, len(mask))
    drift = (kept - reference).sum(1)
    supervised = kept.sum(1) if sft_reduce == "sum" else kept.sum(1) / mask.sum(1).clamp(min=1)
    return PairLoss(-logsigmoid(beta * (drift[chosen] - drift[rejected])) - eta * supervised[chosen])


def online_kl_term(log_prob: Tensor, reference_log_prob: Tensor, mask: Tensor) -> Tensor:
    """Form the term whose gradient over fresh samples is that of KL: sg(log_prob - reference_log_prob) log_prob.

    [B, T], 0 on masked steps. Its value means nothing; averaged over samples of the policy, its gradient is the KL's.
    """
    kept, reference = _rows(log_prob, reference_log_prob, mask)
    return (kept.detach() - reference) * kept


def hypo(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    online: Tensor | None = None,
    *,
    beta: float = 0.1,
    coef: float = 1e-4,
    clamp_reference: bool = False,
) -> PairLoss:
    """Regularise offline DPO by a reverse KL on fresh samples, or by a reference that may not disagree with the label.

    The first (HyPO, 2406.01462): L = DPO + coef mean sg(log_prob - reference_log_prob) log_prob over the unmasked steps
    of the rows in ``online`` (bool [B], samples of the present policy); ``regulariser`` holds coef times that term,
    scaled so that its mean over all unmasked steps of the batch (step_mean) is the mean over the online ones. Without
    ``online`` there is none. The second (HyPO, 2602.11902), ``clamp_reference``: with D = D_policy - D_reference, the
    reference's margin is replaced by max(0, D_reference). Both off is DPO, and clamping changes nothing where the
    reference prefers the chosen row. log_prob, reference_log_prob: [B, T]; mask: bool [B, T]; chosen, rejected: int64
    [P]; beta: > 0; coef: >= 0. Reconstructed: summaries and abstracts; the loss's form and coef are not confirmed.

    On denoising steps: the exact KL of Gaussian steps on fresh trajectories replaces the sampled term.
    """
    check_number("beta", beta, 0.0, strict=True, finite=False)
    check_number("coef", coef, 0.0, finite=False)
    kept, reference = _rows(log_prob, reference_log_prob, mask)
    _check_pairs(chosen, rejected, len(mask))
    policy, base = kept.sum(1), reference.sum(1)
    margin = base[chosen] - base[rejected]
    if clamp_reference:
        margin = margin.clamp(min=0.0)
    loss = -logsigmoid(beta * (policy[chosen] - policy[rejected] - margin))
    if online is None:
        return PairLoss(loss)
    check_flags("online", online, tuple(mask.shape[:1]))
    fresh = mask & online[:, None]
    scale = coef * mask.sum().to(kept.dtype) / fresh.sum().clamp(min=1)
    return PairLoss(loss, scale * torch.where(fresh, (kept.detach() - reference) * kept, 0.0))


@dataclass(frozen=True)
class Reset:
    """prefix: int64 [B], unmasked steps taken from the data; mask: bool [B, T], the steps left to the policy."""

    prefix: Tensor
    mask: Tensor


def reset_lengths(length: Tensor, uniform: Tensor, *, probability: float = 1.0) -> Tensor:
    """Draw how many steps of a labelled row a rollout starts from; int64 [B], 0 .. length - 1, 0 for an empty row.

    length: real [B] >= 0, whole numbers; uniform: [B, 2] in [0, 1): the first tells whether the row is reset (below
    ``probability``, in [0, 1]), the second where to, uniformly. Rows that are not reset start from nothing.
    """
    if length.ndim != 1 or not bool(((length >= 0) & (length == length.floor())).all()):
        raise ValueError(f"length: expected whole numbers >= 0 [B], got {length.dtype} {list(length.shape)}")
    if uniform.shape != (len(length), 2) or not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError(f"uniform: expected [{len(length)}, 2] in [0, 1), got {list(uniform.shape)}")
    check_share("probability", probability)
    size, draw = length.double(), uniform.double()
    return torch.where(draw[:, 0] < probability, (draw[:, 1] * size).floor(), 0.0).long()


def suffix_mask(prefix: Tensor, mask: Tensor) -> Tensor:
    """Keep the unmasked steps after the first ``prefix`` (int64 [B]) unmasked ones; bool [B, T]."""
    check_mask(mask)
    check_ids("prefix", prefix, tuple(mask.shape[:1]))
    return mask & (mask.long().cumsum(1) > prefix[:, None])


def dr_po(mask: Tensor, uniform: Tensor, *, probability: float = 1.0) -> Reset:
    """Start rollouts from random prefixes of labelled rows and train on what follows.

    mask: bool [B, T], the steps of the labelled rows; uniform: [B, 2] in [0, 1), see ``reset_lengths``; probability:
    share of rollouts that are reset (the released script: 1). Any policy-gradient method trains on ``Reset.mask``.
    probability = 0 leaves the mask as it is. DR-PO, 2404.08495.

    On denoising steps: start the SDE from a reference image noised to step ``prefix``.
    """
    check_mask(mask)
    prefix = reset_lengths(mask.sum(1), uniform, probability=probability)
    return Reset(prefix=prefix, mask=suffix_mask(prefix, mask))


def polar_ranking(scores: Tensor, *, pairs: Literal["all", "adjacent"] = "all") -> Tensor:
    """Rank outputs by a Bradley-Terry loss: mean over ordered pairs i < j of -log sigmoid(s_i - s_j); float32 [B].

    scores: floating [B, K], K >= 2 columns from best to worst (triples in the source: same policy, near, far), NaN for
    no value: its pairs are left out, and a row without a pair gives 0. pairs: "all", or neighbours only. The gradient
    flows into ``scores``. Such scores are unbounded and only comparable for one prompt, so normalise them per group
    before use as rewards. POLAR, 2507.05197. Reconstructed: from the README and memory.

    On denoising steps: a scorer conditioned on a reference image.
    """
    if scores.ndim != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floating [B, K] with K >= 2, got {scores.dtype} {list(scores.shape)}")
    if pairs not in ("all", "adjacent"):
        raise ValueError(f"pairs: expected 'all' or 'adjacent', got {pairs!r}")
    known = ~scores.isnan()
    value = widen(torch.where(known, scores, 0.0))
    size = scores.shape[1]
    better, worse = torch.triu_indices(size, size, 1, device=scores.device)
    if pairs == "adjacent":
        better, worse = better[worse - better == 1], worse[worse - better == 1]
    counts = known[:, better] & known[:, worse]
    loss = torch.where(counts, -logsigmoid(value[:, better] - value[:, worse]), 0.0)
    return loss.sum(1) / counts.sum(1).clamp(min=1)


_TESTS = "tests/advantage/test_preference.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="rpo",
        kind="objective",
        paper_id="2405.16436",
        title="RPO: DPO with a supervised term on the chosen row",
        tier=2,
        evidence={
            "formula": _TESTS + "test_rpo_against_a_plain_loop",
            "identity": _TESTS + "test_both_reduce_to_dpo",
        },
        call=rpo,
    ),
    Method(
        key="hypo",
        kind="objective",
        paper_id="2406.01462",
        title="HyPO: DPO with a reverse KL on fresh samples (2602.11902: with a clamped reference margin)",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_hypo_against_a_plain_loop",
            "exact": _TESTS + "test_online_term_has_the_exact_kl_gradient",
            "identity": _TESTS + "test_both_reduce_to_dpo",
        },
        call=hypo,
    ),
    Method(
        key="dr_po",
        kind="curriculum",
        paper_id="2404.08495",
        title="DR-PO: rollouts from random prefixes of labelled data",
        tier=2,
        evidence={
            "exact": _TESTS + "test_dr_po_worked_numbers",
            "formula": _TESTS + "test_suffix_mask_by_a_plain_loop",
        },
        call=dr_po,
    ),
    Method(
        key="polar_ranking",
        kind="reward",
        paper_id="2507.05197",
        title="POLAR: Bradley-Terry ranking of outputs against a reference",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_polar_worked_numbers",
            "formula": _TESTS + "test_polar_against_a_plain_loop",
        },
        call=polar_ranking,
    ),
)
