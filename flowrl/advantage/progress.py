"""Rewards that follow progress: against the prompt's own history, and against a rising threshold.

A prompt owns a place in a state, ``slot``: int64 [B] in 0 ... P - 1. States are float64 and never change in place: score
first, then update. NaN rewards and ``valid``: as in ``estimators``. Every rank of a data-parallel run must keep the
same state: gather rewards over ranks before an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_flags, read_rewards, read_rows
from .method import Method
from .normalisation import per_group
from .segments import Groups
from .state import State
from .streams import add_by_slot, check_slots

_SLACK = 1e-9  # so that sums such as .3 + .15 + .15 reach their bound
# (threshold from which it holds, least mean and greatest deviation of the success rate)
_MASTERY = ((0.75, 0.55, 0.40), (0.60, 0.75, 0.35), (-math.inf, 0.80, 0.20))
# (threshold from which it holds, how far the threshold rises)
_STEPS = ((0.75, 0.05), (0.55, 0.10), (-math.inf, 0.15))


@dataclass(frozen=True)
class HistoryState(State):
    """What right answers cost so far: cost, float64 [P], NaN for none yet; number, float64 [P], how many there were."""

    cost: Tensor
    number: Tensor

    def __post_init__(self) -> None:
        for name, x in (("cost", self.cost), ("number", self.number)):
            if x.dtype != torch.float64 or x.ndim != 1 or x.shape != self.cost.shape:
                raise ValueError(f"{name}: expected float64 [P], alike for both, got {x.dtype} {list(x.shape)}")


def hapo_init(places: int) -> HistoryState:
    """Start without any right answer to ``places`` prompts, on the default device."""
    check_number("places", places, 1.0)
    zeros = torch.zeros(places, dtype=torch.float64)
    return HistoryState(cost=torch.full_like(zeros, torch.nan), number=zeros)


def _read_history(
    state: HistoryState, slot: Tensor, correct: Tensor, cost: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_slots(slot, len(state.cost))
    counted = torch.ones_like(slot, dtype=torch.bool) if valid is None else valid
    check_flags("valid", counted, tuple(slot.shape))
    check_flags("correct", correct, tuple(slot.shape))
    spent = read_rows("cost", cost, counted, 0.0)
    if bool((counted & (spent == 0)).any()):
        raise ValueError("cost: expected values > 0 where they count, got 0")
    return spent, counted


def hapo_reward(
    correct: Tensor,
    cost: Tensor,
    slot: Tensor,
    state: HistoryState,
    valid: Tensor | None = None,
    *,
    floor: float = -0.7,
    weight: float = 1.0,
) -> Tensor:
    """Reward right answers that cost less than the prompt's best so far: correct + weight r, float32 [B].

    r = max(cos(min(pi L / (2 h), pi)), floor) for a right answer, min(0, that) for a wrong one, 0 without a history;
    L the row's cost, h the remembered one. correct: bool [B]; cost: real [B] > 0; floor in [-1, 0], weight >= 0. Rows
    not valid give NaN. Call ``hapo_update`` afterwards. HAPO, 2505.11225; reconstructed in part: the official readme
    gives the form, the wrong answers' case is filled in. On denoising steps: the cost is the number of network calls.
    """
    check_number("weight", weight, 0.0)
    if not -1 <= floor <= 0:
        raise ValueError(f"floor: expected a number in [-1, 0], got {floor}")
    spent, counted = _read_history(state, slot, correct, cost, valid)
    angle = (spent / state.cost[slot] * (math.pi / 2)).clamp(max=math.pi)
    bonus = angle.cos().clamp(min=floor).nan_to_num(nan=0.0)
    bonus = torch.where(correct, bonus, bonus.clamp(max=0.0))
    return torch.where(counted, correct.double() + weight * bonus, torch.nan).float()


def hapo_update(
    state: HistoryState,
    slot: Tensor,
    correct: Tensor,
    cost: Tensor,
    valid: Tensor | None = None,
    *,
    keep: Literal["min", "mean"] = "min",
) -> HistoryState:
    """Remember what right answers cost: the least of all so far, or their mean; wrong ones leave no trace.

    Arguments as in ``hapo_reward``; several rows may share a slot. HAPO, 2505.11225. On denoising steps: the same.
    """
    if keep not in ("min", "mean"):
        raise ValueError(f"keep: expected 'min' or 'mean', got {keep!r}")
    spent, counted = _read_history(state, slot, correct, cost, valid)
    right, places = counted & correct, len(state.cost)
    number = state.number + add_by_slot(places, slot, right.double())
    if keep == "min":
        best = state.cost.nan_to_num(nan=torch.inf)
        best = best.scatter_reduce(0, slot, torch.where(right, spent, torch.inf), reduce="amin")
        return HistoryState(cost=torch.where(best.isinf(), torch.nan, best), number=number)
    spent_sum = state.cost.nan_to_num(nan=0.0) * state.number + add_by_slot(
        places, slot, torch.where(right, spent, 0.0)
    )
    return HistoryState(cost=torch.where(number > 0, spent_sum / number.clamp(min=1), torch.nan), number=number)


@dataclass(frozen=True)
class ThresholdState(State):
    """A threshold and its window: tau float64 []; success, score float64 [W], newest last, NaN where still empty.

    One entry a group: the share of its rewards above the threshold of that time, and their mean.
    """

    tau: Tensor
    success: Tensor
    score: Tensor

    def __post_init__(self) -> None:
        for name, x, shape in (("tau", self.tau, ()), ("success", self.success, (len(self.success),))):
            if x.dtype != torch.float64 or tuple(x.shape) != shape:
                raise ValueError(f"{name}: expected float64 {list(shape)}, got {x.dtype} {list(x.shape)}")
        if self.score.dtype != torch.float64 or self.score.shape != self.success.shape:
            raise ValueError(f"score: expected float64 like success, got {self.score.dtype} {list(self.score.shape)}")


def threshold_init(*, tau: float = 0.3, window: int = 30) -> ThresholdState:
    """Start at threshold ``tau`` with an empty window of ``window`` groups, on the default device."""
    check_number("tau", tau)
    check_number("window", window, 1.0)
    empty = torch.full((window,), torch.nan, dtype=torch.float64)
    return ThresholdState(tau=torch.tensor(tau, dtype=torch.float64), success=empty, score=empty)


def threshold_reward(rewards: Tensor, state: ThresholdState) -> Tensor:
    """Make a continuous score binary: 1[r > tau], float32 in the shape of ``rewards`` (floating), NaN stays."""
    if not rewards.is_floating_point():
        raise ValueError(f"rewards: expected floating numbers, got {rewards.dtype}")
    value = rewards.detach().double()
    return torch.where(value.isnan(), torch.nan, (value > state.tau).double()).float()


def _last(window: Tensor, new: Tensor, keep: int) -> Tensor:
    """Append and keep the newest ``keep`` entries, the rest of the window empty."""
    every = torch.cat([window, new])
    newest = every[len(every) - keep :]
    return torch.cat([torch.full_like(window[: len(window) - keep], torch.nan), newest])


def threshold_update(
    state: ThresholdState,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    margin: float = 0.1,
    cap: float = 0.8,
) -> ThresholdState:
    """Add the batch's groups to the window, and raise the threshold once where the window is full and mastered.

    Raised where mean(success) >= P, std(success) <= S and mean(score) - tau >= margin; for tau >= .75: P .55, S .40,
    step .05; >= .60: P .75, S .35; below: P .80, S .20; step .10 from .55 and .15 below. Never above ``cap``. A raise
    keeps the newest half of the window. The deviation is over W; groups enter in the order of their ids.

    MedLoc-R1, 2603.28120; reconstructed from a third-party port, the paper's code could not be had. rewards: [B],
    continuous scores (there overlaps of boxes); group: int64 [B]; margin and cap in units of the score.
    On denoising steps: a threshold for any continuous image score, see ``threshold_reward``.
    """
    check_number("margin", margin)
    check_number("cap", cap)
    value, mask = read_rewards(rewards, group, valid)
    groups = Groups.of(group, mask)
    score, success = (per_group(groups, groups.mean(x)) for x in (value, (value > state.tau).double()))
    known = ~score.isnan()
    size = len(state.score)
    score, success = _last(state.score, score[known], size), _last(state.success, success[known], size)
    tau = state.tau.item()
    least, most = next((p, s) for start, p, s in _MASTERY if tau >= start - _SLACK)
    mastered = (
        not bool(success.isnan().any())
        and success.mean().item() >= least - _SLACK
        and success.std(correction=0).item() <= most + _SLACK
        and score.mean().item() - tau >= margin - _SLACK
    )
    if not mastered or tau >= cap:
        return ThresholdState(tau=state.tau, success=success, score=score)
    step = next(step for start, step in _STEPS if tau >= start - _SLACK)
    none, half = score[:0], size // 2
    return ThresholdState(
        tau=torch.full_like(state.tau, min(tau + step, cap)),
        success=_last(success, none, half),
        score=_last(score, none, half),
    )


_TESTS = "tests/advantage/test_progress.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="hapo",
        kind="reward",
        paper_id="2505.11225",
        title="HAPO: right answers are rewarded for costing less than the prompt's best so far",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_hapo_worked_numbers",
            "formula": _TESTS + "test_hapo_against_a_plain_loop",
        },
        call=hapo_reward,
    ),
    Method(
        key="medloc",
        kind="curriculum",
        paper_id="2603.28120",
        title="MedLoc-R1: a success threshold that rises with mastery",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_threshold_walks_to_its_cap",
            "formula": _TESTS + "test_threshold_against_a_plain_loop",
        },
        call=threshold_update,
    ),
)
