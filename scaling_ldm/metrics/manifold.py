"""Precision and recall of generated images, from balls around features.

Kynkaanniemi et al. 2019 (arXiv 1904.06991): the manifold of a set is the union of balls
around its features; each ball reaches to the k-th neighbour in the set. Precision is
the share of generated images that lie in the manifold of the real ones. Recall is the
share of real images that lie in the manifold of the generated ones. Naeem et al. 2020
(arXiv 2002.09797): density is the number of real balls that a generated image lies in,
on average and divided by k, so that outliers weigh less; coverage is the share of real
balls that hold a generated image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import scipy.stats

from scaling_ldm.metrics.checks import check_finite, check_level, check_replicates
from scaling_ldm.metrics.estimate import Estimate

BLOCK = 2**23  # distances at a time
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifold:
    """Shares in [0, 1]; `density` may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare(real_ND: np.ndarray, generated_MD: np.ndarray, *, k: int = 3) -> Manifold:
    """All four numbers. They depend on N and M: compare only equal ones.

    Distances are formed in blocks. So the memory stays at a few times that of the
    features in float64, or of BLOCK numbers.

    Args:
      real_ND: features of N real images.
      generated_MD: features of M generated images.
      k: the neighbour that a ball reaches to.

    Raises:
      ValueError: k rows or fewer in a set, dimensions that differ, values not finite.
    """
    real, generated = _features(real_ND, generated_MD, k)
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    in_real, balls, covered, in_generated = np.zeros(len(generated), bool), 0, 0, 0
    for rows, squares in _distances(real, generated):
        inside = squares <= real_radii[rows, None]
        balls += int(inside.sum())
        covered += int(inside.any(axis=1).sum())
        in_real |= inside.any(axis=0)
        in_generated += int((squares <= generated_radii).any(axis=1).sum())
    return Manifold(
        precision=float(in_real.mean()),
        recall=in_generated / len(real),
        density=balls / (k * len(generated)),
        coverage=covered / len(real),
    )


def precision_recall(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    *,
    seed: int,
    k: int = 3,
    replicates: int = 100,
    level: float = 0.9,
) -> tuple[Estimate, Estimate]:
    """Precision and recall, and how far those of other generated images would scatter.

    The real images are fixed, as in `frechet.interval`, and so is their manifold. Each
    generated image lies in it or not, so precision has Wilson's interval for a share of
    M independent trials.

    The trials of recall are not independent: one generated image may decide for many
    real ones. So its interval uses an equivalent number of trials, in three steps:

      1. Recall is computed again from random subsets, each of two thirds of the
         generated rows, with balls among these rows alone.
      2. The variance V of recall is the variance of these recalls times 2, that is,
         rows kept / rows left out (the delete-d jackknife, Shao & Wu 1989, Annals of
         Statistics 17, 1176).
      3. The share r of T independent trials has the variance r (1 - r) / T. So T is
         r (1 - r) / V, with r the mean of these recalls. If V is 0, T is M.

    Recall then has Wilson's interval for T trials. Subsets of one half were tried too:
    on Gaussians, their intervals hold the truth less often.

    Both intervals stay in [0, 1], and those around 0 and 1 have a width. The bias of
    finite N and M is in the values, not in the intervals.

    Args:
      real_ND, generated_MD, k: as for `compare`.
      seed: of the random subsets.
      replicates: number of subsets.
      level: of both intervals.

    Returns:
      (precision, recall).

    Raises:
      ValueError: as `compare`, or two thirds of the rows are k or fewer.
    """
    real, generated = _features(real_ND, generated_MD, k)
    m = len(generated)
    kept = 2 * m // 3
    if kept <= k:
        raise ValueError(f"neighbour {k} of two thirds of {m} rows")
    check_replicates(replicates)
    check_level(level)
    nearest = _nearest(generated, min(m - 1, 4 * k + 24))
    radii_SM = np.empty((1 + replicates, m))  # radii of all rows, then of parts of them
    radii_SM[0] = nearest[0][:, k - 1]
    rng = np.random.default_rng(seed)
    for radii in radii_SM[1:]:
        part = np.zeros(m, bool)
        part[rng.permutation(m)[:kept]] = True
        radii[:] = _radii_among(part, *nearest, k)
    real_radii, widest = _radii(real, k), radii_SM.max(axis=0)
    in_real, met = np.zeros(m, bool), np.zeros(len(radii_SM), int)
    for rows, squares in _distances(real, generated):
        in_real |= (squares <= real_radii[rows, None]).any(axis=0)
        row, ball = np.nonzero(squares <= widest)
        squares = squares[row, ball]
        for s, radii in enumerate(radii_SM):
            met[s] += np.count_nonzero(np.bincount(row[squares <= radii[ball]]))
    recall, *parts = (met / len(real)).tolist()
    variance = float(np.var(parts, ddof=1)) * kept / (m - kept)
    mean = float(np.mean(parts))
    trials = mean * (1 - mean) / variance if variance else float(m)
    precision = _share(float(in_real.mean()), float(m), level)
    return precision, _share(recall, trials, level)


def _share(value: float, trials: float, level: float) -> Estimate:
    """A share of a number of trials, with Wilson's interval (1927, JASA 22, 209)."""
    z = float(scipy.stats.norm.ppf((1 + level) / 2))
    centre = (value + z**2 / (2 * trials)) / (1 + z**2 / trials)
    width = math.sqrt(value * (1 - value) / trials + (z / (2 * trials)) ** 2)
    width *= z / (1 + z**2 / trials)
    low, high = max(centre - width, 0.0), min(centre + width, 1.0)
    return Estimate(
        value=value, low=min(low, value), high=max(high, value), level=level
    )


def _features(
    real: np.ndarray, generated: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, less the mean of the real ones."""
    real, generated = np.asarray(real), np.asarray(generated)
    if real.ndim != 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of {real.shape} and {generated.shape}, wanted [N, D], [M, D]"
        )
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"neighbour {k} of {len(real)} and {len(generated)} rows")
    check_finite(real, "features")
    check_finite(generated, "features")
    centre = real.mean(axis=0, dtype=np.float64)  # less cancellation in distances
    return real - centre, generated - centre


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour [N]."""
    out = np.empty(len(x))
    for rows, squares in _distances(x, x):
        at = np.arange(rows.start, rows.stop)
        squares[at - rows.start, at] = np.inf  # a row is not its own neighbour
        out[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return out


def _nearest(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other rows of each row, in order: squared distances and numbers.

    Both are [N, count].
    """
    found = np.empty((len(x), count)), np.empty((len(x), count), np.intp)
    for rows, squares in _distances(x, x):
        at = np.arange(rows.start, rows.stop)
        squares[at - rows.start, at] = np.inf
        which = np.argpartition(squares, count - 1, axis=1)[:, :count]
        squares = np.take_along_axis(squares, which, axis=1)
        order = np.argsort(squares, axis=1)
        found[0][rows] = np.take_along_axis(squares, order, axis=1)
        found[1][rows] = np.take_along_axis(which, order, axis=1)
    return found


def _radii_among(
    part: np.ndarray, squares_ML: np.ndarray, which_ML: np.ndarray, k: int
) -> np.ndarray:
    """Squared radii [M] of balls among a part of the rows; -1 for the other rows.

    The part holds two thirds of the rows. Once in 1e13 rows, fewer than k of the
    4 k + 24 nearest rows are in it; the radius is then that of the farthest.
    """
    taken = np.cumsum(part[which_ML], axis=1)
    taken[:, -1] = k
    at = np.argmax(taken == k, axis=1)
    radii = np.take_along_axis(squares_ML, at[:, None], axis=1)[:, 0]
    return np.where(part, radii, -1.0)


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of a, with their squared distances to the rows of b.

    A distance within the rounding of |a|^2 + |b|^2 - 2 a.b counts as zero.
    """
    squares_a, squares_b = np.sum(a * a, axis=1), np.sum(b * b, axis=1)
    step = max(1, BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        sums = squares_a[rows, None] + squares_b
        found = sums - 2 * (a[rows] @ b.T)
        found[found < a.shape[1] * _EPS * sums] = 0
        yield rows, found
