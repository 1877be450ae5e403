"""Kernel distance between two sets of features (KID).

Binkowski et al. 2018 (arXiv 1801.01401): the squared maximum mean discrepancy under the
kernel k(x, y) = (x.y / D + 1)^3, by its unbiased estimate, averaged over subsets. It
has no bias of finite samples, so it may be below zero.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.stats

from scaling_ldm.metrics.checks import check_finite, check_level, check_replicates
from scaling_ldm.metrics.estimate import Estimate

DEGREE = 3  # degree of the polynomial kernel


def distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """The unbiased squared discrepancy of two whole sets.

    Raises:
      ValueError: fewer than two rows, dimensions that differ, values not finite.
    """
    a, b = _features(a_ND, b_MD)
    return _unbiased(a, b)


def kid(
    a_ND: np.ndarray,
    b_MD: np.ndarray,
    *,
    seed: int,
    subsets: int = 100,
    subset_size: int = 1000,
    level: float = 0.9,
) -> Estimate:
    """The mean over random subsets of both sets, and an interval for other images.

    Let v be the variance of the values of subsets of m out of n rows. Values of other
    sets of n rows then have the variance v (m / n) / (1 - m / n). The finite number of
    subsets adds v / subsets. If the distributions are almost equal, the variance falls
    faster than 1 / n, so the interval is too wide.

    Args:
      a_ND, b_MD: features of the two sets, such as generated and real images.
      seed: of the random subsets.
      subsets: number of subsets.
      subset_size: m, rows of a subset.
      level: of the interval.

    Raises:
      ValueError: as `distance`, or subsets of more than half of the smaller set: they
        overlap too much to show a spread.
    """
    a, b = _features(a_ND, b_MD)
    n = min(len(a), len(b))
    if not 2 <= subset_size <= n // 2:
        raise ValueError(
            f"subsets of {subset_size} out of {n} rows; wanted from 2 to {n // 2}"
        )
    check_replicates(subsets, "subsets")
    check_level(level)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        part_a = a[rng.permutation(len(a))[:subset_size]]
        part_b = b[rng.permutation(len(b))[:subset_size]]
        values.append(_unbiased(part_a, part_b))
    value, share = float(np.mean(values)), subset_size / n
    variance = float(np.var(values, ddof=1)) * (share / (1 - share) + 1 / subsets)
    half_width = float(scipy.stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return Estimate.symmetric(value, half_width, level)


def _features(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape} and {b.shape}, wanted [N, D], [M, D]")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; 2 are needed")
    check_finite(a, "features")
    check_finite(b, "features")
    return a.astype(np.float64), b.astype(np.float64)


def _unbiased(a: np.ndarray, b: np.ndarray) -> float:
    within = 0.0
    for x in (a, b):
        k = (x @ x.T / x.shape[1] + 1) ** DEGREE
        within += (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))
    return float(within - 2 * ((a @ b.T / a.shape[1] + 1) ** DEGREE).mean())
