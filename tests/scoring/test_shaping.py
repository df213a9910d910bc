"""Shaping is arithmetic: each step against its formula, and a missing value stays missing and touches no other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowrl.config.rewards import Shape, read_shaping
from flowrl.scoring.shaping import affine, clip, gate, rank, rows_of, shape, sigmoid

NAN = float("nan")
NONE = np.zeros(0, np.int64)


def values(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float64)


def same(found: np.ndarray, *numbers: float) -> None:
    np.testing.assert_allclose(found, values(*numbers), rtol=0, atol=1e-12)


def test_affine_and_clip() -> None:
    same(affine(values(20.0, NAN, 26.0), 1 / 8, -18 / 8), 0.25, NAN, 1.0)
    same(clip(values(-3, 0.5, NAN, 9), -1, 2), -1, 0.5, NAN, 2)
    with pytest.raises(ValueError, match=r"low 1 must be below high 1"):
        clip(values(0), 1, 1)


def test_sigmoid_is_the_logistic_function_and_does_not_overflow() -> None:
    x = values(-2.0, 0.5, 3.0)
    same(sigmoid(x, 0.5, 2.0), *[1 / (1 + math.exp(-(v - 0.5) / 2.0)) for v in x])
    with np.errstate(over="raise"):
        same(sigmoid(values(-1e6, 1e6, NAN), 0, 1), 0, 1, NAN)
    with pytest.raises(ValueError, match="width 0 must be above 0"):
        sigmoid(x, 0, 0)


def test_rank_is_the_place_in_the_group_with_ties_shared() -> None:
    group = np.array([7, 3, 7, 3, 7, 7, 5])
    # Group 7: 10, 30, 20, 20 (places 0, 3, 1.5, 1.5 of 3); group 3: one value and one missing; group 5: alone.
    found = rank(values(10, 4, 30, NAN, 20, 20, 8), group)
    same(found, 0, 0.5, 1, NAN, 0.5, 0.5, 0.5)


def test_rank_agrees_with_counting() -> None:
    generator = np.random.default_rng(0)
    group = generator.integers(5, size=60)
    x = generator.integers(6, size=60).astype(float)
    x[generator.random(60) < 0.2] = NAN
    expected = []
    for i in range(60):
        rivals = [x[j] for j in range(60) if group[j] == group[i] and j != i and x[j] == x[j]]
        wins = sum(1.0 if x[i] > r else 0.5 if x[i] == r else 0.0 for r in rivals)
        expected.append(NAN if x[i] != x[i] else wins / len(rivals) if rivals else 0.5)
    same(rank(x, group), *expected)


def test_rank_ignores_a_monotone_change_of_scale() -> None:
    x = np.random.default_rng(1).normal(size=12)
    group = np.repeat([0, 1], 6)
    same(rank(np.exp(3 * x), group), *rank(x, group))


def test_gate_lets_through_within_its_bounds_both_included() -> None:
    x, by = values(1, 2, 3, 4, NAN, NAN), values(0.5, 0.4, 0.6, NAN, 0.5, 0.1)
    through, closed = gate(x, by, 0.5, 0.6, 0.0)
    same(through, 1, 0, 3, NAN, NAN, NAN)
    assert closed.tolist() == [False, True, False, False, False, True]
    same(gate(x, by, 0.5, math.inf, -7.0)[0], 1, -7, 3, NAN, NAN, NAN)
    same(gate(x, by, -math.inf, 0.5, None)[0], 1, 2, NAN, NAN, NAN, NAN)


def test_steps_apply_in_order_and_only_a_mask_masks() -> None:
    steps = [Shape("affine", (2.0, 1.0)), Shape("clip", (0.0, 5.0)), Shape("rank"), Shape("affine", (1.0, -0.5))]
    found, masked = shape(values(0, 1, 9, 10), steps, np.zeros(4, np.int64), {})
    same(found, -0.5, 1 / 3 - 0.5, 2.5 / 3 - 0.5, 2.5 / 3 - 0.5)
    assert not masked.any()
    others = {"nsfw": values(0.9, 0.1, NAN)}
    shut = Shape("gate", by="nsfw", at_most=0.5, otherwise=None)
    found, masked = shape(values(1, 2, 3), [shut], NONE, others)
    same(found, NAN, 2, NAN)
    assert masked.tolist() == [True, False, False], "an unknown gate is a failure, not a mask"
    assert shape(values(NAN, 2, 3), [shut], NONE, others)[1].tolist() == [False] * 3, "no value was there to mask"
    assert shape(values(1, 2, 3), [Shape("gate", by="nsfw", at_most=0.5)], NONE, others)[1].tolist() == [False] * 3


@pytest.mark.parametrize("step", [{"affine": [2, 1]}, {"clip": [0, 1]}, {"sigmoid": [0, 1]}, {"rank": None}])
def test_a_missing_value_changes_no_other(step: dict) -> None:
    (made,), wrong = read_shaping([step])
    assert not wrong
    x = np.random.default_rng(2).normal(size=8)
    group = np.repeat([0, 1], 4)
    holed = x.copy()
    holed[1] = NAN
    whole, part = shape(x, [made], group, {})[0], shape(holed, [made], group, {})[0]
    assert np.isnan(part[1]) and not np.isnan(part[[0, 2, 3]]).any()
    np.testing.assert_array_equal(part[4:], whole[4:])
    if made.kind != "rank":
        np.testing.assert_array_equal(part[[0, 2, 3]], whole[[0, 2, 3]])


def test_rows_of_groups_that_are_mixed() -> None:
    assert [rows.tolist() for rows in rows_of(np.array([9, 2, 9, 2, 1]))] == [[0, 2], [1, 3], [4]]
    assert rows_of(NONE) == []
