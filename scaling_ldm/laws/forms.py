"""The power law, and what every bootstrap of a fit shares.

Everything is float64 numpy and scipy. Every bootstrap of this folder resamples
residuals in the same way: residuals are divided by sqrt(1 - leverage), rescaled to the
variance RSS / (n - p) and resampled. Each draw is multiplied by sqrt(nu / chi2_nu),
nu = n - p, because the noise level itself was estimated from nu degrees of freedom. For
a linear coefficient this gives the t interval. Without it a nominal 90% interval of a
parabola through six points covers about 80%.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Float

from scaling_ldm.records import Interval, PowerLaw, Refusal

MAX_FAILED_DRAWS = 0.1  # share of failed draws above which a fit is not identified

Points = Float[np.ndarray, "points"]
Draws = Float[np.ndarray, "draws"]
ManyDraws = Float[np.ndarray, "draws *columns"]


def exchangeable(residuals: Points, leverage: Points, dof: float) -> np.ndarray:
    """Residuals scaled to equal variance, RSS / dof.

    Points of leverage one are fitted exactly, whatever their value. They hold no
    information about the noise and are left out.
    """
    free = 1 - leverage > 1e-6
    pool = residuals[free] / np.sqrt(1 - leverage[free])
    pool = pool - pool.mean()
    rms = math.sqrt(np.mean(pool**2))
    return pool * (math.sqrt(np.sum(residuals**2) / dof) / rms) if rms else pool


def central(draws: ManyDraws, level: float) -> np.ndarray:
    """The ends of the central interval of each column of draws: [2, columns]."""
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)


def percentiles(draws: Draws, level: float) -> Interval:
    """The central interval of the finite draws."""
    low, high = central(draws[np.isfinite(draws)], level)
    return Interval(low=float(low), high=float(high), level=level)


def band(
    x: Points, low: Points, high: Points
) -> tuple[tuple[float, float, float], ...]:
    """Rows (x, low, high) of a law's prediction band."""
    rows = zip(x, low, high, strict=True)
    return tuple((float(g), float(a), float(b)) for g, a, b in rows)


def band_grid(x: Points, extend: float, points: int = 41) -> np.ndarray:
    """Log-spaced x from half the smallest to `extend` times the largest."""
    return np.geomspace(x.min() / 2, x.max() * extend, points)


def power_law(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    x_name: str = "x",
    y_name: str = "y",
    confidence: float = 0.9,
    extend: float = 4.0,
) -> PowerLaw | Refusal:
    """Fits y = coef * x^exponent by least squares of ln y on ln x.

    Intervals are the exact t intervals of a straight line with n - 2 degrees of
    freedom. The band is the pointwise prediction interval of one new y.

    Args:
      x: n positive numbers.
      y: n positive numbers.
      x_name: what x is, kept in the result.
      y_name: what y is, kept in the result.
      confidence: level of the intervals and of the band.
      extend: the band reaches from x.min() / 2 to extend * x.max().

    Returns:
      The law, or a refusal: fewer than three points, a number that is not finite
      and positive, or no spread in x.

    Raises:
      ValueError: x and y of unlike lengths.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be equally long lists: {x.shape}, {y.shape}")
    if unusable := _unusable(x, y):
        reason, detail = unusable
        return Refusal(quantity=y_name, reason=reason, detail=detail)
    u, v = np.log(x), np.log(y)
    centre = u.mean()
    spread = float(np.sum((u - centre) ** 2))
    exponent = float(np.sum((u - centre) * v) / spread)
    residuals = v - v.mean() - exponent * (u - centre)
    dof = len(x) - 2
    s = math.sqrt(float(np.sum(residuals**2)) / dof)
    t = float(scipy.stats.t.ppf((1 + confidence) / 2, dof))
    log_coef = v.mean() - exponent * centre
    half = t * s / math.sqrt(spread)
    half_coef = t * s * math.sqrt(1 / len(x) + centre**2 / spread)
    grid = band_grid(x, extend)
    offset = np.log(grid) - centre
    middle = v.mean() + exponent * offset
    width = t * s * np.sqrt(1 + 1 / len(x) + offset**2 / spread)

    def interval(low: float, high: float) -> Interval:
        return Interval(low=float(low), high=float(high), level=confidence)

    return PowerLaw(
        x_name=x_name,
        y_name=y_name,
        coef=float(np.exp(log_coef)),
        exponent=exponent,
        coef_interval=interval(*np.exp([log_coef - half_coef, log_coef + half_coef])),
        exponent_interval=interval(exponent - half, exponent + half),
        points=len(x),
        x_min=float(x.min()),
        x_max=float(x.max()),
        rmse_log=s,
        band=band(grid, np.exp(middle - width), np.exp(middle + width)),
    )


def _unusable(x: Points, y: Points) -> tuple[str, str] | None:
    """The reason why no line goes through these points, with its numbers."""
    bad = ~(np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0))
    if bad.any():
        pairs = zip(x[bad], y[bad], strict=True)
        listed = ", ".join(f"({a:.6g}, {b:.6g})" for a, b in pairs)
        return "not finite and positive", listed
    if len(x) < 3:
        return "fewer than 3 points", f"{len(x)} given"
    u = np.log(x)
    if float(np.sum((u - u.mean()) ** 2)) < 1e-12:
        return "no spread in x", f"all near {x[0]:.6g}"
    return None
