"""The minima of two sets of runs at the budgets that both have.

Runs may be given in pairs. Then both sides have the same runs in the same order, and
their minima are drawn from one stream of random numbers: the residuals of the runs of a
pair are drawn together, and what they have in common stays in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaling_ldm.laws import checked_laws, curve_noise, law_of_minima, points
from scaling_ldm.laws.estimators import AUTO
from scaling_ldm.laws.isoflop_curve import IsoflopCurve, fit_curves
from scaling_ldm.laws.law_of_minima import QUANTITIES
from scaling_ldm.laws.minima import Minima, find_minima
from scaling_ldm.laws.points import IsoflopPoint
from scaling_ldm.records import Refusal

COMPARISON = "comparison"  # what a refusal is about
# Measured: docs/compare.md, one seed.
TOO_SURE = (
    "runs of one size share noise between budgets: in simulated pairs like that, 90% "
    "intervals of ratios and of the compute for equal loss held the truth in 70%, so "
    "read them and the verdict as too sure; several seeds mend it"
)
_LOSS = QUANTITIES.index("L_opt")


def pair_of(names: Sequence[str]) -> str:
    return f"{names[1]} against {names[0]}"


def refuse(names: Sequence[str], reason: str, detail: str) -> Refusal:
    return Refusal(
        quantity=COMPARISON, group=pair_of(names), reason=reason, detail=detail
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinimaOptions:
    """How minima are found and drawn; the options of `fit.isoflop` of these names."""

    confidence: float = 0.9
    bootstrap: int = 1000
    seed: int = 0
    estimator: str = AUTO

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.bootstrap < 50:
            raise ValueError(
                "confidence must lie between 0 and 1, and bootstrap be at least 50 "
                f"draws, given {self.confidence} and {self.bootstrap}"
            )


@dataclasses.dataclass(frozen=True)
class UsableRuns:
    """The usable points of one side, and where each stands in what was given."""

    points: list[IsoflopPoint]
    places: list[int]
    excluded: list[str]
    doubts: list[str]


def read(given: Sequence[Any], metric: str, size: str, data: str) -> UsableRuns:
    """The usable runs of one side.

    Args:
      given: points, as `fit.isoflop` takes them.
      data: "tokens"; with anything else 6 N D is not meant to be C.

    Raises:
      ValueError: points of another form.
    """
    kept, excluded, doubts = points.read(given, metric, size)
    if data != "tokens":
        doubts = [line for line in doubts if not line.startswith("6 N D")]
    kept, diverged = points.without_diverged(kept, metric)
    names = ("budget_flops", size, "tokens", metric)
    values = [points.values_of(p, names, i) for i, p in enumerate(given)]
    place = {v[1:]: i for i, v in reversed(list(enumerate(values)))}
    return UsableRuns(
        kept, [place[p.n, p.d, p.loss] for p in kept], excluded + diverged, doubts
    )


def in_pairs(sides: Sequence[UsableRuns]) -> tuple[list[UsableRuns], bool, list[str]]:
    """Both sides with their pairs alone, in one order; or as they are, and why."""
    found = [dict(zip(s.places, s.points, strict=True)) for s in sides]
    together = sorted(found[0].keys() & found[1].keys())
    for place in together:
        a, b = (f[place].budget for f in found)
        if abs(a - b) > points.SAME_BUDGET * max(a, b):
            detail = f"runs {place} have {a:.6g} and {b:.6g} FLOPs"
            return list(sides), False, [f"not paired: {detail}"]
    if not together:
        return list(sides), False, ["not paired: no run of both sides is usable"]
    order = sorted(together, key=lambda i: (found[0][i].budget, found[0][i].n, i))
    out = []
    for side, of_side in zip(sides, found, strict=True):
        alone = [
            f"{points.run_name(p.budget, p.n)}: the other run of its pair is missing "
            "or left out"
            for i, p in of_side.items()
            if i not in set(order)
        ]
        out.append(
            dataclasses.replace(
                side,
                points=[of_side[i] for i in order],
                places=order,
                excluded=side.excluded + sorted(alone),
            )
        )
    return out, True, []


@dataclasses.dataclass(frozen=True)
class Both:
    """The minima of both sides at the budgets that both have."""

    minima: tuple[Minima, Minima]
    excluded: list[str]
    notes: list[str]

    @property
    def correlation(self) -> float:
        """Of the drawn errors of the least losses of both sides, mean over budgets."""
        drawn = [m.draws[:, :, _LOSS] for m in self.minima]
        usable = np.all(np.isfinite(drawn), axis=(0, 2))
        a, b = (d[usable] - d[usable].mean(0) for d in drawn)
        scale = np.sqrt(np.sum(a * a, 0) * np.sum(b * b, 0))
        if not scale.all():  # without noise
            return 0.0
        return float(np.mean(np.sum(a * b, 0) / scale))


def minima_of_both(
    sides: Sequence[UsableRuns],
    names: Sequence[str],
    paired: bool,
    how: MinimaOptions,
) -> Both | Refusal:
    """The minima at budgets that both sides have, or why they cannot be compared."""
    of_a, of_b = (fit_curves(side.points, None)[0] for side in sides)
    shared = [(a, b) for a in of_a for b in of_b if _same_budget(a, b)]
    excluded = [
        f"{name}: the budget {_budget(curve):.6g} FLOPs is not one of {other}"
        for name, other, curves, i in ((*names, of_a, 0), (*names[::-1], of_b, 1))
        for curve in curves
        if not any(curve is pair[i] for pair in shared)
    ]
    curves = [pair for pair in shared if _are_curves(pair)]
    streams = (
        [how.seed, 5],
        [how.seed, 5 if paired else 6],
    )  # one stream: the same resamples
    found = [
        find_minima(
            [pair[i] for pair in curves],
            how.bootstrap,
            how.confidence,
            stream,
            how.estimator,
        )
        for i, stream in enumerate(streams)
    ]
    measured = iter(zip(*(m.parabolas for m in found), strict=True))
    ends = [next(measured) if _are_curves(pair) else pair for pair in shared]
    refused = [[p for p in pair if isinstance(p, Refusal)] for pair in ends]
    excluded += [
        f"{name}: {p.what}: {p.why}"
        for pair in ends
        for name, p in zip(names, pair, strict=True)
        if isinstance(p, Refusal)
    ]
    kept = [_budget(a) for (a, _), why in zip(shared, refused, strict=True) if not why]
    lost = [
        _budget(a)
        for (a, _), why in zip(shared, refused, strict=True)
        if any(p.reason in checked_laws.OUTSIDE for p in why)
    ]
    notes = [
        f"{name}: {note}"
        for name, m in zip(names, found, strict=True)
        for note in m.notes
    ]
    if any(curve_noise.SHARED in note for note in notes):
        notes.append(TOO_SURE)
    if lost:
        said = f"{len(lost)} of {len(lost) + len(kept)} budgets have no minimum inside "
        said += f"the grids of both ({', '.join(f'{c:.6g}' for c in lost)} FLOPs)"
        if len(lost) > checked_laws.MAX_OUTSIDE * (len(lost) + len(kept)):
            return refuse(names, checked_laws.TOO_MANY_OUTSIDE, said)
        notes.append(f"{said}: what is compared leans to the grids' centres")
    both = Both((_at(found[0], kept), _at(found[1], kept)), excluded, notes)
    if unusable := law_of_minima.unusable(both.minima[0], "N_opt"):
        detail = f"on both sides: {unusable.detail}"
        if excluded:
            detail += f"; left out: {'; '.join(excluded)}"
        return refuse(names, unusable.reason, detail)
    return both


def _budget(found: IsoflopCurve | Refusal) -> float:
    if isinstance(found, IsoflopCurve):
        return found.budget
    return found.budget_flops or 0.0


def _same_budget(a: IsoflopCurve | Refusal, b: IsoflopCurve | Refusal) -> bool:
    low, high = sorted((_budget(a), _budget(b)))
    return high - low <= points.SAME_BUDGET * high


def _are_curves(pair: tuple[Any, Any]) -> bool:
    return all(isinstance(found, IsoflopCurve) for found in pair)


def _at(minima: Minima, budgets: Sequence[float]) -> Minima:
    """The minima at these budgets, which may be those of the other side."""
    places = [
        int(np.argmin(np.abs(np.log(minima.budgets / budget)))) for budget in budgets
    ]
    return dataclasses.replace(
        minima,
        budgets=np.array(budgets),
        centre=minima.centre[places].reshape(-1, 3),
        draws=minima.draws[:, places],
    )
