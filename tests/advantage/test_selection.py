"""Selection: brute force over all subsets and allocations, worked numbers, plain loops, schedules, bad input."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.selection import (
    METHODS,
    best_worst_k,
    d3s,
    knapsack_allocate,
    knapsack_value,
    linear_schedule,
    max_variance_subset,
    pf_ppo,
    resample,
    rollouts_to_mixed_group,
    step_topk,
)

NAN = float("nan")


def _variance(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


def _picked(keep: Tensor) -> list[int]:
    return [int(i) for i in keep.nonzero()[:, 0]]


def _ragged(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unequal groups with ids of any spacing, shuffled, with NaN and rows that do not count."""
    rng = random.Random(seed)
    ids = [g for g, n in ((7, 5), (-3, 1), (900, 9), (12, 4)) for _ in range(n)]
    rng.shuffle(ids)
    rewards = torch.tensor([rng.gauss(100 * g, 1.0) for g in ids], dtype=torch.float64)
    valid = torch.tensor([rng.random() > 0.2 for _ in ids])
    rewards[3] = NAN
    rewards[~valid] = float("inf")
    return rewards, torch.tensor(ids), valid


def test_max_variance_worked_number() -> None:
    rewards = torch.tensor([-1.2, -0.8, -0.1, 0.1, 0.3, 1.7], dtype=torch.float64)
    keep = max_variance_subset(rewards, number=3)
    assert rewards[keep].tolist() == [-1.2, -0.8, 1.7]
    assert rewards[keep].var(correction=0) == pytest.approx(1.6467, abs=1e-4)
    assert keep.equal(max_variance_subset(rewards))  # half of six


@pytest.mark.parametrize("size", range(1, 11))
def test_max_variance_is_the_best_of_all_subsets(size: int) -> None:
    """Brute force for every number kept; values far from 0 as well, where a one-pass variance would cancel."""
    rng = random.Random(size)
    for offset in (0.0, 1e7):
        values = [offset + rng.choice((rng.gauss(0, 1), rng.randint(0, 2))) for _ in range(size)]
        for number in range(1, size + 1):
            keep = _picked(max_variance_subset(torch.tensor(values, dtype=torch.float64), number=number))
            best = max(_variance(list(c)) for c in itertools.combinations(values, number))
            assert len(keep) == number
            assert _variance([values[i] for i in keep]) == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_pods_selects_in_each_group(seed: int, number: int) -> None:
    rewards, group, valid = _ragged(seed)
    keep = max_variance_subset(rewards, group, valid, number=number)
    for g in group.unique():
        rows = [i for i in range(len(group)) if group[i] == g and valid[i] and not rewards[i].isnan()]
        kept = [i for i in _picked(keep) if group[i] == g]
        assert set(kept) <= set(rows) and len(kept) == min(number, len(rows))
        if rows:
            alone = max_variance_subset(rewards[rows], number=number)
            assert [rows[i] for i in _picked(alone)] == kept  # isolated, and the batch form on one group


def test_other_groups_change_nothing() -> None:
    rewards, group, valid = _ragged(9)
    changed = torch.where(group == 900, rewards * 1e9 - 1, rewards)
    before, after = (max_variance_subset(r, group, valid, fraction=0.4) for r in (rewards, changed))
    assert before[group != 900].equal(after[group != 900])


def test_fraction_is_rounded_up_in_each_group() -> None:
    group = torch.tensor([0] * 5 + [1] * 2 + [2] * 10)
    keep = max_variance_subset(torch.arange(17.0), group, fraction=0.2)
    assert [int(keep[group == g].sum()) for g in range(3)] == [1, 1, 2]
    assert int(max_variance_subset(torch.arange(30.0), fraction=0.1).sum()) == 3  # 30 x 0.1 is a little above 3


def test_max_variance_ties_and_whole_batch() -> None:
    assert _picked(max_variance_subset(torch.tensor([-2.0, -1.0, 1.0, 2.0]), number=3)) == [0, 2, 3]
    assert _picked(max_variance_subset(torch.tensor([0.3, 0.9, 0.5]), number=1)) == [1]
    assert _picked(max_variance_subset(torch.full((4,), 0.1), number=2)) == [2, 3]
    third = torch.tensor([1 / 3, -1 / 3, 0.1, -0.1], dtype=torch.float64) + 1e3  # equal but for rounding
    assert _picked(max_variance_subset(third, number=3)) == [0, 1, 2]
    assert bool(max_variance_subset(torch.randn(7), number=7).all())
    assert bool(max_variance_subset(torch.randn(7), number=99).all())
    standard = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    standard = (standard - standard.mean()) / standard.std(correction=0)
    assert standard[max_variance_subset(standard, number=16)].var(correction=0) > 1


def test_nothing_valid_keeps_nothing() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    assert not max_variance_subset(torch.ones(3), None, none).any()
    assert not best_worst_k(torch.ones(3), torch.arange(3), none).any()
    assert pf_ppo(torch.ones(3), None, none).tolist() == [0, 0, 0]


def test_step_topk_against_sorting() -> None:
    g = torch.Generator().manual_seed(1)
    advantage, entropy = torch.randn(6, 9, generator=g), torch.rand(6, 9, generator=g)
    mask = torch.rand(6, 9, generator=g) > 0.4
    mask[2] = False
    score = {(b, t): abs(float(advantage[b, t])) * float(entropy[b, t]) for b, t in mask.nonzero().tolist()}
    best = sorted(score, key=lambda k: -score[k])[: math.ceil(0.3 * len(score))]
    hidden = torch.where(mask, advantage, NAN)
    assert sorted(map(tuple, step_topk(hidden, entropy, mask, fraction=0.3).nonzero().tolist())) == sorted(best)
    by_row = step_topk(advantage, torch.where(mask, entropy, NAN), mask, fraction=0.3, per="row")
    for b in range(6):
        row = sorted((k for k in score if k[0] == b), key=lambda k: -score[k])
        assert set(row[: math.ceil(0.3 * len(row))]) == {(b, t) for t in _picked(by_row[b])}


def test_step_topk_broadcasts_rows_and_breaks_ties_early() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    rows = step_topk(torch.tensor([1.0, -3.0]), torch.ones(2, 5), mask, fraction=0.4)
    assert rows.tolist() == [[False] * 5, [True] * 4 + [False]]
    assert int(step_topk(torch.ones(2), torch.zeros(2, 5), mask).sum()) == 2  # a fifth of ten, by default
    assert step_topk(torch.tensor([NAN, 1.0]), torch.ones(2, 5), mask, fraction=0.1).tolist()[1][0]
    padded = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    assert step_topk(torch.ones(2), torch.ones(2, 8), padded, fraction=0.6)[:, :5].equal(
        step_topk(torch.ones(2), torch.ones(2, 5), mask, fraction=0.6)
    )


def test_d3s_chooses_rows_then_steps() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    advantage = torch.tensor([1.0, 0.1, -2.0, 0.0, 50.0])  # the last row has no step, so it is no candidate
    entropy = torch.tensor([[0.3, 0.9, 9], [1, 1, 1], [0.1, 0.2, 0.3], [1, 1, 1], [9, 9, 9]])
    keep = d3s(advantage, entropy, mask, row_fraction=0.5, step_fraction=0.4)
    assert keep.nonzero().tolist() == [[0, 1], [2, 2]]
    by_step = d3s(
        advantage[:, None] + torch.tensor([-0.5, 0.5, 0.0]), entropy, mask, row_fraction=0.5, step_fraction=0.4
    )
    assert by_step.nonzero().tolist() == [[0, 1], [2, 2]]  # scores .15 1.35 | .25 .3 .6
    in_groups = d3s(
        advantage, entropy, mask, torch.tensor([5, 5, 5, 8, 8]), level="group", row_fraction=0.3, step_fraction=1
    )
    assert in_groups.any(1).tolist() == [True, False, False, True, False]
    assert not d3s(torch.tensor([NAN, NAN]), torch.ones(2, 3), mask[:2]).any()


def test_d3s_row_score_is_the_mean_over_unmasked_steps() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    advantage = torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 0], [-2.5, -2.5, 0, 0]])
    keep = d3s(advantage, torch.ones(3, 4), mask, row_fraction=0.6, step_fraction=1)
    assert keep.any(1).tolist() == [False, True, True]


def test_d3s_keeps_everything_at_full_fractions() -> None:
    g = torch.Generator().manual_seed(2)
    mask = torch.rand(5, 4, generator=g) > 0.3
    assert d3s(torch.randn(5, generator=g), torch.rand(5, 4, generator=g), mask, row_fraction=1, step_fraction=1).equal(
        mask
    )


def test_d3s_defaults_keep_half_the_rows_and_a_fifth_of_their_steps() -> None:
    keep = d3s(torch.arange(10.0), torch.ones(10, 6), torch.ones(10, 6, dtype=torch.bool))
    assert int(keep.sum()) == 6  # a fifth of 5 x 6


def test_linear_schedule() -> None:
    assert [linear_schedule(p, start=0.2, end=0.6) for p in (-1.0, 0.0, 0.25, 1.0, 7.0)] == pytest.approx(
        [0.2, 0.2, 0.3, 0.6, 0.6]
    )


def test_best_worst_worked_numbers() -> None:
    rewards, group = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7, 9.0, 2.0]), torch.tensor([4, 4, 4, 4, 4, 1, 1])
    assert _picked(best_worst_k(rewards, group, number=2)) == [1, 2, 5, 6]
    assert _picked(best_worst_k(rewards, group, number=3)) == [1, 2, 4, 5, 6]  # the odd one goes to the best
    assert _picked(best_worst_k(rewards, group, number=1)) == [1, 5]
    of_24 = best_worst_k(torch.arange(24.0), torch.zeros(24, dtype=torch.int64))
    assert _picked(of_24) == [*range(4), *range(20, 24)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_best_worst_against_plain_loop(seed: int, number: int) -> None:
    rewards, group, valid = _ragged(seed)
    kept: set[int] = set()
    for g in group.unique():
        rows = [i for i in range(len(group)) if group[i] == g and valid[i] and not rewards[i].isnan()]
        rows.sort(key=lambda i: float(rewards[i]))
        kept |= set(rows[: number // 2]) | set(rows[max(len(rows) - (number - number // 2), 0) :])
    assert set(_picked(best_worst_k(rewards, group, valid, number=number))) == kept


def test_best_worst_is_max_variance_on_symmetric_groups() -> None:
    rewards, group = torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]), torch.zeros(6, dtype=torch.int64)
    assert best_worst_k(rewards, group, number=4).equal(max_variance_subset(rewards, group, number=4))


def test_filtration_worked_numbers() -> None:
    rewards = torch.tensor([1.0, -2.0, 0.0, NAN])
    assert pf_ppo(rewards).tolist() == pytest.approx([0.6, 2.4, 0, 0], abs=1e-6)
    assert pf_ppo(rewards, power=1.0).tolist() == pytest.approx([1, 2, 0, 0], abs=1e-6)
    assert pf_ppo(rewards, kind="max_min").tolist() == pytest.approx([1.5, 1.5, 0, 0], abs=1e-6)
    assert pf_ppo(rewards, kind="max_random").tolist() == pytest.approx([2, 0.5, 0.5, 0], abs=1e-6)
    assert pf_ppo(rewards, floor=1.0).tolist() == pytest.approx([0.75, 1.875, 0.375, 0])
    assert pf_ppo(rewards, power=0.0).tolist() == [1, 1, 1, 0]
    assert pf_ppo(torch.zeros(3)).tolist() == [1, 1, 1]  # verl's 1e-8 under every weight
    assert pf_ppo(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([2 - 2e-8, 2e-8], rel=1e-6)
    assert pf_ppo(torch.zeros(3), floor=0.0).tolist() == [0, 0, 0]
    assert pf_ppo(rewards[:3], kind="max_min", floor=0.0).tolist() == [1.5, 1.5, 0]


@pytest.mark.parametrize("kind", ["pow", "max_min", "max_random"])
@pytest.mark.parametrize("seed", range(3))
def test_filtration_against_plain_loop(kind: Any, seed: int) -> None:
    rewards, group, valid = _ragged(seed)
    usable = [i for i in range(len(group)) if valid[i] and not rewards[i].isnan()]
    raw = [0.0] * len(group)
    for i in usable:
        mates = [float(rewards[j]) for j in usable if group[j] == group[i]]
        r = float(rewards[i])
        if kind == "pow":
            raw[i] = abs(r) ** 1.5
        elif kind == "max_min":
            raw[i] = float(r in (max(mates), min(mates)))
        else:
            raw[i] = 0.4 if r == max(mates) else 0.1
    mean = math.fsum(raw) / len(usable)
    weight = pf_ppo(rewards.float() if kind == "pow" else rewards, group, valid, kind=kind, power=1.5)
    assert (
        weight.tolist() == pytest.approx([w / mean for w in raw], rel=1e-5, abs=1e-6) and weight.dtype == torch.float32
    )


def test_filtration_mean_is_over_all_ranks() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, NAN])
    other = torch.tensor([26.0, 3.0], dtype=torch.float64)  # the other rank: f summed, rows
    weight = pf_ppo(rewards, reduce=lambda x: x + other)
    assert weight.tolist() == pytest.approx([6 / 40, 24 / 40, 54 / 40, 0], abs=1e-6)
    by_group = pf_ppo(rewards, torch.zeros(4, dtype=torch.int64), kind="max_min", reduce=lambda x: x)
    assert by_group.tolist() == pytest.approx([1.5, 0, 1.5, 0], abs=1e-6)
    with pytest.raises(ValueError, match="group"):
        pf_ppo(rewards, kind="max_random", reduce=lambda x: x)


def test_equal_weights_are_the_bootstrap() -> None:
    assert pf_ppo(torch.tensor([2.0, -2.0, 2.0])).tolist() == pytest.approx([1, 1, 1])
    drawn = resample(torch.ones(50), torch.Generator().manual_seed(3))
    assert drawn.shape == (50,) and drawn.dtype == torch.int64 and len(set(drawn.tolist())) < 50
    assert drawn.equal(resample(torch.ones(50), torch.Generator().manual_seed(3)))


def test_resample_draws_by_weight() -> None:
    drawn = resample(torch.tensor([0.0, 1.0, 3.0]), torch.Generator().manual_seed(4), number=20_000)
    share = torch.bincount(drawn, minlength=3) / 20_000
    assert share[0] == 0 and share[1] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 20_000))


def test_knapsack_worked_numbers() -> None:
    assert knapsack_allocate(torch.tensor([0.5, 0.1, 0.9]), budget=24).tolist() == [7, 15, 2]
    assert knapsack_allocate(torch.tensor([0.3, 0.05, 0.9, 1.0]), budget=32).tolist() == [11, 17, 2, 2]
    value = knapsack_value(torch.tensor(8), torch.tensor([0.05, 0.1, 1 / 3, 0.5, 0.9], dtype=torch.float64))
    assert value.tolist() == pytest.approx([0.0152, 0.0461, 0.1423, 0.1240, 0.0051], abs=1e-4)
    p = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert p[knapsack_value(torch.tensor(10**6), p).argmax()] == pytest.approx(1 / 3, abs=1e-3)


def _best_value(p: list[float], budget: int, low: int, high: int) -> float:
    """Dynamic programme over prompts."""
    best = {0: 0.0}
    for rate in p:
        value = [(1 - rate**n - (1 - rate) ** n) * rate * (1 - rate) ** 2 for n in range(high + 1)]
        best = {
            spent: max(best[spent - n] + value[n] for n in range(low, high + 1) if spent - n in best)
            for spent in range(min(best) + low, min(max(best) + high, budget) + 1)
        }
    return best[budget]


@pytest.mark.parametrize("seed", range(6))
def test_knapsack_is_the_best_allocation(seed: int) -> None:
    rng = random.Random(seed)
    p = [rng.choice([0.0, 1.0, rng.random(), rng.random()]) for _ in range(rng.randint(1, 6))]
    low, high = rng.randint(1, 3), rng.randint(4, 14)
    for budget in {len(p) * low, len(p) * high, rng.randint(len(p) * low, len(p) * high)}:
        shares = knapsack_allocate(torch.tensor(p), budget=budget, low=low, high=high)
        value = knapsack_value(shares, torch.tensor(p, dtype=torch.float64)).sum()
        assert int(shares.sum()) == budget and int(shares.min()) >= low and int(shares.max()) <= high
        assert float(value) == pytest.approx(_best_value(p, budget, low, high), abs=1e-6)


def test_knapsack_value_is_concave_and_the_loop_limit_binds() -> None:
    p = torch.tensor([[0.02], [0.4], [0.97]], dtype=torch.float64)
    gain = knapsack_value(torch.arange(1, 60), p).diff()
    assert bool((gain > 0).all()) and bool((gain.diff() < 0).all())
    assert knapsack_allocate(torch.tensor([0.4, 0.05]), budget=22, high=12).tolist() == [10, 12]
    assert knapsack_allocate(torch.tensor([0.2, 1.0]), budget=130).tolist() == [128, 2]


def test_equal_rates_get_equal_shares() -> None:
    for p in (0.3, 0.0, 1.0):
        assert knapsack_allocate(torch.full((3,), p)).tolist() == [8, 8, 8]
    assert knapsack_allocate(torch.full((3,), 0.3), budget=25).tolist() == [9, 8, 8]
    assert knapsack_allocate(torch.full((3,), 0.3), budget=6).tolist() == [2, 2, 2]
    assert knapsack_allocate(torch.full((2,), 0.3), budget=2, low=1, high=1).tolist() == [1, 1]


def test_knapsack_gives_the_rest_to_prompts_never_solved() -> None:
    rates = torch.tensor([1.0, 0.0, 0.5, 0.0])
    assert knapsack_allocate(rates, budget=20, high=6).tolist() == [2, 6, 6, 6]
    assert knapsack_allocate(rates, budget=17, high=6).tolist() == [2, 5, 6, 4]
    assert knapsack_allocate(rates, budget=22, high=6).tolist() == [4, 6, 6, 6]
    assert knapsack_allocate(torch.tensor([1.0, 0.0]), budget=5).tolist() == [2, 3]


def test_rollouts_to_a_mixed_group_by_simulation() -> None:
    p = torch.tensor([0.5, 0.2, 0.0, 1.0])
    expected = rollouts_to_mixed_group(p).tolist()
    assert expected == pytest.approx([3.0, 5.25, math.inf, math.inf], rel=1e-6)
    rng, lengths = random.Random(0), []
    for _ in range(4000):
        first, n = rng.random() < 0.2, 2
        while (rng.random() < 0.2) == first:
            n += 1
        lengths.append(n)
    assert sum(lengths) / 4000 == pytest.approx(5.25, abs=0.35)


ONES, IDS, MASK = torch.ones(4), torch.zeros(4, dtype=torch.int64), torch.ones(4, 2, dtype=torch.bool)
BAD: list[tuple[str, Any]] = [
    ("rewards", lambda: max_variance_subset(torch.ones(2, 2))),
    ("rewards", lambda: best_worst_k(torch.full((4,), NAN), IDS)),
    ("rewards", lambda: pf_ppo(torch.full((4,), float("inf")))),
    ("group", lambda: max_variance_subset(ONES, torch.ones(4))),
    ("fraction", lambda: max_variance_subset(ONES, fraction=0.0)),
    ("fraction", lambda: step_topk(ONES, torch.ones(4, 2), MASK, fraction=1.1)),
    ("number", lambda: max_variance_subset(ONES, number=0)),
    ("number", lambda: best_worst_k(ONES, IDS, number=0)),
    ("per", lambda: step_topk(ONES, torch.ones(4, 2), MASK, per="group")),  # type: ignore[arg-type]
    ("mask", lambda: step_topk(ONES, torch.ones(4, 2), MASK.float())),
    ("mask", lambda: d3s(ONES, torch.ones(4, 2), MASK.float())),
    ("entropy", lambda: step_topk(ONES, torch.ones(4, 3), MASK)),
    ("entropy", lambda: d3s(ONES, torch.full((4, 2), NAN), MASK)),
    ("advantage", lambda: d3s(torch.ones(3), torch.ones(4, 2), MASK)),
    ("advantage", lambda: step_topk(torch.full((4,), float("inf")), torch.ones(4, 2), MASK)),
    ("advantage", lambda: step_topk(torch.full((4,), -float("inf")), torch.ones(4, 2), MASK)),
    ("level", lambda: d3s(ONES, torch.ones(4, 2), MASK, level="row")),  # type: ignore[arg-type]
    ("group", lambda: d3s(ONES, torch.ones(4, 2), MASK, level="group")),
    ("kind", lambda: pf_ppo(ONES, kind="max")),  # type: ignore[arg-type]
    ("power", lambda: pf_ppo(ONES, power=-1.0)),
    ("floor", lambda: pf_ppo(ONES, floor=-1.0)),
    ("floor", lambda: pf_ppo(ONES, floor=NAN)),
    ("power", lambda: pf_ppo(ONES, power=math.inf)),
    ("weight", lambda: resample(torch.zeros(3), torch.Generator())),
    ("weight", lambda: resample(torch.tensor([1.0, -1.0]), torch.Generator())),
    ("weight", lambda: resample(torch.tensor([1.0, NAN]), torch.Generator())),
    ("number", lambda: resample(ONES, torch.Generator(), number=0)),
    ("success_rate", lambda: knapsack_allocate(torch.tensor([0.5, 1.1]))),
    ("success_rate", lambda: knapsack_allocate(torch.tensor([-0.1]))),
    ("success_rate", lambda: knapsack_allocate(torch.tensor([NAN]))),
    ("success_rate", lambda: knapsack_allocate(torch.ones(0))),
    ("low, high", lambda: knapsack_allocate(ONES, low=0)),
    ("low, high", lambda: knapsack_allocate(ONES, low=9, high=8)),
    ("budget", lambda: knapsack_allocate(ONES, budget=7)),
    ("budget", lambda: knapsack_allocate(ONES, budget=513)),
]


@pytest.mark.parametrize(("named", "call"), BAD)
def test_bad_input_is_named(named: str, call: Any) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_inputs_are_left_alone_and_entries_point_to_tests() -> None:
    rewards, group, valid = _ragged(5)
    copy = rewards.clone()
    max_variance_subset(rewards, group, valid), best_worst_k(rewards, group, valid), pf_ppo(rewards, group, valid)
    assert torch.equal(rewards.nan_to_num(nan=-5.0), copy.nan_to_num(nan=-5.0))
    assert [m.key for m in METHODS] == ["d3s", "best_worst_k", "pf_ppo", "knapsack"]
    for m in METHODS:
        assert all(test.split("::")[1] in globals() for kind, test in m.evidence.items() if kind != "learned")
