"""Fits an isoFLOP study: records or points in, laws or refusals out. No jax.

`minima` finds the minimum of each budget. `law_of_minima` fits straight lines in
log-log through these minima, `offset_law` the law of the loss with an offset.
`checked_laws` predicts the largest budget from the smaller ones and refuses a law of
the loss that misses it. `estimates` sets all estimators of the minima side by side.
Every bootstrap draw of the vertices goes through all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm.laws import fitted_rows
from scaling_ldm.laws.checked_laws import fit_laws
from scaling_ldm.laws.comparison import compare
from scaling_ldm.laws.comparison_summary import comparison_summary
from scaling_ldm.laws.estimates import estimates, lack_of_fit
from scaling_ldm.laws.forms import power_law
from scaling_ldm.laws.isoflop_curve import IsoflopCurve, fit_curves
from scaling_ldm.laws.law_of_minima import QUANTITIES
from scaling_ldm.laws.minima import find_minima
from scaling_ldm.laws.points import (
    RUN,
    IsoflopPoint,
    read,
    shared_seeds,
    without_diverged,
)
from scaling_ldm.laws.published import PublishedLaw, published
from scaling_ldm.laws.rates import rate_law, rate_records
from scaling_ldm.laws.summary import summary
from scaling_ldm.laws.surface import refuse, surface
from scaling_ldm.records import (
    FitResult,
    Measurement,
    Parametric,
    Refusal,
    TrainRecord,
)
from scaling_ldm.records import results as ends
from scaling_ldm.records.measurements import HIGHER_IS_BETTER, LOSS

__all__ = [
    "PublishedLaw",
    "compare",
    "comparison_summary",
    "fit_records",
    "isoflop",
    "parametric",
    "power_law",
    "published",
    "rate_law",
    "rate_records",
    "summary",
]


def isoflop(
    points: Iterable[Any],
    *,
    metric: str = "loss",
    size: str = "params",
    confidence: float = 0.9,
    bootstrap: int = 1000,
    seed: int = 0,
    hold_out_largest: bool = True,
    window: float | None = None,
    extend: float = 4.0,
    estimator: str = "auto",
    huber: float | None = None,
) -> FitResult:
    """Fits the minima, laws and surface of an isoFLOP study, or says why it cannot.

    Args:
      points: one per run: (budget_flops, params, tokens, loss), or a mapping or object
        with budget_flops, tokens and the fields `size` and `metric`. What has names,
        such as a named tuple, is read by them, and points with the same text as
        `run_id` are of one trajectory. Budgets that differ by 2% or less are one. A
        point that is given twice counts once. Runs of equal budget and size are seeds:
        each is a point. FLOPs are 2 x multiply-adds, tokens those the trunk processes.
      metric: field with the loss; for tuples only a label.
      size: field with the number of parameters; for tuples only a label.
      confidence: level of all intervals and bands.
      bootstrap: number of draws, at least 50.
      seed: of the draws; the order of the points does not matter.
      hold_out_largest: also predict the largest minimum from the other budgets.
      window: None, or the largest factor in N around the size of smallest loss that a
        curve uses.
      extend: law bands reach this factor beyond the largest budget.
      estimator: of the minima: a name of `estimators.ESTIMATORS`, or "auto", the better
        of "parabola" and "shape" at runs that are left out in turn.
      huber: of the surface, as in `parametric`.

    Returns:
      A FitResult. A parabola, law, surface or prediction that the points do not
      support is a Refusal; every point left out has a line in `excluded`.

    Raises:
      ValueError: options out of range, or points of another form.

    Example:
      >>> points = [(c, n, c / (6 * n), 1 + 0.1 * np.log(n / (c / 6) ** 0.5) ** 2)
      ...           for c in (1e12, 1e13, 1e14) for n in (1e5, 5e5, 1e6, 5e6, 1e7)]
      >>> round(isoflop(points, bootstrap=50).laws["N_opt"].exponent, 6)
      0.5
    """
    _check(confidence, bootstrap, window, extend)
    kept, excluded, doubts = read(points, metric, size)
    kept, diverged = without_diverged(kept, metric)
    curves, outside = fit_curves(kept, window)
    result = _fitted(
        kept,
        curves,
        confidence=confidence,
        bootstrap=bootstrap,
        seed=seed,
        hold_out_largest=hold_out_largest,
        extend=extend,
        estimator=estimator,
        huber=huber,
    )
    return dataclasses.replace(
        result,
        metric=metric,
        size=size,
        excluded=tuple(excluded + diverged + outside),
        notes=(*doubts, *result.notes),
    )


def _fitted(
    points: Sequence[IsoflopPoint],
    curves: Sequence[IsoflopCurve | Refusal],
    *,
    confidence: float,
    bootstrap: int,
    seed: int,
    hold_out_largest: bool,
    extend: float,
    estimator: str,
    huber: float | None,
) -> FitResult:
    """All of a result but what is known of the points alone."""
    minima = find_minima(curves, bootstrap, confidence, [seed, 1], estimator)
    found = fit_laws(
        curves,
        minima,
        draws=bootstrap,
        level=confidence,
        extend=extend,
        seed=seed,
        hold_out_largest=hold_out_largest,
        estimator=estimator,
    )
    surface = _surface(points, huber, confidence, bootstrap, seed)
    surface = lack_of_fit(surface, curves, minima) or surface
    every, disagreement, apart = estimates(
        curves,
        minima,
        surface,
        confidence,
        seed,
        law=found.laws["N_opt"],
        held_out=found.held_out,
    )
    return FitResult(
        metric="",
        size="",
        parabolas=tuple(minima.parabolas),
        laws=found.laws,
        loss_forms=found.loss_forms,
        parametric=surface,
        held_out=found.held_out,
        left_out=found.left_out,
        estimator=minima.chosen.name if minima.chosen else "parabola",
        estimates=every,
        disagreement=disagreement,
        excluded=(),
        bootstrap=bootstrap,
        seed=seed,
        notes=(*minima.notes, *shared_seeds(points), *found.notes, *apart),
    )


def _check(
    confidence: float, bootstrap: int, window: float | None, extend: float
) -> None:
    """Refuses options out of range (ValueError)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, given {confidence}")
    if bootstrap < 50:
        raise ValueError(f"bootstrap must be at least 50 draws, given {bootstrap}")
    if window is not None and not window > 1:
        raise ValueError(f"window must be a factor above 1 or None, given {window}")
    if not extend >= 1:
        raise ValueError(f"extend must be a factor of at least 1, given {extend}")


def _surface(
    points: Sequence[IsoflopPoint],
    huber: float | None,
    confidence: float,
    bootstrap: int,
    seed: int,
) -> Parametric | Refusal:
    n, d, loss = np.array([(p.n, p.d, p.loss) for p in points]).reshape(-1, 3).T
    return surface(
        n, d, loss, huber=huber, confidence=confidence, bootstrap=bootstrap, seed=seed
    )


def parametric(
    points: Iterable[Any],
    *,
    metric: str = "loss",
    size: str = "params",
    huber: float | None = None,
    confidence: float = 0.9,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Parametric | Refusal:
    """Fits L = E + A / N^alpha + B / D^beta to points as `isoflop` takes them.

    Points that `isoflop` would exclude are refused here: this result has no place to
    name them. With `huber`, a run that diverged may stay. See `surface.surface` for the
    method.

    Args:
      points, metric, size: as for `isoflop`.
      huber, confidence, bootstrap, seed: as for `surface.surface`.

    Returns:
      The surface; or a refusal, as `surface.surface`, or of unusable points.

    Raises:
      ValueError: points of another form.
    """
    kept, excluded, _ = read(points, metric, size)
    if huber is None:
        excluded += without_diverged(kept, metric)[1]
    if excluded:
        return refuse("unusable points", "; ".join(excluded))
    return _surface(kept, huber, confidence, bootstrap, seed)


def fit_records(
    records: Iterable[TrainRecord],
    rows: Iterable[Measurement],
    *,
    metric: str = LOSS,
    weights: str,
    size: str = "params_without_embeddings",
    asked: Sequence[str] = (),
    protocols: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> FitResult:
    """`isoflop` of the rows that runs have at their last step (`records.read_table`).

    Rows of a trajectory (plan.reuse) whose budget is smaller than that of its record
    count as the ends of separate runs.

    Rows of several protocols are never mixed. Of several, the asked one is fitted, or
    the only one that all finished runs have. If there is no such protocol, nothing is
    fitted, and the result says how the protocols differ.

    Args:
      records: of the runs; those that are not finished are excluded by name.
      rows: of these runs and any others, of any step.
      metric: of the table, e.g. "loss" or "fd_clip".
      weights: "raw" or the name of an average.
      size: "params" or "params_without_embeddings".
      asked: the first characters of the hashes of protocols, as config.fit.protocols.
      protocols: hash -> parts of the known protocols, to say how they differ.
      options: of `isoflop`.
    """
    found = fitted_rows.choose(records, rows, metric, weights, asked)
    excluded = found.unfinished
    if metric.startswith(HIGHER_IS_BETTER):
        reason, detail = "larger is better", "laws are of minima"
        result = _nothing(reason, detail, found.rows, **options)
    elif found.protocol is None and found.measured:
        detail = ends.why_none_is_shared(found.measured, found.wanted, protocols or {})
        reason = "measured by several protocols"
        result = _nothing(reason, detail, found.rows, **options)
    else:
        excluded = tuple(sorted(excluded + found.missing))
        result = isoflop(
            [
                {
                    "budget_flops": r.budget_flops,
                    size: getattr(r, size),
                    "tokens": r.tokens,
                    metric: r.value,
                    RUN: r.run_id,
                }
                for r in found.rows
            ],
            metric=metric,
            size=size,
            **options,
        )
    return dataclasses.replace(
        result,
        metric=metric,
        size=size,
        weights=weights,
        protocol_hash=found.protocol or "",
        excluded=excluded + result.excluded,
    )


def _nothing(
    reason: str,
    detail: str,
    rows: Iterable[Measurement],
    bootstrap: int = 1000,
    seed: int = 0,
    **_: Any,
) -> FitResult:
    """The result when nothing can be fitted to these rows: a refusal of every law."""
    why = {"reason": reason, "detail": detail}
    minima = [
        Refusal(quantity="isoFLOP minimum", budget_flops=budget, **why)
        for budget in sorted({row.budget_flops for row in rows})
    ]
    return FitResult(
        metric="",
        size="",
        parabolas=tuple(minima),
        laws={name: Refusal(quantity=name, **why) for name in QUANTITIES},
        parametric=refuse(reason, detail),
        held_out=(),
        excluded=(),
        bootstrap=bootstrap,
        seed=seed,
    )
