"""FID against Gaussians with a closed form, KID and CMMD against plain loops, and what each does at small n."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from flowrl.evaluation.distances import caution, cmmd, fid, frechet, gaussian, kid, mmd2, polynomial


def draw(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


# ------------------------------------------------------------------------------------------------------------ frechet


def test_frechet_of_independent_coordinates() -> None:
    """Diagonal covariances: sum of squared differences of means and of standard deviations."""
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])
    found = frechet([0, 1, 2], np.diag(a), [1, 1, 0], np.diag(b))
    assert found == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2 + 0.5**2, abs=1e-12)


def test_frechet_of_rotated_gaussians() -> None:
    """In two dimensions Tr (AB)^(1/2) = sqrt(Tr AB + 2 sqrt(det AB)), whatever the angle between A and B."""
    angle = 0.6
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    a, b = np.diag([5.0, 0.5]), turn @ np.diag([2.0, 3.0]) @ turn.T
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert frechet([0, 0], a, [0, 0], b) == pytest.approx(5.5 + 5 - 2 * root, abs=1e-12)


def test_frechet_agrees_with_the_matrix_square_root() -> None:
    one, two = draw(0, 40, 6), draw(1, 40, 6, 0.3) * np.linspace(0.2, 3, 6)
    a, b = np.cov(one.T), np.cov(two.T)
    public = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet(one.mean(0), a, two.mean(0), b) == pytest.approx(public, rel=1e-9)
    assert fid(one, two) == pytest.approx(public, rel=1e-9)


def test_singular_covariances_are_no_trouble() -> None:
    """Fewer pictures than dimensions: the matrix square root of the product is where public code turns complex."""
    one, two = draw(2, 5, 30), draw(3, 7, 30, 1.0)
    a, b = np.cov(one.T), np.cov(two.T)
    assert fid(one, two) == pytest.approx(frechet(one.mean(0), a, two.mean(0), b), rel=1e-6)
    assert fid(one, one) == pytest.approx(0, abs=1e-9)
    assert fid(one, one + 2.0) == pytest.approx(4.0 * 30, rel=1e-9)


def test_fid_of_many_draws_nears_the_analytic_value() -> None:
    one, two = draw(4, 20_000, 3), 2 * draw(5, 20_000, 3, 0.5)
    assert fid(one, two) == pytest.approx(3 * 1.0 + 3 * (2 - 1) ** 2, rel=0.02)


def test_fid_is_biased_upwards_and_kid_is_not() -> None:
    """Two sets of one law: FID falls as 1/n and stays above 0; KID's mean is within three errors of 0."""
    small = [fid(draw(s, 20, 8), draw(s + 900, 20, 8)) for s in range(20)]
    large = [fid(draw(s, 200, 8), draw(s + 900, 200, 8)) for s in range(20)]
    assert min(small) > 0 and 5 < np.mean(small) / np.mean(large) < 20
    many = [mmd2(draw(s, 20, 8), draw(s + 900, 20, 8), polynomial) for s in range(400)]
    assert abs(np.mean(many)) < 3 * np.std(many) / 20
    biased = [mmd2(draw(s, 20, 8), draw(s + 900, 20, 8), polynomial, biased=True) for s in range(400)]
    assert np.mean(biased) > 30 * np.std(biased) / 20


# ---------------------------------------------------------------------------------------------------------- KID, CMMD


def loops(a: np.ndarray, b: np.ndarray, k, paired: bool = False) -> float:
    n, m = len(a), len(b)
    within = sum(k(a[i], a[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    within += sum(k(b[i], b[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    pairs = [(i, j) for i in range(n) for j in range(m) if not (paired and i == j)]
    return within - 2 * sum(k(a[i], b[j]) for i, j in pairs) / len(pairs)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return (float(np.dot(x, y)) / len(x) + 1) ** 3


def bell(x: np.ndarray, y: np.ndarray) -> float:
    return math.exp(-sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / 200)


@pytest.mark.parametrize(("n", "m", "paired"), [(7, 5, False), (6, 6, False), (6, 6, True)])
def test_unbiased_mmd_against_plain_loops(n: int, m: int, paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.evaluation.distances._ROWS", 4)  # blocks of rows that do not divide n
    a, b = draw(0, n, 4), draw(1, m, 4, 0.5)
    assert mmd2(a, b, polynomial, paired=paired) == pytest.approx(loops(a, b, cubic, paired), rel=1e-10)
    assert mmd2(a, b, gaussian(10.0), paired=paired) == pytest.approx(loops(a, b, bell, paired), abs=1e-12)


def test_kid_is_the_mean_over_subsets() -> None:
    """Ten subsets of 5, with the draws of the documented generator."""
    a, b = draw(0, 11, 4), draw(1, 30, 4, 0.5)
    found = kid(a, b, subsets=10, size=5, seed=3)
    rng = np.random.default_rng(3)
    values = [loops(a[rng.permutation(11)[:5]], b[rng.permutation(30)[:5]], cubic) for _ in range(10)]
    assert (found.mean, found.std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values)))
    assert (found.subsets, found.size) == (10, 5)
    assert found == kid(a, b, subsets=10, size=5, seed=3) != kid(a, b, subsets=10, size=5, seed=4)


def test_small_sets_are_halved() -> None:
    assert kid(draw(0, 11, 2), draw(1, 30, 2)).size == 5
    assert kid(draw(0, 3, 2), draw(1, 3, 2)).size == 2
    assert kid(draw(0, 11, 2), draw(1, 30, 2), size=11).size == 5  # all of them, a hundred times, would tell nothing
    assert kid(draw(0, 12, 2), draw(1, 30, 2), size=11).size == 11


def test_equal_pairs_are_at_distance_nought_only_when_told_so() -> None:
    """Without that, k(x_i, x_i) in the cross term makes the distance of a set from itself negative."""
    a = draw(0, 30, 4)
    assert mmd2(a, a, polynomial, paired=True) == pytest.approx(0, abs=1e-12)
    assert mmd2(a, a, polynomial) < -0.1
    assert kid(a, a, paired=True).mean == pytest.approx(0, abs=1e-12) == cmmd(a, a, paired=True)


def test_cmmd_by_hand() -> None:
    """Rows are scaled to length 1, sigma is 10, and the result is a thousandfold."""
    a, b = draw(0, 5, 3), draw(1, 6, 3, 1.0)
    u, v = (x / np.sqrt((x**2).sum(1))[:, None] for x in (a, b))
    assert cmmd(a, b) == pytest.approx(1000 * loops(u, v, bell), rel=1e-8)
    public = np.mean([[bell(x, y) for y in u] for x in u]) + np.mean([[bell(x, y) for y in v] for x in v])
    public -= 2 * np.mean([[bell(x, y) for y in v] for x in u])
    assert cmmd(a, b, biased=True) == pytest.approx(1000 * public, rel=1e-8)
    assert cmmd(a, b) == pytest.approx(cmmd(5 * a, b / 3), rel=1e-9)


def test_two_points_of_opposite_direction() -> None:
    """All of a set at e, all of the other at -e: |x - y|^2 = 4, so CMMD = 2000 (1 - exp(-4 / 200))."""
    a, b = np.tile([1.0, 0.0], (4, 1)), np.tile([-2.0, 0.0], (4, 1))
    assert cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-0.02)), rel=1e-9)


def test_cautions() -> None:
    assert caution("fid", 192, 192).startswith("192 pictures cannot fill a covariance of 192 dimensions")
    assert "biased upwards below 10,000 pictures (9,999 here)" in caution("fid", 9_999, 192)
    assert caution("fid", 10_000, 192) == caution("kid", 1000, 5000) == caution("cmmd", 1000, 5000) == ""
    assert caution("kid", 999, 5) == "uncertain below 1,000 pictures (999 here)" == caution("cmmd", 999, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fid(draw(0, 1, 3), draw(0, 5, 3)), "fid: sets of 1 and 5 pictures; each needs at least 2"),
        (lambda: kid(draw(0, 4, 3), draw(0, 5, 2)), r"kid: expected \[N, D\] and \[M, D\], got \[4, 3\] and \[5, 2\]"),
        (lambda: kid(draw(0, 4, 3), draw(0, 5, 3), subsets=0), "kid: subsets 0 must be at least 1"),
        (lambda: mmd2(draw(0, 4, 3), draw(0, 5, 3), polynomial, paired=True), "paired sets must be of one size, got 4"),
        (lambda: cmmd(np.eye(3) * [[1], [0], [1]], draw(0, 5, 3)), "cmmd: row 1 of the features has length 0"),
        (lambda: fid(draw(0, 4, 3) * np.nan, draw(0, 5, 3)), "fid: the features hold values that are not finite"),
        (lambda: frechet([0, 0], np.eye(3), [0, 0], np.eye(2)), "frechet: means"),
        (lambda: frechet([0, 0], [[1, 0.5], [0, 1]], [0, 0], np.eye(2)), "a covariance is not symmetric"),
        (lambda: frechet([0, 0], -np.eye(2), [0, 0], np.eye(2)), "has the eigenvalue -1"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
