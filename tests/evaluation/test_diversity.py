"""Spread and Vendi score where the answer is known: equal, orthogonal and half-and-half pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowrl.evaluation.diversity import RMS_WIDTH, by_group, pairwise, similarity, vendi
from flowrl.scoring.alarm import cells, spread

ORDERS = [0.0, 0.5, 1.0, 2.0, math.inf]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("metric", ["cosine", "rms"])
def test_equal_pictures_count_once(order: float, metric: str) -> None:
    assert vendi(similarity(np.tile([0.3, -2.0, 1.0], (5, 1)), metric), order) == pytest.approx(1)


@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_pictures_count_each(order: float) -> None:
    assert vendi(similarity(np.eye(6) * 3), order) == pytest.approx(6)


def test_two_kinds_in_unequal_shares() -> None:
    """Three of one kind and one of another: the exponential of the entropy of (3/4, 1/4), and its Renyi kin."""
    kernel = similarity(np.array([[1.0, 0], [2, 0], [1, 0], [0, 1]]))
    assert vendi(kernel) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert vendi(kernel, 2.0) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert vendi(kernel, 0.0) == pytest.approx(2)
    assert vendi(kernel, math.inf) == pytest.approx(4 / 3)
    assert vendi(kernel, 1.0 + 1e-7) == pytest.approx(vendi(kernel), abs=1e-5)


def test_two_pictures_at_an_angle() -> None:
    """cos = c gives the eigenvalues (1 +- c) / 2."""
    c = 0.6
    share = np.array([(1 + c) / 2, (1 - c) / 2])
    kernel = similarity(np.array([[1.0, 0], [c, math.sqrt(1 - c * c)]]))
    assert vendi(kernel) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_distances_by_hand() -> None:
    rows = np.array([[1.0, 0, 0, 0], [0, 2, 0, 0], [-1, 0, 0, 0]])
    assert pairwise(rows).tolist() == pytest.approx(np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]]))
    root = [[0, math.sqrt(5 / 4), 1], [math.sqrt(5 / 4), 0, math.sqrt(5 / 4)], [1, math.sqrt(5 / 4), 0]]
    np.testing.assert_allclose(pairwise(rows, "rms"), root)
    near = similarity(np.array([[0.0, 0.0], [RMS_WIDTH, RMS_WIDTH]]), "rms")
    np.testing.assert_allclose(near, [[1, math.exp(-0.5)], [math.exp(-0.5), 1]])


def test_by_group_leaves_other_groups_out() -> None:
    features = np.array([[1.0, 0], [1, 0], [0, 1], [5, 5], [0, 1]])
    groups = [7, 3, 7, 9, 7]
    found, score = by_group(features, groups)
    np.testing.assert_allclose(found, [1, np.nan, 0.5, np.nan, 0.5])
    expected = math.exp(-math.log(1 / 3) / 3 - 2 / 3 * math.log(2 / 3))
    np.testing.assert_allclose(score, [expected, np.nan, expected, np.nan, expected])
    assert by_group(features, groups, order=2.0)[1][0] == pytest.approx(1 / (1 / 9 + 4 / 9))


def test_the_spread_of_cells_is_the_alarms_diversity() -> None:
    """Evaluations during training and at the end speak of one number."""
    pictures = np.random.default_rng(0).integers(0, 256, (9, 20, 13, 3), dtype=np.uint8)
    groups = np.repeat([0, 1, 2], 3)
    np.testing.assert_allclose(by_group(cells(pictures), groups, "rms")[0], spread(pictures, groups), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vendi(np.ones((2, 3))), r"expected a square matrix, got \[2, 3\]"),
        (lambda: vendi(2 * np.eye(3)), "ones on its diagonal"),
        (lambda: vendi([[1, 0.5], [0.2, 1]]), "must be symmetric"),
        (lambda: vendi([[1, 2.0], [2.0, 1]]), "has the eigenvalue -1"),
        (lambda: vendi(np.eye(2), -1.0), "order is -1.0; use 0 or more"),
        (lambda: pairwise(np.zeros((2, 3))), "row 0 of the features has length 0"),
        (lambda: pairwise(np.zeros(3)), r"expected features \[N, D\], got \[3\]"),
        (lambda: pairwise(np.full((2, 3), np.inf)), "not finite"),
        (lambda: pairwise(np.ones((2, 3)), "l1"), "metric is 'l1'; use cosine, rms"),
        (lambda: by_group(np.ones((2, 3)), [0, 0, 0]), r"2 pictures and groups of shape \[3\]"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
