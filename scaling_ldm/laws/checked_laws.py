"""All laws through the minima of the budgets, each held against the largest budget.

The laws are fitted once to all budgets, and once to all but the largest, which they
then predict. A law of the loss whose interval misses that measurement is no law: the
result is a refusal with the numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from scaling_ldm.laws import law_of_minima, offset_law
from scaling_ldm.laws.isoflop_curve import IsoflopCurve
from scaling_ldm.laws.law_of_minima import QUANTITIES, Fitted
from scaling_ldm.laws.minima import Minima, find_minima
from scaling_ldm.records import HeldOut, LeftOut, LossForm, OffsetLaw, PowerLaw, Refusal

REFUTED = "held-out budget outside its interval"
TOO_MANY_OUTSIDE = "too many minima outside their grids"
# Refusals of a budget that depend on where its minimum is.
OUTSIDE = (
    "vertex outside the grid",
    "smallest loss at the edge of the grid",
    "minimum not identified",
)
MAX_OUTSIDE = 1 / 4  # part of the budgets that a law may lose to that
AnyLaw = PowerLaw | OffsetLaw | Refusal
_EXACT = 1e-6  # a prediction as close as this is right, whatever its interval


@dataclasses.dataclass(frozen=True)
class Laws:
    """What `FitResult` has of the laws."""

    laws: Mapping[str, PowerLaw | OffsetLaw | Refusal]
    loss_forms: tuple[LossForm, ...]
    held_out: tuple[HeldOut | Refusal, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def fit_laws(
    curves: Sequence[IsoflopCurve | Refusal],
    minima: Minima,
    *,
    draws: int,
    level: float,
    extend: float,
    seed: int,
    hold_out_largest: bool,
    estimator: str,
) -> Laws:
    """The laws of the minima of these curves.

    Args:
      curves: one for each budget.
      minima: of the curves.
      draws: of the bootstrap of the budgets without the largest.
      level: of the intervals.
      extend: the bands reach this factor beyond the largest budget.
      seed: of the draws.
      hold_out_largest: whether the largest budget is also predicted.
      estimator: of the minima of the smaller budgets, as in `find_minima`.
    """
    n, d, loss = _fit(minima, level, extend, [seed, 2])
    lost, censored = _censored(minima)
    checks: dict[str, HeldOut | Refusal | None] = {}
    if hold_out_largest and len(minima.budgets):
        largest = minima.budgets[-1]
        rest = [c for c in curves if isinstance(c, IsoflopCurve) and c.budget < largest]
        # The same noise as of all budgets: what a prediction and the minimum beside it
        # have in common is drawn for both.
        there = [c.budget < largest for c in curves if isinstance(c, IsoflopCurve)]
        noise = [n for n, one in zip(minima.noise, there, strict=True) if one]
        smaller = find_minima(rest, draws, level, [seed, 1], estimator, noise)
        of_n, of_d, of_loss = _fit(smaller, level, extend, [seed, 4])
        fits = {"N_opt": of_n, "D_opt": of_d, "L_opt": of_loss.chosen}
        fits |= {"power": of_loss.pure, "offset": of_loss.offset}
        checks = {name: _check(minima, name, fitted) for name, fitted in fits.items()}
    forms = tuple(
        LossForm(
            form=form,
            law=_unless_refuted(lost("L_opt", fitted.law), checks.get(form)),
            left_out_error=error,
            held_out=checks.get(form),
        )
        for form, fitted, error in (
            ("power", loss.pure, loss.errors[0]),
            ("offset", loss.offset, loss.errors[1]),
        )
    )
    notes = [*censored, *n.notes, *d.notes, *loss.chosen.notes]
    of_l = _unless_refuted(lost("L_opt", loss.chosen.law), checks.get("L_opt"))
    if isinstance(of_l, OffsetLaw) and of_l.bends:
        i = of_l.offset_interval
        notes.append(
            f"L_opt: the loss bends away from a pure power law towards E = "
            f"{of_l.offset:.4g} ({i.low:.4g} to {i.high:.4g})"
        )
    return Laws(
        laws={
            "N_opt": lost("N_opt", n.law),
            "D_opt": lost("D_opt", d.law),
            "L_opt": of_l,
        },
        loss_forms=forms,
        held_out=tuple(c for q in QUANTITIES if (c := checks.get(q)) is not None),
        left_out=tuple(_left_out(minima, loss)),
        notes=tuple(notes),
    )


def _censored(
    minima: Minima,
) -> tuple[Callable[[str, AnyLaw], AnyLaw], list[str]]:
    """What becomes of a law where budgets have no minimum inside their grid, and notes.

    Where a minimum lies outside, the budget is lost. What is left are the minima near
    the centre of the grid, so the exponent is off towards that of the grid.
    """
    refused = [p for p in minima.parabolas if isinstance(p, Refusal)]
    outside = [p for p in refused if p.reason in OUTSIDE]
    every = len(outside) + len(minima.budgets)
    if not outside:
        return lambda name, law: law, []
    listed = ", ".join(f"{p.budget_flops:.6g}" for p in outside)
    said = f"{len(outside)} of {every} budgets have no minimum inside their grid"
    if len(outside) > MAX_OUTSIDE * every:
        detail = f"{said} ({listed} FLOPs); laws of the rest lean to the grids' centres"

        def refuse(name: str, law: AnyLaw) -> AnyLaw:
            return (
                law
                if isinstance(law, Refusal)
                else Refusal(quantity=name, reason=TOO_MANY_OUTSIDE, detail=detail)
            )

        return refuse, []
    line = f"{said} ({listed} FLOPs): laws of the rest lean to the grids' centres"
    return lambda name, law: law, [line]


def _left_out(minima: Minima, loss: offset_law.LossLaws) -> Iterator[LeftOut]:
    """Each budget's minimum, predicted by the laws of all other budgets.

    The loss is predicted by the form that predicts better.
    """
    if len(minima.budgets) <= law_of_minima.MIN_BUDGETS:
        return
    predicted = np.exp(law_of_minima.left_out(minima))
    measured = minima.centre.copy()
    measured[:, :2] = np.exp(measured[:, :2])
    losses = loss.left_out
    if losses is not None:
        best = int(np.argmin(np.array(loss.errors, float)))
        predicted = np.stack([*predicted.T, losses[:, best]], 1)
    for name, said, value in zip(QUANTITIES, predicted.T, measured.T, strict=False):
        for budget, one, other in zip(minima.budgets, said, value, strict=True):
            yield LeftOut(
                quantity=name,
                budget_flops=float(budget),
                predicted=float(one),
                measured=float(other),
                relative_error=float(one / other - 1),
            )


def _fit(
    minima: Minima, level: float, extend: float, seed: Sequence[int]
) -> tuple[Fitted, Fitted, offset_law.LossLaws]:
    n, d, pure = (
        law_of_minima.fit_law(minima, index, level, extend, [*seed, index])
        for index in range(3)
    )
    return n, d, offset_law.fit_loss(minima, pure, level, extend, [*seed, 3])


def _check(minima: Minima, name: str, fitted: Fitted) -> HeldOut | Refusal:
    """The largest measured minimum beside what `fitted` says, which never saw it.

    Args:
      name: a quantity, or a form of the law of L_opt.
    """
    quantity = name if name in QUANTITIES else "L_opt"
    index, largest = QUANTITIES.index(quantity), float(minima.budgets[-1])
    value, noise = float(minima.centre[-1, index]), minima.draws[:, -1, index]
    reason, detail = "loss not positive", "a power law cannot predict it"
    if quantity == "L_opt" and value > 0:
        value, noise = math.log(value), np.log(np.where(noise > 0, noise, np.nan))
    elif quantity == "L_opt":
        value = math.nan
    law = fitted.law
    if isinstance(law, Refusal):
        reason, detail = law.reason, f"{law.detail}, the largest left out"
    if isinstance(law, Refusal) or fitted.predict is None or not math.isfinite(value):
        return Refusal(
            quantity=f"{quantity} held out",
            budget_flops=largest,
            reason=reason,
            detail=detail,
        )
    noise = np.nan_to_num(noise - value)  # a draw without a minimum counts as exact
    (said,), (low,), (high,) = fitted.predict(np.array([largest]), noise)
    measured = math.exp(value)
    level = law.exponent_interval.level
    return HeldOut(
        quantity=quantity,
        budget_flops=largest,
        predicted=float(said),
        predicted_interval=law_of_minima.interval(low, high, level),
        measured=measured,
        relative_error=float(said) / measured - 1,
    )


def _unless_refuted(law: AnyLaw, check: HeldOut | Refusal | None) -> AnyLaw:
    """The law; a refusal if the largest budget is outside of its prediction."""
    if isinstance(law, Refusal) or not isinstance(check, HeldOut):
        return law
    if check.inside or abs(check.relative_error) < _EXACT:
        return law
    i = check.predicted_interval
    return Refusal(
        quantity=law.y_name,
        reason=REFUTED,
        detail=f"measured {check.measured:.4g} at {check.budget_flops:.6g} FLOPs, "
        f"predicted {check.predicted:.4g} ({i.low:.4g} to {i.high:.4g}) from the "
        f"smaller budgets; exponent {law.exponent:.4g} without that check",
    )
