"""Curricula, hints, prefixes and shaped rewards: boundaries, worked numbers, plain loops, bad input."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import grpo
from flowrl.advantage.curriculum import (
    EASY,
    HARD,
    MEDIUM,
    METHODS,
    all_fail,
    clpo,
    difficulty_label,
    ghpo,
    hierarchical_reward,
    next_hint_ratio,
    otc,
    pick_replacements,
    prefix_groups,
    prefix_rl,
    replace_rows,
    sample_prefix,
    scaf_grpo,
    suffix_mask,
)

NAN = float("nan")


def _same(left: Tensor, right: Tensor, atol: float = 1e-7) -> None:
    assert left.dtype == right.dtype and torch.allclose(left, right, rtol=1e-6, atol=atol)


def _ragged(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correct flags, shuffled unequal groups with wide ids, rows that count; group 5 has none that does."""
    rng = random.Random(seed)
    ids = [g for g, n in ((7, 6), (-3, 1), (10**15, 9), (12, 4), (5, 2), (40, 5)) for _ in range(n)]
    rng.shuffle(ids)
    chance = {g: rng.choice((0.0, 0.2, 0.5, 0.8, 1.0)) for g in set(ids)}
    correct = torch.tensor([rng.random() < chance[g] for g in ids])
    valid = torch.tensor([g != 5 and rng.random() > 0.2 for g in ids])
    return correct, torch.tensor(ids), valid


def _rows(group: Tensor, valid: Tensor, g: int) -> list[int]:
    return [i for i in range(len(group)) if int(group[i]) == g and bool(valid[i])]


def test_difficulty_boundaries() -> None:
    accuracy = [0.0, 0.3, 0.3000001, 0.7, 0.7000001, 1.0, NAN]
    expected = [HARD, HARD, MEDIUM, MEDIUM, EASY, EASY, -1]
    for dtype in (torch.float32, torch.float64):
        assert difficulty_label(torch.tensor(accuracy, dtype=dtype)).tolist() == expected
    for right, label in ((3, HARD), (4, MEDIUM), (7, MEDIUM), (8, EASY)):  # of ten
        result = clpo(torch.arange(10) < right, torch.zeros(10, dtype=torch.int64))
        assert set(result.label.tolist()) == {label}
    assert difficulty_label(torch.tensor([0.4, 0.6]), hard=0.4, easy=0.5).tolist() == [HARD, EASY]
    assert difficulty_label(torch.tensor([0.0, 0.1, 1.0]), hard=0.0, easy=1.0).tolist() == [HARD, MEDIUM, MEDIUM]


@pytest.mark.parametrize("seed", range(4))
def test_clpo_against_plain_loop(seed: int) -> None:
    correct, group, valid = _ragged(seed)
    result = clpo(correct, group, valid)
    for i in range(len(group)):
        rows = _rows(group, valid, int(group[i]))
        if not rows:
            assert (int(result.label[i]), bool(result.train[i]), bool(result.rewrite[i])) == (-1, False, False)
            assert result.kl_scale[i] == 1
            continue
        accuracy = sum(bool(correct[j]) for j in rows) / len(rows)
        label = "hard" if accuracy <= 0.3 else "medium" if accuracy <= 0.7 else "easy"
        assert ("hard", "medium", "easy")[int(result.label[i])] == label
        assert bool(result.train[i]) == (0 < accuracy < 1 and bool(valid[i]))
        assert bool(result.rewrite[i]) == (label != "easy")
        assert float(result.kl_scale[i]) == (0.5 if label == "hard" else 1.0)
    assert result.kl_scale.dtype == torch.float32
    assert clpo(correct, group, valid, hard_kl=1.0).kl_scale.eq(1).all()
    assert clpo(correct, group, valid, hard_kl=0.0).kl_scale.equal((result.label != HARD).float())


def test_all_fail() -> None:
    rewards = torch.tensor([0.0, NAN, 0.0, 0.2, NAN, -1.0, 0.0])
    group = torch.tensor([3, 3, 8, 8, 1, 9, 9])
    assert all_fail(rewards, group).tolist() == [True, True, False, False, False, True, True]
    assert all_fail(rewards, group, threshold=0.2).tolist() == [True] * 4 + [False, True, True]
    keep = torch.tensor([1, 1, 1, 0, 1, 1, 1]).bool()
    assert all_fail(rewards, group, keep).tolist() == [True] * 4 + [False, True, True]


def test_pick_replacements() -> None:
    success = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool()
    assert pick_replacements(success).tolist() == [-1, 0, 1, 2]


def test_scaf_grpo_worked_batch() -> None:
    rewards = torch.tensor([0.0, 0.0, NAN, 1.0, 0.0, 0.0, 0.0])
    group, slot = torch.tensor([9, 5, 5, 9, 5, 2, 2]), torch.tensor([0, 1, 1, 0, 1, 2, 2])
    success = torch.tensor([[1, 1], [0, 1], [0, 0]]).bool()
    result = scaf_grpo(rewards, group, slot, success)
    assert result.row.tolist() == [False, True] + [False] * 5
    assert result.level.tolist() == [-1, 1] + [-1] * 5
    assert result.source.tolist() == [-1, 3] + [-1] * 5  # slot 1, level 1, of two levels
    hinted = torch.arange(10.0, 16.0)
    assert replace_rows(rewards, result.source, hinted).nan_to_num(nan=7).tolist() == [0, 13, 7, 1, 0, 0, 0]
    first_gone = scaf_grpo(rewards, group, slot, success, torch.tensor([1, 0, 1, 1, 1, 1, 1]).bool())
    assert first_gone.row.nonzero().tolist() == [[4]]
    raised = scaf_grpo(rewards, group, slot, success, threshold=1.0)
    assert raised.row.nonzero().tolist() == [[0], [1]] and raised.source.tolist()[:2] == [0, 3]
    for step, active in ((0, False), (49, False), (50, True), (51, True)):
        assert bool(scaf_grpo(rewards, group, slot, success, step=step).row.any()) == active
    assert bool(scaf_grpo(rewards, group, slot, success, step=5, exempt_steps=5).row.any())
    idle = scaf_grpo(rewards, group, slot, success, step=0)
    assert idle.level.eq(-1).all() and idle.source.eq(-1).all()


@pytest.mark.parametrize("seed", range(4))
def test_scaf_grpo_against_plain_loop(seed: int) -> None:
    correct, group, valid = _ragged(seed)
    ids = sorted(set(group.tolist()), reverse=True)
    slot = torch.tensor([ids.index(g) for g in group.tolist()])
    success = torch.rand(len(ids), 4, generator=torch.Generator().manual_seed(seed)) > 0.6
    result = scaf_grpo(correct.float(), group, slot, success, valid)
    expected: dict[int, int] = {}
    for p, g in enumerate(ids):
        rows, level = _rows(group, valid, g), 0
        while level < 4 and not success[p, level]:
            level += 1
        if rows and not any(correct[i] for i in rows) and level < 4:
            expected[rows[0]] = level
    assert {int(i): int(result.level[i]) for i in result.row.nonzero()[:, 0]} == expected
    assert all(int(result.source[i]) == int(slot[i]) * 4 + level for i, level in expected.items())


def test_without_success_nothing_is_replaced() -> None:
    correct, group, _ = _ragged(1)
    result = scaf_grpo(correct.float() * 0, group, torch.zeros_like(group), torch.zeros(1, 12, dtype=torch.bool))
    assert not result.row.any()
    x = torch.arange(len(group) * 6).view(-1, 2, 3)
    assert replace_rows(x, result.source, x[:1]).equal(x)
    one = torch.where(torch.arange(len(group)) == 4, 1, -1)
    swapped = replace_rows(x, one, -x[:2] - 1)
    assert swapped[4].equal(-x[1] - 1) and swapped[:4].equal(x[:4]) and swapped[5:].equal(x[5:])


def test_hint_ratio_steps() -> None:
    ratio, fail, seen = torch.zeros(2), torch.tensor([True, False]), []
    for _ in range(5):
        ratio = next_hint_ratio(fail, ratio)
        seen.append(ratio.tolist())
    assert seen == [[0.25, 0], [0.5, 0], [0.75, 0], [0.75, 0], [0.75, 0]] and ratio.dtype == torch.float32
    assert next_hint_ratio(torch.tensor([True]), torch.tensor([0.9])).tolist() == pytest.approx([0.9])
    assert next_hint_ratio(torch.tensor([True]), torch.tensor([1.0])).tolist() == [1.0]
    assert next_hint_ratio(torch.tensor([True]), torch.tensor([0.0]), stride=1.0, maximum=1.0).tolist() == [1.0]
    rewards, group = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.3]), torch.tensor([4, 2, 2, 4, 6])
    hints = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.0])
    assert ghpo(rewards, group, hints).tolist() == [0.75, 0.25, 0.25, 0.75, 0.0]
    assert ghpo(rewards, group, hints, threshold=0.3, stride=0.5, maximum=0.5).tolist() == [0.5, 0.25, 0.25, 0.5, 0.5]
    dropped = torch.tensor([1, 1, 0, 1, 1]).bool()
    assert ghpo(rewards, group, hints, dropped).tolist() == [0.75, 0.5, 0.5, 0.75, 0.0]


def test_sample_prefix_worked_numbers() -> None:
    length, uniform = torch.tensor([10, 10, 10, 4, 1]), torch.tensor([0.49, 0.5, 0.99, 0.75, 0.99])
    assert sample_prefix(length, uniform).tolist() == [0, 0, 9, 2, 0]
    assert sample_prefix(length, uniform, plain=0.0).tolist() == [4, 5, 9, 3, 0]
    assert sample_prefix(length, uniform, plain=0.0, low=0.5, high=0.5).tolist() == [5, 5, 5, 2, 0]
    assert sample_prefix(length, uniform, plain=0.0, low=0.5).tolist() == [7, 7, 9, 3, 0]
    assert sample_prefix(length, uniform, plain=0.0, low=1.0).tolist() == [9, 9, 9, 3, 0]
    assert sample_prefix(length, uniform, plain=1.0).tolist() == [0] * 5
    drawn = sample_prefix(
        torch.full((9000,), 8.0), torch.rand(9000, generator=torch.Generator().manual_seed(0)), plain=0.2
    )
    share = torch.bincount(drawn, minlength=8) / 9000
    assert share.tolist() == pytest.approx([0.3] + [0.1] * 7, abs=0.02) and drawn.dtype == torch.int64


def test_suffix_mask() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert suffix_mask(mask, torch.tensor([2, 0, 9])).tolist() == [
        [False, False, True, True],
        [True, True, True, False],
        [False] * 4,
    ]


def test_groups_include_the_prefix() -> None:
    """Prefixed rows (easy: reward 1) must not drag the plain rows of the prompt below their own baseline."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    group = torch.tensor([70, 70, 70, 70, 70, 70])
    prefix_id, prefix = torch.tensor([4, 0, 3, 3, 3, 3]), torch.tensor([0, 0, 5, 5, 2, 2])
    ready = prefix_rl(group, prefix_id, prefix, torch.ones(6, 6, dtype=torch.bool))
    assert ready.group.tolist() == [0, 0, 2, 2, 1, 1]  # plain | cut at 2 | cut at 5
    assert ready.mask.sum(1).tolist() == [6, 6, 1, 1, 4, 4]
    own = grpo(rewards, ready.group, eps=0.0).advantage
    assert own.tolist() == pytest.approx([-1, 1, 0, 0, -1, 1])
    mixed = grpo(rewards, group, eps=0.0).advantage
    assert mixed[2] != 0 and mixed[1] < 1  # what leaving the prefix out would give


@pytest.mark.parametrize("seed", range(3))
def test_prefix_groups_against_plain_loop(seed: int) -> None:
    rng = random.Random(seed)
    rows = [(rng.choice((-(2**62), 5, 2**62)), rng.choice((0, 3, 2**61)), rng.choice((0, 1, 4))) for _ in range(60)]
    group = prefix_groups(*(torch.tensor(column) for column in zip(*rows, strict=True)))
    assert group.dtype == torch.int64 and set(group.tolist()) == set(range(int(group.max()) + 1))
    found = group.tolist()
    for i, (g, trace, cut) in enumerate(rows):
        for j, (h, other, end) in enumerate(rows):
            assert (found[i] == found[j]) == (g == h and cut == end and (cut == 0 or trace == other))


def test_no_prefix_changes_nothing() -> None:
    group, mask = torch.tensor([8, 3, 8, 3]), torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    ready = prefix_rl(group, torch.arange(4), torch.zeros(4, dtype=torch.int64), mask)
    assert ready.group.tolist() == [1, 0, 1, 0] and ready.mask.equal(mask)


def test_otc_worked_numbers() -> None:
    def tool(cost: list[float], **options: Any) -> list[float]:
        group = torch.zeros(len(cost), dtype=torch.int64)
        return otc(torch.ones(len(cost), dtype=torch.bool), torch.tensor(cost), group, **options).tolist()

    assert tool([2.0, 2.0]) == pytest.approx([1, 1])
    assert tool([1.0, 3.0]) == pytest.approx([1, 0.7071], abs=1e-4)
    assert tool([0.0, 2.0]) == pytest.approx([1, 0.7071], abs=1e-4)  # none needed: the cosine, smooth 4
    assert tool([2.0, 0.0, 5.0], form="ppo", smooth=4.0) == pytest.approx(
        [0.7071, 1, math.cos(5 * math.pi / 14)], abs=1e-4
    )
    assert tool([2.0, 0.0], smooth=2.0, alpha=3.0) == pytest.approx([3 * math.cos(math.pi / 3), 3], abs=1e-4)
    wrong = otc(torch.tensor([False, True]), torch.tensor([1.0, 3.0]), torch.tensor([4, 4]))
    assert wrong.tolist() == [0.0, 1.0] and wrong.dtype == torch.float32  # a wrong row's calls set no standard
    wrong = otc(torch.tensor([False, True]), torch.tensor([NAN, 3.0]), torch.tensor([4, 4]))
    assert wrong.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("form", ["grpo", "ppo"])
@pytest.mark.parametrize("seed", range(3))
def test_otc_against_plain_loop(form: Any, seed: int) -> None:
    correct, group, valid = _ragged(seed)
    cost = torch.randint(0, 9, (len(group),), generator=torch.Generator().manual_seed(seed)).float()
    reward = otc(correct, cost, group, valid, form=form, alpha=0.5, smooth=3.0)
    for i in range(len(group)):
        right = [j for j in _rows(group, valid, int(group[i])) if bool(correct[j])]
        m, expected = float(cost[i]), 0.0
        if i in right:
            n = min(float(cost[j]) for j in right)
            if form == "ppo" or n == 0:
                expected = math.cos(m * math.pi / (2 * m + 3))
            else:
                expected = math.sin((2 * n * m / (m + n)) * math.pi / (2 * n))
        assert float(reward[i]) == pytest.approx(0.5 * expected, abs=1e-6)


def test_hierarchical_reward_worked_numbers() -> None:
    rewards = torch.tensor([[1.0, 0.4, 0.8], [0.0, 0.4, 0.8], [0.5, 1.0, NAN], [NAN, 0.5, 0.5], [NAN, NAN, NAN]])
    result = hierarchical_reward(rewards)
    assert result[:4].tolist() == pytest.approx([2.2, 0.0, 1.5, 1.0]) and result[4].isnan()
    only = hierarchical_reward(rewards, torch.tensor([9.0, 2.0, 1.0]), count_gates=False)
    assert only[:4].tolist() == pytest.approx([1.6, 0.0, 2.0, 1.5])
    assert hierarchical_reward(rewards[:2], threshold=0.0).tolist() == pytest.approx([2.2, 1.2])
    swapped = rewards.clone()
    swapped[1, 1:] = 77.0
    assert hierarchical_reward(swapped)[1] == result[1]  # the gate failed: soft terms are ignored
    assert hierarchical_reward(torch.tensor([[0.2], [3.0]])).tolist() == pytest.approx([0.2, 3.0])


@pytest.mark.parametrize("seed", range(3))
def test_hierarchical_against_plain_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards, weights, tier = torch.rand(40, 5, generator=g), torch.randn(5, generator=g), torch.tensor([3, 1, 7, 1, 3])
    rewards[torch.rand(40, 5, generator=g) < 0.2] = NAN
    result = hierarchical_reward(rewards, weights, tier, threshold=0.3)
    for i, row in enumerate(rewards.tolist()):
        expected = 0.0
        for k, r in enumerate(row):
            passed = all(not row[j] < 0.3 for j in range(5) if tier[j] < tier[k])
            expected += 0.0 if math.isnan(r) or not passed else r * float(weights[k])
        assert float(result[i]) == pytest.approx(expected, abs=1e-5)


def test_open_gates_are_a_weighted_sum() -> None:
    rewards, weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -2.0, 0.5, 3.0])
    same_tier = hierarchical_reward(rewards, weights, torch.zeros(4, dtype=torch.int64))
    _same(same_tier, (rewards * weights).sum(1))


YES, IDS, ONES = torch.ones(3, dtype=torch.bool), torch.arange(3), torch.ones(3)
MASK = torch.ones(3, 2, dtype=torch.bool)
BAD: list[tuple[str, Any]] = [
    ("hard, easy", lambda: difficulty_label(ONES, hard=0.8, easy=0.7)),
    ("hard, easy", lambda: difficulty_label(ONES, hard=-0.1)),
    ("hard, easy", lambda: clpo(YES, IDS, easy=1.1)),
    ("accuracy", lambda: difficulty_label(torch.tensor([1.1]))),
    ("accuracy", lambda: difficulty_label(torch.tensor([-0.1]))),
    ("accuracy", lambda: difficulty_label(torch.tensor([1]))),
    ("hard_kl", lambda: clpo(YES, IDS, hard_kl=-0.1)),
    ("hard_kl", lambda: clpo(YES, IDS, hard_kl=math.inf)),
    ("correct", lambda: clpo(ONES, IDS)),
    ("rewards", lambda: all_fail(torch.ones(3, 1), IDS)),
    ("success", lambda: pick_replacements(torch.ones(2, 3))),
    ("success", lambda: pick_replacements(torch.ones(2, 0, dtype=torch.bool))),
    ("slot", lambda: scaf_grpo(ONES, IDS, torch.tensor([0, 1, 3]), MASK)),
    ("slot", lambda: scaf_grpo(ONES, IDS, torch.tensor([0, 1, -1]), MASK)),
    ("slot", lambda: scaf_grpo(ONES, IDS, IDS.int(), MASK)),
    ("source", lambda: replace_rows(ONES, IDS, torch.ones(2))),
    ("source", lambda: replace_rows(ONES, IDS.int(), ONES)),
    ("replacement", lambda: replace_rows(ONES, IDS, torch.ones(3, 2))),
    ("replacement", lambda: replace_rows(ONES, IDS, torch.ones(3).double())),
    ("replacement", lambda: replace_rows(ONES, IDS - 9, torch.ones(0))),
    ("stride", lambda: next_hint_ratio(YES, ONES, stride=0.0)),
    ("maximum", lambda: next_hint_ratio(YES, ONES, maximum=1.1)),
    ("stride", lambda: next_hint_ratio(YES, ONES, stride=1.1)),
    ("maximum", lambda: next_hint_ratio(YES, ONES, maximum=0.0)),
    ("fail", lambda: next_hint_ratio(ONES, ONES)),
    ("hint_ratio", lambda: next_hint_ratio(YES, ONES * 1.1)),
    ("hint_ratio", lambda: next_hint_ratio(YES, -ONES)),
    ("hint_ratio", lambda: next_hint_ratio(YES, ONES * NAN)),
    ("hint_ratio", lambda: ghpo(ONES, IDS, torch.ones(2))),
    ("plain", lambda: sample_prefix(ONES, ONES / 2, plain=1.1)),
    ("plain", lambda: sample_prefix(ONES, ONES / 2, plain=-0.1)),
    ("low", lambda: sample_prefix(ONES, ONES / 2, low=0.6, high=0.5)),
    ("high", lambda: sample_prefix(ONES, ONES / 2, high=1.1)),
    ("low", lambda: sample_prefix(ONES, ONES / 2, low=-0.1)),
    ("length", lambda: sample_prefix(ONES / 2, ONES / 2)),
    ("length", lambda: sample_prefix(torch.ones(3, 1), torch.zeros(3, 1))),
    ("uniform", lambda: sample_prefix(ONES, ONES)),
    ("uniform", lambda: sample_prefix(ONES, ONES - 1.5)),
    ("uniform", lambda: sample_prefix(ONES, torch.zeros(2))),
    ("mask", lambda: suffix_mask(MASK.float(), IDS)),
    ("prefix", lambda: suffix_mask(MASK, IDS - 1)),
    ("prefix", lambda: suffix_mask(MASK, ONES)),
    ("prefix_id", lambda: prefix_groups(IDS, IDS[:2], IDS)),
    ("prefix", lambda: prefix_groups(IDS, IDS, IDS.int())),
    ("form", lambda: otc(YES, ONES, IDS, form="dpo")),  # type: ignore[arg-type]
    ("smooth", lambda: otc(YES, ONES, IDS, smooth=0.0)),
    ("smooth", lambda: otc(YES, ONES, IDS, smooth=math.inf)),
    ("alpha", lambda: otc(YES, ONES, IDS, alpha=math.inf)),
    ("cost", lambda: otc(YES, -ONES, IDS)),
    ("cost", lambda: otc(YES, ONES * math.inf, IDS)),
    ("cost", lambda: otc(YES, torch.ones(2), IDS)),
    ("correct", lambda: otc(ONES, ONES, IDS)),
    ("rewards", lambda: hierarchical_reward(ONES)),
    ("rewards", lambda: hierarchical_reward(torch.ones(0, 2))),
    ("rewards", lambda: hierarchical_reward(torch.full((1, 2), math.inf))),
    ("weights", lambda: hierarchical_reward(torch.ones(3, 2), ONES)),
    ("weights", lambda: hierarchical_reward(torch.ones(3, 2), torch.full((2,), NAN))),
    ("tier", lambda: hierarchical_reward(torch.ones(3, 2), None, torch.ones(2))),
]


@pytest.mark.parametrize(("named", "call"), BAD)
def test_bad_input_is_named(named: str, call: Any) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_entries_point_to_tests() -> None:
    assert [m.key for m in METHODS] == ["clpo", "scaf_grpo", "ghpo", "prefix_rl", "otc", "rl_struct"]
    assert [m.tier for m in METHODS] == [2, 2, 2, 2, 2, 3]
    for m in METHODS:
        assert all(test.split("::")[1] in globals() for test in m.evidence.values())
