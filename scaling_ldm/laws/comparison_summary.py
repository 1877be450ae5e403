"""A comparison as lines of text, for the stage and the page."""

from __future__ import annotations

from collections.abc import Mapping

from scaling_ldm.records import (
    AtBudget,
    ComparedLaw,
    CrossingBudget,
    EqualLoss,
    Interval,
    LawComparison,
    Refusal,
    comparison,
)

_SYMBOLS = {"N_opt": "N", "D_opt": "D", "L_opt": "L"}


def comparison_summary(found: LawComparison | Refusal) -> list[str]:
    """The verdict, the laws, the crossing and every refusal, a line or two each."""
    if isinstance(found, Refusal):
        return [f"refused: {found.what}: {found.why}"]
    lines = [f"{found.second} against {found.first}: {verdict(found)}"]
    lines += [law_said(name, law, found) for name, law in found.laws.items()]
    lines += [at_said(at, found) for at in found.at_budgets]
    lines.append(crossing_said(found))
    lines += [f"note: {note}" for note in found.notes]
    return lines + [f"left out: {line}" for line in found.excluded]


def verdict(found: LawComparison) -> str:
    """What the loss says, in a sentence without its end."""
    least, largest = found.budgets[0], found.budgets[-1]
    over = f"over {least:.3g} to {largest:.3g} FLOPs"
    names = _names(found)
    if found.verdict == comparison.NO_VERDICT:
        return f"No verdict {over}"
    if found.verdict == comparison.NO_DIFFERENCE:
        return f"No difference of the loss is shown {over}"
    parts = [
        f"{names[side]} has the lower loss from {low:.3g} to {high:.3g} FLOPs"
        for low, high, side in found.better
    ]
    covered = [row[:2] for row in found.better]
    whole = covered == [(covered[0][0], covered[0][1])] and (
        covered[0][0] <= least * 1.001 and covered[0][1] >= largest * 0.999
    )
    if whole:
        return f"{names[found.better[0][2]]} has the lower loss {over}"
    return "; ".join(parts) + f"; elsewhere {over} no difference is shown"


def law_said(name: str, law: ComparedLaw | Refusal, found: LawComparison) -> str:
    """The exponents of one quantity and their difference."""
    if isinstance(law, Refusal):
        return f"refused: {law.what}: {law.why}"
    a, b = law.exponents
    i = law.difference_interval
    shown = "" if law.differs else ": no difference shown"
    slope = " (mean slope of ln L, E = 0)" if name == "L_opt" else ""
    return (
        f"{name}: exponents {a:.3f} {_ends(law.exponent_intervals[0], '.3f')} of "
        f"{found.first}, {b:.3f} {_ends(law.exponent_intervals[1], '.3f')} of "
        f"{found.second}{slope}; difference {law.difference:+.3f} {_ends(i, '+.3f')}"
        f"{shown}; at {found.middle:.3g} FLOPs {_SYMBOLS[name]} is {law.ratio:.4g} "
        f"times as large {_ends(law.ratio_interval, '.4g')}"
    )


def at_said(at: AtBudget | Refusal, found: LawComparison) -> str:
    """Loss and equal compute at one budget."""
    if isinstance(at, Refusal):
        return f"refused: {at.what}: {at.why}"
    said = (
        f"at {at.budget_flops:.3g} FLOPs the loss of {found.second} is "
        f"{at.loss_ratio:.4f} times that of {found.first} "
        f"{_ends(at.loss_ratio_interval, '.4f')}"
    )
    if isinstance(at.compute, EqualLoss):
        beyond = ", beyond the budgets compared" if at.compute.extrapolated else ""
        return (
            f"{said}; for equal loss it needs {at.compute.ratio:.3g} times the compute "
            f"{_ends(at.compute.interval, '.3g')}{beyond}"
        )
    return f"{said}; compute for equal loss refused: {at.compute.why}"


def crossing_said(found: LawComparison) -> str:
    """The budget of equal losses, or why there is none."""
    crossing = found.crossing
    if not isinstance(crossing, CrossingBudget):
        return f"Refused: {crossing.what}: {crossing.why}"
    return (
        f"The losses are equal at {crossing.budget_flops:.3g} FLOPs "
        f"{_ends(crossing.interval, '.3g')}; beyond it "
        f"{_names(found)[crossing.better_beyond]} has the lower one"
    )


def _names(found: LawComparison) -> Mapping[str, str]:
    return {"first": found.first, "second": found.second}


def _ends(i: Interval, digits: str) -> str:
    return f"[{i.low:{digits}}, {i.high:{digits}}]"
