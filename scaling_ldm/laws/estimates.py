"""The answers of all estimators of the minima, side by side, and their disagreement.

The same drawn noise goes through every estimator. So the difference of two exponents
has an interval of its own, which is narrower than either: what the runs have in common
cancels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from scaling_ldm.laws import curve_models, law_of_minima
from scaling_ldm.laws.checked_laws import MAX_OUTSIDE
from scaling_ldm.laws.estimators import ESTIMATORS, OfBudget, least, windowed_parabola
from scaling_ldm.laws.forms import MAX_FAILED_DRAWS, percentiles
from scaling_ldm.laws.isoflop_curve import IsoflopCurve, outside
from scaling_ldm.laws.law_of_minima import MIN_BUDGETS
from scaling_ldm.laws.minima import Minima, redraw_rng, redrawn
from scaling_ldm.laws.surface import refuse
from scaling_ldm.records import (
    HeldOut,
    Interval,
    MinimaEstimate,
    OffsetLaw,
    Parametric,
    PowerLaw,
    Refusal,
)

WINDOWS = 8.0, 4.0  # factors in N around the least loss, of further parabolas
LEAST = "least measured loss"
LACK = 0.01  # p below which runs are on no surface
APART = 0.02  # exponents that differ by less agree


def estimates(
    curves: Sequence[IsoflopCurve | Refusal],
    minima: Minima,
    surface: Parametric | Refusal,
    level: float,
    seed: int,
    *,
    law: PowerLaw | OffsetLaw | Refusal,
    held_out: Sequence[HeldOut | Refusal],
) -> tuple[tuple[MinimaEstimate, ...], float | None, list[str]]:
    """The table, the disagreement index, and a note if estimators disagree.

    The index is the largest distance of an exponent of N_opt from that of the minima
    that the laws use, over half of the interval of their difference: above 1, an
    estimator disagrees. The intervals of m differences are at 1 - (1 - level) / m each
    (Bonferroni).

    Args:
      curves: one for each budget.
      minima: of the curves, by the estimator that the laws use.
      surface: through all runs, for its exponent.
      level: of the intervals.
      seed: of the draws.
      law: of N_opt through these minima. Where it is refused, no row has an exponent,
        but for the surface. Nor has an estimator that loses too many budgets.
      held_out: the predictions of the largest budget; none: no row has one.

    Returns:
      The rows, that of the laws first; None for the index: there is no other exponent.
    """
    if minima.chosen is None:
        return (), None, []
    good = [c for c in curves if isinstance(c, IsoflopCurve)]
    every = {minima.chosen.name: minima}
    for name, of_budget in {**ESTIMATORS, **_windows(good)}.items():
        found = (
            _of_estimator(of_budget, minima, good, seed) if name not in every else None
        )
        if found is not None and len(found.budgets):
            every[name] = found
    strict = 1 - (1 - level) / max(len(every) - 1 + isinstance(surface, Parametric), 1)
    rows = [_row(name, found, level, seed) for name, found in every.items()]
    rows = rows[:1] + [
        dataclasses.replace(row, **_difference(found, minima, strict))
        for row, found in zip(rows[1:], list(every.values())[1:], strict=True)
    ]
    if (measured := _of_estimator(least, minima, good, seed)) is not None:
        rows.append(_without_interval(_row(LEAST, measured, level, seed)))
    enough = (1 - MAX_OUTSIDE) * len(good)
    lost = isinstance(law, Refusal)
    rows = [_without_law(r) if lost or len(r.minima) < enough else r for r in rows]
    if isinstance(law, PowerLaw):
        rows[0] = dataclasses.replace(rows[0], exponent_interval=law.exponent_interval)
    own = [h for h in held_out if isinstance(h, HeldOut) and h.quantity == "N_opt"]
    rows[0] = dataclasses.replace(rows[0], held_out=own[0] if own else None)
    if not held_out:
        rows = [dataclasses.replace(row, held_out=None) for row in rows]
    if isinstance(surface, Parametric):
        rows.append(_of_surface(surface, good, rows[0]))
    return tuple(rows), *_disagreement(rows)


def _windows(curves: Sequence[IsoflopCurve]) -> dict[str, OfBudget]:
    """Parabolas through fewer runs, where a window leaves some out."""
    found = {}
    for factor in WINDOWS:
        if any(np.ptp(c.x) > 2 * math.log(factor) for c in curves):
            found[f"parabola, window {factor:g}"] = windowed_parabola(factor)
    return found


def _of_estimator(
    of_budget: OfBudget | None,
    minima: Minima,
    curves: Sequence[IsoflopCurve],
    seed: int,
) -> Minima | None:
    """The minima of an estimator, from the noise that was drawn already.

    A budget without a minimum inside its grid in nearly all draws is left out.
    """
    chosen, noise = minima.chosen, minima.noise
    assert chosen is not None  # there are curves
    if of_budget is None:
        model = curve_models.shapes(curves)
        if model is None:
            return None
        centre = model.vertices
        drawn = model.redraw(noise, redraw_rng([seed, 1]))
    else:
        centre = np.array([of_budget(c, c.y[None])[0] for c in curves])
        drawn = redrawn(of_budget, curves, chosen.model, noise)
    kept = np.array(
        [
            outside(c, centre[i, 0]) is None
            and np.mean(np.isfinite(drawn[:, i, 0])) >= 1 - MAX_FAILED_DRAWS
            for i, c in enumerate(curves)
        ]
    )
    return dataclasses.replace(
        minima,
        parabolas=[],
        budgets=np.array([c.budget for c in curves])[kept],
        centre=centre[kept],
        draws=drawn[:, kept],
    )


def _row(name: str, minima: Minima, level: float, seed: int) -> MinimaEstimate:
    """What one estimator says, without a comparison."""
    law = law_of_minima.fit_law(minima, 0, level, 1.0, [seed, 6]).law
    assert minima.chosen is not None  # there are curves
    fitted = isinstance(law, PowerLaw)
    largest = len(minima.budgets) - 1
    return MinimaEstimate(
        estimator=name,
        minima=tuple(
            (float(c), math.exp(v[0]), float(v[2]))
            for c, v in zip(minima.budgets, minima.centre, strict=True)
        ),
        exponent=law.exponent if fitted else None,
        exponent_interval=law.exponent_interval if fitted else None,
        run_error=minima.chosen.errors.get(name),
        left_out_error=_left_out(minima),
        held_out=_held_out(minima, level, seed) if largest >= MIN_BUDGETS else None,
    )


def _without_law(row: MinimaEstimate) -> MinimaEstimate:
    return dataclasses.replace(
        row,
        exponent=None,
        exponent_interval=None,
        held_out=None,
        left_out_error=None,
        difference=None,
        difference_interval=None,
    )


def _without_interval(row: MinimaEstimate) -> MinimaEstimate:
    """Sizes of a grid jump where others move: no draws of noise show their error."""
    return dataclasses.replace(row, exponent_interval=None, held_out=None)


def _left_out(minima: Minima) -> float | None:
    """The rms of ln(predicted / measured N_opt), budgets left out in turn."""
    if len(minima.budgets) <= MIN_BUDGETS:
        return None
    errors = law_of_minima.left_out(minima)[:, 0] - minima.centre[:, 0]
    return float(np.sqrt(np.mean(errors**2)))


def _held_out(minima: Minima, level: float, seed: int) -> HeldOut | None:
    """N_opt of the largest budget, from the law of the smaller ones."""
    smaller = dataclasses.replace(
        minima,
        budgets=minima.budgets[:-1],
        centre=minima.centre[:-1],
        draws=minima.draws[:, :-1],
    )
    fitted = law_of_minima.fit_law(smaller, 0, level, 1.0, [seed, 8])
    if fitted.predict is None:
        return None
    value = float(minima.centre[-1, 0])
    noise = np.nan_to_num(minima.draws[:, -1, 0] - value)
    at = np.array([minima.budgets[-1]])
    (said,), (low,), (high,) = fitted.predict(at, noise)
    return HeldOut(
        quantity="N_opt",
        budget_flops=float(minima.budgets[-1]),
        predicted=float(said),
        predicted_interval=Interval(low=float(low), high=float(high), level=level),
        measured=math.exp(value),
        relative_error=float(said) / math.exp(value) - 1,
    )


def _difference(other: Minima, minima: Minima, level: float) -> dict[str, Any]:
    """The other exponent minus that of the minima, and its interval.

    It is that over the budgets which both have.
    """
    common = np.intersect1d(other.budgets, minima.budgets)
    if len(common) < MIN_BUDGETS:
        return {}
    u = np.log(common)
    solve = (u - u.mean()) / np.sum((u - u.mean()) ** 2)
    one, two = (np.isin(m.budgets, common) for m in (other, minima))
    found = float((other.centre[one, 0] - minima.centre[two, 0]) @ solve)
    errors = other.draws[:, one, 0] - other.centre[one, 0]
    errors = (errors - minima.draws[:, two, 0] + minima.centre[two, 0]) @ solve
    ends = percentiles(errors - np.nanmedian(errors), level)
    return {
        "difference": found,
        "difference_interval": Interval(
            low=found + ends.low, high=found + ends.high, level=level
        ),
    }


def lack_of_fit(
    surface: Parametric | Refusal,
    curves: Sequence[IsoflopCurve | Refusal],
    minima: Minima,
) -> Refusal | None:
    """A refusal if runs lie further off the surface than off their budgets' curves.

    An F-test of the two sums of squares, at 1%. Minima that scatter about their law are
    on no surface, and its intervals know nothing of that. Budgets that have no curve
    leave the test out.
    """
    good = [c for c in curves if isinstance(c, IsoflopCurve)]
    if isinstance(surface, Refusal) or minima.chosen is None or len(good) < len(curves):
        return None
    model, of_all = minima.chosen.model, surface.points - 5
    inner, dof = float(model.squares.sum()), float(model.dof.sum())
    outer = surface.rmse**2 * of_all
    floor = (1e-9 * max(float(np.abs(c.y).max()) for c in good)) ** 2 * of_all
    more = of_all - dof
    if more <= 0 or outer <= floor or surface.points != sum(len(c.x) for c in good):
        return None
    ratio = max(outer - inner, 0.0) / more / max(inner / dof, 1e-300)
    p = float(scipy.stats.f.sf(ratio, more, dof))
    if p >= LACK:
        return None
    detail = (
        f"rms residual {surface.rmse:.3g}, {math.sqrt(inner / dof):.3g} about curves "
    )
    detail += f"of each budget (F test, p = {p:.2g}); n_opt_exponent would be "
    detail += f"{surface.n_opt_exponent:.3f}"
    return refuse("the runs are on no such surface", detail)


def _of_surface(
    surface: Parametric, curves: Sequence[IsoflopCurve], head: MinimaEstimate
) -> MinimaEstimate:
    """The surface's minima at the tokens of each budget's runs, and its exponent.

    Its errors and those of the other exponent count as independent.
    """
    minima = []
    for c in curves:
        x = np.linspace(c.x.min(), c.x.max(), 2001)
        ln_n, ln_d, _ = c.place(x, x).T
        loss = surface.E + surface.A * np.exp(-surface.alpha * ln_n)
        loss += surface.B * np.exp(-surface.beta * ln_d)
        i = int(loss.argmin())
        minima.append((c.budget, math.exp(ln_n[i]), float(loss[i])))
    interval = surface.intervals["n_opt_exponent"]
    row = MinimaEstimate(
        estimator="surface",
        minima=tuple(minima),
        exponent=surface.n_opt_exponent,
        exponent_interval=interval,
        run_error=None,
        left_out_error=None,
        held_out=None,
    )
    if head.exponent is None or head.exponent_interval is None:
        return row
    found = surface.n_opt_exponent - head.exponent
    i = head.exponent_interval
    half = math.hypot(interval.high - interval.low, i.high - i.low) / 2
    apart = Interval(low=found - half, high=found + half, level=i.level)
    return dataclasses.replace(row, difference=found, difference_interval=apart)


def _disagreement(rows: Sequence[MinimaEstimate]) -> tuple[float | None, list[str]]:
    """The index, and a note if it is above 1."""
    index: dict[str, float] = {}
    for row in rows:
        i = row.difference_interval
        if i is not None and row.difference is not None:
            half = max((i.high - i.low) / 2, APART)
            index[row.estimator] = abs(row.difference) / half
    apart = [row for row in rows if index.get(row.estimator, 0.0) > 1]
    worst = max(index.values(), default=None)
    if not apart or rows[0].exponent is None:
        return worst, []
    listed = ", ".join(f"{r.estimator} {r.exponent:.3f}" for r in apart if r.exponent)
    return worst, [
        f"estimators of the minima disagree by more than their noise: the exponent of "
        f"N_opt is {rows[0].exponent:.3f} by {rows[0].estimator}, and {listed}"
    ]
