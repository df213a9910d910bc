"""Baselines with a memory: worked numbers, plain loops over visits, identities, two ranks, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import grpo
from flowrl.advantage.streams import (
    SASState,
    SPOState,
    add_by_slot,
    dcpo_smoothed,
    sas_init,
    sas_update,
    spo_init,
    spo_sampling_weight,
    spo_shift,
    spo_single_stream,
    spo_update,
)

from .test_normalisation import close, deviation, mean, members, over_ranks

NAN = math.nan


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def state_of(*pairs: tuple[float, float]) -> SPOState:
    return SPOState(*(doubles(*column) for column in zip(*pairs, strict=True)))


# SPO, single stream


def stream(seed: int) -> tuple[Tensor, Tensor, Tensor, SPOState]:
    """Rewards in [0, 1] with NaN, shuffled slots, flags, and a state of 30 prompts."""
    draw = torch.Generator().manual_seed(seed)
    rewards, slot = torch.rand(20, generator=draw).double(), torch.randperm(30, generator=draw)[:20]
    rewards[seed % 20] = NAN
    counts = torch.rand(2, 30, generator=draw).double() * 5 + 0.1
    return rewards, slot, torch.rand(20, generator=draw) < 0.8, SPOState(counts[0], counts[1])


def test_spo_worked_numbers() -> None:
    after = spo_update(state_of((4, 4)), torch.tensor([0]), torch.tensor([1.0]), torch.tensor([9.0]))
    assert after.alpha.tolist() == [4.5] and after.beta.tolist() == [3.5] and after.value.tolist() == [0.5625]
    start = spo_init(torch.tensor([6, 0, 0]), torch.tensor([8, 8, 0]))
    assert start.alpha.tolist() == pytest.approx([5.7778, 0.4444, 0.5], abs=1e-4)
    assert start.beta.tolist() == pytest.approx([2.2222, 7.5556, 0.5], abs=1e-4)
    assert spo_init(doubles(1), doubles(1), rho_min=0.75).alpha.tolist() == [3.0]
    close(spo_sampling_weight(state_of((1, 3), (4, 4))), [math.sqrt(3) / 4 + 0.05, 0.55], 1e-6)
    close(spo_sampling_weight(state_of((4, 4)), floor=0.0), [0.5], 0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ddof", [0, 1])
def test_spo_against_a_plain_loop(seed: int, ddof: int) -> None:
    rewards, slot, valid, state = stream(seed)
    out = spo_single_stream(rewards, slot, state, valid, ddof=ddof, eps=1e-3)
    used = [i for i in range(20) if valid[i] and not rewards[i].isnan()]
    baseline = [float(state.alpha[s] / (state.alpha[s] + state.beta[s])) for s in slot]
    raw = {i: float(rewards[i]) - baseline[i] for i in used}
    centre, spread = mean(list(raw.values())), deviation(list(raw.values()), ddof)
    close(out.advantage, [(raw[i] - centre) / (spread + 1e-3) if i in raw else 0.0 for i in range(20)], 1e-5)
    close(out.channels["baseline"], baseline, 1e-6)
    assert out.loss_mask.nonzero().flatten().tolist() == used and torch.equal(out.weight, out.loss_mask.float())
    assert out.live.all() and out.group_mean is None


def test_spo_defaults_and_a_batch_without_signal() -> None:
    state = state_of((1, 1), (1, 3))
    out = spo_single_stream(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), state)
    close(out.advantage, [0.5**0.5, -(0.5**0.5)], 1e-6)
    tiny = spo_single_stream(doubles(0.5, 0.5 + 1e-8), torch.tensor([0, 0]), state, ddof=0)
    close(tiny.advantage, [-1 / 3, 1 / 3], 1e-6)
    equal = spo_single_stream(torch.full((7,), 0.1), torch.zeros(7).long(), state, eps=0.0)
    assert not equal.advantage.any() and not equal.live.any() and equal.loss_mask.all()


def test_spo_standardises_over_all_ranks() -> None:
    rewards, slot, valid, state = stream(3)
    whole = spo_single_stream(rewards, slot, state, valid).advantage
    calls = [
        lambda r, s=s: spo_single_stream(rewards[s], slot[s], state, valid[s], reduce=r).advantage  # type: ignore[misc]
        for s in (slice(0, 7), slice(7, 20))
    ]
    assert torch.allclose(torch.cat(over_ranks(calls)), whole, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_spo_update_against_a_plain_loop(seed: int) -> None:
    rewards, slot, valid, state = stream(seed)
    before = {name: x.clone() for name, x in state.state_dict().items()}
    draw = random.Random(seed)
    shift = [draw.choice([0.0, 0.004, 0.008, 0.01, 0.5, NAN]) for _ in range(20)]
    after = spo_update(state, slot, rewards, torch.tensor(shift, dtype=torch.float64), valid)
    alpha, beta = state.alpha.tolist(), state.beta.tolist()
    for i, s in enumerate(slot.tolist()):
        if valid[i] and not rewards[i].isnan():
            moved = 0.0 if math.isnan(shift[i]) else shift[i]
            rho = min(max(2 ** (-moved / 0.06), 0.875), 0.96)
            alpha[s], beta[s] = rho * alpha[s] + float(rewards[i]), rho * beta[s] + 1 - float(rewards[i])
    assert after.alpha.tolist() == pytest.approx(alpha) and after.beta.tolist() == pytest.approx(beta)
    assert all(torch.equal(x, before[name]) for name, x in state.state_dict().items())


def test_spo_without_forgetting_is_beta_bernoulli() -> None:
    state, draw = state_of((1, 1), (2, 5)), random.Random(0)
    wins, losses = [1, 2], [1, 5]
    for _ in range(30):
        slot = draw.randrange(2)
        r = draw.randrange(2)
        state = spo_update(
            state, torch.tensor([slot]), torch.tensor([float(r)]), doubles(1.0), rho_min=1.0, rho_max=1.0
        )
        wins[slot], losses[slot] = wins[slot] + r, losses[slot] + 1 - r
    assert state.alpha.tolist() == wins and state.beta.tolist() == losses


def test_spo_memory_has_a_fixed_point_and_values_stay_inside() -> None:
    state, slot = state_of((0.5, 0.5)), torch.tensor([0])
    for step in range(1, 21):
        state = spo_update(state, slot, torch.tensor([1.0]), doubles(9.0))
        assert 0 < state.value.item() < 1
        assert (state.alpha + state.beta).item() == pytest.approx(8 - 7 * 0.875**step)


def test_spo_ignores_rows_that_do_not_count_and_takes_a_state_dict() -> None:
    state = SPOState.from_state_dict(state_of((1, 1), (1, 3)).state_dict())
    slot, rewards = torch.tensor([0, 0, 1]), torch.tensor([NAN, 1.0, 9.0])
    valid = torch.tensor([True, True, False])
    after = spo_update(state, slot, rewards, torch.tensor([-1.0, 9.0, math.inf]), valid)
    assert after.alpha.tolist() == [1.875, 1.0] and after.beta.tolist() == [0.875, 3.0]


def test_add_by_slot() -> None:
    assert add_by_slot(4, torch.tensor([3, 1, 3]), doubles(1.5, 2.0, -4.0)).tolist() == [0.0, 2.0, 0.0, -2.5]


def test_spo_shift() -> None:
    now, then = torch.tensor([[1.0, 2.0, NAN], [0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.5, 7.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False] * 3])
    moved = spo_shift(now, then, mask)
    assert moved[0].item() == 0.75 and moved[1].isnan() and moved.dtype == torch.float64


# DCPO, smoothed advantage


def test_sas_worked_numbers() -> None:
    slot, state = torch.full((4,), 2), sas_init(3)
    visits = [[0.0, 0, 0, 1], [1.0, 1, 0, 1], [1.0, 1, 1, 1]]
    state = sas_update(state, slot, torch.tensor(visits[0]))
    second = dcpo_smoothed(torch.tensor(visits[1]), slot, state)
    close(second.channels["new"], [0.5, 0.5, -1.5, 0.5])
    close(second.channels["total"], [0.9354, 0.9354, -0.9354, 0.9354])
    close(second.advantage, [0.7177, 0.7177, -1.2177, 0.7177])
    state = sas_update(state, slot, torch.tensor(visits[1]))
    third = dcpo_smoothed(torch.tensor(visits[2]), slot, state)
    close(third.channels["total"], [0.6770] * 4)
    close(third.advantage, [0.2257] * 4)
    assert not third.channels["new"].any() and third.live.all()


def test_sas_takes_the_first_smoothing_on_a_tie() -> None:
    # Made so that the part of this visit is 1 and that of all visits -1: S1 = 1/3, S2 = -1/3.
    state = SASState(visits=torch.tensor([2]), count=doubles(6), mean=doubles(10), m2=doubles(141))
    out = dcpo_smoothed(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), state, ddof=0)
    close(out.channels["total"][1:], [-1.0], 0)
    close(out.advantage[1:], [1 / 3], 1e-7)


def visits_of(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = random.Random(seed)
    out = []
    for _ in range(4):
        size = draw.randint(6, 20)
        slot = [draw.choice([0, 3, 4, 6]) for _ in range(size)]
        rewards = [NAN if draw.random() < 0.15 else draw.choice([0.0, 1.0, 0.1, draw.gauss(0, 3)]) for _ in slot]
        rewards = [0.1 if s == 6 and not math.isnan(r) else r for s, r in zip(slot, rewards, strict=True)]
        rewards[0] = 0.1 if slot[0] == 6 else 0.5
        valid = [True] + [draw.random() < 0.85 for _ in slot[1:]]
        out.append((torch.tensor(rewards, dtype=torch.float64), torch.tensor(slot), torch.tensor(valid)))
    return out


def z_score(r: float, values: list[float], ddof: int, eps: float) -> float:
    return 0.0 if max(values) == min(values) else (r - mean(values)) / (deviation(values, ddof) + eps)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("ddof", "eps"), [(1, 0.0), (0, 0.01)])
def test_sas_against_a_plain_loop(seed: int, ddof: int, eps: float) -> None:
    state, history = sas_init(7), {s: [] for s in range(7)}  # type: tuple[SASState, dict[int, list[list[float]]]]
    for rewards, slot, valid in visits_of(seed):
        out = dcpo_smoothed(rewards, slot, state, valid, ddof=ddof, eps=eps)
        state = sas_update(state, slot, rewards, valid)
        expected, live = [0.0] * len(slot), dict.fromkeys(range(7), False)
        for s, rows in members(rewards, slot, valid).items():
            history[s].append([float(rewards[i]) for i in rows])
            now, ever, visit = history[s][-1], [r for part in history[s] for r in part], len(history[s])
            live[s] = max(ever) > min(ever)
            for i in rows:
                new, whole = (z_score(float(rewards[i]), values, ddof, eps) for values in (now, ever))
                both = ((visit - 1) * new + whole) / visit, (new + (visit - 1) * whole) / visit
                expected[i] = both[0] if abs(both[0]) <= abs(both[1]) else both[1]
        close(out.advantage, expected, 1e-5)
        assert torch.equal(out.loss_mask, valid & ~rewards.isnan())
        assert out.live.tolist() == [live[s] for s in slot.tolist()]
        plain = grpo(rewards, slot, valid, ddof=ddof)
        assert torch.allclose(out.group_mean, plain.group_mean, equal_nan=True)
        assert torch.allclose(out.group_std, plain.group_std, equal_nan=True)


@pytest.mark.parametrize("seed", range(6))
def test_sas_state_is_the_statistics_of_the_whole_history(seed: int) -> None:
    state, history = sas_init(7), {s: [] for s in range(7)}  # type: tuple[SASState, dict[int, list[list[float]]]]
    for rewards, slot, valid in visits_of(seed):
        before = state.state_dict()
        after = sas_update(state, slot, rewards, valid)
        assert all(torch.equal(x, before[name]) for name, x in state.state_dict().items())
        state = SASState.from_state_dict(after.state_dict())
        for s, rows in members(rewards, slot, valid).items():
            history[s].append([float(rewards[i]) for i in rows])
    for s, parts in history.items():
        ever = [r for part in parts for r in part] or [0.0]
        assert state.visits[s] == len(parts) and state.count[s] == sum(len(part) for part in parts)
        assert state.mean[s].item() == pytest.approx(mean(ever), abs=1e-12)
        assert state.m2[s].item() == pytest.approx(len(ever) * deviation(ever, 0) ** 2, abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_sas_first_visit_is_grpo(seed: int) -> None:
    rewards, slot, valid = visits_of(seed)[0]
    out = dcpo_smoothed(rewards, slot, sas_init(7), valid)
    expected = grpo(rewards, slot, valid, ddof=1, eps=0.0)
    assert torch.allclose(out.advantage, expected.advantage, atol=1e-6) and torch.equal(out.live, expected.live)


def test_sas_dead_history_is_exactly_zero() -> None:
    # The mean of repeated .1 moves by rounding, which must not become a signal.
    state = sas_init(1)
    for size in (3, 7, 1, 6):
        rewards = torch.full((size,), 1e6 + 0.1, dtype=torch.float64)
        out = dcpo_smoothed(rewards, torch.zeros(size).long(), state)
        assert not out.advantage.any() and not out.live.any()
        state = sas_update(state, torch.zeros(size).long(), rewards)


S, R, SPO = torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), state_of((1, 1), (1, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spo_single_stream(R, S + 1, SPO), "slot: expected 0 ... 1, places of the state, got 1 ... 2"),
        (lambda: spo_single_stream(R, S - 1, SPO), "slot: expected 0 ... 1, places of the state, got -1 ... 0"),
        (lambda: spo_single_stream(R, R, SPO), "slot: expected int64 [B] with B >= 1, got torch.float32 [2]"),
        (lambda: spo_single_stream(R[:0], S[:0], SPO), "slot: expected int64 [B] with B >= 1, got torch.int64 [0]"),
        (lambda: spo_single_stream(R, S[None], SPO), "slot: expected int64 [B] with B >= 1, got torch.int64 [1, 2]"),
        (lambda: spo_single_stream(R + 1, S, SPO), "rewards: expected values in [0, 1], got 1 outside"),
        (lambda: spo_single_stream(R, S, SPO, ddof=2), "ddof: expected 0 or 1"),
        (lambda: spo_single_stream(R, S, SPO, eps=-1.0), "eps: expected"),
        (lambda: spo_update(SPO, S, R - 1, R), "rewards: expected values in [0, 1]"),
        (lambda: spo_update(SPO, S * 0, R, R), "slot: expected each prompt once a batch"),
        (lambda: spo_update(SPO, S, R, -R), "shift: expected finite values and >= 0"),
        (lambda: spo_update(SPO, S, R, R[:1]), "shift: expected real [2], got torch.float32 [1]"),
        (lambda: spo_update(SPO, S, R, R, half=0.0), "half: expected a finite number > 0, got 0.0"),
        (lambda: spo_update(SPO, S, R, R, rho_min=0.97), "rho_min, rho_max: expected 0 < rho_min <= rho_max <= 1"),
        (lambda: spo_update(SPO, S, R, R, rho_max=1.01), "rho_min, rho_max: expected 0 < rho_min"),
        (lambda: spo_update(SPO, S, R, R, rho_min=0.0), "rho_min, rho_max: expected 0 < rho_min"),
        (lambda: spo_init(R, R, rho_min=1.0), "rho_min: expected less than 1, got 1.0"),
        (lambda: spo_init(R, R, rho_min=-0.1), "rho_min: expected a finite number >= 0"),
        (lambda: spo_init(R, R * 0), "total: expected sums of rewards in [0, 1]"),
        (lambda: spo_init(R[:1], R), "number: expected real [1], got torch.float32 [2]"),
        (lambda: spo_init(-R, R), "total: expected finite values and >= 0"),
        (lambda: spo_init(R * 0, -R), "number: expected finite values and >= 0"),
        (lambda: spo_sampling_weight(SPO, floor=-1.0), "floor: expected a finite number >= 0"),
        (lambda: spo_shift(R, R, S[None] > 0), "log_prob: expected real [1, 2] like mask, got torch.float32 [2]"),
        (lambda: spo_shift(R[None], R, S[None] > 0), "old_log_prob: expected real [1, 2] like mask"),
        (lambda: spo_shift(R, R, S > 0), "mask: expected bool [B, T]"),
        (lambda: SPOState(R + 1, R), "beta: expected finite counts > 0, got 0 ... 1"),
        (lambda: SPOState(R / 0, R + 1), "alpha: expected finite counts > 0"),
        (lambda: SPOState(R[:0], R[:0]), "alpha: expected floating [P], alike for both, got torch.float32 [0]"),
        (lambda: SPOState(S + 1, R + 1), "alpha: expected floating [P], alike for both, got torch.int64 [2]"),
        (lambda: SPOState(R + 1, R[:1] + 1), "beta: expected floating [P], alike for both, got torch.float32 [1]"),
        (lambda: SPOState(R[None] + 1, R[None] + 1), "alpha: expected floating [P], alike for both"),
        (lambda: dcpo_smoothed(R, S + 1, sas_init(2)), "slot: expected 0 ... 1"),
        (lambda: dcpo_smoothed(R, S, sas_init(2), ddof=-1), "ddof: expected 0 or 1"),
        (lambda: dcpo_smoothed(R, S, sas_init(2), eps=NAN), "eps: expected"),
        (lambda: sas_update(sas_init(1), S, R), "slot: expected 0 ... 0, places of the state, got 0 ... 1"),
        (lambda: sas_update(sas_init(2), S, R * NAN), "rewards: every valid sample is NaN"),
        (lambda: sas_init(0), "places: expected a finite number >= 1, got 0"),
        (lambda: SASState(R, R, R, R), "visits: expected int64 [2], got torch.float32 [2]"),
        (lambda: SASState(S, R, R, R), "count: expected float64 [2], got torch.float32 [2]"),
        (
            lambda: SASState(S, R.double(), R.double(), R.double()[:1]),
            "m2: expected float64 [2], got torch.float64 [1]",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
