"""Two sets of minima over the same budgets: lines of ln y on ln C, and what they say.

The difference d = ln(second / first) of a quantity is taken at each budget, and a line
goes through these differences. What both sides share is in no difference: the bend of
their laws, as far as it is one bend, and noise that was drawn for both together. The
difference has its own scatter about its line, by the Q-profile of `law_of_minima`.

Draws of a pair belong together: draw i of the first and draw i of the second are of the
same resampled runs where the sides are paired.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from scaling_ldm.laws import forms, offset_law
from scaling_ldm.laws.law_of_minima import excess_scatter, interval, noise_variance
from scaling_ldm.records import Interval

REACH = 4.0  # a crossing, or an equal loss, is looked for this far beyond the budgets
NEVER = math.inf  # ln of a ratio: no compute is enough
_SAME = 1e-9  # differences of logarithms below this are rounding
_PLACES = 21

Budgets = Float[np.ndarray, "k"]
Noise = Float[np.ndarray, "draws k"]
Draws = Float[np.ndarray, "draws"]
Places = Float[np.ndarray, "places"]
Everywhere = Float[np.ndarray, "everywhere"]


@dataclasses.dataclass(frozen=True)
class Line:
    """ln y = middle + slope u, with u = ln C minus its mean, and drawn errors."""

    middle: float
    slope: float
    errors: np.ndarray  # of (middle, slope): [draws, 2]
    rmse: float  # sqrt(RSS / (budgets - 2))

    def at(self, u: Places) -> Places:
        return self.middle + self.slope * u

    def errors_at(self, u: Places) -> np.ndarray:
        """Drawn errors of the line: [draws, places]."""
        return self.errors @ np.stack([np.ones_like(u), u])

    def of_middle(self, level: float) -> Interval:
        """The interval of e^middle."""
        i = forms.percentiles(self.errors[:, 0], level)
        low, high = (math.exp(self.middle + end) for end in (i.low, i.high))
        return interval(low, high, level)

    def of_slope(self, level: float) -> Interval:
        i = forms.percentiles(self.errors[:, 1], level)
        return interval(self.slope + i.low, self.slope + i.high, level)


def fit_line(u: Budgets, y: Budgets, noise: Noise, rng: np.random.Generator) -> Line:
    """The least-squares line through minima that have noise and scatter.

    Args:
      u: ln C minus its mean, of three budgets or more.
      y: logarithms.
      noise: drawn errors of y.
      rng: of the scatter.
    """
    design = np.stack([np.ones_like(u), u], axis=1)
    solve = np.linalg.pinv(design)
    middle, slope = solve @ y
    squares = float(np.sum((y - design @ (solve @ y)) ** 2))
    drawn = np.sum((noise - (noise @ solve.T) @ design.T) ** 2, axis=1)
    dof = len(u) - 2
    scatter = excess_scatter(squares, dof, drawn, noise_variance(noise), rng)
    moved = scatter[:, None] * rng.standard_normal(noise.shape)
    return Line(
        middle=float(middle),
        slope=float(slope),
        errors=(noise + moved) @ solve.T,
        rmse=math.sqrt(squares / dof),
    )


def without_each(u: Budgets, y: Budgets) -> list[float]:
    """The slope without each budget in turn; none of three budgets."""
    if len(u) < 4:
        return []
    rest = [np.arange(len(u)) != left_out for left_out in range(len(u))]
    return [float(np.polyfit(u[kept], y[kept], 1)[0]) for kept in rest]


def places(u: Budgets) -> Places:
    """From the first to the last of these ln C."""
    return np.linspace(u[0], u[-1], _PLACES)


def band(
    line: Line, at: Places, over: Everywhere, level: float
) -> tuple[Places, Places, Places]:
    """The line at these places with ends of a band that holds everywhere `over`.

    The band is the widest of the draws, in units of the pointwise half width. So the
    probability that it misses the line anywhere is 1 - level.

    Args:
      at: where it is wanted.
      over: where it must hold.
    """
    everywhere = line.errors_at(over)
    low, high = forms.central(everywhere, level)
    half = np.maximum((high - low) / 2, 1e-300)
    largest = np.max(np.abs(everywhere) / half, axis=1)
    factor = float(np.quantile(largest, level))
    low, high = forms.central(line.errors_at(at), level)
    width = factor * (high - low) / 2
    return line.at(at), line.at(at) - width, line.at(at) + width


def signs(low: Places, high: Places) -> np.ndarray:
    """-1 where a band lies below 0, 1 where it lies above, else 0."""
    return (low > _SAME).astype(int) - (high < -_SAME).astype(int)


def crossing(line: Line, u: Budgets, level: float) -> tuple[float, float, float]:
    """The u at which a difference is 0, and the ends of its interval.

    The interval is Fieller's (1954, J. R. Stat. Soc. B 16, 175), by the draws: all u at
    which the interval of the difference contains 0. An end is infinite where it reaches
    beyond REACH times the budgets. NaN: the difference is nowhere 0.
    """
    if abs(line.slope) * np.ptp(u) < _SAME:
        return math.nan, -math.inf, math.inf
    at = -line.middle / line.slope
    far = math.log(REACH)
    coarse = np.unique(np.append(np.linspace(u[0] - far, u[-1] + far, 101), at))
    inside = np.flatnonzero(_may_be_zero(line, coarse, level))
    if not len(inside):
        return at, math.nan, math.nan
    first, last = inside[0], inside[-1]
    ends = [-math.inf, math.inf]
    if first > 0:
        fine = np.linspace(coarse[first - 1], coarse[first], 41)
        ends[0] = float(fine[_may_be_zero(line, fine, level).argmax()])
    if last < len(coarse) - 1:
        fine = np.linspace(coarse[last + 1], coarse[last], 41)
        ends[1] = float(fine[_may_be_zero(line, fine, level).argmax()])
    return at, ends[0], ends[1]


def _may_be_zero(line: Line, at: Places, level: float) -> np.ndarray:
    """Where the pointwise interval of a line contains 0."""
    low, high = forms.central(line.errors_at(at), level)
    return (line.at(at) + low <= _SAME) & (line.at(at) + high >= -_SAME)


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """The least loss of one side over u: its offset law, and its pure power law."""

    central: offset_law.Constants  # of the fit
    drawn: offset_law.Constants  # of draws
    line: Line  # E = 0
    budgets: int


def loss_curve(
    u: Budgets, losses: Budgets, noise: Noise, line: Line, rng: np.random.Generator
) -> LossCurve:
    """The curve through these losses; `noise` is that of ln L."""
    central = offset_law.solve(u, losses[None], losses)
    fitted, dof = central(u)[0], len(u) - 3
    drawn = offset_law.solve(u, fitted * np.exp(noise), losses)
    if dof:
        squares, variance = float(central.squares[0]), noise_variance(noise)
        scatter = excess_scatter(squares, dof, drawn.squares, variance, rng)
        if scatter.any():
            moved = scatter[:, None] * rng.standard_normal(noise.shape)
            factors = np.exp(np.clip(noise + moved, -30, 30))
            drawn = offset_law.solve(u, fitted * factors, losses)
    return LossCurve(central, drawn, line, len(u))


def equal_loss(
    curve: LossCurve, difference: Line, u: float, level: float
) -> tuple[float, float, float]:
    """ln of the compute that the second needs over the first's, for equal loss at u.

    It is how far one must go along the second's curve until its loss has fallen by
    `difference`. With three budgets, the interval is the hull of those of both forms.

    Args:
      curve: of the second.
      difference: ln(second / first), with the same draws.

    Returns:
      The value and the ends of its interval; infinite where the loss is never reached.
    """
    at = np.array([u])
    d = difference.at(at)
    drawn = d + difference.errors_at(at)[:, 0]
    value = float(_shift(curve.central, d, u)[0])
    low, high = _ends(_shift(curve.drawn, drawn, u), level)
    if curve.budgets == 3:
        slopes = curve.line.slope + curve.line.errors[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            along = -drawn / slopes
        pure = np.where(np.abs(drawn) < _SAME, 0.0, along)
        pure = np.where(slopes < 0, pure, np.copysign(NEVER, drawn))
        other = _ends(pure, level)
        low, high = min(low, other[0]), max(high, other[1])
    return value, low, high


def _shift(law: offset_law.Constants, d: Draws, u: float) -> Draws:
    """How far the loss of a law must move along u to change by the factor e^-d."""
    fall = law.A * np.exp(-law.b * u)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = ((law.E + fall) * np.exp(-d) - law.E) / fall
        moved = np.where(left > 0, -np.log(left) / law.b, NEVER)
    moved = np.where(fall > 0, moved, np.copysign(NEVER, d))
    return np.where(np.abs(d) < _SAME, 0.0, moved)


def _ends(draws: Draws, level: float) -> tuple[float, float]:
    """The ends of the central interval: observed draws, as one may be infinite."""
    at = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(draws, at, method="inverted_cdf")
    return float(low), float(high)
