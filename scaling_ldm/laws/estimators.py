"""Where the loss of a budget is least: the estimators of a minimum.

`ESTIMATORS` has the name of each. A parabola in ln N is approach 2 of Hoffmann et al.
2022 (arXiv 2203.15556). `cubic` has a cubic term of each budget's own. `shape` is one
shape for all budgets (`shared_shape`). `akima` interpolates the losses over sizes, as
the noise-and-interpolate of arXiv 2406.19146.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.interpolate

from scaling_ldm.laws.isoflop_curve import MIN_SIZES, IsoflopCurve

Losses = np.ndarray  # [draws, points] of one budget
Vertices = np.ndarray  # [draws, 3]: ln N, ln D, loss; NaN: no minimum
OfBudget = Callable[[IsoflopCurve, Losses], Vertices]
_FINE = 24  # places between two sizes, where an interpolant is evaluated


def _parabola(curve: IsoflopCurve, losses: Losses) -> Vertices:
    return curve.parabola_minimum(losses @ curve.solve.T)


def windowed_parabola(factor: float) -> OfBudget:
    """A parabola through the runs within a factor in N around the least loss."""

    def of_budget(curve: IsoflopCurve, losses: Losses) -> Vertices:
        sizes, means = _means(curve, curve.y[None])
        near = np.abs(curve.x - sizes[means[0].argmin()]) <= math.log(factor) + 1e-9
        if len(np.unique(curve.x[near])) < MIN_SIZES:
            return np.full((len(losses), 3), np.nan)
        solve = np.linalg.pinv(curve.design[near])
        return curve.parabola_minimum(losses[:, near] @ solve.T)

    return of_budget


def _cubic(curve: IsoflopCurve, losses: Losses) -> Vertices:
    """The minimum of a cubic; NaN: it has none, or there are fewer than 5 sizes."""
    if len(curve.sizes) < 5:
        return np.full((len(losses), 3), np.nan)
    design = np.vander(curve.x, 4, increasing=True)
    c0, c1, c2, c3 = np.linalg.pinv(design) @ losses.T
    root = c2 * c2 - 3 * c3 * c1
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -c1 / (c2 + np.sqrt(np.where(root > 0, root, np.nan)))
    return curve.place(at, c0 + at * (c1 + at * (c2 + at * c3)))


def _means(curve: IsoflopCurve, losses: Losses) -> tuple[np.ndarray, np.ndarray]:
    """The sizes and the mean losses of each: [sizes] and [draws, sizes]."""
    sizes = curve.sizes
    of_size = (curve.x == sizes[:, None]) / np.sum(curve.x == sizes[:, None], 1)[
        :, None
    ]
    return sizes, losses @ of_size.T


def _akima(curve: IsoflopCurve, losses: Losses) -> Vertices:
    """The lowest of fine places, moved to the vertex through it and its neighbours."""
    sizes, y = _means(curve, losses)
    steps = np.arange(_FINE * (len(sizes) - 1) + 1) / _FINE
    x = np.interp(steps, np.arange(len(sizes)), sizes)
    values = scipy.interpolate.Akima1DInterpolator(sizes, y.T)(x).T
    i, draw = np.clip(values.argmin(1), 1, len(x) - 2), np.arange(len(y))
    low, middle, high = (values[draw, i + d] for d in (-1, 0, 1))
    left, right = x[i] - x[i - 1], x[i + 1] - x[i]
    down, up = (middle - low) / left, (high - middle) / right
    bend = (up - down) / (left + right)
    slope = (down * right + up * left) / (left + right)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.where(bend > 0, -slope / (2 * bend), 0.0)
    moved = np.clip(moved, -left, right)
    return curve.place(x[i] + moved, middle + moved * (slope + moved * bend))


def least(curve: IsoflopCurve, losses: Losses) -> Vertices:
    """The size of least measured loss: the envelope of approach 1 at these budgets."""
    sizes, y = _means(curve, losses)
    return curve.place(sizes[y.argmin(1)], y.min(1))


ESTIMATORS: dict[str, OfBudget | None] = {
    "parabola": _parabola,
    "cubic": _cubic,
    "shape": None,  # of all budgets together
    "akima": _akima,
}
AUTO = "auto"  # the better of parabola and shape
