"""The best learning rates, their law, and what other rates lose: words and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from scaling_ldm.laws import best_rates
from scaling_ldm.records import BestRate, RateFit, RateLaw, Refusal
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import Study
from scaling_ldm.report.table import (
    Table,
    cell,
    pick,
    ranged,
    refused,
    spread,
    text,
)

_SYMBOLS = {"params": "N", "tokens": "D", "batch_size": "B"}


def named(study: Study) -> Iterator[tuple[str, str, RateFit]]:
    """(name of the figure and table, title, fit) of each fit of learning rates."""
    several = len({fit.metric for fit in study.rates}) > 1
    taken: set[str] = set()
    for fit in study.rates:
        parts = [fit.group] if fit.group else []
        parts += [fmt.measure(fit.metric, fit.weights)] if several else []
        name = "_".join(["rates", *(re.sub(r"\W+", "_", part) for part in parts)])
        while name in taken:
            name += "_"
        taken.add(name)
        yield name, ", ".join(parts), fit


def tables(study: Study) -> list[Table]:
    """The tables of every fit of learning rates."""
    every = [(fit, name) for name, _, fit in named(study)]
    return [make(*one) for one in every for make in (table, excluded)]


def found(fit: RateFit) -> list[BestRate]:
    return [b for b in fit.best if isinstance(b, BestRate)]


def table(fit: RateFit, name: str) -> Table:
    """Each size, length and batch: its best rate and what others lose, or a refusal."""
    runs = {
        best_rates.name_of(*run[:3]): dict(
            zip(_SYMBOLS, map(float, run[:3]), strict=True)
        )
        for run in fit.runs
    }
    rows = []
    for b in fit.best:
        row: dict[str, Any] = {"group": fit.group} if fit.group else {}
        row |= pick(b, " ".join(_SYMBOLS))
        if isinstance(b, Refusal):
            row |= runs.get(b.group, {})
        row |= pick(b, "rates points") | spread(b, "rate")
        row |= pick(b, "loss lost_at_half lost_at_double") | refused(b)
        rows.append(row)
    columns = (
        cell(f"N, {fmt.spoken(fit.size)}", "params", fmt.prefixed),
        cell("D, tokens", "tokens", fmt.prefixed),
        cell("batch", "batch_size", fmt.plain),
        cell("rates", "rates", fmt.count),
        ranged("best rate", "rate", fmt.compact),
        cell("loss there", "loss", fmt.loss),
        cell("lost at half the rate", "lost_at_half", fmt.compact),
        cell("lost at double", "lost_at_double", fmt.compact),
        text("refused", "refused"),
    )
    caption = (
        f"Best learning rate of each size, length and batch, with {_level(fit)} "
        f"intervals, and how much higher the {fmt.measure(fit.metric, fit.weights)} is "
        "at half and at double that rate."
    )
    return Table(name, ". ".join(filter(None, (fit.group, caption))), rows, columns)


def _level(fit: RateFit) -> str:
    best = found(fit)
    return f"{100 * best[0].rate_interval.level:.0f}%" if best else "no"


def excluded(fit: RateFit, name: str) -> Table:
    """The runs that were left out."""
    rows = [{"excluded": line} for line in fit.excluded]
    columns = (text("run, and why it was left out", "excluded"),)
    return Table(f"{name}_excluded", "Runs without a rate.", rows, columns)


def said(fit: RateFit) -> list[str]:
    """What the runs say of the rate, in sentences."""
    best = found(fit)
    lines = []
    if fit.best:
        lines.append(
            f"{len(best)} of {len(fit.best)} combinations of size, length and batch "
            "have a best learning rate."
        )
    if isinstance(fit.law, RateLaw):
        lines.append(_law(fit.law))
    for name, words in (("lost_at_half", "Half"), ("lost_at_double", "Double")):
        lost = [value for b in best if (value := getattr(b, name)) is not None]
        if lost:
            least, most = fmt.compact(min(lost)), fmt.compact(max(lost))
            span = least if least == most else f"{least} to {most}"
            lines.append(f"{words} the best rate costs {span} of loss.")
    if fit.noise is not None and best:
        lines.append(
            f"The losses of single runs scatter by {fmt.compact(fit.noise)} about "
            "these parabolas."
        )
    return lines


def _law(law: RateLaw) -> str:
    level = f"{100 * law.intervals['coef'].level:.0f}%"
    powers = "; ".join(
        f"{_SYMBOLS[name]}: {fmt.plain(value)} "
        f"{fmt.bracket(law.intervals[name], fmt.plain)}"
        for name, value in law.exponents.items()
    )
    words = (
        f"A power law goes through {law.points} best rates, with the exponents "
        f" {powers} (in brackets {level} intervals)"
    )
    words += f" and the coefficient {fmt.compact(law.coef)}."
    flat = [
        _SYMBOLS[name]
        for name in law.exponents
        if law.intervals[name].low <= 0 <= law.intervals[name].high
    ]
    if flat:
        words += (
            f" The interval of the exponent of {' and of '.join(flat)} has 0 in it: "
            "no change of the rate is seen there."
        )
    if law.held:
        held = ", ".join(
            f"{_SYMBOLS[name]} = {fmt.prefixed(value)}"
            for name, value in law.held.items()
        )
        words += f" It was measured at {held} alone."
    return words


def refusals(fit: RateFit) -> list[str]:
    """What was refused, and why, a line each; alike ones in one line."""
    lines = []
    if isinstance(fit.law, Refusal):
        lines.append(f"The law of the learning rate: {fit.law.why}.")
    reasons: dict[str, int] = {}
    for b in fit.best:
        if isinstance(b, Refusal):
            reasons[b.reason] = reasons.get(b.reason, 0) + 1
    lines += [
        f"The best rate of {count} of {len(fit.best)}: {reason} (the table says which)."
        for reason, count in reasons.items()
    ]
    return lines
