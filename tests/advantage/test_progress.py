"""Rewards that follow progress: worked numbers, plain loops over visits, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.progress import (
    HistoryState,
    ThresholdState,
    hapo_init,
    hapo_reward,
    hapo_update,
    threshold_init,
    threshold_reward,
    threshold_update,
)

from .test_normalisation import close, deviation, mean

NAN = math.nan


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# HAPO


def test_hapo_worked_numbers() -> None:
    state = HistoryState(cost=doubles(NAN, 100.0), number=doubles(0, 3))
    cost, slot = torch.tensor([50.0, 100, 150, 400, 50, 80]), torch.tensor([1, 1, 1, 1, 1, 0])
    right = torch.ones(6, dtype=torch.bool)
    close(hapo_reward(right, cost, slot, state), [1.7071, 1, 0.3, 0.3, 1.7071, 1])
    close(hapo_reward(~right, cost, slot, state, floor=-1.0), [0, 0, -0.7071, -1, 0, 0])
    close(hapo_reward(right, cost.long(), slot, state, weight=0.5)[:3], [1.35355, 1, 0.65])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keep", ["min", "mean"])
def test_hapo_against_a_plain_loop(seed: int, keep: Any) -> None:
    draw = random.Random(seed)
    state, history = hapo_init(5), {s: [] for s in range(5)}  # type: tuple[HistoryState, dict[int, list[float]]]
    for _ in range(4):
        slot = [draw.choice([0, 1, 4]) for _ in range(9)]
        cost, correct = [draw.uniform(1, 9) for _ in slot], [draw.random() < 0.4 for _ in slot]
        valid = [draw.random() < 0.8 for _ in slot]
        inputs = (torch.tensor(correct), torch.where(torch.tensor(valid), doubles(*cost), NAN))
        reward = hapo_reward(*inputs, torch.tensor(slot), state, torch.tensor(valid)).tolist()
        for i, s in enumerate(slot):
            known = history[s] and {"min": min(history[s]), "mean": mean(history[s])}[keep]
            bonus = max(math.cos(min(math.pi / 2 * cost[i] / known, math.pi)), -0.7) if known else 0.0
            expected = float(correct[i]) + (bonus if correct[i] else min(0.0, bonus)) if valid[i] else NAN
            assert reward[i] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        before = state.state_dict()
        after = hapo_update(state, torch.tensor(slot), *inputs, torch.tensor(valid), keep=keep)
        assert all(torch.equal(x.nan_to_num(), before[n].nan_to_num()) for n, x in state.state_dict().items())
        state = HistoryState.from_state_dict(after.state_dict())
        for i, s in enumerate(slot):
            if valid[i] and correct[i]:
                history[s].append(cost[i])
        for s, costs in history.items():
            known = {"min": min(costs), "mean": mean(costs)}[keep] if costs else NAN
            assert state.cost[s].item() == pytest.approx(known, nan_ok=True) and state.number[s] == len(costs)


def test_hapo_keeps_the_least_cost_by_default() -> None:
    state = hapo_update(hapo_init(1), torch.tensor([0, 0]), torch.tensor([True, True]), torch.tensor([3.0, 5.0]))
    assert state.cost.tolist() == [3.0] and state.number.tolist() == [2.0]


# MedLoc-R1


def test_threshold_reward() -> None:
    state = threshold_init()
    scores = torch.tensor([[0.25, 0.5], [NAN, 0.75]], dtype=torch.bfloat16)
    close(threshold_reward(scores, state).nan_to_num(nan=-9)[0], [0, 1], 0)
    assert threshold_reward(scores, state)[1].isnan().tolist() == [True, False]
    at = ThresholdState(tau=torch.tensor(0.5, dtype=torch.float64), success=doubles(NAN), score=doubles(NAN))
    assert threshold_reward(scores[0], at).tolist() == [0.0, 0.0]
    assert threshold_update(at, scores[0], torch.tensor([4, 4])).success.tolist() == [0.0]


def feed(state: ThresholdState, score: float, groups: int = 30, **options: float) -> ThresholdState:
    return threshold_update(state, torch.full((groups,), score), torch.arange(groups), **options)


def test_threshold_walks_to_its_cap() -> None:
    state, seen = threshold_init(), []
    for _ in range(8):
        state = feed(state, 0.95)
        seen.append(round(state.tau.item(), 9))
    assert seen == [0.45, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert seen == sorted(seen) and state.tau.dtype == torch.float64
    capped = feed(state, 0.95)
    assert not capped.success.isnan().any()  # at the cap nothing is dropped
    steps = [(0.54, 0.69), (0.55, 0.65), (0.74, 0.84), (0.75, 0.8)]
    assert all(feed(threshold_init(tau=t), 1.0, cap=0.9).tau.item() == pytest.approx(u) for t, u in steps)
    assert feed(threshold_init(tau=0.5), 1.0, cap=0.52).tau.item() == 0.52


def test_a_short_window_never_raises_and_a_raise_keeps_the_newest_half() -> None:
    state = feed(threshold_init(), 0.9, 29)
    assert state.tau.item() == 0.3 and state.success.isnan().tolist() == [True] + [False] * 29
    state = feed(state, 0.95, 1)
    assert state.tau.item() == pytest.approx(0.45)
    assert state.score.isnan().tolist() == [True] * 15 + [False] * 15
    assert state.score[15:].tolist() == pytest.approx([0.9] * 14 + [0.95])
    assert state.success[15:].tolist() == [1.0] * 15
    assert feed(state, 0.95, 14).tau == state.tau and feed(state, 0.95, 15).tau > state.tau
    odd = feed(threshold_init(window=5), 0.9, 7)
    assert odd.score.isnan().tolist() == [True] * 3 + [False] * 2 and len(odd.success) == 5


def groups_of(successes: list[int], score: float, size: int = 10) -> tuple[Tensor, Tensor]:
    """Groups with so many rewards of ``score`` and the rest 0."""
    rows = [[score] * n + [0.0] * (size - n) for n in successes]
    return torch.tensor(rows, dtype=torch.float64).flatten(), torch.arange(len(rows)).repeat_interleave(size)


@pytest.mark.parametrize(
    ("tau", "successes", "raised"),
    [
        (0.3, [8, 8, 8, 8], True),  # mean .8
        (0.3, [8, 8, 8, 7], False),
        (0.3, [10, 10, 6, 6], True),  # deviation .2
        (0.3, [10, 10, 10, 5], False),  # deviation .217
        (0.6, [8, 8, 7, 7], True),  # mean .75
        (0.6, [8, 8, 7, 6], False),
        (0.59, [8, 8, 7, 7], False),
        (0.75, [6, 6, 5, 5], True),  # mean .55
        (0.75, [6, 6, 5, 4], False),
        (0.74, [6, 6, 5, 5], False),
        (0.75, [10, 10, 2, 2], True),  # deviation .4
        (0.75, [10, 10, 1, 2], False),
        (0.6, [10, 10, 10, 2], True),  # deviation .346
        (0.6, [10, 10, 10, 1], False),
    ],
)
def test_threshold_mastery_table(tau: float, successes: list[int], raised: bool) -> None:
    state = threshold_update(threshold_init(tau=tau, window=4), *groups_of(successes, 50.0))
    assert (state.tau.item() > tau) is raised


def test_threshold_needs_a_margin_of_the_mean_score() -> None:
    start = threshold_init(tau=0.3, window=2)
    assert feed(start, 0.39, 2).tau.item() == 0.3 and feed(start, 0.41, 2).tau.item() > 0.3
    exact = threshold_update(start, doubles(0.4, 0.4), torch.tensor([0, 1]))
    assert exact.tau.item() > 0.3  # .4 - .3 is .1 within rounding
    assert feed(start, 0.39, 2, margin=0.05).tau.item() > 0.3
    assert feed(start, 0.31, 2, margin=0.0).tau.item() > 0.3


@pytest.mark.parametrize("seed", range(4))
def test_threshold_against_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)
    state, tau, window = threshold_init(window=6), 0.3, []  # type: tuple[ThresholdState, float, list[tuple[float, float]]]
    for _ in range(25):
        ids = [draw.choice([-4, 9, 10**12, 3]) for _ in range(12)]
        scores = [NAN if draw.random() < 0.1 else draw.choice([0.1, 0.97, 0.97, 0.99, 0.99]) for _ in ids]
        valid = [draw.random() < 0.9 for _ in ids]
        scores[0], valid[0] = 0.99, True
        before = state.state_dict()
        after = threshold_update(state, doubles(*scores), torch.tensor(ids), torch.tensor(valid))
        assert all(torch.equal(x.nan_to_num(), before[n].nan_to_num()) for n, x in state.state_dict().items())
        state = ThresholdState.from_state_dict(after.state_dict())
        for g in sorted(set(ids)):
            rows = [r for r, i, v in zip(scores, ids, valid, strict=True) if i == g and v and not math.isnan(r)]
            if rows:
                window.append((mean([float(r > tau) for r in rows]), mean(rows)))
        window = window[-6:]
        success, score = [w[0] for w in window], [w[1] for w in window]
        least, most, step = (0.55, 0.4, 0.05) if tau >= 0.75 else (0.75, 0.35, 0.1) if tau > 0.599 else (0.8, 0.2, 0.15)
        full = len(window) == 6 and mean(success) >= least - 1e-9 and deviation(success, 0) <= most + 1e-9
        if full and mean(score) - tau >= 0.1 - 1e-9 and tau < 0.8:
            tau, window = min(tau + step, 0.8), window[-3:]
        assert state.tau.item() == pytest.approx(tau)
        assert state.success[6 - len(window) :].tolist() == pytest.approx([w[0] for w in window])
        assert state.score.tolist() == pytest.approx([NAN] * (6 - len(window)) + [w[1] for w in window], nan_ok=True)
    assert tau > 0.5


S, R, B = torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hapo_reward(B, R, S + 1, hapo_init(2)), "slot: expected 0 ... 1, places of the state, got 1 ... 2"),
        (lambda: hapo_reward(S, R, S, hapo_init(2)), "correct: expected bool [2], got torch.int64 [2]"),
        (lambda: hapo_reward(B, R, S, hapo_init(2), S), "valid: expected bool [2], got torch.int64 [2]"),
        (lambda: hapo_reward(B, R * 3 - 3, S, hapo_init(2)), "cost: expected values > 0 where they count, got 0"),
        (lambda: hapo_reward(B, -R, S, hapo_init(2)), "cost: expected finite values and >= 0"),
        (lambda: hapo_reward(B, R[:1], S, hapo_init(2)), "cost: expected real [2], got torch.float32 [1]"),
        (lambda: hapo_reward(B, R, S, hapo_init(2), floor=0.1), "floor: expected a number in [-1, 0], got 0.1"),
        (lambda: hapo_reward(B, R, S, hapo_init(2), floor=-1.1), "floor: expected a number in [-1, 0], got -1.1"),
        (lambda: hapo_reward(B, R, S, hapo_init(2), weight=-1.0), "weight: expected a finite number >= 0"),
        (lambda: hapo_update(hapo_init(2), S, B, R * NAN), "cost: expected finite values"),
        (lambda: hapo_update(hapo_init(2), S, B, R, keep="max"), "keep: expected 'min' or 'mean', got 'max'"),  # type: ignore[arg-type]
        (lambda: hapo_init(0), "places: expected a finite number >= 1, got 0"),
        (lambda: HistoryState(R, R), "cost: expected float64 [P], alike for both, got torch.float32 [2]"),
        (lambda: HistoryState(R.double(), R.double()[:1]), "number: expected float64 [P], alike for both"),
        (lambda: HistoryState(R.double()[None], R.double()[None]), "cost: expected float64 [P], alike for both"),
        (lambda: threshold_init(window=0), "window: expected a finite number >= 1, got 0"),
        (lambda: threshold_init(tau=NAN), "tau: expected a finite number, got nan"),
        (lambda: threshold_reward(S, threshold_init()), "rewards: expected floating numbers, got torch.int64"),
        (lambda: feed(threshold_init(), 1.0, margin=NAN), "margin: expected a finite number"),
        (lambda: feed(threshold_init(), 1.0, cap=math.inf), "cap: expected a finite number"),
        (lambda: threshold_update(threshold_init(), R, R), "group: expected int64 [2]"),
        (lambda: ThresholdState(R[0], R.double(), R.double()), "tau: expected float64 [], got torch.float32 []"),
        (lambda: ThresholdState(R.double(), R.double(), R.double()), "tau: expected float64 [], got torch.float64 [2]"),
        (lambda: ThresholdState(R[0].double(), R, R), "success: expected float64 [2], got torch.float32 [2]"),
        (lambda: ThresholdState(R[0].double(), R.double(), R), "score: expected float64 like success"),
        (lambda: ThresholdState(R[0].double(), R.double(), R.double()[:1]), "score: expected float64 like success"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
