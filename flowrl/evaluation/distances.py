"""How far two sets of pictures are apart, from their features: FID, KID and CMMD. Smaller is nearer; all take float [N, D].

With x, x' drawn from one set and y, y' from the other, the squared maximum mean discrepancy of a kernel k is

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

(Gretton et al., JMLR 13, 2012). KID (1801.01401) takes k(x, y) = (x.y / D + 1)^3; CMMD (2401.09603) takes
k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) of unit vectors with sigma = 10, times 1000. FID (1706.08500) is the Frechet distance of
two Gaussians with the sets' means and covariances, which is not unbiased: it is too large for small sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]
Kernel = Callable[[Features, Features], Features]

DISTANCES = ("kid", "cmmd", "fid")
SMALL = {"fid": 10_000, "kid": 1_000, "cmmd": 1_000}
"""Pictures a set, below which a distance is given with a warning."""
SIGMA, SCALE = 10.0, 1000.0
_ROWS = 1024  # rows of a kernel matrix held at a time


def frechet(mean_a: npt.ArrayLike, cov_a: npt.ArrayLike, mean_b: npt.ArrayLike, cov_b: npt.ArrayLike) -> float:
    """Return |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians.

    With C = F^T F for each, Tr (C_a C_b)^(1/2) is the sum of the singular values of F_a F_b^T, which needs no square root of
    a matrix that is not symmetric. means: float [D]; covariances: symmetric float [D, D], no eigenvalue below 0 beyond
    rounding. Raises ValueError for shapes that do not match and for a covariance that is none.
    """
    means = [np.asarray(mean, np.float64) for mean in (mean_a, mean_b)]
    covariances = [np.asarray(cov, np.float64) for cov in (cov_a, cov_b)]
    size = means[0].shape
    if any(m.shape != size or m.ndim != 1 for m in means) or any(c.shape != size * 2 for c in covariances):
        raise ValueError(
            f"frechet: means {[list(m.shape) for m in means]} and covariances {[list(c.shape) for c in covariances]} must be "
            "[D] and [D, D]"
        )
    factors = [_factor(covariance) for covariance in covariances]
    return _from_factors(means[0], factors[0], means[1], factors[1])


def fid(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Return the Frechet distance of two sets, with covariances over N - 1, in float64. Both need at least 2 rows."""
    first, second = _sets(a, b, "fid")
    return _from_factors(first.mean(0), _spread(first), second.mean(0), _spread(second))


def _spread(features: Features) -> Features:
    """F with F^T F the covariance over N - 1, at most [D, D]."""
    triangle: npt.NDArray[np.float64] = np.asarray(
        np.linalg.qr((features - features.mean(0)) / np.sqrt(len(features) - 1), mode="r")
    )
    return triangle


def _factor(covariance: Features) -> Features:
    """F with F^T F = covariance."""
    if not np.allclose(covariance, covariance.T, rtol=1e-8, atol=1e-12):
        raise ValueError("frechet: a covariance is not symmetric")
    values, vectors = np.linalg.eigh(covariance)
    if values.min() < -1e-8 * max(1.0, float(values.max())):
        raise ValueError(f"frechet: a covariance has the eigenvalue {values.min():g}; none may be below 0")
    factor: Features = np.sqrt(values.clip(0.0))[:, None] * vectors.T
    return factor


def _from_factors(mean_a: Features, a: Features, mean_b: Features, b: Features) -> float:
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    total = ((mean_a - mean_b) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * shared
    return max(0.0, float(total))


def mmd2(a: npt.ArrayLike, b: npt.ArrayLike, kernel: Kernel, *, paired: bool = False, biased: bool = False) -> float:
    """Estimate MMD^2 of two sets; unbiased, so that it may be below 0, unless ``biased``.

    Unbiased: sum_{i != j} k(x_i, x_j) / (n (n - 1)), likewise for y with m, less 2 sum_{i, j} k(x_i, y_j) / (n m).
    paired: rows i of both sets were made from the same prompt and noise, so k(x_i, y_i) is no draw of independent pictures
    and is left out, as in the U-statistic over pairs (Gretton et al., eq. 4); two equal sets are then at distance 0 exactly.
    biased: means over all pairs, k(x_i, x_i) too, at least 0: what the public code of CMMD computes.

    a: float [N, D]; b: float [M, D]; kernel: float [n, D] and [m, D] to [n, m]. Raises ValueError for bad shapes, and for
    paired sets of unequal size.
    """
    first, second = _sets(a, b, "mmd2")
    n, m = len(first), len(second)
    if paired and n != m:
        raise ValueError(f"mmd2: paired sets must be of one size, got {n} and {m}")
    (xx, xx_own), (yy, yy_own), (xy, xy_own) = (
        _kernel_sums(kernel, u, v) for u, v in ((first, first), (second, second), (first, second))
    )
    if biased:
        return float(xx / n**2 + yy / m**2 - 2 * xy / (n * m))
    cross = (xy - xy_own) / (n * (n - 1)) if paired else xy / (n * m)
    return float((xx - xx_own) / (n * (n - 1)) + (yy - yy_own) / (m * (m - 1)) - 2 * cross)


def _kernel_sums(kernel: Kernel, a: Features, b: Features) -> tuple[float, float]:
    """Sum over all pairs, and over pairs of equal index (as far as both sets go), a block of rows at a time."""
    total, own = 0.0, 0.0
    for start in range(0, len(a), _ROWS):
        block = kernel(a[start : start + _ROWS], b)
        total += float(block.sum())
        own += float(np.trace(block, offset=start))
    return total, own


def polynomial(a: Features, b: Features) -> Features:
    """KID's kernel (x.y / D + 1)^3, [n, D] and [m, D] to [n, m]."""
    values: Features = (a @ b.T / a.shape[1] + 1.0) ** 3
    return values


def gaussian(sigma: float) -> Kernel:
    """Make the kernel exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(a: Features, b: Features) -> Features:
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        values: Features = np.exp(-squares.clip(0.0) / (2 * sigma**2))
        return values

    return kernel


@dataclass(frozen=True)
class Kid:
    """mean and std over ``subsets`` random subsets of ``size`` pictures of each set."""

    mean: float
    std: float
    subsets: int
    size: int


def kid(
    a: npt.ArrayLike, b: npt.ArrayLike, *, subsets: int = 100, size: int = 1000, seed: int = 0, paired: bool = False
) -> Kid:
    """Estimate the kernel inception distance: mean and standard deviation of unbiased MMD^2 over random subsets.

    Each subset is drawn without replacement within it. Subsets overlap, so the standard deviation says how much one subset
    tells, and is no standard error. Where a set has no more than ``size`` pictures, subsets hold half of the smaller set (at
    least 2). paired: as `mmd2`; the same rows of both sets are then drawn.
    Raises ValueError for sets of fewer than 2 rows, or subsets or size out of range.
    """
    first, second = _sets(a, b, "kid")
    if subsets < 1 or size < 2:
        raise ValueError(f"kid: subsets {subsets} must be at least 1 and size {size} at least 2")
    least = min(len(first), len(second))
    taken = size if least > size else max(2, least // 2)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        rows = rng.permutation(len(first))[:taken]
        others = rows if paired else rng.permutation(len(second))[:taken]
        found.append(mmd2(first[rows], second[others], polynomial, paired=paired))
    return Kid(float(np.mean(found)), float(np.std(found)), subsets, taken)


def cmmd(
    a: npt.ArrayLike, b: npt.ArrayLike, *, sigma: float = SIGMA, paired: bool = False, biased: bool = False
) -> float:
    """Estimate CMMD: 1000 times MMD^2 with a Gaussian kernel on rows scaled to length 1. Arguments as `mmd2`.

    The public code takes the biased form; the two differ by about 1000 (1 - mean k) (1/n + 1/m). Raises ValueError for a row
    of length 0.
    """
    first, second = (unit_rows(features, "cmmd") for features in _sets(a, b, "cmmd"))
    return SCALE * mmd2(first, second, gaussian(sigma), paired=paired, biased=biased)


def unit_rows(features: Features, where: str) -> Features:
    """Scale each row to length 1. Raises ValueError for a row of length 0, which has no direction."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"{where}: row {int(np.flatnonzero(lengths[:, 0] == 0)[0])} of the features has length 0")
    scaled: Features = features / lengths
    return scaled


def _sets(a: npt.ArrayLike, b: npt.ArrayLike, where: str) -> tuple[Features, Features]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not first.shape[1]:
        raise ValueError(f"{where}: expected [N, D] and [M, D], got {list(first.shape)} and {list(second.shape)}")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{where}: sets of {len(first)} and {len(second)} pictures; each needs at least 2")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f"{where}: the features hold values that are not finite")
    return first, second


def caution(name: str, count: int, dimensions: int) -> str:
    """Say why a distance of sets of ``count`` pictures is not to be trusted, or "" where they are large enough.

    name: one of DISTANCES; count: of the smaller set; dimensions: of the features.
    """
    if name == "fid" and count <= dimensions:
        return (
            f"{count} pictures cannot fill a covariance of {dimensions} dimensions: the value is far too large; use KID or "
            "CMMD"
        )
    if count >= SMALL[name]:
        return ""
    if name == "fid":
        return f"biased upwards below {SMALL[name]:,} pictures ({count:,} here); compare it with sets of the same size alone"
    return f"uncertain below {SMALL[name]:,} pictures ({count:,} here)"
