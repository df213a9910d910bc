"""Outcome advantages with a process term: implicit rewards from log-ratios, cumulative log-ratios, step scores.

What the methods share (a NaN reward, steps outside every segment, masked steps, float32) is in ``local_terms``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_choice, check_number
from .estimators import dr_grpo, grpo, rloo
from .inputs import check_flags, check_ids, check_mask, read_rewards, read_segments, read_steps
from .local_terms import Norm, combine, count_steps, normalise, read_table
from .method import Method
from .record import Advantage
from .segments import Groups
from .statistics import Singleton
from .steps import reverse_scan, segment_reduce

Baseline = Literal["loo", "mean", "std"]


def _episodes(group: Tensor, trajectory: Tensor | None) -> tuple[Tensor, int, Tensor]:
    """Number the episodes: int64 [B], how many there are, and the group of each, int64 [E]."""
    if trajectory is None:
        return torch.arange(len(group), device=group.device), len(group), group
    check_ids("trajectory", trajectory, (len(group),))
    ids, index = torch.unique(trajectory, return_inverse=True)
    owner = torch.zeros(len(ids), dtype=torch.int64, device=group.device).scatter_(0, index, group)
    if bool((owner[index] != group).any()):
        raise ValueError("trajectory: rows of one trajectory belong to different groups")
    return index, len(ids), owner


def _episode_advantage(
    rewards: Tensor, group: Tensor, trajectory: Tensor | None, baseline: str, eps: float
) -> Advantage:
    """Take the outcome advantage over episodes, each counted once, and give it to its rows."""
    value, known = read_rewards(rewards, group, None)
    index, number, owner = _episodes(group, trajectory)
    episodes = Groups.of(index, known)
    if bool((episodes.max(value) > episodes.min(value)).any()):
        raise ValueError("rewards: rows of one trajectory have different outcomes")
    mean = torch.full((number,), torch.nan, dtype=torch.float64, device=value.device)
    mean[index[known]] = value[known]
    if baseline == "loo":
        result = rloo(mean, owner, ddof=1)
    else:
        result = dr_grpo(mean, owner, ddof=1) if baseline == "mean" else grpo(mean, owner, ddof=1, eps=eps)
    group_mean, group_std = result.group_mean, result.group_std
    return Advantage(
        advantage=result.advantage[index],
        weight=known.float(),
        loss_mask=known,
        live=result.live[index],
        group_mean=None if group_mean is None else group_mean[index],
        group_std=None if group_std is None else group_std[index],
    )


def _first_steps(present: Tensor, index: Tensor, number: int) -> Tensor:
    """bool [B, S]: the first segment with a step, of the first row of each episode that has one."""
    rows = len(present)
    position = torch.arange(rows, device=index.device)
    some = present.any(dim=1)
    least = torch.full((number,), rows, dtype=torch.int64, device=index.device)
    least.scatter_reduce_(0, index, torch.where(some, position, rows), reduce="amin")
    chosen = some & (least[index] == position)
    return chosen[:, None] & present & (present.long().cumsum(dim=1) == 1)


def oprl(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    segment: Tensor,
    process_log_prob: Tensor,
    old_log_prob: Tensor,
    trajectory: Tensor | None = None,
    *,
    beta: float = 0.05,
    step_weight: float = 1.0,
    baseline: Baseline = "loo",
    step_mean: Literal["all", "first"] = "all",
    eps: float = 1e-6,
) -> Advantage:
    """Add to the episode advantage that of each step's implicit reward, the log-ratio of a process reward model.

    r_k = beta sum over the steps of segment k of (process_log_prob - old_log_prob); A = A_E + step_weight A_S, with
    A_E the outcome over the episodes of the group and A_S the r_k over all segments of the group, each one datum.

    rewards: [B], one outcome an episode; trajectory: int64 [B] where an episode spans several rows (they share group
    and outcome; the episode counts once), else a row is an episode. baseline, of both terms: "loo" n/(n-1) (x - mean),
    "mean" without the factor, "std" over (deviation + eps), ddof 1. step_mean: "all" segments of the group (paper), or
    "first", the public code's: mean, deviation and n over the first segment of each episode (rows in their order).
    OPRL / iStar, 2509.19199. step_weight 0 is RLOO; the r_k of an episode add up to beta log(pi_prm / pi_old) of it.
    The code's REINFORCE++ form is "mean" with whitening over steps afterwards. ``oprl_pair_loss`` trains the model.
    On denoising steps: the log-ratio of a transition, as in Diffusion-DPO (a difference of squared errors over
    2 sigma^2); a segment is a block of transitions.
    """
    check_number("beta", beta)
    check_number("step_weight", step_weight)
    check_choice("baseline", baseline, ("loo", "mean", "std"))
    check_choice("step_mean", step_mean, ("all", "first"))
    norm = Norm("group", "loo" if baseline == "loo" else "mean", divide=baseline == "std", ddof=1, eps=eps)
    outcome = _episode_advantage(rewards, group, trajectory, baseline, eps)
    check_mask(mask, len(group))
    ratio = _log_ratio("process_log_prob", process_log_prob, old_log_prob, mask)
    segment = read_segments(segment, mask)
    reward = beta * segment_reduce(ratio, segment, mask)
    count = count_steps(segment, reward.shape[1]) * outcome.loss_mask[:, None]
    index, number, _ = _episodes(group, trajectory)
    pool = _first_steps(count > 0, index, number) if step_mean == "first" else None
    return combine(outcome, normalise(reward, count, Groups.of(group), norm, pool), step_weight, mask, group, segment)


def _log_ratio(name: str, log_prob: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Check both and return ``log_prob`` (called ``name``) - old_log_prob: [B, T], 0 on masked steps."""
    wide = torch.promote_types(torch.promote_types(log_prob.dtype, other.dtype), torch.float32)
    return read_steps(name, log_prob, mask, wide) - read_steps("old_log_prob", other, mask, wide)


def oprl_pair_loss(
    process_log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    group: Tensor,
    correct: Tensor,
    trajectory: Tensor | None = None,
    segment: Tensor | None = None,
    *,
    beta: float = 0.05,
    seq_reduce: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Train the process reward model on pairs: the mean of -log sigmoid(s_good - s_bad) over pairs inside groups.

    s = sum over the steps of an episode of beta (process_log_prob - old_log_prob); a pair is a right and a wrong
    episode of one group, and all pairs of the batch weigh the same. Returns a float32 (or wider) scalar, 0 without a
    pair. Gradient into process_log_prob alone.

    correct: bool [B]; trajectory: int64 [B], where an episode spans several rows (right if one of its rows is);
    seq_reduce: "sum" (paper), or "mean" (the public code) over the segments of the episode, which needs ``segment``
    (int64 [B, T]; without it every step is a segment). Memory grows with the number of pairs. OPRL / iStar,
    2509.19199, trajectory-level DPO.
    On denoising steps: Diffusion-DPO with both samples from the group.
    """
    check_number("beta", beta)
    check_choice("seq_reduce", seq_reduce, ("sum", "mean"))
    check_mask(mask)
    check_ids("group", group, (len(mask),))
    check_flags("correct", correct, (len(mask),))
    for name, x in (("process_log_prob", process_log_prob), ("old_log_prob", old_log_prob)):
        read_steps(name, x, mask)
    wide = torch.promote_types(process_log_prob.dtype, torch.float32)
    ratio = process_log_prob.to(wide) - old_log_prob.detach().to(wide)
    kept = mask.long() - 1 if segment is None else read_segments(segment, mask)
    score = beta * torch.where(kept >= 0, ratio, 0.0).sum(dim=1)
    index, number, owner = _episodes(group, trajectory)
    total = score.new_zeros(number).index_add(0, index, score)
    if seq_reduce == "mean":
        parts = mask.sum(dim=1) if segment is None else (count_steps(kept, mask.shape[1]) > 0).sum(dim=1)
        total = total / torch.zeros_like(total).index_add(0, index, parts.to(wide)).clamp(min=1)
    right = torch.zeros(number, dtype=torch.int64, device=index.device).index_add_(0, index, correct.long()) > 0
    good, bad = _pairs(owner, right)
    return -torch.nn.functional.logsigmoid(total[good] - total[bad]).sum() / max(len(good), 1)


def _pairs(group: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """List every (right, wrong) pair of members of one group: two int64 [P] of positions."""
    index = torch.unique(group, return_inverse=True)[1]
    wrong = torch.argsort(torch.where(right, index.max() + 1, index), stable=True)  # by group, the right ones last
    size = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=group.device).index_add_(
        0, index, (~right).long()
    )
    start = size.cumsum(0) - size
    members = right.nonzero()[:, 0]
    number = size[index[members]]
    good = members.repeat_interleave(number)
    offset = torch.arange(len(good), device=group.device) - (number.cumsum(0) - number).repeat_interleave(number)
    return good, wrong[start[index[good]] + offset]


def prl(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    old_log_prob: Tensor,
    reference_log_prob: Tensor,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    eta: float = 200.0,
    block: int = 256,
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: Singleton = "zero",
) -> Advantage:
    """Take the log-ratio that is still to come off the outcome: the process reward that maximises reward minus KL.

    r_t = A_outcome - (1/eta) sum_{s >= t} (old_log_prob_s - reference_log_prob_s); A_t = r at the last step of the
    segment of t.

    segment: the reasoning steps; without it every ``block`` unmasked steps are one, and the rest of the row another.
    eta: > 0, infinity is GRPO. PRL, 2601.10201 (code: 256 steps a block, GRPO with ddof 1, eps 1e-6, singleton "raw").
    With one step a segment it is the return-to-go of a reward A_outcome at the end and -(1/eta) log-ratio at each
    step, that is GAE with value 0 and gamma = lambda = 1; with one segment it is A_outcome - last log-ratio / eta.
    On denoising steps: as it is; the KL of a transition in closed form has less variance than the sampled log-ratio:
    pass it as old_log_prob, with zeros as reference_log_prob.
    """
    check_number("eta", eta, 0.0, strict=True, finite=False)
    if block < 1:
        raise ValueError(f"block: expected at least one step, got {block}")
    outcome = grpo(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton)
    check_mask(mask, len(group))
    ahead = reverse_scan(-_log_ratio("reference_log_prob", reference_log_prob, old_log_prob, mask), 1.0)
    if segment is None:
        segment = by_rows(_blocks_of(block), mask)[0]
    else:
        segment = read_segments(segment, mask)
    at_end = segment_reduce(ahead, segment, mask, "last")
    return combine(outcome, at_end, 0.0 if math.isinf(eta) else -1.0 / eta, mask, group, segment)


def _blocks_of(block: int) -> Callable[[Tensor], tuple[Tensor]]:
    """Number every ``block`` unmasked steps of a row one segment: bool [B, T] -> int32 [B, T], -1 on masked ones."""

    def numbered(mask: Tensor) -> tuple[Tensor]:
        position = mask.cumsum(dim=1, dtype=torch.int32).sub_(1)
        return (torch.where(mask, position.div_(block, rounding_mode="floor"), -1),)

    return numbered


def prorag(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    segment: Tensor,
    stage_reward: Tensor,
    valid: Tensor | None = None,
    *,
    beta: float = 0.3,
    ddof: int = 1,
    eps: float = 1e-4,
    step_eps: float = 1e-8,
    singleton: Singleton = "zero",
) -> Advantage:
    """Add the score of each reasoning step, standardised over all unmasked steps of the group, to the outcome.

    A = (R - mean_g) / (std_g + eps) + beta (score - m_g) / (s_g + step_eps); m_g, s_g (ddof 0) over the steps of all
    rows of the group, each with the score of its segment, so long rows weigh more and a row's process terms need not
    add up to 0.

    stage_reward: [B, S], score of each segment, NaN for none (it leaves the statistics and adds 0). ddof, eps: of the
    outcome. ProRAG, 2601.21912 (beta 0.3 in its script, 0.5 in its class). beta 0, or a constant score, is GRPO.
    On denoising steps: a process reward model on blocks of steps.
    """
    check_number("beta", beta)
    norm = Norm("group_steps", eps=step_eps)
    outcome = grpo(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton)
    check_mask(mask, len(group))
    score = read_table("stage_reward", stage_reward, len(group))
    segment = read_segments(segment, mask, score.shape[1])
    return combine(outcome, score, beta, mask, group, segment, norm=norm)


_TESTS = "tests/advantage/test_process_terms.py::"
_PROCESS = "the process term remains where all rewards are equal"

METHODS: tuple[Method, ...] = (
    Method(
        key="oprl",
        kind="estimator",
        paper_id="2509.19199",
        title="OPRL: implicit step rewards from the log-ratio of a process reward model, beside the outcome",
        tier=2,
        evidence={
            "exact": _TESTS + "test_oprl_worked_numbers",
            "formula": _TESTS + "test_oprl_against_a_plain_loop",
            "identity": _TESTS + "test_oprl_without_the_step_term_is_rloo",
        },
        call=oprl,
        exempt={"constant": _PROCESS, "scale": "nothing is divided by a deviation, and the step term has its own unit"},
    ),
    Method(
        key="oprl",
        kind="objective",
        paper_id="2509.19199",
        title="OPRL: pair loss of the implicit process reward model",
        tier=2,
        evidence={
            "exact": _TESTS + "test_pair_loss_worked_numbers",
            "formula": _TESTS + "test_pair_loss_against_a_plain_loop",
        },
        call=oprl_pair_loss,
    ),
    Method(
        key="prl",
        kind="estimator",
        paper_id="2601.10201",
        title="PRL: outcome minus the log-ratio that is still to come",
        tier=2,
        evidence={
            "exact": _TESTS + "test_prl_worked_numbers",
            "formula": _TESTS + "test_prl_against_a_plain_loop",
            "identity": _TESTS + "test_prl_with_a_step_a_segment_is_gae_on_rewards_with_kl",
        },
        call=prl,
        exempt={"constant": _PROCESS},
    ),
    Method(
        key="prorag",
        kind="estimator",
        paper_id="2601.21912",
        title="ProRAG: outcome and step scores, the latter normalised over all steps of the group",
        tier=2,
        evidence={
            "exact": _TESTS + "test_prorag_worked_numbers",
            "formula": _TESTS + "test_prorag_against_a_plain_loop",
            "identity": _TESTS + "test_prorag_without_the_process_term_is_grpo",
        },
        call=prorag,
        exempt={"constant": _PROCESS},
    ),
)
