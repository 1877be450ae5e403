"""The best learning rate of one size, length and batch, by a parabola in ln rate.

The parabola goes through the rates next to the best measured one. Far from it the loss
is no parabola: it rises slowly to small rates and abruptly to large ones. A best rate
at the edge of its grid is refused, and so is one beside a rate that diverges.

The interval of a best rate is Fieller's: the rates at which the parabola's slope is
not significantly different from 0. It takes the uncertain curvature into account, and
where the curvature itself is not significant there is no interval. The noise of a run
is that of the deviations from the parabolas, pooled over all cells. The loss is
lopsided, which moves the vertex of a wide parabola. So the interval reaches at least to
the vertex of the parabola through the best three rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.interpolate
import scipy.stats
from jaxtyping import Float

from scaling_ldm.records import BestRate, Interval, Refusal

BEST = "best learning rate"  # what a refusal is about
# A rise of the loss this many times any rise on the other side is no parabola's.
CLIFF = 10.0
SAME = 1e-6  # relative difference up to which two numbers are equal

Values = Float[np.ndarray, "runs"]
Coefs = Float[np.ndarray, "3"]
Covariance = Float[np.ndarray, "3 3"]


def name_of(params: float, tokens: float, batch_size: float) -> str:
    """What a refusal calls the runs of one size, length and batch."""
    return f"{params:.6g} parameters, {tokens:.6g} tokens, batch {batch_size:.6g}"


@dataclasses.dataclass(frozen=True)
class RateCell:
    """The runs of one size, length and batch."""

    at: tuple[float, float, float]  # params, tokens, batch_size
    x: Values  # ln rate, ascending
    y: Values  # loss

    @property
    def name(self) -> str:
        return name_of(*self.at)

    def refusal(self, reason: str, detail: str) -> Refusal:
        return Refusal(quantity=BEST, group=self.name, reason=reason, detail=detail)


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """The parabola of a cell through its best rates; x is ln rate minus `centre`."""

    cell: RateCell
    centre: float
    x: Values
    coefs: Coefs
    covariance: Covariance  # of coefs, for noise of variance 1
    rss: float
    dof: int
    narrow: float  # the vertex of the parabola through the best three rates


def _by_rate(cell: RateCell) -> list[np.ndarray]:
    """The indices of the runs of each rate, ascending."""
    breaks = np.flatnonzero(np.diff(cell.x) > SAME) + 1
    return np.split(np.arange(len(cell.x)), breaks)


def fit_curve(cell: RateCell, neighbours: int) -> RateCurve | Refusal:
    """The parabola of a cell, or the first reason why it has no best rate."""
    groups = _by_rate(cell)
    rates = np.exp([cell.x[g[0]] for g in groups])
    if len(groups) < 3:
        return cell.refusal("fewer than 3 rates", f"{len(groups)} with a finite loss")
    means = np.array([cell.y[g].mean() for g in groups])
    k, grid = int(means.argmin()), f"{rates[0]:.4g} to {rates[-1]:.4g}"
    if k in (0, len(groups) - 1):
        return cell.refusal(
            "best rate at the edge of the grid",
            f"least loss {means[k]:.6g} at rate {rates[k]:.4g}, an end of {grid}",
        )
    reach = _reach(means, k, neighbours)
    if not reach:
        above = k + 1 if means[k + 1] > means[k - 1] else k - 1
        return cell.refusal(
            "loss rises abruptly beside the best rate",
            f"{means[k]:.6g} at rate {rates[k]:.4g}, {means[above]:.6g} at "
            f"{rates[above]:.4g}: train rates between",
        )
    used = np.concatenate(groups[k - reach : k + reach + 1])
    x, y = cell.x[used], cell.y[used]
    centre = float(cell.x[groups[k][0]])
    design = np.vander(x - centre, 3, increasing=True)
    covariance = np.linalg.inv(design.T @ design)
    coefs = covariance @ design.T @ y
    residuals = y - design @ coefs
    curve = RateCurve(
        cell=cell,
        centre=centre,
        x=x - centre,
        coefs=coefs,
        covariance=covariance,
        rss=float(residuals @ residuals),
        dof=len(x) - 3,
        narrow=_vertex_of_three(
            np.array([cell.x[groups[i][0]] for i in (k - 1, k, k + 1)]) - centre,
            means[k - 1 : k + 2],
        ),
    )
    if coefs[2] <= 1e-12 * max(1e-300, np.abs(y).max()):
        return cell.refusal(
            "no upward-opening parabola",
            f"curvature {coefs[2]:.4g} per (ln rate)^2 near rate {rates[k]:.4g}",
        )
    at = -coefs[1] / (2 * coefs[2])
    if not curve.x.min() < at < curve.x.max():
        return cell.refusal(
            "vertex outside the rates that it was fitted to",
            f"vertex at rate {math.exp(min(700.0, at + centre)):.4g}, best measured "
            f"{rates[k]:.4g} of {grid}",
        )
    return curve


def _reach(means: np.ndarray, k: int, neighbours: int) -> int:
    """How many rates on each side of the best one lie on its parabola; 0: none do.

    A parabola with its minimum near rate k rises alike on both sides. Where training
    diverges, the loss rises many times more, and a parabola through it has its minimum
    in the middle between two rates, whatever the loss is there.

    Args:
      means: the loss of each rate, ascending in the rate; k is the best of them.
      neighbours: the most on each side.
    """
    rise = means - means[k]
    below, above = rise[:k].max(), rise[k + 1 :].max()
    for reach in range(min(neighbours, k, len(means) - 1 - k), 0, -1):
        left, right = rise[k - reach : k].max(), rise[k + 1 : k + reach + 1].max()
        if right <= CLIFF * below and left <= CLIFF * above:
            return reach
    return 0


def _vertex_of_three(x: Coefs, y: Coefs) -> float:
    """The minimum of the parabola through three points, the lowest in the middle."""
    slopes = np.diff(y) / np.diff(x)
    bend = (slopes[1] - slopes[0]) / (x[2] - x[0])
    if bend <= 0:  # three equal losses
        return float(x[1])
    return float((x[0] + x[1]) / 2 - slopes[0] / (2 * bend))


def noise(curves: Sequence[RateCurve]) -> tuple[float, int]:
    """The variance of one run's loss, pooled over cells, and its degrees of freedom.

    It is that of the deviations from the parabolas. They hold the noise between seeds
    and what a parabola misses.
    """
    dof = sum(curve.dof for curve in curves)
    return (sum(curve.rss for curve in curves) / dof if dof else 0.0), dof


def best_rate(
    curve: RateCurve, variance: float, dof: int, level: float
) -> BestRate | Refusal:
    """The vertex with Fieller's interval."""
    cell = curve.cell
    if not dof:
        return cell.refusal(
            "noise not known",
            "three rates and one seed everywhere: train a fourth rate or a second seed",
        )
    _, b, c = (float(value) for value in curve.coefs)
    v = curve.covariance * variance * scipy.stats.t.ppf((1 + level) / 2, dof) ** 2
    # (b + 2 c x)^2 <= v_bb + 4 v_bc x + 4 v_cc x^2, a quadratic inequality in x.
    p = 4 * (c * c - v[2, 2])
    q = 4 * (b * c - v[1, 2])
    r = b * b - v[1, 1]
    if p <= 0:
        return cell.refusal(
            "best rate not identified",
            f"the curvature {c:.3g} per (ln rate)^2 is within its error "
            f"{math.sqrt(v[2, 2]):.3g} at level {level:g}",
        )
    root = math.sqrt(max(q * q - 4 * p * r, 0.0))
    ends = [(-root - q) / (2 * p), (root - q) / (2 * p), curve.narrow]
    low, high = np.exp([curve.centre + min(ends), curve.centre + max(ends)])
    at = -b / (2 * c)
    rate, loss = math.exp(curve.centre + at), float(curve.coefs[0] - c * at * at)
    groups = _by_rate(cell)
    shape = scipy.interpolate.PchipInterpolator(
        [cell.x[g[0]] for g in groups],
        [cell.y[g].mean() for g in groups],
        extrapolate=False,
    )

    def lost(factor: float) -> float | None:
        value = float(shape(math.log(rate * factor)))
        return value - loss if math.isfinite(value) else None

    return BestRate(
        params=float(cell.at[0]),
        tokens=float(cell.at[1]),
        batch_size=float(cell.at[2]),
        rates=len(groups),
        points=len(curve.x),
        curvature=c,
        rate=rate,
        rate_interval=Interval(low=float(low), high=float(high), level=level),
        loss=loss,
        lost_at_half=lost(0.5),
        lost_at_double=lost(2.0),
    )
