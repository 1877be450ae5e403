"""The law of the least loss, L = E + A C^-b, beside the pure power law with E = 0.

A loss levels off at E, the part that no compute removes. A pure power law falls to 0:
its predictions of larger budgets are too low, and its interval does not know it.

For a given b, the best E >= 0 and A >= 0 follow from linear least squares of the
relative errors, so only b is searched (variable projection; Golub and Pereyra 1973,
SIAM J. Numer. Anal. 10, 413). The intervals are of a parametric bootstrap: the fitted
law, with the drawn errors of the minima and their scatter, is fitted again. Three
budgets have no scatter about three constants. There the interval of a prediction is the
hull of that of this law and that of the pure one, from the noise of the minima alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from scaling_ldm.laws import forms
from scaling_ldm.laws.law_of_minima import (
    CALM,
    MIN_BUDGETS,
    Fitted,
    Predict,
    excess_scatter,
    noise_variance,
    scatter_note,
    usable_draws,
)
from scaling_ldm.laws.minima import Minima
from scaling_ldm.records import Interval, OffsetLaw, Refusal

LOSS = 2  # the place of L_opt in a minimum
MAX_DECAY = 2.0  # of b; a surface of exponents up to 2 and 2 has b <= 1
_FAR = 30.0  # largest error of a logarithm, far outside any interval
_ROUNDING = 1e-7  # an E below this part of the loss is 0
_LEAST_FALL = 0.002  # b times the span of ln C from which it is searched

Budgets = Float[np.ndarray, "k"]
Places = Float[np.ndarray, "places"]
Draws = Float[np.ndarray, "draws"]
Losses = Float[np.ndarray, "draws k"]


@dataclasses.dataclass(frozen=True)
class Constants:
    """E, A and b of many laws at once; A is at the centre of ln C."""

    E: Draws
    A: Draws
    b: Draws
    squares: Draws  # sums of squares of relative errors

    def __call__(self, u: Places) -> np.ndarray:
        """Losses [draws, places] at ln C minus its centre."""
        return self.E[:, None] + self.A[:, None] * np.exp(-self.b[:, None] * u)


def solve(u: Budgets, losses: Losses, scale: Budgets) -> Constants:
    """The least squares of (E + A e^(-b u) - losses) / scale with E, A >= 0.

    Args:
      u: ln C minus its mean, of three budgets or more.
      losses: of each draw; positive.
      scale: what an error is relative to.
    """
    w = 1 / scale
    y = losses * w
    yy, gy, gg = np.sum(y * y, 1), y @ w, float(w @ w)

    def linear(ff, fg, fy):
        """E and A where f is e^(-b u) / scale and g is 1 / scale."""
        with np.errstate(divide="ignore", invalid="ignore"):
            det = ff * gg - fg * fg
            e, a = (gy * ff - fy * fg) / det, (fy * gg - gy * fg) / det
        pure = ~(e > _ROUNDING * scale.min())  # also where the two are one
        e, a = np.where(pure, 0.0, e), np.where(pure, fy / ff, a)
        flat = a < 0
        return np.where(flat, gy / gg, e), np.where(flat, 0.0, a)

    def at(ln_b):
        f = np.exp(-np.exp(ln_b)[:, None] * u) * w
        e, a = linear(np.sum(f * f, 1), f @ w, np.sum(f * y, 1))
        return e, a, np.sum((y - e[:, None] * w - a[:, None] * f) ** 2, 1)

    grid = _decays(u, 40)
    squares = np.empty((len(grid), len(losses)))
    for row, ln_b in zip(squares, grid, strict=True):
        f = np.exp(-math.exp(ln_b) * u) * w
        ff, fg, fy = float(f @ f), float(f @ w), y @ f
        e, a = linear(ff, fg, fy)
        row[:] = yy + e * e * gg + a * a * ff + 2 * (e * a * fg - e * gy - a * fy)
    best = squares.argmin(0)
    low = grid[np.maximum(best - 1, 0)]
    high = grid[np.minimum(best + 1, len(grid) - 1)]
    part = 1 - (math.sqrt(5) - 1) / 2  # golden section
    left, right = low + part * (high - low), high - part * (high - low)
    of_left, of_right = at(left)[2], at(right)[2]
    for _ in range(40 if len(losses) == 1 else 14):  # to 1e-8, and to 1e-3 of ln b
        lower = of_left < of_right
        low, high = np.where(lower, low, left), np.where(lower, right, high)
        kept, of_kept = np.where(lower, left, right), np.minimum(of_left, of_right)
        step = part * (high - low)
        new = np.where(lower, low + step, high - step)
        of_new = at(new)[2]
        left, right = np.where(lower, new, kept), np.where(lower, kept, new)
        of_left = np.where(lower, of_new, of_kept)
        of_right = np.where(lower, of_kept, of_new)
    ln_b = (low + high) / 2
    e, a, squares = at(ln_b)
    return Constants(e, a, np.exp(ln_b), squares)


def _decays(u: Budgets, number: int) -> np.ndarray:
    """The ln b that are searched."""
    return np.linspace(math.log(_LEAST_FALL / np.ptp(u)), math.log(MAX_DECAY), number)


@dataclasses.dataclass(frozen=True)
class LossLaws:
    """Both forms, and the one that is the law of L_opt."""

    pure: Fitted
    offset: Fitted
    chosen: Fitted  # constants of one form; intervals and predictions of the offset law
    left_out: np.ndarray | None  # [k, 2], as of left_out_losses

    errors: tuple[float | None, float | None] = (None, None)  # rms of both forms there


def fit_loss(
    minima: Minima, pure: Fitted, level: float, extend: float, seed: Sequence[int]
) -> LossLaws:
    """The offset law of L_opt, and which form is the better one.

    The pure law is the better one where its error over budgets that are left out in
    turn is not larger, and the interval of E contains 0. The offset law contains it, so
    the intervals are those of the offset law also then.

    Args:
      pure: the power law of the same minima.
    """
    offset = _fit_offset(minima, pure, level, extend, seed)
    left_out = left_out_losses(minima)
    errors: tuple[float | None, float | None] = (None, None)
    if left_out is not None:
        ratio = left_out / minima.centre[:, LOSS, None]
        of_pure, of_offset = map(float, np.sqrt(np.mean((ratio - 1) ** 2, 0)))
        errors = of_pure, of_offset
    chosen, law, line = offset, offset.law, pure.law
    if isinstance(law, OffsetLaw) and not isinstance(line, Refusal):
        of_pure, of_offset = errors
        better = of_pure is not None and of_offset is not None and of_pure <= of_offset
        if better and not law.bends:
            c, e, middle = line.coef, line.exponent, line.middle_coef
            around = law.middle_coef_interval
            assert middle is not None
            assert around is not None
            of_pure_form = dataclasses.replace(
                law,
                offset=0.0,
                coef=c,
                exponent=e,
                coef_interval=_hull(law.coef_interval, c, c),
                exponent_interval=_hull(law.exponent_interval, e, e),
                middle_coef=middle,
                middle_coef_interval=_hull(around, middle, middle),
                rmse_log=line.rmse_log,
            )
            chosen = dataclasses.replace(
                offset, law=of_pure_form, predict=_around(of_pure_form, offset.predict)
            )
    return LossLaws(pure, offset, chosen, left_out, errors)


def left_out_losses(minima: Minima) -> np.ndarray | None:
    """The least losses by the pure and by the offset law of all other budgets: [k, 2].

    None: fewer than four budgets, or losses that are not positive.
    """
    losses, u = minima.centre[:, LOSS], np.log(minima.budgets)
    if len(u) <= MIN_BUDGETS or not (losses > 0).all():
        return None
    found = []
    for left_out in range(len(u)):
        rest = np.arange(len(u)) != left_out
        centre = u[rest].mean()
        at = u[left_out] - centre
        line = np.polyfit(u[rest] - centre, np.log(losses[rest]), 1)
        of = solve(u[rest] - centre, losses[None, rest], losses[rest])
        found.append([math.exp(np.polyval(line, at)), of(np.array([at]))[0, 0]])
    return np.array(found)


def _fit_offset(
    minima: Minima, pure: Fitted, level: float, extend: float, seed: Sequence[int]
) -> Fitted:
    """The offset law with its intervals, or a refusal."""
    if isinstance(pure.law, Refusal):
        return Fitted(pure.law)
    noise, usable, refusal = usable_draws(minima, LOSS)
    if refusal:
        return Fitted(refusal)
    budgets, losses = minima.budgets, minima.centre[:, LOSS]
    centre = float(np.mean(np.log(budgets)))
    u, dof = np.log(budgets) - centre, len(budgets) - 3
    central = solve(u, losses[None], losses)
    if not central.A[0] > 0:
        low, high = losses[[0, -1]]
        detail = f"{low:.6g} at {budgets[0]:.6g}, {high:.6g} at {budgets[-1]:.6g} FLOPs"
        reason = "loss does not fall with the budget"
        return Fitted(Refusal(quantity="L_opt", reason=reason, detail=detail))
    rng = np.random.default_rng(seed)
    fitted, scatter = central(u)[0], np.zeros(len(noise))
    fits = solve(u, fitted * _factors(noise), losses)
    notes: tuple[str, ...] = ()
    if dof:
        variance = noise_variance(noise)
        squares = float(central.squares[0])
        scatter = excess_scatter(squares, dof, fits.squares, variance, rng)
        notes = scatter_note("L_opt", squares, dof, fits.squares, variance)
    moved = scatter[:, None] * rng.standard_normal((len(noise), len(u) + 1))
    if scatter.any():
        fits = solve(u, fitted * _factors(noise + moved[:, :-1]), losses)
    design = np.stack([np.ones_like(u), u], axis=1)
    lines = (np.log(losses) + noise) @ np.linalg.pinv(design).T  # the pure law
    fresh = noise[np.arange(len(noise)), rng.integers(len(u), size=len(noise))]

    def predict(x, own=None):
        new = moved[:, -1] - (fresh if own is None else own[usable])
        at = np.log(x) - centre
        drawn = fits(at) * _factors(new)[:, None]
        low, high = forms.central(drawn, level)
        if not dof:
            steps = np.stack([np.ones(len(at)), at])
            line = np.exp(lines @ steps + new[:, None])
            pure_low, pure_high = forms.central(line, level)
            low, high = np.minimum(low, pure_low), np.maximum(high, pure_high)
        return central(at)[0], low, high

    offset = _profile(budgets, losses, central, noise, level)
    exponent = forms.percentiles(-fits.b, level)
    with np.errstate(over="ignore"):
        coef = forms.percentiles(fits.A * np.exp(fits.b * centre), level)
        middle = forms.percentiles(fits.A, level)
    if not dof:
        offset, line = _hull(offset, 0.0, 0.0), pure.law
        i, j, k = line.exponent_interval, line.coef_interval, line.middle_coef_interval
        assert k is not None
        exponent, coef = _hull(exponent, i.low, i.high), _hull(coef, j.low, j.high)
        middle = _hull(middle, k.low, k.high)
    grid = forms.band_grid(budgets, extend)
    law = OffsetLaw(
        x_name="budget_flops",
        y_name="L_opt",
        offset=float(central.E[0]),
        coef=float(central.A[0] * math.exp(central.b[0] * centre)),
        exponent=-float(central.b[0]),
        offset_interval=offset,
        coef_interval=coef,
        exponent_interval=exponent,
        points=len(budgets),
        x_min=float(budgets.min()),
        x_max=float(budgets.max()),
        rmse_log=math.sqrt(float(central.squares[0]) / max(dof, 1)),
        band=forms.band(grid, *predict(grid)[1:]),
        middle=math.exp(centre),
        middle_coef=float(central.A[0]),
        middle_coef_interval=middle,
    )
    return Fitted(law, predict, notes)


def _profile(
    budgets: Budgets, losses: Budgets, central: Constants, noise: Losses, level: float
) -> Interval:
    """The offsets that the losses do not refute: a profile-likelihood interval.

    For each E the best A and b are sought; E is refuted where the squares in standard
    deviations of the noise rise above the best by more than chi2 with one degree of
    freedom. Where the best squares themselves are more than noise gives, they set the
    scale instead, and the limit is that of F. The interval holds the fitted E. It
    begins at 0, and ends at the least loss, where the profile is flat.

    Args:
      losses: at the budgets.
      noise: drawn relative errors of the losses, [draws, k].
    """
    u, dof = np.log(budgets) - np.mean(np.log(budgets)), len(budgets) - 3
    spread = np.cov(noise.T) + np.eye(len(u)) * _ROUNDING**2
    white = np.linalg.inv(np.linalg.cholesky(spread))
    flat = white @ (1 / losses)

    def squares(E):
        """The least squares of each E, over A and ever finer grids of b."""
        grid = np.broadcast_to(_decays(u, 100), (len(E), 100))
        step = grid[0, 1] - grid[0, 0]
        rest = (white @ np.ones(len(u)) - E[:, None] * flat)[:, None]  # [E, 1, k]
        for again in (True, True, False):
            falling = np.exp(-np.exp(grid)[:, :, None] * u) / losses @ white.T
            A = np.sum(falling * rest, -1) / np.sum(falling**2, -1)
            found = np.sum((rest - np.maximum(A, 0)[..., None] * falling) ** 2, -1)
            if again:
                best = np.take_along_axis(grid, found.argmin(1)[:, None], 1)
                grid = best + step * np.linspace(-1, 1, 41)
                step /= 20
        return _lowest(found)

    top, fitted = float(losses.min()), float(central.E[0])
    every = np.sort(np.append(np.linspace(0, top, 200, endpoint=False), fitted))
    best = every[squares(every).argmin()]
    width = top / 100
    for _ in range(3):  # finer around the best
        near = np.clip(np.linspace(best - width, best + width, 101), 0, top)
        best, width = near[squares(near).argmin()], width / 25
    least = float(squares(np.array([best]))[0])
    limit = float(scipy.stats.chi2.ppf(level, 1))
    if dof and least > scipy.stats.chi2.ppf(CALM[min(dof, len(CALM)) - 1], dof):
        limit = least / dof * float(scipy.stats.f.ppf(level, 1, dof))
    inside = squares(every) <= least + limit
    held = np.append(every[inside], best)
    # Each end lies between one that is held and one that is refuted, if there is one.
    held = np.array([held.min(), held.max()])
    out = np.array([0.0, top])
    if (below := every[every < held[0]]).size:
        out[0] = below.max()
    if (above := every[every > held[1]]).size:
        out[1] = above.min()
    for _ in range(40):
        middle = (held + out) / 2
        near = squares(middle) <= least + limit
        held, out = np.where(near, middle, held), np.where(near, out, middle)
    low, high = (float(e) for e in held)
    if high > top * (1 - 1e-3):
        high = top
    return Interval(low=min(low, fitted), high=max(high, fitted), level=level)


def _lowest(values: np.ndarray) -> np.ndarray:
    """The minimum of each row, by a parabola through the least and its neighbours."""
    i, row = np.clip(values.argmin(1), 1, values.shape[1] - 2), np.arange(len(values))
    low, middle, high = (values[row, i + d] for d in (-1, 0, 1))
    bend = low - 2 * middle + high
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(bend > 0, middle - (high - low) ** 2 / (8 * bend), middle)
    return np.maximum(np.minimum(found, values.min(1)), 0)


def _factors(errors: np.ndarray) -> np.ndarray:
    """e^errors, limited: with one degree of freedom a drawn scatter may be any."""
    return np.exp(np.clip(errors, -_FAR, _FAR))


def _hull(i: Interval, low: float, high: float) -> Interval:
    return Interval(low=min(i.low, low), high=max(i.high, high), level=i.level)


def _around(law: OffsetLaw, predict: Predict | None) -> Predict | None:
    """The predictions of another law of the same family, with its own values."""
    if predict is None:
        return None

    def values(x, own=None):
        _, low, high = predict(x, own)
        return np.array([law(float(c)) for c in x]), low, high

    return values
