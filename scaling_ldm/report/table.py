"""A table: raw values for CSV, and the same values rounded for reading."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

from scaling_ldm.records import Interval
from scaling_ldm.report.format import NONE

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    show: Callable[[Row], str]
    number: bool = True  # aligned to the right
    badge: bool = False  # drawn as a warning where it is not "finished"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """`rows` is what the CSV holds; `columns` is how the page shows it."""

    name: str
    caption: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    total: Row | None = None

    def csv(self) -> str:
        out = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return out.getvalue()


def text(title: str, key: str, badge: bool = False) -> Column:
    return Column(title, lambda r: str(r[key] or NONE), False, badge)


def cell(title: str, key: str, show: Callable[[Any], str]) -> Column:
    return Column(title, lambda r: show(r[key]))


def ranged(title: str, key: str, show: Callable[[Any], str]) -> Column:
    """A value with its interval, kept as `key`, `key`_low and `key`_high."""

    def both(row: Row) -> str:
        if row[key] is None:
            return NONE
        if row[f"{key}_low"] is None:
            return show(row[key])
        return (
            f"{show(row[key])} [{show(row[f'{key}_low'])}, {show(row[f'{key}_high'])}]"
        )

    return Column(title, both)


def spread(key: str, value: float | None, interval: Interval | None) -> dict:
    low, high = (interval.low, interval.high) if interval else (None, None)
    return {key: value, f"{key}_low": low, f"{key}_high": high}
