"""Law against law: two studies, or two groups of one, over the budgets that both have.

The minima of each side are found as `fit.isoflop` finds them. `compared_lines` draws
lines through them and through their differences. Where runs are given in pairs, which
share their seed and data, both sides are drawn with the same resampled runs, so that
noise which the runs of a pair have in common is in no difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm.laws import compared_lines as lines
from scaling_ldm.laws import law_of_minima, offset_law
from scaling_ldm.laws.compared_minima import (
    Both,
    MinimaOptions,
    in_pairs,
    minima_of_both,
    pair_of,
    read,
    refuse,
)
from scaling_ldm.laws.law_of_minima import QUANTITIES, interval
from scaling_ldm.records import OffsetLaw, PowerLaw, Refusal, comparison
from scaling_ldm.records.comparison import (
    AtBudget,
    ComparedLaw,
    CrossingBudget,
    EqualLoss,
    LawComparison,
)
from scaling_ldm.records.measurements import HIGHER_IS_BETTER

EQUAL_LOSS, CROSSING = "equal loss", "crossing"
UNLIKE = "measured unlike"
_LOSS = QUANTITIES.index("L_opt")
_ROUNDING = 1e-9  # of ln C


def compare(
    first: Iterable[Any],
    second: Iterable[Any],
    *,
    names: tuple[str, str] = ("first", "second"),
    metric: str = "loss",
    size: str = "params",
    data: str = "tokens",
    paired: bool = False,
    budgets: Sequence[float] = (),
    conventions: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
    **options: Any,
) -> LawComparison | Refusal:
    """Compares the laws of two sets of runs (paper B, arXiv 2410.08184, section 4).

    Args:
      first: one point per run, as `fit.isoflop` takes them.
      second: the same, of what is held against the first.
      names: of both sides.
      metric, size: as for `fit.isoflop`.
      data: what the points give as tokens: "tokens" or "pictures".
      paired: point i of both is of one seed and the same data. A pair of which one is
        unusable is left out. Of pairs whose budgets differ, nothing is paired.
      budgets: FLOPs at which losses and equal compute are stated, within those
        compared; (): the least, the middle and the largest of these.
      conventions: of each side {what: value}; where one differs, nothing is compared.
      options: confidence, bootstrap, seed and estimator, as for `fit.isoflop`.

    Returns:
      The comparison. A refusal instead: the sides are measured unlike, more of the
      metric is better, fewer than three budgets have a minimum on both sides, they span
      less than a factor of 2, or more than a third lost theirs at the edge of a grid.

    Raises:
      ValueError: options out of range, or points of another form.
      TypeError: an unknown option.

    Example:
      >>> a, b = ([(c, n, c / (6 * n), loss + 0.1 * np.log(n / (c / 6) ** 0.5) ** 2)
      ...          for c in (1e12, 1e13, 1e14) for n in (1e5, 5e5, 1e6, 5e6, 1e7)]
      ...         for loss in (1.0, 0.9))
      >>> compare(a, b, bootstrap=50).verdict
      'second better'
    """
    how = MinimaOptions(**options)
    if metric.startswith(HIGHER_IS_BETTER):
        return refuse(names, "larger is better", "laws are of minima")
    if unlike := difference_of(*conventions, names):
        return refuse(names, UNLIKE, unlike)
    sides = [read([*given], metric, size, data) for given in (first, second)]
    notes: list[str] = []
    if paired:
        sides, paired, notes = in_pairs(sides)
    both = minima_of_both(sides, names, paired, how)
    if isinstance(both, Refusal):
        return both
    each = [*zip(names, sides, strict=True)]
    excluded = [f"{name}: {line}" for name, side in each for line in side.excluded]
    doubts = [f"{name}: {doubt}" for name, side in each for doubt in side.doubts]
    return LawComparison(
        first=names[0],
        second=names[1],
        metric=metric,
        size=size,
        data=data,
        paired=paired,
        correlation=both.correlation if paired else None,
        **_Fitted(both, how.confidence, how.seed).compared(budgets, names),
        weights="",
        protocol_hash="",
        excluded=tuple(excluded + both.excluded),
        notes=tuple(doubts + notes + both.notes),
        bootstrap=how.bootstrap,
        seed=how.seed,
    )


def difference_of(
    a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]
) -> str:
    """In what two sides differ, as text; "" if in nothing."""
    return "; ".join(
        f"{what}: {a.get(what)!r} in {names[0]}, {b.get(what)!r} in {names[1]}"
        for what in dict.fromkeys((*a, *b))
        if a.get(what) != b.get(what)
    )


class _Fitted:
    """The lines of both sides and of their differences, and what follows."""

    def __init__(self, both: Both, level: float, seed: int) -> None:
        self.level, self.seed, self.minima = level, seed, both.minima
        ln_c = np.log(both.minima[0].budgets)
        self.centre = float(ln_c.mean())
        self.u = ln_c - self.centre
        self.middle = math.exp(self.centre)
        self.lines: dict[str, tuple[lines.Line, lines.Line, lines.Line]] = {}
        self.noise: tuple[np.ndarray, np.ndarray] = (np.empty(0), np.empty(0))
        self.laws = {name: self._law(name) for name in QUANTITIES}

    def compared(
        self, budgets: Sequence[float], names: Sequence[str]
    ) -> dict[str, Any]:
        """The fields of a `LawComparison` that follow from the lines."""
        loss = self.laws["L_opt"]
        crossing = loss if isinstance(loss, Refusal) else self._crossing()
        if isinstance(crossing, Refusal):
            crossing = dataclasses.replace(
                crossing, quantity=CROSSING, group=pair_of(names)
            )
        at_budgets, better, verdict = self._losses(budgets)
        return {
            "budgets": tuple(map(float, self.minima[0].budgets)),
            "middle": self.middle,
            "laws": self.laws,
            "offset_laws": (self._offset_law(0), self._offset_law(1)),
            "crossing": crossing,
            "at_budgets": at_budgets,
            "better": better,
            "verdict": verdict,
        }

    def _law(self, name: str) -> ComparedLaw | Refusal:
        """The lines of one quantity; those of the loss stay for what follows."""
        index, level = QUANTITIES.index(name), self.level
        for m in self.minima:
            refusal = law_of_minima.unusable(m, name)
            refusal = refusal or law_of_minima.usable_draws(m, index)[2]
            if refusal:
                return refusal
        with np.errstate(invalid="ignore", divide="ignore"):
            ln = np.log if name == "L_opt" else np.asarray
            a, b = (ln(m.centre[:, index]) for m in self.minima)
            drawn = [ln(m.draws[:, :, index]) for m in self.minima]
        usable = np.all(np.isfinite(drawn), axis=(0, 2))
        noise = drawn[0][usable] - a, drawn[1][usable] - b
        rng = np.random.default_rng([self.seed, 7, index])
        of_a, of_b, of_d = (
            lines.fit_line(self.u, y, errors, rng)
            for y, errors in (
                (a, noise[0]),
                (b, noise[1]),
                (b - a, noise[1] - noise[0]),
            )
        )
        self.lines[name], self.noise = (of_a, of_b, of_d), noise
        at = lines.places(self.u)
        said = np.exp(lines.band(of_d, at, at, level))
        budgets = self.minima[0].budgets
        return ComparedLaw(
            quantity=name,
            exponents=(of_a.slope, of_b.slope),
            exponent_intervals=(of_a.of_slope(level), of_b.of_slope(level)),
            difference=of_d.slope,
            difference_interval=of_d.of_slope(level),
            at_middle=(math.exp(of_a.middle), math.exp(of_b.middle)),
            at_middle_intervals=(of_a.of_middle(level), of_b.of_middle(level)),
            ratio=math.exp(of_d.middle),
            ratio_interval=of_d.of_middle(level),
            rmse_log=of_d.rmse,
            minima=_rows(budgets, np.exp(a), np.exp(b)),
            band=_rows(np.exp(self.centre + at), *said),
            left_out=_rows(budgets, lines.without_each(self.u, b - a)),
        )

    def _offset_law(self, side: int) -> OffsetLaw | Refusal:
        """The law of L_opt with an offset, over the budgets that are compared."""
        m, seed = self.minima[side], [self.seed, 8, side]
        pure = law_of_minima.fit_law(m, _LOSS, self.level, lines.REACH, seed)
        fitted = offset_law.fit_loss(m, pure, self.level, lines.REACH, seed)
        law = fitted.offset.law
        assert not isinstance(law, PowerLaw)
        return law

    def _crossing(self) -> CrossingBudget | Refusal:
        """Where the least losses are equal, or why that is not known."""
        of_d, level = self.lines["L_opt"][2], self.level
        at, low, high = lines.crossing(of_d, self.u, level)
        slope = of_d.of_slope(level)
        said = f"difference of the exponents {of_d.slope:.3g} "
        said += f"({slope.low:.3g} to {slope.high:.3g})"
        if not slope.low * slope.high > 0 or math.isnan(at):
            return _refusal(CROSSING, "slopes are not shown to differ", said)
        ends = [math.exp(min(self.centre + x, 700)) for x in (at, low, high)]
        said = f"the lines meet at {ends[0]:.4g} FLOPs"
        if not self.u[0] <= at <= self.u[-1]:
            return _refusal(CROSSING, "outside the budgets compared", said)
        if not math.isfinite(low + high):
            shown = [f"{x:.4g}" for x in ends[1:]]
            shown = [
                s if math.isfinite(x) else "beyond what is known"
                for s, x in zip(shown, (low, high), strict=True)
            ]
            detail = f"{said}, from {shown[0]} to {shown[1]}"
            return _refusal(CROSSING, "not identified", detail)
        return CrossingBudget(
            budget_flops=ends[0],
            interval=interval(ends[1], ends[2], level),
            better_beyond=("second", "first")[int(of_d.slope > 0)],
        )

    def _losses(
        self, budgets: Sequence[float]
    ) -> tuple[tuple[AtBudget | Refusal, ...], tuple[Any, ...], str]:
        """Both sides at each budget, where which one is better, and the verdict."""
        if "L_opt" not in self.lines:
            return (), (), comparison.NO_VERDICT
        of_d, level = self.lines["L_opt"][2], self.level
        at = lines.places(self.u)
        _, low, high = lines.band(of_d, at, at, level)
        shown = [
            (float(math.exp(self.centre + u[0])), float(math.exp(self.centre + u[-1])))
            + (("second", "", "first")[sign + 1],)
            for sign, u in _runs_of_equal(lines.signs(low, high), at)
        ]
        better = tuple(row for row in shown if row[2])
        winners = {row[2] for row in better}
        verdict = {
            frozenset(): comparison.NO_DIFFERENCE,
            frozenset({"first"}): comparison.FIRST_BETTER,
            frozenset({"second"}): comparison.SECOND_BETTER,
        }.get(frozenset(winners), comparison.CROSS)
        ends = self.minima[0].budgets[[0, -1]]
        wanted = tuple(budgets) or (ends[0], self.middle, ends[1])
        rng = np.random.default_rng([self.seed, 9])
        losses = self.minima[1].centre[:, _LOSS]
        curve = lines.loss_curve(
            self.u, losses, self.noise[1], self.lines["L_opt"][1], rng
        )
        found = tuple(self._at_budget(float(c), curve) for c in wanted)
        return found, better, verdict

    def _at_budget(self, budget: float, curve: lines.LossCurve) -> AtBudget | Refusal:
        u, ends = math.log(budget) - self.centre, self.u[[0, -1]]
        if not ends[0] - _ROUNDING <= u <= ends[1] + _ROUNDING:
            first, last = self.minima[0].budgets[[0, -1]]
            detail = f"compared are {first:.6g} to {last:.6g} FLOPs"
            reason = "outside the budgets compared"
            return dataclasses.replace(
                _refusal(EQUAL_LOSS, reason, detail), budget_flops=budget
            )
        of_d, level = self.lines["L_opt"][2], self.level
        over = lines.places(self.u)
        (said,), (low,), (high,) = np.exp(lines.band(of_d, np.array([u]), over, level))
        return AtBudget(
            budget_flops=budget,
            loss_ratio=float(said),
            loss_ratio_interval=interval(low, high, level),
            compute=self._compute(budget, u, curve),
        )

    def _compute(
        self, budget: float, u: float, curve: lines.LossCurve
    ) -> EqualLoss | Refusal:
        of_d, level = self.lines["L_opt"][2], self.level
        value, low, high = lines.equal_loss(curve, of_d, u, level)
        ends, far = self.u[[0, -1]], math.log(lines.REACH)
        shown = [f"{math.exp(min(x, 700)):.4g}" for x in (value, low, high)]
        shown = [
            s if math.isfinite(x) else "no finite number"
            for s, x in zip(shown, (value, low, high), strict=True)
        ]
        detail = f"{shown[0]} times the compute ({shown[1]} to {shown[2]})"
        reason = ""
        if not all(map(math.isfinite, (value, low, high))):
            reason = "not shown to be reached"
        elif u + low < ends[0] - far or u + high > ends[1] + far:
            reason = f"more than {lines.REACH:g} times beyond the budgets compared"
        if reason:
            refusal = _refusal(EQUAL_LOSS, reason, detail)
            return dataclasses.replace(refusal, budget_flops=budget)
        return EqualLoss(
            ratio=math.exp(value),
            interval=interval(math.exp(low), math.exp(high), level),
            extrapolated=not ends[0] - _ROUNDING <= u + value <= ends[1] + _ROUNDING,
        )


def _refusal(quantity: str, reason: str, detail: str) -> Refusal:
    return Refusal(quantity=quantity, reason=reason, detail=detail)


def _rows(*columns: Any) -> tuple[Any, ...]:
    """Rows of numbers from columns; none where a column is empty."""
    if not all(len(column) for column in columns):
        return ()
    rows = zip(*columns, strict=True)
    return tuple(tuple(map(float, row)) for row in rows)


def _runs_of_equal(values: np.ndarray, at: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(value, its places) of each run of equal values."""
    cuts = np.flatnonzero(np.diff(values)) + 1
    parts = zip(np.split(values, cuts), np.split(at, cuts), strict=True)
    return [(int(v[0]), u) for v, u in parts]
