"""IsoFLOP minima: where the loss of each budget is least, and the bootstrap of that.

The curves are parabolas in ln N (Chinchilla approach 2; Liang et al. 2024, arXiv
2410.08184), or of one shape that all budgets share (`shared_shape`), or those of
another estimator. `auto` takes the parabola or the shape: the one whose errors are
smaller at runs that are left out in turn. The shape contains the parabola, so the
intervals of `auto` are those of the shape whichever of the two it is.

Uncertainty is a residual bootstrap (`curve_noise`): each draw of the noise gives a
vertex of each budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from scaling_ldm.laws import curve_models, curve_noise, forms
from scaling_ldm.laws.curve_models import CurveModel, Noise
from scaling_ldm.laws.estimators import AUTO, ESTIMATORS, OfBudget
from scaling_ldm.laws.isoflop_curve import MINIMUM, IsoflopCurve, outside
from scaling_ldm.records import Interval, Parabola, Refusal

_FEW_LOST = 0.01  # part of the draws without a minimum that needs no note

Budgets = Float[np.ndarray, "k"]
Vertices = Float[np.ndarray, "k 3"]
DrawnVertices = Float[np.ndarray, "draws k 3"]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The estimator of the minima, and the model that their noise is drawn from."""

    name: str
    vertices: Vertices
    curvature: Budgets
    exponents: tuple[float, float] | None
    model: CurveModel
    of_budget: OfBudget | None  # None: the model's own vertices
    errors: Mapping[str, float]  # of runs left out, by name of a model

    def redraw(
        self, curves: Sequence[IsoflopCurve], noise: Noise, rng: np.random.Generator
    ) -> DrawnVertices:
        """The vertices of drawn noise."""
        if self.of_budget is None:
            return self.model.redraw(noise, rng)
        return redrawn(self.of_budget, curves, self.model, noise)


def redrawn(
    of_budget: OfBudget,
    curves: Sequence[IsoflopCurve],
    model: CurveModel,
    noise: Noise,
) -> DrawnVertices:
    """The vertices of an estimator, with its errors where a model is the truth."""
    found = []
    for c, fitted, part in zip(curves, model.fitted, noise, strict=True):
        errors = of_budget(c, fitted + part) - of_budget(c, fitted[None])
        found.append(of_budget(c, c.y[None]) + errors)
    return np.stack(found, 1)


def redraw_rng(seed: Sequence[int]) -> np.random.Generator:
    """Of what is drawn beside the noise: equal for all fits of one study."""
    return np.random.default_rng([*seed, 0])


def choose(curves: Sequence[IsoflopCurve], estimator: str = AUTO) -> Chosen | str:
    """The estimator by its name, or why these curves have none.

    Raises:
      ValueError: an unknown name.
    """
    if estimator not in (AUTO, *ESTIMATORS):
        known = ", ".join((AUTO, *ESTIMATORS))
        raise ValueError(f"estimator must be one of {known}, given {estimator!r}")
    parabola = curve_models.parabolas(curves)
    shape = None if estimator == "parabola" else curve_models.shapes(curves)
    errors, better = {}, parabola
    if shape is not None:
        parabola = dataclasses.replace(parabola, weights=shape.weights)
        errors = {m.name: m.left_out_error(curves) for m in (parabola, shape)}
        if errors["shape"] < errors["parabola"] * (1 - 1e-6):
            better = shape
    elif estimator == "shape":
        return "too few runs for a shared shape"
    if estimator in ("parabola", "shape", AUTO):
        head = {"parabola": parabola, "shape": shape}.get(estimator, better)
        assert head is not None  # without a shape, "shape" has returned
        return Chosen(
            name=head.name,
            vertices=head.vertices,
            curvature=head.curvature,
            exponents=head.exponents,
            model=shape if estimator == AUTO and shape is not None else head,
            of_budget=None,
            errors=errors,
        )
    of_budget = ESTIMATORS[estimator]
    assert of_budget is not None  # of the two that are models
    return Chosen(
        name=estimator,
        vertices=np.array([of_budget(c, c.y[None])[0] for c in curves]),
        curvature=parabola.curvature,
        exponents=None,
        model=better,
        of_budget=of_budget,
        errors=errors,
    )


@dataclasses.dataclass(frozen=True)
class Minima:
    """The minima of all budgets; `k` of them have one."""

    parabolas: list[Parabola | Refusal]  # one for each budget, ascending
    budgets: Budgets  # those with a minimum
    centre: Vertices  # (ln N, ln D, loss)
    draws: DrawnVertices
    losses: tuple[float, float]  # least and largest loss of the runs of these budgets
    notes: list[str]
    chosen: Chosen | None = None  # None: no budget has a curve
    noise: Noise = ()  # drawn for the runs of each curve, [draws, points]


def find_minima(
    curves: Sequence[IsoflopCurve | Refusal],
    draws: int,
    level: float,
    seed: Sequence[int],
    estimator: str = AUTO,
    noise: Noise | None = None,
) -> Minima:
    """The minimum of each curve, with the bootstrap of all vertices.

    Args:
      curves: one per budget, ascending; refusals are handed on.
      draws: of the bootstrap.
      level: of the intervals.
      seed: of the draws.
      estimator: "auto", or a name of `estimators.ESTIMATORS`.
      noise: drawn already for the runs of each curve; None: it is drawn.
    """
    good = [c for c in curves if isinstance(c, IsoflopCurve)]
    chosen = choose(good, estimator) if good else ""
    if isinstance(chosen, Chosen):
        notes: list[str] = []
        if noise is None:
            rng = np.random.default_rng(seed)
            noise, notes = curve_noise.draw(good, chosen.model, draws, rng)
        drawn = chosen.redraw(good, noise, redraw_rng(seed))
        notes += curve_noise.far_runs(good, chosen.model)
    else:
        refused: list[Parabola | Refusal] = [
            c if isinstance(c, Refusal) else _refuse(c, chosen, "") for c in curves
        ]
        nothing = np.empty((draws, 0, 3))
        return Minima(refused, np.empty(0), nothing[0], nothing, (0.0, 0.0), [])
    results = [_minimum(c, i, chosen, drawn[:, i], level) for i, c in enumerate(good)]
    found = [isinstance(r, Parabola) for r in results]
    for c, vertices, there in zip(good, drawn.swapaxes(0, 1), found, strict=True):
        lost = int(np.isnan(vertices[:, 0]).sum())
        if lost > _FEW_LOST * draws and there:
            notes.append(
                f"at {c.budget:.6g} FLOPs {lost} of {draws} bootstrap draws have no "
                "minimum; intervals and laws leave them out"
            )
    kept = [c for c, there in zip(good, found, strict=True) if there]
    fitted = [
        (c, r.n_opt_interval)
        for c, r in zip(good, results, strict=True)
        if isinstance(r, Parabola)
    ]
    if chosen.name == "parabola" and chosen.model.name == "parabola":
        notes += _lopsided_note(fitted)
    losses = np.concatenate([c.y for c in kept]) if kept else np.zeros(1)
    by_budget = {c.budget: r for c, r in zip(good, results, strict=True)}
    return Minima(
        parabolas=[
            c if isinstance(c, Refusal) else by_budget[c.budget] for c in curves
        ],
        budgets=np.array([c.budget for c in kept]),
        centre=chosen.vertices[found],
        draws=drawn[:, found],
        losses=(float(losses.min()), float(losses.max())),
        notes=notes,
        chosen=chosen,
        noise=noise,
    )


def _refuse(curve: IsoflopCurve, reason: str, detail: str) -> Refusal:
    return Refusal(
        quantity=MINIMUM, budget_flops=curve.budget, reason=reason, detail=detail
    )


def _minimum(
    curve: IsoflopCurve, i: int, chosen: Chosen, drawn: np.ndarray, level: float
) -> Parabola | Refusal:
    """The minimum of the i-th curve with intervals, or why there is none."""
    x, d, loss = chosen.vertices[i]
    if refusal := outside(curve, x):
        return refusal
    at = drawn[:, 0] - curve.centre
    inside = np.mean((at > curve.x.min()) & (at < curve.x.max()))  # False where NaN
    if 1 - inside > forms.MAX_FAILED_DRAWS:
        detail = f"{1 - inside:.0%} of {len(drawn)} bootstrap draws have no minimum "
        return _refuse(curve, "minimum not identified", f"{detail}inside the grid")

    def interval(index: int, value: float) -> Interval:
        ends = forms.percentiles(drawn[:, index], level)
        low, high = min(ends.low, value), max(ends.high, value)
        if index < 2:
            low, high = math.exp(low), math.exp(min(high, 700.0))
        return Interval(low=low, high=high, level=level)

    model = chosen.model
    rmse = math.sqrt(float(np.sum(model.residuals[i] ** 2) / model.dof[i]))
    return Parabola(
        budget_flops=curve.budget,
        points=len(curve.x),
        curvature=float(chosen.curvature[i]),
        n_opt=math.exp(x),
        d_opt=math.exp(d),
        l_opt=float(loss),
        n_opt_interval=interval(0, float(x)),
        d_opt_interval=interval(1, float(d)),
        l_opt_interval=interval(2, float(loss)),
        rmse=rmse,
        estimator=chosen.name,
        exponents=chosen.exponents,
    )


def _lopsided_note(fitted: Sequence[tuple[IsoflopCurve, Interval]]) -> list[str]:
    """A line if a cubic and a quartic term would move minima out of their intervals.

    Each term has one coefficient for all budgets. An F-test compares the two together
    with the pooled residuals: a lopsided curve has both, and each hides the other. If
    they are significant (p <= 1%), each curve's minimum with the cubic term is compared
    with the interval from its parabola.
    """
    dof = sum(c.dof for c, _ in fitted) - 2
    if dof < 1:
        return []
    terms = [np.stack([c.x**3, c.x**4], 1) for c, _ in fitted]
    bent = np.concatenate(
        [t - c.design @ (c.solve @ t) for t, (c, _) in zip(terms, fitted, strict=True)]
    )
    rest = np.concatenate([c.residuals for c, _ in fitted])
    g = np.linalg.pinv(bent) @ rest
    less = float(np.sum((bent @ g) ** 2))
    rss = float(rest @ rest) - less
    p = scipy.stats.f.sf(less / 2 / max(rss / dof, 1e-300), 2, dof)
    shifts, out = [], 0
    for term, (c, interval) in zip(terms, fitted, strict=True):
        c0, c1, c2 = c.solve @ (c.y - term @ g)
        roots = np.roots([4 * g[1], 3 * g[0], 2 * c2, c1])
        roots = roots[np.abs(roots.imag) < 1e-9].real
        roots = roots[(2 * c2 + roots * (6 * g[0] + 12 * g[1] * roots)) > 0]
        old = c.parabola_minimum(c.coefs)[0]
        n = math.nan
        if len(roots):
            at = float(roots[np.abs(roots + c.centre - old).argmin()])
            n = math.exp(at + c.centre) if abs(at) < 100 else math.nan
        shifts.append(n / math.exp(old) - 1)
        out += not interval.low <= n <= interval.high and not abs(shifts[-1]) < 0.01
    if p > 0.01 or not out:
        return []
    return [
        f"a cubic and a quartic term common to all budgets (p = {p:.2g}) would move "
        f"N_opt by {min(shifts):+.1%} to {max(shifts):+.1%}, outside its interval at "
        f"{out} of {len(fitted)} budgets: the curves are lopsided; use the estimator "
        "shape, narrow the grid or set window"
    ]
