"""The tables of a comparison."""

from __future__ import annotations

from typing import Any

from scaling_ldm.records import (
    AtBudget,
    ComparedLaw,
    EqualLoss,
    Interval,
    LawComparison,
    Refusal,
)
from scaling_ldm.report import format as fmt
from scaling_ldm.report.table import (
    Column,
    Table,
    bracketed,
    cell,
    ranged,
    refused,
    spread,
    text,
)

_LAW = "first second difference at_middle_first at_middle_second ratio"


def tables(found: LawComparison, suffix: str) -> list[Table]:
    """Those that have rows.

    Args:
      suffix: ends their names.
    """
    every = [
        laws(found, suffix),
        budgets(found, suffix),
        offsets(found, suffix),
        minima(found, suffix),
        left_out(found, suffix),
    ]
    return [table for table in every if table.rows]


def laws(found: LawComparison, suffix: str) -> Table:
    """Exponents and values in the middle, of both and of their difference."""
    rows = []
    for name, law in found.laws.items():
        row: dict[str, Any] = {"quantity": name}
        for key in _LAW.split():
            row |= {key: None, f"{key}_low": None, f"{key}_high": None}
        if isinstance(law, ComparedLaw):
            row |= _with("first", law.exponents[0], law.exponent_intervals[0])
            row |= _with("second", law.exponents[1], law.exponent_intervals[1])
            row |= spread(law, "difference ratio")
            of_a, of_b = law.at_middle_intervals
            row |= _with("at_middle_first", law.at_middle[0], of_a)
            row |= _with("at_middle_second", law.at_middle[1], of_b)
        shown = isinstance(law, ComparedLaw) and law.differs
        row["shown"] = "yes" if shown else "no"
        rows.append(row | refused(law))

    def in_middle(side: str) -> Column:
        key = f"at_middle_{side}"
        return Column(
            f"in the middle, {side}",
            lambda r: bracketed(r, key, fmt.quantity(r["quantity"])),
        )

    columns = (
        text("quantity", "quantity"),
        ranged("exponent, first", "first", fmt.plain),
        ranged("exponent, second", "second", fmt.plain),
        ranged("difference", "difference", fmt.plain),
        text("shown to differ", "shown"),
        in_middle("first"),
        in_middle("second"),
        ranged("second / first", "ratio", lambda x: fmt.plain(x, 4)),
        text("refused", "refused"),
    )
    caption = (
        f"First: {found.first}. Second: {found.second}. The middle is "
        f"{fmt.scientific(found.middle)} FLOPs. The exponent of L is the mean slope of "
        "ln L over the budgets, with E = 0 on both sides. N counts "
        f"{fmt.spoken(found.size)}, D {found.data}. {_level(found)} intervals."
    )
    return Table(f"laws{suffix}", caption, rows, columns)


def budgets(found: LawComparison, suffix: str) -> Table:
    """The losses, and the compute for equal loss, at each budget that is stated."""
    rows = []
    for at in found.at_budgets:
        row = {"budget_flops": at.budget_flops} | _with("loss_ratio", None, None)
        row |= _with("compute", None, None) | {"extrapolated": None}
        why = refused(at)
        if isinstance(at, AtBudget):
            row |= spread(at, "loss_ratio")
            why = refused(at.compute)
            if isinstance(at.compute, EqualLoss):
                row |= _with("compute", at.compute.ratio, at.compute.interval)
                row["extrapolated"] = "yes" if at.compute.extrapolated else "no"
        rows.append(row | why)
    columns = (
        cell("budget of the first, FLOPs", "budget_flops", fmt.scientific),
        ranged("loss, second / first", "loss_ratio", lambda x: fmt.plain(x, 4)),
        ranged("compute of the second for equal loss", "compute", fmt.plain),
        text("beyond the budgets", "extrapolated"),
        text("refused", "refused"),
    )
    caption = (
        "Compute for equal loss is a multiple of the first's budget: below 1, the "
        f"second needs less. {_level(found)} intervals; those of the loss hold at all "
        "budgets together."
    )
    return Table(f"budgets{suffix}", caption, rows, columns)


def offsets(found: LawComparison, suffix: str) -> Table:
    """The law of the loss with an offset, of each side."""
    rows = []
    for name, law in zip((found.first, found.second), found.offset_laws, strict=True):
        row = {"side": name} | spread(law, "offset exponent coef")
        rows.append(row | refused(law))
    columns = (
        text("side", "side"),
        ranged("offset E", "offset", fmt.loss),
        ranged("exponent", "exponent", fmt.plain),
        ranged("coefficient", "coef", fmt.compact),
        text("refused", "refused"),
    )
    caption = (
        "L = E + A C^b over the budgets that are compared. Exponents beside different "
        f"offsets may not be compared. {_level(found)} intervals."
    )
    return Table(f"offsets{suffix}", caption, rows, columns)


def minima(found: LawComparison, suffix: str) -> Table:
    """The minima of both at each budget."""
    rows = []
    for name, law in found.laws.items():
        if isinstance(law, ComparedLaw):
            rows += [
                {
                    "quantity": name,
                    "budget_flops": budget,
                    "first": a,
                    "second": b,
                    "ratio": b / a,
                }
                for budget, a, b in law.minima
            ]

    def value(title: str, key: str) -> Column:
        return Column(title, lambda r: fmt.quantity(r["quantity"])(r[key]))

    columns = (
        text("quantity", "quantity"),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        value("first", "first"),
        value("second", "second"),
        cell("second / first", "ratio", lambda x: fmt.plain(x, 4)),
    )
    return Table(f"minima{suffix}", "The minima that are compared.", rows, columns)


def left_out(found: LawComparison, suffix: str) -> Table:
    """The difference of the exponents without each budget in turn."""
    rows = [
        {"quantity": name, "budget_flops": budget, "difference": difference}
        for name, law in found.laws.items()
        if isinstance(law, ComparedLaw)
        for budget, difference in law.left_out
    ]
    columns = (
        text("quantity", "quantity"),
        cell("budget left out, FLOPs", "budget_flops", fmt.scientific),
        cell("difference of the exponents", "difference", fmt.plain),
    )
    caption = "The difference of the exponents without each budget in turn."
    return Table(f"left_out{suffix}", caption, rows, columns)


def _with(key: str, value: float | None, i: Interval | None) -> dict[str, Any]:
    ends = (i.low, i.high) if i else (None, None)
    return {key: value, f"{key}_low": ends[0], f"{key}_high": ends[1]}


def _level(found: LawComparison) -> str:
    levels = (
        law.difference_interval.level
        for law in found.laws.values()
        if not isinstance(law, Refusal)
    )
    level = next(levels, None)
    return "Bootstrap" if level is None else f"{100 * level:.0f}% bootstrap"
