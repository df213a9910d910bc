"""Credit by anchor states: what different rollouts did from the same state is compared there.

Shapes: B rows, T steps. NaN rewards are no value; statistics are float64, results float32 without gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_choice
from .inputs import check_ids, check_mask, read_rewards, read_step_reward
from .method import Method
from .record import Advantage
from .segments import Groups, group_any, number_ids
from .statistics import Singleton, check_policies, divide, drop_rounding, group_statistics, step_result
from .steps import reverse_scan


@dataclass(frozen=True)
class _Turns:
    """Turns of every row, U a row: all T steps where a row is an episode, 1 where a row is a turn.

    reward: float64 [B, U], what the turn earned; acted: bool [B, U]; anchor: int64 [B, U]; episode: int64 [B], 0, 1, ...;
    order: int64 [B], the rows by episode and, inside one, by time; last: bool [B, U], the episode's last turn.
    """

    reward: Tensor
    acted: Tensor
    anchor: Tensor
    episode: Tensor
    order: Tensor
    last: Tensor


def _steps_as_turns(anchor: Tensor, mask: Tensor, reward: Tensor) -> _Turns:
    """Turns where a row is an episode and each unmasked step a turn."""
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = mask & (place == torch.where(mask, place, -1).amax(dim=1, keepdim=True))
    rows = torch.arange(len(mask), device=mask.device)
    return _Turns(reward, mask, anchor, rows, rows, last)


def _rows_as_turns(
    anchor: Tensor, mask: Tensor, reward: Tensor, group: Tensor, trajectory: Tensor, turn: Tensor | None
) -> _Turns:
    """Turns where a row is one: its reward is the sum over its steps, its anchor that of its first unmasked step."""
    check_ids("trajectory", trajectory, (len(mask),))
    own = torch.unique(trajectory, return_inverse=True)[1]
    episode = torch.unique(Groups.of(group).index * len(mask) + own, return_inverse=True)[1]
    order = torch.arange(len(mask), device=mask.device)
    if turn is not None:
        check_ids("turn", turn, (len(mask),))
        order = turn.argsort()
    order = order[episode[order].argsort(stable=True)]
    same = episode[order][1:] == episode[order][:-1]
    if turn is not None and bool((same & (turn[order][1:] == turn[order][:-1])).any()):
        raise ValueError("turn: two rows of one episode have the same turn")
    last = torch.ones_like(mask[:, 0]).index_put_((order[:-1],), ~same)
    first_step = mask.long().argmax(dim=1, keepdim=True)
    return _Turns(
        reward=reward.sum(dim=1, keepdim=True),
        acted=mask.any(dim=1, keepdim=True),
        anchor=anchor.gather(1, first_step),
        episode=episode,
        order=order,
        last=last[:, None],
    )


def _episode_return(turns: _Turns, rewards: Tensor | None, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return of every row's episode, float64 [B], 0 for none, and whether it has one."""
    if rewards is None:
        earned = Groups.of(turns.episode, turns.acted.any(dim=1))
        return Groups.of(turns.episode).sum(turns.reward.sum(dim=1)), earned.count() > 0
    value, known = read_rewards(rewards, group, None)
    episodes = Groups.of(turns.episode, known)
    if bool((episodes.max(value) > episodes.min(value)).any()):
        raise ValueError("rewards: rows of one episode (trajectory) have different returns")
    return episodes.max(value).nan_to_num(nan=0.0), episodes.count() > 0


def _return_to_go(turns: _Turns, reward: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of a turn and all later ones of its episode: float64 [B, U]."""
    if reward.shape[1] > 1:
        return reverse_scan(reward, gamma, turns.acted)
    x, episode = reward[turns.order, 0], turns.episode[turns.order]
    reach, longest = 1, int(torch.bincount(episode).max())
    while reach < longest:  # x holds the sum of the next ``reach`` turns; an episode's rows lie side by side
        same = episode[reach:] == episode[:-reach]
        x = x + gamma**reach * torch.cat([torch.where(same, x[reach:], 0.0), x.new_zeros(reach)])
        reach *= 2
    return torch.zeros_like(reward).index_put_((turns.order,), x[:, None])


def _episode_term(
    turns: _Turns, total: Tensor, known: Tensor, group: Tensor, scale: bool, eps: float, singleton: Singleton
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the episodes of a group, each counted once: advantage, mean and deviation, float64 [B] each."""
    rows = torch.arange(len(total), device=total.device)
    first = torch.full_like(total, len(total), dtype=torch.int64)
    first = first.scatter_reduce_(0, turns.episode, rows, reduce="amin")[turns.episode] == rows
    s = group_statistics(total, group, known & first, 1, singleton)
    once = drop_rounding(s.centred, s.groups.max(total.abs()))
    once = divide(once, s.scale, eps) if scale else once
    advantage = torch.zeros_like(total).index_add_(0, turns.episode, torch.where(first, once, 0.0))[turns.episode]
    return advantage, s.mean, s.std


def _step_term(turns: _Turns, to_go: Tensor, known: Tensor, group: Tensor, scale: bool, eps: float) -> Tensor:
    """Compare the turns of a group that start in the same state: [B, U] like ``to_go``, 0 for a state met once."""
    state, states = number_ids(turns.anchor)
    place, places = number_ids(Groups.of(group).index[:, None] * states + state)
    acted = turns.acted if bool(known.all()) else turns.acted & known[:, None]
    size, total, square = (torch.zeros(places, dtype=torch.float64, device=to_go.device) for _ in range(3))

    def add(place: Tensor, to_go: Tensor, acted: Tensor) -> tuple[()]:
        size.index_add_(0, place.flatten(), acted.double().flatten())
        total.index_add_(0, place.flatten(), torch.where(acted, to_go, 0.0).double().flatten())
        return ()

    def centre(place: Tensor, to_go: Tensor, acted: Tensor) -> tuple[Tensor]:
        middle = mean[place]
        gain = drop_rounding(to_go - middle, middle.abs())
        return (torch.where(acted & several[place], gain, 0.0).to(to_go.dtype),)

    def add_squares(place: Tensor, centred: Tensor) -> tuple[()]:
        square.index_add_(0, place.flatten(), centred.double().square().flatten())
        return ()

    by_rows(add, place, to_go, acted)
    mean, several = total / size.clamp(min=1), size > 1
    (centred,) = by_rows(centre, place, to_go, acted)
    if not scale:
        return centred
    by_rows(add_squares, place, centred)
    std = (square / (size - 1).clamp(min=1)).sqrt()
    return by_rows(lambda place, x: (divide(x, std[place], eps),), place, centred)[0]


def _check_options(omega: float, gamma: float, normalise: str, eps: float, singleton: str) -> None:
    check_choice("normalise", normalise, ("mean", "std"))
    check_policies(eps=eps, singleton=singleton)
    if not (0 <= gamma <= 1 and math.isfinite(omega)):
        raise ValueError(f"gamma, omega: expected one in [0, 1] and a finite number, got {gamma} and {omega}")


def gigpo(
    rewards: Tensor | None,
    group: Tensor,
    anchor: Tensor,
    mask: Tensor,
    step_reward: Tensor | None = None,
    trajectory: Tensor | None = None,
    turn: Tensor | None = None,
    *,
    omega: float = 1.0,
    gamma: float = 0.95,
    normalise: Literal["mean", "std"] = "mean",
    eps: float = 1e-6,
    singleton: Singleton = "raw",
) -> Advantage:
    """Add to the episode's advantage one among all turns of the group that start in the same state.

    A = A_E + omega A_S; A_E = (R - mean_g R) / F; A_S = (G - mean G) / F over turns of equal (group, anchor), with
    G = sum_{k >= 0} gamma^k r_{t + k} the return from the turn on; F = 1 ("mean") or the deviation + eps ("std").

    rewards: [B], the episode's return R, NaN for none; None: the sum of its step rewards. step_reward: [B, T]; None: R
    at the last turn. At least one of the two. anchor: int64 [B, T], equal ids for the same state; a state met twice by
    one episode counts twice. mask: bool [B, T].
    Without ``trajectory`` a row is an episode and each unmasked step a turn. With it (int64 [B], episodes may repeat
    ids in other groups) a row is one turn of several tokens: it starts at the anchor of its first unmasked step, earns
    the sum of its rewards, and statistics of R count each episode once; rows of an episode come in the order of
    ``turn`` (int64 [B]), or of the batch. Its rewards must agree.

    gamma: [0, 1]. Deviations are unbiased, as in the public code. singleton: a group with one episode keeps A_E = R
    ("raw", public code) or 0; a state met once has A_S = 0. live: the group has an advantage that is not 0.
    group_mean, group_std: of R over episodes.
    Identities: omega 0, or no state met twice, is ``dr_grpo`` ("mean") or ``grpo`` ("std"). With gamma 1, a terminal
    reward and one state for all, A_S = A_E. On a balanced tree with anchors at the branch points, the mean of A_S
    over the leaves below a child is its ``spo_tree`` edge.
    Source: GiGPO, 2505.10978; langfengQ/verl-agent.
    On denoising steps: an anchor is a latent shared by branches (same seed and noise up to there), its id the node's.
    """
    if rewards is None and step_reward is None:
        raise ValueError("rewards, step_reward: expected at least one of them, got None")
    _check_options(omega, gamma, normalise, eps, singleton)
    check_mask(mask)
    check_ids("group", group, (len(mask),))
    check_ids("anchor", anchor, tuple(mask.shape))
    reward = torch.zeros((), dtype=torch.float64, device=mask.device).expand(mask.shape)
    if step_reward is not None:
        reward = read_step_reward(step_reward, mask, torch.float64)
    if trajectory is None:
        turns = _steps_as_turns(anchor, mask, reward)
    else:
        turns = _rows_as_turns(anchor, mask, reward, group, trajectory, turn)
    total, known = _episode_return(turns, rewards, group)
    earned = torch.where(turns.last, total[:, None], 0.0) if step_reward is None else turns.reward
    to_go = _return_to_go(turns, earned, gamma)
    scale = normalise == "std"
    outcome, mean, std = _episode_term(turns, total, known, group, scale, eps, singleton)
    local = omega * _step_term(turns, to_go, known, group, scale, eps)
    kept = mask & known[:, None]
    advantage = torch.where(kept, outcome[:, None] + local, 0.0)
    live = group_any(advantage.any(dim=1), group)
    return replace(step_result(advantage, kept, live), group_mean=mean.float(), group_std=std.float())


_TESTS = "tests/advantage/test_anchors.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="gigpo",
        kind="estimator",
        paper_id="2505.10978",
        title="GiGPO: the episode's advantage plus one among turns that start in the same state",
        tier=2,
        evidence={
            "exact": _TESTS + "test_gigpo_worked_numbers",
            "formula": _TESTS + "test_gigpo_against_a_loop",
            "identity": _TESTS + "test_gigpo_averages_to_the_edges_of_a_tree",
        },
        call=gigpo,
        exempt={
            "shift": "a discounted return moves with its distance to the end, and a lone episode keeps its reward",
            "scale": "in the units of the reward: no deviation divides",
            "constant": "discounting tells an early visit of a state from a late one",
        },
    ),
)
