"""Forms of scaling laws: fits of arrays, and the published laws as data.

Everything is float64 numpy and scipy. The small-sample recipe is the same for every
bootstrap here and in `fit`: residuals are divided by sqrt(1 - leverage), rescaled to
the variance RSS / (n - p), resampled, and each draw is multiplied by
sqrt(nu / chi2_nu), nu = n - p, because the noise level itself was estimated from nu
degrees of freedom. For a linear coefficient this gives the t interval; without it a
nominal 90% interval of a parabola through six points covers about 80%.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping

import numpy as np
import scipy.optimize
import scipy.stats

from scaling_ldm.records import Interval, Parametric, PowerLaw, Refusal

EXPONENT_BOUNDS = (0.02, 2.0)
MAX_FAILED_DRAWS = 0.1  # of a bootstrap; beyond it an estimate is not identified
SURFACE_DRAWS = 500  # at most; each is a non-linear fit
MAX_EXPONENT_RATIO = 10.0  # high / low of an exponent's interval


def exchangeable(residuals: np.ndarray, leverage: np.ndarray, dof: int) -> np.ndarray:
    """Residuals made alike in variance and rescaled to the variance RSS / dof.

    Points of leverage one (fitted exactly whatever their value) say nothing about the
    noise and are left out.
    """
    free = 1 - leverage > 1e-6
    pool = residuals[free] / np.sqrt(1 - leverage[free])
    pool = pool - pool.mean()
    rms = math.sqrt(np.mean(pool**2))
    return pool * (math.sqrt(np.sum(residuals**2) / dof) / rms) if rms else pool


def percentiles(draws: np.ndarray, level: float) -> Interval:
    """The central interval of the finite draws."""
    low, high = np.quantile(
        draws[np.isfinite(draws)], [(1 - level) / 2, (1 + level) / 2]
    )
    return Interval(low=float(low), high=float(high), level=level)


def band_grid(x: np.ndarray, extend: float, points: int = 41) -> np.ndarray:
    """Log-spaced x from half the smallest to `extend` times the largest."""
    return np.geomspace(x.min() / 2, x.max() * extend, points)


def power_law(
    x,
    y,
    *,
    x_name: str = "x",
    y_name: str = "y",
    confidence: float = 0.9,
    extend: float = 4.0,
) -> PowerLaw | Refusal:
    """Fits y = coef * x^exponent by least squares of ln y on ln x.

    Intervals are the exact t intervals of a straight line with n - 2 degrees of
    freedom; the band is the pointwise prediction interval of one new y.

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
    x = np.asarray(x, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be equally long lists: {x.shape}, {y.shape}")
    what = f"power law of {y_name} against {x_name}"
    bad = ~(np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0))
    if bad.any():
        pairs = ", ".join(
            f"({a:.6g}, {b:.6g})" for a, b in zip(x[bad], y[bad], strict=True)
        )
        return Refusal(what=what, reason="not finite and positive", detail=pairs)
    if len(x) < 3:
        return Refusal(
            what=what, reason="fewer than 3 points", detail=f"{len(x)} given"
        )
    u, v = np.log(x), np.log(y)
    centre = u.mean()
    spread = float(np.sum((u - centre) ** 2))
    if spread < 1e-12:
        return Refusal(
            what=what, reason="no spread in x", detail=f"all near {x[0]:.6g}"
        )
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
    return PowerLaw(
        x_name=x_name,
        y_name=y_name,
        coef=float(np.exp(log_coef)),
        exponent=exponent,
        coef_interval=Interval(
            low=float(np.exp(log_coef - half_coef)),
            high=float(np.exp(log_coef + half_coef)),
            level=confidence,
        ),
        exponent_interval=Interval(
            low=exponent - half, high=exponent + half, level=confidence
        ),
        points=len(x),
        x_min=float(x.min()),
        x_max=float(x.max()),
        rmse_log=s,
        band=tuple(
            (float(g), float(np.exp(m - w)), float(np.exp(m + w)))
            for g, m, w in zip(grid, middle, width, strict=True)
        ),
    )


def _surface_start(u: np.ndarray, w: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Variable projection on a grid: for given exponents E, A, B are linear and >= 0.

    Returns the best (E, A, B, alpha, beta); u and w are centred ln N and ln D.
    """
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


def _surface_fit(
    u: np.ndarray,
    w: np.ndarray,
    loss: np.ndarray,
    start: np.ndarray,
    huber: float | None,
):
    """Local refinement of (E, A, B, alpha, beta); scipy's result, residuals summed."""

    def parts(p):
        n_term, d_term = np.exp(-p[3] * u), np.exp(-p[4] * w)
        return n_term, d_term, p[0] + p[1] * n_term + p[2] * d_term

    def residual(p):
        model = parts(p)[2]
        if huber is None:
            return model - loss
        return np.log(np.maximum(model, 1e-300)) - np.log(loss)

    def jacobian(p):
        a, b, model = parts(p)
        j = np.stack([np.ones_like(a), a, b, -p[1] * u * a, -p[2] * w * b], axis=1)
        return j if huber is None else j / np.maximum(model, 1e-300)[:, None]

    tolerances = {"xtol": 1e-14, "ftol": 1e-14, "max_nfev": 500}
    with np.errstate(over="ignore", invalid="ignore"):
        if huber is None:
            return scipy.optimize.least_squares(
                residual, start, jacobian, method="lm", gtol=1e-14, **tolerances
            )
        return scipy.optimize.least_squares(
            residual,
            start,
            jacobian,
            loss="huber",
            f_scale=huber,
            x_scale=np.maximum(np.abs(start), 1e-8),
            gtol=None,
            **tolerances,
        )


def _surface_sound(p: np.ndarray) -> str:
    """Empty, or why these constants are no surface of the wanted form."""
    low, high = EXPONENT_BOUNDS
    for name, value in (("alpha", p[3]), ("beta", p[4])):
        if not low < value < high:
            return f"{name} = {value:.4g} is at or beyond the bounds {low} to {high}"
    for name, value in (("E", p[0]), ("the N term", p[1]), ("the D term", p[2])):
        if not value > 0:
            return f"{name} is not positive ({value:.4g})"
    return ""


def surface(
    n,
    d,
    loss,
    *,
    huber: float | None = None,
    confidence: float = 0.9,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Parametric | Refusal:
    """Fits L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3).

    A grid of exponents with non-negative linear least squares for E, A and B (variable
    projection) gives the start; Levenberg-Marquardt on all five refines it. The
    objective is a sum over points, never a mean, and stops by relative tolerances:
    averaged Huber losses stopped L-BFGS early in the original (arXiv 2404.10102).

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
    what = "parametric surface E + A/N^alpha + B/D^beta"

    def refuse(reason: str, detail: str) -> Refusal:
        return Refusal(what=what, reason=reason, detail=detail)

    positive = (n > 0) & (d > 0) & ((loss > 0) | (huber is None))
    bad = ~(np.isfinite(n) & np.isfinite(d) & np.isfinite(loss) & positive)
    if bad.any():
        return refuse("not finite and positive", f"{bad.sum()} of {len(n)} points")
    sizes, datas = len(np.unique(n)), len(np.unique(d))
    if len(n) < 6 or sizes < 3 or datas < 3:
        return refuse(
            "too few points",
            f"{len(n)} points, {sizes} sizes, {datas} token counts; "
            "at least 6, 3 and 3 are needed",
        )
    log_n, log_d = np.log(n), np.log(d)
    u, w = log_n - log_n.mean(), log_d - log_d.mean()
    correlation = float(u @ w / math.sqrt((u @ u) * (w @ w)))
    if abs(correlation) > 0.999:
        return refuse(
            "N and D are collinear",
            f"correlation of ln N and ln D {correlation:.5f}: more than one budget "
            "is needed",
        )
    start = _surface_start(u, w, loss)
    if not (start[:3] > 0).all():
        return refuse("not identified", "best fit has " + _surface_sound(start))
    result = _surface_fit(u, w, loss, start, huber)
    if result.status <= 0:
        return refuse("no convergence", f"{result.message} ({result.nfev} evaluations)")
    p = result.x
    if _surface_sound(p):
        return refuse("not identified", _surface_sound(p))

    dof = len(n) - 5
    model = p[0] + p[1] * np.exp(-p[3] * u) + p[2] * np.exp(-p[4] * w)
    residuals = loss - model if huber is None else np.log(loss) - np.log(model)
    leverage = np.sum(np.linalg.qr(result.jac)[0] ** 2, axis=1)
    if huber is not None:  # scipy scales the Jacobian by the weights
        leverage = np.full(len(n), 5 / len(n))
    pool = exchangeable(residuals, leverage, dof)
    rng = np.random.default_rng([seed, 5])
    draws = min(bootstrap, SURFACE_DRAWS)
    fits = np.full((draws, 5), np.nan)
    for k in range(draws):
        noise = rng.choice(pool, len(n)) * math.sqrt(dof / rng.chisquare(dof))
        drawn = model + noise if huber is None else model * np.exp(noise)
        redo = _surface_fit(u, w, drawn, p, huber)
        if redo.status > 0 and not _surface_sound(redo.x):
            fits[k] = redo.x
    failed = float(np.mean(np.isnan(fits[:, 0])))
    if failed > MAX_FAILED_DRAWS:
        return refuse(
            "not identified", f"{failed:.0%} of {draws} bootstrap draws have no surface"
        )
    fits = fits[~np.isnan(fits[:, 0])]

    def constants(q):
        a = q[..., 1] * np.exp(q[..., 3] * log_n.mean())
        b = q[..., 2] * np.exp(q[..., 4] * log_d.mean())
        alpha, beta = q[..., 3], q[..., 4]
        return {
            "E": q[..., 0],
            "A": a,
            "B": b,
            "alpha": alpha,
            "beta": beta,
            "n_opt_exponent": beta / (alpha + beta),
        }

    intervals = {k: percentiles(v, confidence) for k, v in constants(fits).items()}
    for name in ("alpha", "beta"):
        i = intervals[name]
        if i.high > MAX_EXPONENT_RATIO * i.low:
            return refuse(
                "not identified", f"{name} lies in {i.low:.3g} to {i.high:.3g}"
            )
    return Parametric(
        **{k: float(v) for k, v in constants(p).items()},
        intervals=intervals,
        points=len(n),
        rmse=math.sqrt(float(np.sum((loss - model) ** 2)) / dof),
        huber_delta=huber,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedLaw:
    """A law as printed in a paper, called in FLOPs, parameters and tokens.

    `form` is "power", y = coef (C / input_scale)^exponent + offset, times
    output_scale; or "surface", E + A / N^alpha + B / D^beta. A constant that was never
    published, or whose unit is not known, is None and the law cannot be called.
    """

    key: str
    source: str
    quantity: str
    model: str
    form: str
    constants: Mapping[str, float | None]
    input_unit: str  # of the printed law
    output_unit: str
    input_scale: float | None  # printed unit of the input in FLOPs
    output_scale: float | None
    domain: tuple[float, float] | None  # FLOPs over which it was fitted
    reliability: str  # "paper" | "quoted" | "digest": how its numbers were obtained
    note: str

    def __call__(self, *inputs: float) -> float:
        """y(C) for a power law, L(N, D) for a surface.

        Raises:
          ValueError: a constant or unit is not known.
        """
        unknown = [k for k, v in self.constants.items() if v is None]
        if unknown or self.input_scale is None or self.output_scale is None:
            raise ValueError(
                f"{self.key} cannot be evaluated: "
                f"{', '.join(unknown) or 'its unit'} not known. {self.note}"
            )
        c = self.constants
        if self.form == "surface":
            n, d = inputs
            return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]
        (flops,) = inputs
        y = c["coef"] * (flops / self.input_scale) ** c["exponent"]
        return (y + c.get("offset", 0.0)) * self.output_scale


@functools.cache
def published() -> Mapping[str, PublishedLaw]:
    """Published laws by key, from `published.json` beside this file."""
    text = (
        importlib.resources.files("scaling_ldm.laws")
        .joinpath("published.json")
        .read_text(encoding="utf-8")
    )
    laws = {}
    for row in json.loads(text)["laws"]:
        domain = row.pop("domain")
        law = PublishedLaw(domain=tuple(domain) if domain else None, **row)
        laws[law.key] = law
    return laws
