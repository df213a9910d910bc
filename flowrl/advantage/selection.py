"""Which samples and which steps are worth training on, and how many samples a prompt is worth.

Selections come back as bool masks (True: train on it) or int64 counts, weights as float32. They never touch an
advantage: pass a mask as ``valid``, or multiply it into the loss mask. rewards: what rows are chosen by, raw rewards
or one advantage a row; NaN is no value, and such a row is never chosen. The batch is what is passed: with ranks,
gather the rewards of all of them first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_share
from .inputs import check_mask, read_rewards, read_steps
from .method import Method
from .moments import Reduce, total
from .segments import Groups

Level = Literal["batch", "group"]
Filtration = Literal["pow", "max_min", "max_random"]
_TIE = 1e-12  # variances closer than this, relative, are one and the same


def _portion(size: Tensor, fraction: float) -> Tensor:
    """ceil(fraction size) as int64, at least 1 where the size is not 0, safe from rounding of the product."""
    return (size.double() * fraction - 1e-9).ceil().long()


def _read(rewards: Tensor, group: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Groups]:
    """Check rewards; without ``group`` the batch is one group. float64 [B] (0 where nothing counts) and its groups."""
    ids = torch.zeros_like(rewards, dtype=torch.int64) if group is None else group
    value, mask = read_rewards(rewards, ids, valid)
    return torch.where(mask, value, 0.0), Groups.of(ids, mask)


def _ranks(value: Tensor, groups: Groups) -> Tensor:
    """int64 [B]: place of each valid member among those of its group, 0 the least; -1 where not valid."""
    rows = groups.valid.nonzero()[:, 0]
    rows = rows[torch.argsort(value[rows], stable=True)]
    rows = rows[torch.argsort(groups.index[rows], stable=True)]
    size = groups.size.long()
    place = torch.arange(len(rows), device=value.device) - (size.cumsum(0) - size)[groups.index[rows]]
    return torch.full_like(groups.index, -1).index_copy_(0, rows, place)


def _segmented_cumsum(x: Tensor, place: Tensor) -> Tensor:
    """Running sums that start anew where ``place`` is 0: [N], in log2(N) passes, so no run leaks into another."""
    reach, longest = 1, int(place.max()) if len(place) else 0
    while reach <= longest:
        x = x + torch.where(place >= reach, x.roll(reach), 0.0)
        reach *= 2
    return x


def _lower_part(value: Tensor, rank: Tensor, groups: Groups, number: Tensor) -> Tensor:
    """int64 [groups]: how many of the ``number`` extremes are the least ones, for the greatest variance."""
    size = groups.size.long()
    start = (size + 1).cumsum(0) - size - 1  # every group has a leading zero: entry i is the sum of its i least
    lead = torch.repeat_interleave(start, size + 1)
    place = torch.arange(len(lead), device=value.device) - lead
    centred = torch.where(groups.valid, value - groups.mean(value), 0.0)
    rows = groups.valid
    cells = (start[groups.index] + rank + 1)[rows]
    first = value.new_zeros(len(lead)).index_copy_(0, cells, centred[rows])
    sums, squares = _segmented_cumsum(first, place), _segmented_cumsum(first.square(), place)
    owner = torch.repeat_interleave(torch.arange(groups.number, device=value.device), number + 1)
    begin = (number + 1).cumsum(0) - number - 1
    low = torch.arange(len(owner), device=value.device) - begin[owner]
    at, n = start[owner], number[owner]
    end, gap = at + size[owner], at + size[owner] - n + low
    divisor = n.clamp(min=1)
    mean = (sums[at + low] + sums[end] - sums[gap]) / divisor
    variance = ((squares[at + low] + squares[end] - squares[gap]) / divisor - mean.square()).clamp(min=0)
    best = value.new_zeros(groups.number).scatter_reduce_(0, owner, variance, reduce="amax")
    candidate = torch.where(variance >= best[owner] * (1 - _TIE), low, n)
    return number.clone().scatter_reduce_(0, owner, candidate, reduce="amin")


def _widest(value: Tensor, groups: Groups, number: Tensor) -> Tensor:
    """bool [B]: the ``number`` (int64 [groups]) members of each group with the greatest variance."""
    number = torch.minimum(number, groups.size.long())
    rank = _ranks(value, groups)
    low = _lower_part(value, rank, groups, number)
    high = groups.gather(groups.size.long() - (number - low))
    return groups.valid & ((rank < groups.gather(low)) | (rank >= high))


def max_variance_subset(
    rewards: Tensor,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    fraction: float = 0.5,
    number: int | None = None,
) -> Tensor:
    """Keep the n rows whose rewards have the greatest variance: the i least and the n - i greatest, the best i.

    argmax over i of q/n - (s/n)^2, with s and q the sums of the kept rewards and of their squares (the optimum is
    always of this form, as the variance is convex in each reward). rewards: float [B]; group: int64 [B], or None for
    one selection over the batch; number: rows kept (of each group), or None for ceil(fraction n); groups with no more
    rows than that are kept whole. Result: bool [B].

    Sample level of D3S (2509.22115) on advantages over the batch; PODS (2504.13818) on raw rewards by groups. Where
    several splits tie, the one with the fewest low rewards wins; among equal rewards, the earlier row is the lower.
    number >= the batch keeps everything. On denoising steps: as it is, rows are images.
    """
    check_share("fraction", fraction, strict=True)
    if number is not None and number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    value, groups = _read(rewards, group, valid)
    size = groups.size.long()
    return _widest(value, groups, _portion(size, fraction) if number is None else torch.full_like(size, number))


def step_topk(
    advantage: Tensor, entropy: Tensor, mask: Tensor, *, fraction: float = 0.2, per: Literal["batch", "row"] = "batch"
) -> Tensor:
    """Keep the ceil(fraction n) of n unmasked steps with the greatest |A_t| H_t: bool [B, T].

    advantage: float [B, T] or [B]; entropy: float [B, T], >= 0; per: n counts the steps of the batch, or of each row.
    Ties go to the earlier row and step. Step level of D3S (2509.22115; its authors train below 20% of the tokens).
    On denoising steps: the entropy of a step with fixed noise says nothing; pass its noise level, or the spread of
    rewards after branching there.
    """
    check_share("fraction", fraction, strict=True)
    check_choice("per", per, ("batch", "row"))
    check_mask(mask)
    score = _row_or_step(advantage, mask).abs() * read_steps("entropy", entropy, mask)
    flat, kept = (score.flatten()[None], mask.flatten()[None]) if per == "batch" else (score, mask)
    order = torch.where(kept, -flat, float("inf")).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    chosen = kept & (rank < _portion(kept.sum(1), fraction)[:, None])
    return chosen.view_as(mask)


def _row_or_step(advantage: Tensor, mask: Tensor) -> Tensor:
    """float32 [B, T] from an advantage [B, T] or [B], 0 on masked steps and where a row has no value."""
    if advantage.ndim == 1 and len(advantage) == len(mask):
        row = advantage.nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
        return read_steps("advantage", row[:, None].expand_as(mask), mask)
    return read_steps("advantage", advantage, mask)


def d3s(
    advantage: Tensor,
    entropy: Tensor,
    mask: Tensor,
    group: Tensor | None = None,
    *,
    row_fraction: float = 0.5,
    step_fraction: float = 0.2,
    level: Level = "batch",
) -> Tensor:
    """Select rows, then steps: the rows of greatest variance, and of theirs the steps of greatest |A_t| H_t.

    advantage: float [B], or [B, T], whose masked row means then choose the rows; entropy: float [B, T]; row_fraction,
    step_fraction: the shares kept (``linear_schedule`` relaxes both over training); level: rows are chosen over the
    batch, or inside each group (needs ``group``, int64 [B]). Result: bool [B, T], a part of ``mask``.

    D3S, 2509.22115. With both fractions 1 it is ``mask`` itself (without rows of NaN). See ``max_variance_subset``
    and ``step_topk``. On denoising steps: as ``step_topk``.
    """
    check_choice("level", level, ("batch", "group"))
    check_mask(mask)
    if level == "group" and group is None:
        raise ValueError("group: level 'group' needs int64 [B], got None")
    steps, by_step = mask.sum(1), _row_or_step(advantage, mask)
    row = advantage.detach().double() if advantage.ndim == 1 else by_step.double().sum(1) / steps.clamp(min=1)
    usable = (steps > 0) & ~row.isnan()
    if not bool(usable.any()):
        return torch.zeros_like(mask)
    rows = max_variance_subset(row, group if level == "group" else None, usable, fraction=row_fraction)
    return step_topk(advantage, entropy, mask & rows[:, None], fraction=step_fraction)


def linear_schedule(progress: float, *, start: float, end: float) -> float:
    """Go from ``start`` to ``end`` in a straight line: start + (end - start) clamp(progress, 0, 1).

    progress: share of training that is done. D3S (2509.22115) prunes hard at first and relaxes.
    """
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def best_worst_k(rewards: Tensor, group: Tensor, valid: Tensor | None = None, *, number: int = 8) -> Tensor:
    """Keep the best and the worst rows of each group: ceil(k/2) of the greatest rewards and floor(k/2) of the least.

    rewards: float [B]; group: int64 [B]; number: k, at least 1; a group with no more than k rows is kept whole.
    Result: bool [B]. DanceGRPO (2505.07818) trains on 8 of 24 videos so; advantages come from the whole group first.
    Among equal rewards the earlier row is the lower. Where k is even and a group is symmetric about its mean it is
    ``max_variance_subset``. On denoising steps: as it is.
    """
    if number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    value, groups = _read(rewards, group, valid)
    rank = _ranks(value, groups)
    best = groups.count() - (number - number // 2)
    return groups.valid & ((rank < number // 2) | (rank >= best))


def pf_ppo(
    rewards: Tensor,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    kind: Filtration = "pow",
    power: float = 2.0,
    floor: float = 1e-8,
    reduce: Reduce | None = None,
) -> Tensor:
    """Weigh rows by how far one may trust their reward, most at the extremes: w_i = n f_i / sum f, float32 [B].

    f, plus ``floor``, is by kind. pow: |r|^power. max_min: 1 for the greatest and the least reward, 0 between.
    max_random: 0.4 for the greatest, 0.1 for the rest. Extremes are those of the batch, or of each group where
    ``group`` (int64 [B]) is given. The weights have mean 1 over the n rows that count and are 0 elsewhere; use them as
    loss weights, the expectation of PF-PPO's resampling without its noise, or draw rows by ``resample``. Equal f give
    ones. ``reduce`` makes the mean that of all ranks; extremes over the batch would still be local, so max_min and
    max_random then need ``group``.

    PF-PPO, 2409.06957; verl has the batch form, power 2, and resamples. On denoising steps: as it is, one weight a row.
    """
    check_choice("kind", kind, ("pow", "max_min", "max_random"))
    if not (math.isfinite(power) and power >= 0 and math.isfinite(floor) and floor >= 0):
        raise ValueError(f"power, floor: expected finite numbers >= 0, got {power} and {floor}")
    if reduce is not None and kind != "pow" and group is None:
        raise ValueError(f"group: kind {kind!r} over all ranks needs the groups (each on one rank), got None")
    value, groups = _read(rewards, group, valid)
    if kind == "pow":
        weight = value.abs().pow(power)
    elif kind == "max_min":
        weight = ((value == groups.max(value)) | (value == groups.min(value))).double()
    else:
        weight = torch.where(value == groups.max(value), 0.4, 0.1).double()
    weight = torch.where(groups.valid, weight + floor, 0.0)
    sums = total(torch.stack([weight.sum(), groups.valid.sum().double()]), reduce)
    return (weight * sums[1] / torch.where(sums[0] > 0, sums[0], 1.0)).float()


def resample(weight: Tensor, generator: torch.Generator, *, number: int | None = None) -> Tensor:
    """Draw rows with replacement, each with probability w_i / sum w: int64 [number], by default as many as there are.

    weight: float [B], >= 0, not all 0, as ``pf_ppo`` gives it. Equal weights are the plain bootstrap. PF-PPO, 2409.06957.
    """
    if weight.ndim != 1 or not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
        raise ValueError(f"weight: expected [B] finite numbers >= 0, not all 0, got {list(weight.shape)}")
    if number is not None and number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    drawn = len(weight) if number is None else number
    return torch.multinomial(weight.detach().double(), drawn, replacement=True, generator=generator)


def _check_rate(success_rate: Tensor) -> Tensor:
    """float64 [P] of success rates; ValueError unless they are numbers in [0, 1]."""
    p = success_rate.detach().double()
    if p.ndim != 1 or len(p) == 0 or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"success_rate: expected [P] numbers in [0, 1], P >= 1, got {list(p.shape)}")
    return p


def knapsack_value(rollouts: Tensor, success_rate: Tensor) -> Tensor:
    """Value a prompt's rollouts: V(N, p) = (1 - p^N - (1 - p)^N) p (1 - p)^2, float64, broadcasting the two.

    The chance of a group with both outcomes times an information term, greatest at p = 1/3. Concave in N. Knapsack
    RL, 2509.25849. rollouts: N >= 1; success_rate: p in [0, 1].
    """
    n, p = rollouts.double(), success_rate.double()
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def rollouts_to_mixed_group(success_rate: Tensor) -> Tensor:
    """Count the rollouts expected until both outcomes were seen: 1/p + 1/(1 - p) - 1, float64, inf at p = 0 and 1."""
    p = _check_rate(success_rate)
    return 1 / p + 1 / (1 - p) - 1


def knapsack_allocate(success_rate: Tensor, *, budget: int | None = None, low: int = 2, high: int = 128) -> Tensor:
    """Share a budget of rollouts among prompts: maximise sum_j V(N_j, p_j) with sum N_j = budget, low <= N_j <= high.

    V by ``knapsack_value``. Its gain from one rollout more, (p^N (1 - p) + (1 - p)^N p) p (1 - p)^2, falls with N, so
    taking the greatest gains first is optimal. Equal gains go to fewer rollouts first, then to the earlier prompt.
    Prompts never solved (p = 0) or always solved (p = 1) gain nothing: they get ``low``, and what is left of the
    budget goes to the never solved in turns, then to the smallest p.

    success_rate: [P] in [0, 1], from the last visit (a prompt that was never visited: pass 0.5, or what you believe);
    budget: P low to P high, None for 8 P. Result: int64 [P]. Equal p give equal shares. Memory: at most (high - low) P
    numbers. Knapsack RL, 2509.25849. On denoising steps: p is the share of a prompt's images above a reward
    threshold; groups become unequal, which every group method here takes.
    """
    p = _check_rate(success_rate)
    spend = 8 * len(p) if budget is None else budget
    if not 0 < low <= high:
        raise ValueError(f"low, high: expected 0 < low <= high, got {low} and {high}")
    if not len(p) * low <= spend <= len(p) * high:
        raise ValueError(f"budget: expected {len(p) * low} to {len(p) * high} for {len(p)} prompts, got {spend}")
    spare = spend - len(p) * low
    n = torch.arange(low, min(high, low + spare), dtype=torch.float64, device=p.device)[:, None]
    gain = (p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p) ** 2
    rank = torch.where(gain > 0, gain, -1 - p).flatten()  # what gains nothing comes last, smallest p first
    taken = torch.argsort(rank, descending=True, stable=True)[:spare]
    return low + torch.bincount(taken % len(p), minlength=len(p))


_SELECTION = "tests/advantage/test_selection.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="d3s",
        kind="selection",
        paper_id="2509.22115",
        title="D3S: rows of greatest variance, then steps of greatest |A| times entropy; PODS by groups",
        tier=2,
        evidence={
            "exact": _SELECTION + "test_max_variance_worked_number",
            "formula": _SELECTION + "test_max_variance_is_the_best_of_all_subsets",
            "identity": _SELECTION + "test_d3s_keeps_everything_at_full_fractions",
            "learned": "docs/results/credit/rest.json",
        },
        call=d3s,
        exempt={
            "isolation": "rows and steps compete over the whole batch",
            "permutation": "rows of equal rewards, and steps of equal scores, are chosen by their order",
        },
    ),
    Method(
        key="best_worst_k",
        kind="selection",
        paper_id="2505.07818",
        title="DanceGRPO: the best and the worst rows of each group",
        tier=2,
        evidence={
            "exact": _SELECTION + "test_best_worst_worked_numbers",
            "formula": _SELECTION + "test_best_worst_against_plain_loop",
            "learned": "docs/results/credit/rest.json",
        },
        call=best_worst_k,
        exempt={"permutation": "rows of equal rewards are chosen by their order"},
    ),
    Method(
        key="pf_ppo",
        kind="weight",
        paper_id="2409.06957",
        title="PF-PPO: rows weighed or resampled by how reliable their reward is",
        tier=2,
        evidence={
            "exact": _SELECTION + "test_filtration_worked_numbers",
            "formula": _SELECTION + "test_filtration_against_plain_loop",
            "identity": _SELECTION + "test_equal_weights_are_the_bootstrap",
        },
        call=pf_ppo,
        exempt={"isolation": "weights have mean 1 over the batch"},
    ),
    Method(
        key="knapsack",
        kind="selection",
        paper_id="2509.25849",
        title="Knapsack RL: a budget of rollouts shared among prompts by what they can teach",
        tier=2,
        evidence={
            "exact": _SELECTION + "test_knapsack_worked_numbers",
            "formula": _SELECTION + "test_knapsack_is_the_best_allocation",
            "identity": _SELECTION + "test_equal_rates_get_equal_shares",
            "learned": "docs/results/credit/rest.json",
        },
        call=knapsack_allocate,
        exempt={"isolation": "prompts share one budget"},
    ),
)
