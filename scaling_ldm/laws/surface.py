"""The parametric surface L = E + A / N^alpha + B / D^beta.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 3.

Its intervals are of a bootstrap of residuals. Where sizes have runs at several token
counts, these may share noise, which is drawn as for the minima (`shared_noise`). Else
each residual keeps its run and changes its sign at random (wild bootstrap; Liu 1988,
Ann. Stat. 16, 1696), so that noise may differ from run to run. Whether the surface is
identified is read from profiles of the squares, not from draws: no seed changes it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats
from jaxtyping import Float

from scaling_ldm.laws import separable
from scaling_ldm.laws.forms import MAX_FAILED_DRAWS, exchangeable, percentiles
from scaling_ldm.laws.shared_noise import groups, shared_noise
from scaling_ldm.records import Parametric, Refusal

EXPONENT_BOUNDS = (0.02, 2.0)
SURFACE_DRAWS = 500  # at most; each is a non-linear fit
COLLINEAR = "N and D are collinear"
MAX_EXPONENT_RATIO = 10.0  # high / low of an exponent's profile
_GRID = np.geomspace(*EXPONENT_BOUNDS, 25)  # of both exponents
_STEPS = 12  # of Gauss and Newton, for a draw

Points = Float[np.ndarray, "points"]
Constants = Float[np.ndarray, "5"]  # E, A, B, alpha, beta; A and B for centred ln N, D
ConstantsOfDraws = Float[np.ndarray, "draws 5"]


def surface(
    n: npt.ArrayLike,
    d: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    huber: float | None = None,
    confidence: float = 0.9,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Parametric | Refusal:
    """Fits L = E + A / N^alpha + B / D^beta.

    The start is the best of a grid of exponents, where E, A and B are non-negative
    linear least squares (variable projection). Levenberg-Marquardt then refines all
    five. The objective is a sum over points and stops by relative tolerances: averaged
    Huber losses stopped L-BFGS early in the original (arXiv 2404.10102).

    Args:
      n: parameters, one per run.
      d: tokens, one per run.
      loss: one per run; positive where `huber` is given.
      huber: None for least squares in the loss; a width delta for the Huber loss of
        ln L_fit - ln L as in Hoffmann et al. (they used 1e-3).
      confidence: level of the intervals.
      bootstrap: residual bootstrap draws; at most SURFACE_DRAWS are used.
      seed: of the draws.

    Returns:
      The surface, or a refusal when it is not identified: fewer than 6 points or 3
      sizes, N and D on one line, an exponent at its bound, a term that vanishes, no
      convergence, or an exponent whose profile spans a decade or reaches a bound.
    """
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
    if refusal := _unusable(n, d, loss, huber):
        return refusal
    log_n, log_d = np.log(n), np.log(d)
    centre = log_n.mean(), log_d.mean()
    u, w = log_n - centre[0], log_d - centre[1]
    correlation = float(u @ w / math.sqrt((u @ u) * (w @ w)))
    if abs(correlation) > 0.999:
        said = f"correlation of ln N and ln D {correlation:.5f}"
        return refuse(COLLINEAR, f"{said}: more than one budget is needed")
    start, squares = _start(u, w, loss)
    if not (start[:3] > 0).all():
        return refuse("not identified", "best fit has " + _unsound(start))
    result = _refine(u, w, loss, start, huber)
    if result.status <= 0:
        return refuse("no convergence", f"{result.message} ({result.nfev} evaluations)")
    if wrong := _unsound(result.x):
        return refuse("not identified", wrong)
    wrong = "" if huber else _vague(squares, result.x, len(loss), confidence)
    if wrong:
        return refuse("not identified", wrong)
    fits = _draws(u, w, loss, result, huber, min(bootstrap, SURFACE_DRAWS), seed)
    lost = np.isnan(fits[:, 0])
    if np.mean(lost) > MAX_FAILED_DRAWS:
        said = f"{np.mean(lost):.0%} of {len(fits)} bootstrap draws have no surface"
        return refuse("not identified", said)

    intervals = {
        name: percentiles(draws, confidence)
        for name, draws in _named(fits[~lost], *centre).items()
    }
    intervals["E"] = dataclasses.replace(
        intervals["E"], low=max(0.0, intervals["E"].low)
    )
    for name in ("alpha", "beta") if huber else ():
        i = intervals[name]
        if i.high > MAX_EXPONENT_RATIO * i.low:
            wrong = f"{name} lies in {i.low:.3g} to {i.high:.3g}"
            return refuse("not identified", wrong)
    rss = float(np.sum((loss - _model(result.x, u, w)) ** 2))
    return Parametric(
        **{name: float(value) for name, value in _named(result.x, *centre).items()},
        intervals=intervals,
        points=len(n),
        rmse=math.sqrt(rss / (len(n) - 5)),
        huber_delta=huber,
    )


def refuse(reason: str, detail: str) -> Refusal:
    return Refusal(quantity="parametric surface", reason=reason, detail=detail)


def _unusable(
    n: Points, d: Points, loss: Points, huber: float | None
) -> Refusal | None:
    positive = (n > 0) & (d > 0) & ((loss > 0) | (huber is None))
    bad = ~(np.isfinite(n) & np.isfinite(d) & np.isfinite(loss) & positive)
    if bad.any():
        return refuse("not finite and positive", f"{bad.sum()} of {len(n)} points")
    sizes, datas = len(np.unique(n)), len(np.unique(d))
    if len(n) >= 6 and sizes >= 3 and datas >= 3:
        return None
    return refuse(
        "too few points",
        f"{len(n)} points, {sizes} sizes, {datas} token counts; "
        "at least 6, 3 and 3 are needed",
    )


def _model(p: Constants, u: Points, w: Points) -> Points:
    """The loss at centred ln N = u and ln D = w."""
    return p[0] + p[1] * np.exp(-p[3] * u) + p[2] * np.exp(-p[4] * w)


def _named(q: np.ndarray, ln_n: float, ln_d: float) -> dict[str, Any]:
    """Constants by name, A and B for ln N and ln D that are not centred."""
    alpha, beta = q[..., 3], q[..., 4]
    return {
        "E": q[..., 0],
        "A": q[..., 1] * np.exp(alpha * ln_n),
        "B": q[..., 2] * np.exp(beta * ln_d),
        "alpha": alpha,
        "beta": beta,
        "n_opt_exponent": beta / (alpha + beta),
    }


def _start(u: Points, w: Points, loss: Points) -> tuple[Constants, np.ndarray]:
    """The best constants on a grid of exponents, and the squares on the grid.

    E, A and B are at least 0.
    """
    best, start = math.inf, np.zeros(5)
    squares = np.empty((len(_GRID), len(_GRID)))
    design = np.ones((len(loss), 3))
    for i, alpha in enumerate(_GRID):
        design[:, 1] = np.exp(-alpha * u)
        for j, beta in enumerate(_GRID):
            design[:, 2] = np.exp(-beta * w)
            linear, norm = scipy.optimize.nnls(design, loss)
            squares[i, j] = norm**2
            if norm < best:
                best, start = norm, np.array([*linear, alpha, beta])
    return start, squares


def _vague(squares: np.ndarray, fitted: Constants, points: int, level: float) -> str:
    """Which exponent the points do not bound; "" if they bound both.

    The profile of an exponent is the least squares over all other constants. Values
    whose profile is above the least by less than the quantile of F are not refuted.

    Args:
      squares: on the grid, by alpha and beta.
      fitted: the constants of least squares.
    """
    least = float(squares.min())
    limit = float(scipy.stats.f.ppf(level, 1, points - 5)) / (points - 5)
    for name, value, axis in (("alpha", fitted[3], 1), ("beta", fitted[4], 0)):
        profile = squares.min(axis)
        near = np.append(_GRID[profile <= least * (1 + limit)], value)
        low, high = float(near.min()), float(near.max())
        if high > MAX_EXPONENT_RATIO * low or low <= _GRID[0] or high >= _GRID[-1]:
            return f"{name} lies in {low:.3g} to {high:.3g}"
    return ""


def _refine(
    u: Points, w: Points, loss: Points, start: Constants, huber: float | None
) -> scipy.optimize.OptimizeResult:
    """All five constants from a start; the residuals are summed."""

    def residual(p):
        model = _model(p, u, w)
        if huber is None:
            return model - loss
        return np.log(np.maximum(model, 1e-300)) - np.log(loss)

    def jacobian(p):
        a, b = np.exp(-p[3] * u), np.exp(-p[4] * w)
        j = np.stack([np.ones_like(a), a, b, -p[1] * u * a, -p[2] * w * b], axis=1)
        return j if huber is None else j / np.maximum(_model(p, u, w), 1e-300)[:, None]

    options: dict[str, Any] = {"xtol": 1e-14, "ftol": 1e-14, "max_nfev": 500}
    if huber is None:
        options |= {"method": "lm", "gtol": 1e-14}
    else:
        scale = np.maximum(np.abs(start), 1e-8)
        options |= {"loss": "huber", "f_scale": huber, "x_scale": scale, "gtol": None}
    with np.errstate(over="ignore", invalid="ignore"):
        return scipy.optimize.least_squares(residual, start, jacobian, **options)


def _unsound(p: Constants) -> str:
    """Why these constants are not a surface of this form; "" if they are."""
    low, high = EXPONENT_BOUNDS
    for name, value in (("alpha", p[3]), ("beta", p[4])):
        if not low < value < high:
            return f"{name} = {value:.4g} is at or beyond the bounds {low} to {high}"
    for name, value in (("E", p[0]), ("the N term", p[1]), ("the D term", p[2])):
        if not value > 0:
            return f"{name} is not positive ({value:.4g})"
    return ""


def _draws(
    u: Points,
    w: Points,
    loss: Points,
    fitted: scipy.optimize.OptimizeResult,
    huber: float | None,
    draws: int,
    seed: int,
) -> ConstantsOfDraws:
    """Constants refitted to drawn noise; NaN where a draw has no surface."""
    model = _model(fitted.x, u, w)
    rng = np.random.default_rng([seed, 5])
    if huber is None:
        drawn = model + _noise(u, w, loss - model, fitted.jac, draws, rng)
        return _refitted(u, w, drawn, fitted.x)
    residuals = np.log(loss) - np.log(model)
    leverage = np.full(len(loss), 5 / len(loss))  # scipy scales the Jacobian
    pool = exchangeable(residuals, leverage, len(loss) - 5)
    fits = np.full((draws, 5), np.nan)
    for k in range(draws):
        scale = math.sqrt((len(loss) - 5) / rng.chisquare(len(loss) - 5))
        again = _refine(
            u, w, model * np.exp(scale * rng.choice(pool, len(loss))), fitted.x, huber
        )
        if again.status > 0 and not _unsound(again.x):
            fits[k] = again.x
    return fits


def _noise(
    u: Points,
    w: Points,
    residuals: Points,
    jacobian: np.ndarray,
    draws: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The noise of the runs, [draws, points]."""
    leverage = np.sum(np.linalg.qr(jacobian)[0] ** 2, axis=1)
    pool = exchangeable(residuals, leverage, len(u) - 5)
    exact = not np.mean(pool**2) > 0
    group = groups(np.exp(u).tolist(), [""] * len(u), np.exp(w).tolist())
    if group is None or exact:
        signs = rng.choice([-1.0, 1.0], (draws, len(u)))
        return residuals / np.maximum(1 - leverage, 0.1) * signs
    shared = shared_noise(residuals, jacobian, group, draws, rng)
    return shared.noise(pool / np.sqrt(np.mean(pool**2)), rng)


def _refitted(
    u: Points, w: Points, drawn: np.ndarray, fitted: Constants
) -> ConstantsOfDraws:
    """The surfaces of least squares near the fitted one; NaN: a term vanishes.

    E may be negative there: the other constants are then those of a law as good.
    """

    def columns(pair):
        alpha, beta = pair.T[:, :, None, None]
        one, two = np.exp(-alpha * u), np.exp(-beta * w)

        def tangents(a, b):
            return -a * u * one, -b * w * two

        return separable.Columns(one, two, tangents)

    low, high = EXPONENT_BOUNDS
    problem = separable.Problem(
        columns=columns,
        losses=drawn[:, None],
        weights=np.ones((1, len(u))),
        prior=np.zeros((len(drawn), 2)),
        precision=0.0,
        low=low,
        high=high,
        longest=0.1,
    )
    start = np.broadcast_to(fitted[3:], (len(drawn), 2))
    found = separable.solve(problem, start, _STEPS)
    fits = np.concatenate([found.coefs[:, 0], found.pair], 1)
    inside = np.all((found.pair > low) & (found.pair < high), axis=1)
    usable = np.asarray(inside & np.all(fits[:, 1:3] > 0, axis=1))
    return np.where(usable[:, None], fits, np.nan)
