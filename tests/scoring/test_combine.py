"""The score is a weighted sum, and shares of its variance add up to one, over processes too."""

from __future__ import annotations

import numpy as np
import pytest

from flowrl.scoring.combine import in_float32, variance_parts, weighted_sum

NAN = float("nan")


def test_weighted_sum_misses_what_a_weighted_member_misses() -> None:
    channels = np.array([[1.0, 10.0, 5.0], [NAN, 1.0, 5.0], [2.0, 3.0, NAN]])
    np.testing.assert_array_equal(weighted_sum(channels, [2.0, -0.5, 0.0]), [-3.0, NAN, 2.5])


def test_shares_of_independent_members_are_their_variances() -> None:
    """Within one group, x = +-1 and y = +-1 in all four combinations: weights 3 and 1 give shares 9/10 and 1/10."""
    channels = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    parts, whole = variance_parts(channels, [3.0, 1.0], np.zeros(4, np.int64))
    np.testing.assert_allclose(parts / whole, [0.9, 0.1])
    assert whole == pytest.approx(40.0)


def test_shares_agree_with_the_covariance_within_groups() -> None:
    generator = np.random.default_rng(0)
    channels, group = generator.normal(size=(30, 3)), np.repeat(np.arange(5), 6)
    channels += 100 * group[:, None]  # what differs between groups does not count
    weights = [0.5, -2.0, 1.0]
    parts, whole = variance_parts(channels, weights, group)
    expected = np.zeros(3)
    for g in range(5):
        mine = channels[group == g] * weights
        expected += [np.cov(mine[:, r], mine.sum(1), bias=True)[0, 1] * 6 for r in range(3)]
    np.testing.assert_allclose(parts, expected, rtol=1e-9)
    assert parts.sum() == pytest.approx(whole)
    halves = [variance_parts(channels[rows], weights, group[rows]) for rows in (group < 2, group >= 2)]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], parts)
    assert halves[0][1] + halves[1][1] == pytest.approx(whole)


def test_members_against_each_other_and_silence() -> None:
    x = np.array([0.0, 1.0, 2.0])
    parts, whole = variance_parts(np.stack([x, -x / 2], 1), [1.0, 1.0], np.zeros(3, np.int64))
    np.testing.assert_allclose(parts / whole, [2.0, -1.0])
    parts, whole = variance_parts(np.ones((3, 2)), [1.0, 1.0], np.zeros(3, np.int64))
    assert parts.tolist() == [0, 0] and whole == 0


def test_samples_without_a_score_are_left_out() -> None:
    channels = np.array([[1.0, 0.0], [3.0, 0.0], [9.0, NAN]])
    parts, whole = variance_parts(channels, [1.0, 1.0], np.zeros(3, np.int64))
    assert parts.tolist() == [2.0, 0.0] and whole == 2.0


def test_float32_has_an_end() -> None:
    found = in_float32(np.array([1.5, 1e50, 2.0]), np.array([True, True, False]))
    assert found.dtype == np.float32 and found[0] == 1.5 and np.isinf(found[1]) and np.isnan(found[2])
