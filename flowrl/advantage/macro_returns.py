"""Advantages on two time scales: macro actions, turns and segments, rounds of an episode.

Conventions of ``returns`` hold: the next step is the next unmasked one, a NaN reward counts as 0, and a row whose
rewards are all NaN has advantage 0 and loss_mask False. ``segment`` (int64 [B, T]) numbers macros or turns 0, 1, ...
along a row, never decreasing, below T, -1 outside. Raises ValueError as ``returns`` does, and where a reward falls on
a segment without an unmasked step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_choice, check_share
from .inputs import check_flags, check_mask, read_rewards, read_segments, read_steps
from .method import Method
from .moments import Reduce, batch_moments, standardise
from .record import Advantage
from .scans import first_step, gae_scan, last_step, read_path, two_level_scan
from .segments import Groups
from .statistics import check_policies, divide, step_result
from .steps import segment_gather, segment_reduce


def ma_rlhf(
    step_reward: Tensor,
    value: Tensor,
    segment: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    pool: Literal["equal", "last", "position"] = "equal",
    macro_reward: Literal["sum", "pooled"] = "sum",
) -> Advantage:
    """Run GAE on macro actions and give every step the advantage and the return of its macro.

    V_k = sum_i w_i V_i over the steps i = 0, 1, ... of macro k; R_k = sum_i gamma^i r_i; A = gae(R, V, gamma, lam).

    step_reward, value: float [B, T]; segment: the macro of each step; mask: bool [B, T]; steps outside a macro are not
    trained. pool: w_i = 1/n ("equal"), 1 on the last step ("last", called unit in the released code), or 1/(i + 1)
    normalised ("position"). macro_reward: "sum" as in the paper, or "pooled", R_k = sum_i w_i r_i, as in the released
    code (it dilutes the outcome unless the last macro has length 1). Between macros gamma counts once a macro.

    Macros of one step: ``gae``. One macro, equal: R - mean V. Source: 2410.02743; ernie-research/MA-RLHF. On denoising
    steps: a macro is a block of solver steps.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    check_choice("pool", pool, ("equal", "last", "position"))
    check_choice("macro_reward", macro_reward, ("sum", "pooled"))
    check_mask(mask)
    segment = read_segments(segment, mask)
    path = read_path(step_reward, mask & (segment >= 0))
    state = read_steps("value", value, path.kept)
    kept, count = path.kept, int(segment.max().clamp(min=0)) + 1
    size = segment_reduce(torch.ones_like(state), segment, kept, "sum", count)
    reward = path.reward
    if pool == "equal":
        macro_value = segment_reduce(state, segment, kept, "mean", count)
    if pool != "equal" or (macro_reward == "sum" and gamma != 1):
        place = _place(segment, kept, count)
    if pool != "equal":
        share = (
            (place == segment_gather(size, segment) - 1).double() if pool == "last" else 1 / (place.clamp(min=0) + 1)
        )
        share = share / segment_gather(segment_reduce(share, segment, kept, "sum", count), segment).clamp(min=1e-300)
        macro_value = segment_reduce(share * state, segment, kept, "sum", count)
        reward = share * reward if macro_reward == "pooled" else reward
    if macro_reward == "sum" and gamma != 1:
        reward = gamma ** place.clamp(min=0) * reward
    how: Literal["mean", "sum"] = "mean" if pool == "equal" and macro_reward == "pooled" else "sum"
    macro = gae_scan(segment_reduce(reward, segment, kept, how, count), macro_value, size > 0, gamma, lam)
    where = torch.where(kept, segment, -1)
    returns = segment_gather((macro + macro_value).float(), where)
    return step_result(segment_gather(macro, where), kept, path.live, returns, kept)


def _place(segment: Tensor, kept: Tensor, count: int) -> Tensor:
    """float64 [B, T]: how many unmasked steps of its macro come before each step."""
    order = kept.cumsum(1).double()
    return order - segment_gather(segment_reduce(order, segment, kept, "first", count), segment)


def _normalised(x: Tensor, mask: Tensor, reduce: Reduce | None) -> Tensor:
    """(x - mean) / (std + 1e-8) over the elements of ``mask``, population deviation, 0 elsewhere."""
    mean, std = batch_moments(x, mask, 0, reduce)
    return standardise(x, mask, mean, 1 / (std + 1e-8))


def hae(
    step_reward: Tensor,
    value: Tensor,
    value_high: Tensor,
    value_term: Tensor,
    switch: Tensor,
    mask: Tensor,
    done: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam_turn: float = 1.0,
    lam_seg: float = 0.95,
    normalise: bool = True,
    reduce: Reduce | None = None,
) -> Advantage:
    """Estimate advantages of turns, of the segments they form, and of the decision to end a segment.

    A step is a turn. A segment starts at the first turn and wherever ``switch`` holds; b' is the next start.
    low: delta_t = r_t + gamma next - V_t with next = V_{t+1} inside and V_high(b') at a segment's last turn;
    A_t = delta_t + gamma lam_turn A_{t+1}, forgotten at the segment's end. high, at a start b of a segment of d turns:
    delta = sum_i gamma^i r_i + gamma^d V_high(b') - V_high(b); A(b) = delta + gamma^d lam_seg A(b').
    term: what is left of the segment, bootstrapped to V_high(b'), minus V_term.

    step_reward, value, value_high, value_term: float [B, T]; switch, mask: bool [B, T]. done: bool [B], all by
    default; past the last turn the value is 0 where done, else the last V_high (taken as unchanged across the cut).
    normalise: (x - mean) / (std + 1e-8) of each channel over its own turns in the batch, population std; ``reduce``
    sums over data-parallel ranks. advantage and returns are those of the low level; channels: "low", "high" (0 but at
    starts), "term", "start" (1 at starts, else 0), and the critics' targets "returns_high", "returns_term".

    One segment: turn-level GAE, and R - V_high(first turn). Source: 2602.16165; JonP07/HiPER-agent (the paper's switch
    advantage, of option-critic form, is another). On denoising steps: high is a block's choice (guidance scale, solver)
    at its first timestep, low each stochastic step.
    """
    for name, x in (("gamma", gamma), ("lam_turn", lam_turn), ("lam_seg", lam_seg)):
        check_share(name, x)
    path = read_path(step_reward, mask)
    check_flags("switch", switch, tuple(mask.shape))
    kept = path.kept
    low_value, high_value, term_value = (
        read_steps(name, x, kept)
        for name, x in (("value", value), ("value_high", value_high), ("value_term", value_term))
    )
    start = kept & (switch | (torch.arange(mask.shape[1], device=mask.device) == first_step(kept)[:, None]))
    cut = torch.zeros_like(high_value[:, 0])
    if done is not None:
        check_flags("done", done, tuple(mask.shape[:1]))
        ending = high_value.gather(1, last_step(kept).clamp(min=0)[:, None])[:, 0]
        cut = torch.where(done, cut, ending)
    low, high, rest = two_level_scan(path.reward, low_value, high_value, start, kept, cut, (gamma, lam_turn, lam_seg))
    term = rest - term_value
    returns, returns_high = low + low_value, torch.where(start, high + high_value, 0.0)
    if normalise:
        low, high, term = (_normalised(x, m, reduce) for x, m in ((low, kept), (high, start), (term, kept)))
    named = {"low": low, "high": high, "term": term, "start": start.float()}
    named |= {"returns_high": returns_high, "returns_term": rest}
    return step_result(low, kept, path.live, returns, kept, named)


def mt_ppo(
    rewards: Tensor,
    stage_reward: Tensor,
    segment: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Advantage:
    """Put each turn's reward on the turn's last step and the outcome on the row's, then run GAE.

    r_t = stage_reward_k at the last unmasked step of turn k, + rewards at the last unmasked step; A = gae(r, V).

    rewards: float [B], the outcome; NaN: the row has no value. stage_reward: float [B, S], S above every turn id, NaN
    counts as 0. segment: the turn of each step. value: float [B, T]; mask: bool [B, T], the policy's own steps (text
    of a tool is masked and passed over). returns = A + V. With turn rewards 0: ``gae`` of the outcome. Source:
    2505.11821; gamma and lam are reconstructed (the paper states neither). On denoising steps: a turn is a block of
    timesteps, its reward that of x0_hat at the block's end.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    outcome, known = read_rewards(rewards, None, None)
    check_mask(mask, len(rewards))
    segment = read_segments(segment, mask)
    kept = mask & known[:, None]
    per_turn, ends = _read_stage_reward(stage_reward, segment, kept)
    reward = torch.zeros_like(mask, dtype=torch.float64).scatter_add_(1, ends, per_turn)
    reward.scatter_add_(1, last_step(kept).clamp(min=0)[:, None], torch.where(known, outcome, 0.0)[:, None])
    reward = torch.where(kept, reward.float(), 0.0)
    state = read_steps("value", value, kept)
    advantage = gae_scan(reward, state, kept, gamma, lam)
    return step_result(advantage, kept, kept.any(1), advantage + state, kept)


def _read_stage_reward(stage_reward: Tensor, segment: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Check rewards of turns; float64 [B, S], 0 for NaN and in rows that are left out; int64 [B, S], their last steps."""
    if stage_reward.ndim != 2 or len(stage_reward) != len(kept) or stage_reward.shape[1] <= int(segment.max()):
        raise ValueError(
            f"stage_reward: expected [{len(kept)}, S] with S > {int(segment.max())}, got {list(stage_reward.shape)}"
        )
    if stage_reward.is_complex() or bool(stage_reward.isinf().any()):
        raise ValueError(f"stage_reward: expected real numbers and no infinity, got {stage_reward.dtype}")
    x = torch.where(kept.any(1, keepdim=True), stage_reward.detach().double(), 0.0).nan_to_num(nan=0.0)
    place = torch.arange(1, kept.shape[1] + 1, device=kept.device).expand_as(kept)
    ends = segment_reduce(place, segment, kept, "last", x.shape[1]) - 1  # -1 where there is no step
    reached = ends >= 0
    if bool((~reached & (x != 0)).any()):
        row, turn = (int(i) for i in (~reached & (x != 0)).nonzero()[0])
        raise ValueError(
            f"stage_reward: the reward of a turn without an unmasked step (row {row}, turn {turn}) is lost"
        )
    return x, ends.clamp(min=0)


def eapo(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    gamma: float = 0.995,
    pool: Literal["group", "round", "none"] = "group",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Advantage:
    """Discount the outcome by the rounds that were still to come, and standardise inside the group.

    x_t = gamma^(T_b - t) R_b, t = 1 .. T_b counting unmasked steps (rounds); A = (x - mean) / (std + eps).

    rewards: float [B], NaN for no value; group: int64 [B]; mask: bool [B, T]. pool: mean and std over all rounds of all
    rows of the group ("group"), over its rows at the same t ("round"), or A = x ("none"). A pool whose x are all equal
    gives 0. gamma = 1: every round gets R. pool "none": ``gae`` with V = 0, lam = 1 and R on the last step. Source:
    2511.07327, reconstructed: gamma 0.995 and the pool were not confirmed. On denoising steps: prefers fewer steps
    where their number is adaptive; at a fixed number all rows are discounted alike.
    """
    check_share("gamma", gamma)
    check_policies(ddof, eps)
    check_choice("pool", pool, ("group", "round", "none"))
    reward, known = read_rewards(rewards, group, None)
    check_mask(mask, len(rewards))
    reward = torch.where(known, reward, 0.0)
    kept = mask if bool(known.all()) else mask & known[:, None]
    (left,) = by_rows(_rounds_left, kept)
    power = gamma ** torch.arange(mask.shape[1], dtype=torch.float64, device=mask.device)
    if pool == "round":
        x = torch.where(kept, power[left.long()] * reward[:, None], 0.0)
        return _pooled_by_round(x, kept, group, ddof, eps)
    number = kept.sum(1, dtype=torch.int32).long()
    if pool == "none":
        return step_result(_discounted(power, reward, left), kept, number > 0)
    mean, std, live = _discounted_moments(power, number, reward, Groups.of(group, number > 0), ddof)
    scale = torch.where(live & (std + eps > 0), 1 / (std + eps), 0.0)
    advantage = _discounted(power, reward * scale, left, mean * scale)
    result = step_result(advantage, kept, live)
    return replace(result, group_mean=mean.float(), group_std=std.float())


def _rounds_left(kept: Tensor) -> tuple[Tensor]:
    """int32 [B, T]: how many unmasked steps come after each step."""
    order = kept.cumsum(1, dtype=torch.int32)
    return (order[:, -1:] - order,)


def _discounted(power: Tensor, factor: Tensor, left: Tensor, shift: Tensor | None = None) -> Tensor:
    """power[left] factor - shift: float32 [B, T]; power: float64 [T], factor, shift: float64 [B]."""

    def discounted(left: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor]:
        at = left.clamp(max=len(power) - 1).flatten()  # a step before a row's first round may have T left
        return ((power.index_select(0, at).view_as(left) * factor[:, None] - shift[:, None]).float(),)

    return by_rows(discounted, left, factor, torch.zeros_like(factor) if shift is None else shift)[0]


def _discounted_moments(
    power: Tensor, number: Tensor, reward: Tensor, groups: Groups, ddof: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation and signal of gamma^k R, k = 0 .. number - 1, over the rounds of a group's rows: [B] each."""
    count = torch.arange(1, len(power) + 1, dtype=torch.float64, device=power.device)
    average = power.cumsum(0) / count
    before = torch.cat([average[:1], average[:-1]])
    square = ((power - before) * (power - average)).cumsum(0)  # to the average, of the first n powers, for every n
    last = (number - 1).clamp(min=0)
    of_row, row_mean, row_square = number.double(), average[last] * reward, square[last] * reward.square()

    def over_group(per_row: Tensor) -> Tensor:
        return groups.gather(torch.zeros_like(groups.size).index_add_(0, groups.index, per_row))

    count = over_group(of_row)
    mean = over_group(of_row * row_mean) / count.clamp(min=1)
    spread = over_group(row_square + of_row * (row_mean - mean).square())
    ends = torch.stack([reward, reward * power[last]])
    live = groups.max(ends.amax(0)) > groups.min(ends.amin(0))
    return mean, (spread / (count - ddof).clamp(min=1)).sqrt(), live


def _pooled_by_round(x: Tensor, kept: Tensor, group: Tensor, ddof: int, eps: float) -> Advantage:
    """Standardise x (float64 [B, T]) over the rows of the group at the same round."""
    rounds = x.shape[1]
    groups = Groups.of(group)
    index = (groups.index[:, None] * rounds + (kept.cumsum(1) - 1).clamp(min=0)).flatten()
    size = x.new_zeros(groups.number * rounds).index_add_(0, index, kept.flatten().double())
    pooled = Groups(index=index, number=len(size), valid=kept.flatten(), size=size)
    flat = x.flatten()
    live = ((pooled.max(flat) > pooled.min(flat)) & pooled.valid).view(x.shape)
    advantage = divide(flat - pooled.mean(flat), pooled.std(flat, ddof), eps).view(x.shape)
    return step_result(torch.where(live, advantage, 0.0), kept, live.any(1))


def keep_even(mask: Tensor, uniform: Tensor, *, ranks: int) -> Tensor:
    """Drop as few samples at random as make their number a multiple of ``ranks``: bool like ``mask``.

    mask: bool [B, T], the samples ((row, round) pairs); uniform: float [B, T], independent draws in [0, 1), which
    decide: the N mod ranks samples with the least go. ranks >= 1. Source: 2511.07327, adaptive downsampling. On
    denoising steps: samples are (row, timestep) pairs.
    """
    check_mask(mask)
    if ranks < 1:
        raise ValueError(f"ranks: expected at least 1, got {ranks}")
    draw = torch.where(mask, read_steps("uniform", uniform, mask), torch.inf)
    gone = draw.flatten().topk(int(mask.sum()) % ranks, largest=False).indices
    kept = mask.flatten().clone()
    kept[gone] = False
    return kept.view(mask.shape)


_TESTS = "tests/advantage/test_macro_returns.py::"
_CRITIC = {
    "shift": "a constant added to every reward is a gain over the critic: the advantages move",
    "scale": "the critic's values do not scale with the rewards",
    "constant": "no group baseline: a constant reward is credit",
}

METHODS: tuple[Method, ...] = (
    Method(
        key="ma_rlhf",
        kind="estimator",
        paper_id="2410.02743",
        title="MA-RLHF: GAE on macro actions, given to their steps",
        tier=2,
        evidence={
            "exact": _TESTS + "test_ma_rlhf_worked_numbers",
            "formula": _TESTS + "test_ma_rlhf_against_a_plain_loop",
            "identity": _TESTS + "test_ma_rlhf_with_macros_of_one_step_is_gae",
        },
        call=ma_rlhf,
        exempt=_CRITIC,
    ),
    Method(
        key="hae",
        kind="estimator",
        paper_id="2602.16165",
        title="HiPER: advantages of turns, segments and switches that meet at segment boundaries",
        tier=2,
        evidence={
            "exact": _TESTS + "test_hae_worked_numbers",
            "formula": _TESTS + "test_hae_against_a_plain_loop",
            "identity": _TESTS + "test_hae_of_one_segment_is_turn_level_gae",
        },
        call=hae,
        exempt={**_CRITIC, "isolation": "every channel is normalised over its turns in the batch"},
    ),
    Method(
        key="mt_ppo",
        kind="estimator",
        paper_id="2505.11821",
        title="MT-PPO: turn rewards at the turns' ends and the outcome at the last step, then GAE",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_mt_ppo_against_a_plain_loop",
            "exact": _TESTS + "test_mt_ppo_worked_numbers",
            "identity": _TESTS + "test_mt_ppo_without_turn_rewards_is_gae",
        },
        call=mt_ppo,
        exempt=_CRITIC,
    ),
    Method(
        key="eapo",
        kind="estimator",
        paper_id="2511.07327",
        title="IterResearch EAPO: outcome discounted by the rounds to come, standardised in the group",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_eapo_against_a_plain_loop",
            "exact": _TESTS + "test_eapo_worked_numbers",
            "identity": _TESTS + "test_eapo_unpooled_is_a_discounted_return_to_go",
        },
        call=eapo,
        exempt={
            "shift": "discounting shifts early rounds less than late ones",
            "constant": "equal outcomes differ by the rounds that were still to come",
        },
    ),
    Method(
        key="eapo",
        kind="selection",
        paper_id="2511.07327",
        title="IterResearch adaptive downsampling: a number of samples that ranks divide",
        tier=3,
        evidence={"reconstructed": _TESTS + "test_keep_even_drops_the_least_draws"},
        call=keep_even,
    ),
)
