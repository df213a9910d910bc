"""Outcome advantage plus a local term, A[b, t] = A_outcome[b] + coef * local[b, t], and the methods that are just that.

A local term is given per step or per segment of steps (turn, stage, block) and normalised inside a pool of elements:
the scope. What the methods share: a NaN outcome reward leaves every statistic, its row gets advantage 0 and loss_mask
False; a step outside every segment (-1) gets the outcome alone; masked steps are exactly 0; a pool whose values are
all equal gives exactly 0. ddof, eps and singleton are those of ``estimators`` and belong to the outcome unless the
method says otherwise. Statistics are float64; results are float32 and carry no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_choice, check_number
from .estimators import grpo
from .inputs import check_mask, read_rewards, read_segments
from .method import Method
from .moments import Reduce, total
from .record import Advantage
from .segments import Groups, group_any
from .statistics import Singleton, check_policies, divide
from .steps import reverse_scan, segment_gather, spread_segments

Scope = Literal["none", "group", "group_turn", "group_steps", "batch", "batch_steps"]
SCOPES = ("none", "group", "group_turn", "group_steps", "batch", "batch_steps")
FLAT = 1e-12  # a pool whose spread is below this part of its mean is constant: what is left is rounding


@dataclass(frozen=True)
class Norm:
    """How a local term is normalised.

    scope: the pool that gives mean and deviation. "none": as it is; "group": all elements of the group, each segment
    one datum; "group_turn": the elements with the same segment number in the group; "group_steps": all steps of the
    group, so that long segments weigh more; "batch", "batch_steps": the same over the whole batch. baseline: "mean",
    or "loo" for the mean of the others, n/(n-1) (x - mean). divide: by the deviation + eps; ddof: 0 or 1, n counts
    data. Raises ValueError for an unknown word or a number out of range.
    """

    scope: Scope = "group"
    baseline: Literal["mean", "loo"] = "mean"
    divide: bool = True
    ddof: int = 0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("baseline", self.baseline, ("mean", "loo"))
        check_policies(self.ddof, self.eps)


def read_table(name: str, x: Tensor, rows: int, least: int = 1) -> Tensor:
    """Return ``x`` detached as float64, NaN (no value) kept.

    Raises ValueError unless it is real [B, S] with B = ``rows``, S >= ``least``, and free of infinities.
    """
    if x.ndim != 2 or len(x) != rows or x.shape[1] < least or x.is_complex():
        raise ValueError(f"{name}: expected real [{rows}, S] with S >= {least}, got {x.dtype} {list(x.shape)}")
    wide = x.detach().double()
    if bool(wide.isinf().any()):
        raise ValueError(f"{name}: {int(wide.isinf().sum())} values are infinite; NaN means no value")
    return wide


def count_steps(segment: Tensor, number: int) -> Tensor:
    """Count the steps of each segment: float64 [B, number]; -1 and ids from ``number`` on count nowhere."""
    width = max(int(segment.max()) + 1, number)

    def counted(segment: Tensor) -> tuple[Tensor]:
        out = torch.zeros(len(segment), width + 1, device=segment.device)
        out.scatter_add_(1, segment.long() + 1, out.new_ones(()).expand_as(segment))
        return (out[:, 1 : number + 1].double(),)

    return by_rows(counted, segment)[0]


def _pools(shape: torch.Size, groups: Groups, scope: str) -> tuple[Tensor, int]:
    """int64 [B, K]: the pool of every element; and how many pools there are."""
    rows, columns = shape
    if scope.startswith("batch"):
        return torch.zeros_like(groups.index)[:, None].expand(rows, columns), 1
    index = groups.index[:, None]
    if scope == "group_turn":
        return index * columns + torch.arange(columns, device=index.device), groups.number * columns
    return index.expand(rows, columns), groups.number


def normalise(
    local: Tensor, count: Tensor, groups: Groups, norm: Norm, pool: Tensor | None = None, reduce: Reduce | None = None
) -> Tensor:
    """Normalise a local term inside its pools: float64 [B, K], 0 where it has no value or its pool no spread.

    local: [B, K]; count: float64 [B, K], steps behind each element, 0 for no value; groups: of the rows; pool: bool
    [B, K], the elements whose statistics are taken, all with a value by default; reduce: sums over data-parallel
    ranks, for the batch scopes. A pool of one datum gives 0.
    """
    present = count > 0
    x = torch.where(present, local.double(), 0.0)
    if norm.scope == "none":
        return x
    taken = present if pool is None else present & pool
    weight = torch.where(taken, count, 0.0) if norm.scope.endswith("_steps") else taken.double()
    key, number = _pools(x.shape, groups, norm.scope)
    over_ranks = reduce if norm.scope.startswith("batch") else None

    def pooled(v: Tensor) -> Tensor:
        zero = torch.zeros(number, dtype=torch.float64, device=x.device)
        return total(zero.index_add_(0, key.flatten(), v.flatten()), over_ranks)

    size = pooled(weight)
    mean = pooled(weight * x) / size.clamp(min=1)
    centred = x - mean[key]
    spread = (pooled(weight * centred.square()) / (size - norm.ddof).clamp(min=1)).sqrt()
    varied = spread > FLAT * mean.abs()
    if pool is not None and not norm.divide:
        varied = torch.ones_like(varied)  # elements outside the statistics may differ from a constant pool
    if norm.baseline == "loo":
        centred = centred * (size / (size - 1).clamp(min=1))[key]
    out = divide(centred, spread[key], norm.eps) if norm.divide else centred
    return torch.where(present & (varied & (size > 1))[key], out, 0.0)


def combine(
    outcome: Advantage,
    local: Tensor,
    coef: float,
    mask: Tensor,
    group: Tensor,
    segment: Tensor | None = None,
    *,
    norm: Norm | None = None,
    reduce: Reduce | None = None,
) -> Advantage:
    """Add a normalised local term to an outcome advantage: A[b, t] = outcome[b] + coef * norm(local)[b, t].

    outcome: a [B] estimate, whose loss_mask says which rows count; local: real [B, T], or [B, K] with ``segment``
    (int64 [B, T], as ``read_segments`` gives it); NaN: no value, adds 0. mask: bool [B, T]; group: int64 [B]; norm: as
    it is by default; reduce: see ``normalise``. A step whose segment is -1 or not below K gets the outcome alone. live
    is that of the outcome, or a local term that is felt somewhere in the group. With coef 0 it is
    ``outcome.over_steps(mask)``. The shape of GiGPO, MT-GRPO, ProRAG, OPRL, KTAE, A2TGPO.
    """
    check_number("coef", coef)
    norm = Norm("none") if norm is None else norm
    kept = mask if bool(outcome.loss_mask.all()) else mask & outcome.loss_mask[:, None]
    if norm.scope == "none":
        term = torch.where(local.isnan(), 0.0, local)
    else:
        count = kept if segment is None else count_steps(segment, local.shape[1]) * outcome.loss_mask[:, None]
        count = torch.where(local.isnan(), 0.0, count.double())
        term = normalise(local, count, Groups.of(group), norm, reduce=reduce)
    if segment is None:
        steps = (outcome.advantage[:, None] + coef * term).float()
        felt = (kept & (steps != outcome.advantage[:, None])).any(dim=1)
    else:
        table = outcome.advantage.double()[:, None] + coef * term
        steps, felt = spread_segments(table, outcome.advantage, segment)
    return replace(
        outcome,
        advantage=torch.where(kept, steps, 0.0),
        weight=torch.where(kept, outcome.weight[:, None], 0.0),
        loss_mask=kept,
        live=outcome.live | group_any(felt & outcome.loss_mask, group),
    )


def mt_grpo(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    segment: Tensor,
    valid: Tensor | None = None,
    *,
    coef: float = 1.0,
    form: Literal["additive", "cumulative"] = "additive",
    discount: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Credit the first turn with its own reward and the outcome, later turns with the outcome alone.

    A_T, A_O, A_C = group norm of the turn reward, of the outcome, of turn + outcome. On segment 0: A_O + coef A_T;
    after it: A_O; in a row without a later segment (no tool was called): A_C everywhere. "cumulative": group norm of
    turn + discount * outcome on segment 0 and in rows without a later segment, A_O after it; coef is not used.

    rewards: [B, 2], (turn, outcome); a NaN turn reward adds 0, a NaN outcome takes the row out. segment: 0 before the
    first tool result, 1 and up after it; only unmasked steps tell. MT-GRPO, 2505.11821 (GRPO_env trainers of
    SiliangZeng/Multi-Turn-RL-Agent: both forms, ddof 1, eps 1e-4). coef 0 is GRPO on the outcome wherever there is a
    later segment, and so is a turn reward that is constant in the group.
    On denoising steps: the turn reward is that of the clean prediction at the end of the first block of steps.
    """
    check_number("coef", coef)
    check_number("discount", discount)
    check_choice("form", form, ("additive", "cumulative"))
    value, known = read_rewards(rewards, group, valid, channels=True)
    if value.shape[1] != 2:
        raise ValueError(f"rewards: expected [B, 2], (turn, outcome), got {list(rewards.shape)}")
    check_mask(mask, len(group))
    segment = read_segments(segment, mask)
    rows, last, turn = known[:, 1], value[:, 1], torch.where(known[:, 0], value[:, 0], 0.0)
    outcome = grpo(last, group, rows, ddof=ddof, eps=eps, singleton=singleton)
    both = turn + (1.0 if form == "additive" else discount) * last
    joint = grpo(both, group, rows, ddof=ddof, eps=eps, singleton=singleton)
    if form == "additive":
        local = grpo(turn, group, known[:, 0] & rows, ddof=ddof, eps=eps, singleton=singleton).advantage
    else:
        local, coef = joint.advantage - outcome.advantage, 1.0
    called = segment.amax(dim=1) > 0
    base = replace(
        outcome,
        advantage=torch.where(called, outcome.advantage, joint.advantage),
        live=torch.where(called, outcome.live, joint.live),
    )
    return combine(base, torch.where(called, local, 0.0)[:, None], coef, mask, group, segment)


def a2tgpo(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    segment: Tensor,
    confidence: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 0.3,
    gamma: float = 1.0,
    clip_width: float = 0.3,
    ddof: int = 0,
    eps: float = 1e-6,
    singleton: Singleton = "zero",
) -> Advantage:
    """Add the information gain of each turn, normalised against that turn of the other rollouts; scale the clip by it.

    IG_k = confidence_{k+1} - confidence_k; z_k = (IG_k - mean) / (std + eps) over the rows of (group, turn k);
    D_k = sum_{j >= k} gamma^(j-k) z_j / sqrt(turns left, k included); A_k = A_outcome + alpha D_k; clip scale
    c_k = 1 + clip_width (2 sigmoid(z_k) - 1). The answer turn gets A_outcome and 1.

    confidence: [B, S + 1], of the right answer before and after each turn, NaN for no value. A turn has a gain where
    both are there and the row has an unmasked step in it; other turns count as answer turns, so give S without the
    answer, or NaN after the last tool turn. clip_scale: multiplies the clip range, 0 on masked steps, all 1 with
    clip_width 0. ddof, eps: of the outcome and of z. A2TGPO, 2605.06200, from a published reading of its code (which
    finds turns by equal neighbouring advantages; here ``segment`` names them); ddof and eps are not confirmed. alpha 0
    is GRPO. With gamma 1 and independent z of variance 1, every D_k has variance 1.
    On denoising steps: confidence is the reward of the clean prediction at the borders of blocks.
    """
    for name, number in (("alpha", alpha), ("gamma", gamma), ("clip_width", clip_width)):
        check_number(name, number, -math.inf if name == "alpha" else 0.0)
    outcome = grpo(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton)
    check_mask(mask, len(group))
    segment = read_segments(segment, mask)
    trust = read_table("confidence", confidence, len(group), 2)
    gain = trust[:, 1:] - trust[:, :-1]
    count = torch.where(gain.isnan(), 0.0, count_steps(segment, gain.shape[1]) * outcome.loss_mask[:, None])
    tool = count > 0
    z = normalise(gain, count, Groups.of(group), Norm("group_turn", ddof=ddof, eps=eps))
    left = reverse_scan(tool.double(), 1.0).clamp(min=1)
    result = combine(outcome, reverse_scan(z, gamma, tool) / left.sqrt(), alpha, mask, group, segment)
    scale = torch.where(tool, 1.0 + clip_width * (2.0 * z.sigmoid() - 1.0), 1.0)
    steps = spread_segments(scale, torch.ones_like(outcome.advantage), segment)[0]
    return replace(result, clip_scale=torch.where(result.loss_mask, steps, 0.0))


def capo_credit(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    votes: Tensor,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    outcome_weight: float = 2.0,
    penalty: float = 1.0,
    vote: Literal["all", "majority"] = "all",
    ddof: int = 0,
    eps: float = 1e-6,
) -> Advantage:
    """Subtract a penalty where critics call a step wrong, and standardise over all steps of the group.

    r[b, t] = outcome_weight * rewards[b] - penalty * wrong[b, t]; A = (r - mean) / (std + eps) over the steps of the
    group, so long rows weigh more. wrong: "all" votes, or more than half ("majority").

    rewards: 0 or 1 in the paper, any number here; votes: bool [N, B, T], or [N, B, S] with ``segment``. CAPO,
    2508.02298 (the credit method; outcome 2, penalty 1, 4 critiques), from summaries: its code is not released, ddof
    and eps are not confirmed; a port elsewhere subtracts the penalty twice, here once. Without a wrong vote and with
    equal lengths it is GRPO (ddof 0); penalty 0 is group normalisation weighted by length.
    On denoising steps: the votes of a judge that looks at blocks of steps.
    """
    check_number("outcome_weight", outcome_weight, 0.0)
    check_number("penalty", penalty, 0.0)
    check_choice("vote", vote, ("all", "majority"))
    none = replace(grpo(rewards, group, valid, ddof=ddof, eps=eps), live=torch.zeros_like(group, dtype=torch.bool))
    check_mask(mask, len(group))
    columns = votes.shape[-1] if votes.ndim == 3 else 0
    wanted = (len(group), mask.shape[1] if segment is None else columns)
    if votes.dtype != torch.bool or votes.numel() == 0 or votes.shape[1:] != wanted:
        raise ValueError(
            f"votes: expected bool [N, {len(group)}, {'S' if segment is not None else mask.shape[1]}] with N >= 1, "
            f"got {votes.dtype} {list(votes.shape)}"
        )
    wrong = votes.all(dim=0) if vote == "all" else 2 * votes.sum(dim=0) > len(votes)
    if segment is not None:
        wrong = segment_gather(wrong, read_segments(segment, mask, columns))
    # A row has two values, right and wrong: they are its two segments, and the statistics need only their sizes.
    right = outcome_weight * torch.where(none.loss_mask, rewards.detach().double(), 0.0)
    table = torch.stack([right, right - penalty], dim=1)
    norm = Norm("group_steps", ddof=ddof, eps=eps)
    zero = replace(none, advantage=torch.zeros_like(none.advantage))
    return combine(zero, table, 1.0, mask, group, torch.where(mask, wrong.int(), -1), norm=norm)


_TESTS = "tests/advantage/test_local_terms.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="mt_grpo",
        kind="estimator",
        paper_id="2505.11821",
        title="MT-GRPO: turn reward and outcome normalised apart, early steps see both",
        tier=2,
        evidence={
            "exact": _TESTS + "test_mt_grpo_worked_numbers",
            "formula": _TESTS + "test_mt_grpo_against_a_plain_loop",
            "identity": _TESTS + "test_mt_grpo_without_the_turn_term_is_grpo",
        },
        call=mt_grpo,
    ),
    Method(
        key="a2tgpo",
        kind="estimator",
        paper_id="2605.06200",
        title="A2TGPO: information gain of each turn against the same turn, and a clip range that follows it",
        tier=2,
        evidence={
            "exact": _TESTS + "test_a2tgpo_worked_numbers",
            "formula": _TESTS + "test_a2tgpo_against_a_plain_loop",
            "identity": _TESTS + "test_a2tgpo_without_the_gain_is_grpo",
        },
        call=a2tgpo,
        exempt={"constant": "the gains of the turns remain where all rewards are equal"},
    ),
    Method(
        key="capo_credit",
        kind="estimator",
        paper_id="2508.02298",
        title="CAPO: outcome minus a penalty on steps that critics call wrong, normalised over the steps of the group",
        tier=2,
        evidence={
            "exact": _TESTS + "test_capo_worked_numbers",
            "formula": _TESTS + "test_capo_against_a_plain_loop",
            "identity": _TESTS + "test_capo_without_wrong_votes_is_grpo",
        },
        call=capo_credit,
        exempt={
            "constant": "the votes remain where all rewards are equal",
            "scale": "the penalty has the unit of the reward and does not grow with it",
        },
    ),
)
