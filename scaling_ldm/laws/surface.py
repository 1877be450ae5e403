"""The parametric surface L = E + A / N^alpha + B / D^beta.

Hoffmann et al. 2022 (arXiv 2203.15556), approach 3.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.optimize
from jaxtyping import Float

from scaling_ldm.laws.forms import MAX_FAILED_DRAWS, exchangeable, percentiles
from scaling_ldm.records import Parametric, Refusal

EXPONENT_BOUNDS = (0.02, 2.0)
SURFACE_DRAWS = 500  # at most; each is a non-linear fit
MAX_EXPONENT_RATIO = 10.0  # high / low of an exponent's interval

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
      convergence, or exponents whose interval spans a decade.
    """
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
    if refusal := _unusable(n, d, loss, huber):
        return refusal
    log_n, log_d = np.log(n), np.log(d)
    centre = log_n.mean(), log_d.mean()
    u, w = log_n - centre[0], log_d - centre[1]
    correlation = float(u @ w / math.sqrt((u @ u) * (w @ w)))
    if abs(correlation) > 0.999:
        return refuse(
            "N and D are collinear",
            f"correlation of ln N and ln D {correlation:.5f}: more than one budget "
            "is needed",
        )
    start = _start(u, w, loss)
    if not (start[:3] > 0).all():
        return refuse("not identified", "best fit has " + _unsound(start))
    result = _refine(u, w, loss, start, huber)
    if result.status <= 0:
        return refuse("no convergence", f"{result.message} ({result.nfev} evaluations)")
    if wrong := _unsound(result.x):
        return refuse("not identified", wrong)
    fits = _draws(u, w, loss, result, huber, min(bootstrap, SURFACE_DRAWS), seed)
    lost = np.isnan(fits[:, 0])
    if np.mean(lost) > MAX_FAILED_DRAWS:
        return refuse(
            "not identified",
            f"{np.mean(lost):.0%} of {len(fits)} bootstrap draws have no surface",
        )

    intervals = {
        name: percentiles(draws, confidence)
        for name, draws in _named(fits[~lost], *centre).items()
    }
    for name in ("alpha", "beta"):
        i = intervals[name]
        if i.high > MAX_EXPONENT_RATIO * i.low:
            return refuse(
                "not identified", f"{name} lies in {i.low:.3g} to {i.high:.3g}"
            )
    squares = float(np.sum((loss - _model(result.x, u, w)) ** 2))
    return Parametric(
        **{name: float(value) for name, value in _named(result.x, *centre).items()},
        intervals=intervals,
        points=len(n),
        rmse=math.sqrt(squares / (len(n) - 5)),
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


def _start(u: Points, w: Points, loss: Points) -> Constants:
    """The best constants on a grid of exponents; E, A and B are at least 0."""
    best, start = math.inf, np.zeros(5)
    grid = np.geomspace(*EXPONENT_BOUNDS, 25)
    design = np.ones((len(loss), 3))
    for alpha in grid:
        design[:, 1] = np.exp(-alpha * u)
        for beta in grid:
            design[:, 2] = np.exp(-beta * w)
            linear, rss = scipy.optimize.nnls(design, loss)
            if rss < best:
                best, start = rss, np.array([*linear, alpha, beta])
    return start


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
    """Constants refitted to resampled residuals; NaN where a draw has no surface."""
    dof = len(loss) - 5
    model = _model(fitted.x, u, w)
    residuals = loss - model if huber is None else np.log(loss) - np.log(model)
    leverage = np.sum(np.linalg.qr(fitted.jac)[0] ** 2, axis=1)
    if huber is not None:  # scipy scales the Jacobian by the weights
        leverage = np.full(len(loss), 5 / len(loss))
    pool = exchangeable(residuals, leverage, dof)
    rng = np.random.default_rng([seed, 5])
    fits = np.full((draws, 5), np.nan)
    for k in range(draws):
        noise = rng.choice(pool, len(loss)) * math.sqrt(dof / rng.chisquare(dof))
        drawn = model + noise if huber is None else model * np.exp(noise)
        again = _refine(u, w, drawn, fitted.x, huber)
        if again.status > 0 and not _unsound(again.x):
            fits[k] = again.x
    return fits
