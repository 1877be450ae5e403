"""Precision and recall of generated images, from balls around features.

Kynkaanniemi et al. 2019 (arXiv 1904.06991): a set's manifold is the union of balls
around its features that reach to their k-th neighbour in the set. Precision is the
share of generated images in the real manifold, recall the share of real ones in the
generated. Naeem et al. 2020 (arXiv 2002.09797) count balls instead (density; outliers
weigh less) and real balls that are met (coverage).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from scaling_ldm.metrics.moments import check_finite

BLOCK = 2**23  # distances at a time
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifold:
    """Shares in [0, 1], but for `density`, which may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def compare(real_ND: np.ndarray, generated_MD: np.ndarray, *, k: int = 3) -> Manifold:
    """All four. All depend on N and M: compare equal ones.

    Distances are formed in blocks; memory stays at a few times that of the features
    in float64, or of BLOCK numbers.

    Raises:
      ValueError: k rows or fewer in a set, dimensions that differ, values not finite.
    """
    real, generated = np.asarray(real_ND), np.asarray(generated_MD)
    if real.ndim != 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of {real.shape} and {generated.shape}, wanted [N, D], [M, D]"
        )
    if not 1 <= k < min(len(real), len(generated)):
        raise ValueError(f"neighbour {k} of {len(real)} and {len(generated)} rows")
    check_finite(real, "features")
    check_finite(generated, "features")
    centre = real.mean(axis=0, dtype=np.float64)  # for less cancellation
    real, generated = real - centre, generated - centre
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


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th neighbour [N]."""
    out = np.empty(len(x))
    for rows, squares in _distances(x, x):
        at = np.arange(rows.start, rows.stop)
        squares[at - rows.start, at] = np.inf  # itself is no neighbour
        out[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return out


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of a and their squared distances to b.

    Those within the rounding of |a|^2 + |b|^2 - 2 a.b are zero.
    """
    squares_a, squares_b = np.sum(a * a, axis=1), np.sum(b * b, axis=1)
    step = max(1, BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        sums = squares_a[rows, None] + squares_b
        found = sums - 2 * (a[rows] @ b.T)
        found[found < a.shape[1] * _EPS * sums] = 0
        yield rows, found
