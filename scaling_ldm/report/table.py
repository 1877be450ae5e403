"""A table: raw values for CSV, and the same values rounded for reading."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaling_ldm.records import Refusal
from scaling_ldm.report.format import NONE

Row = Mapping[str, Any]
Show = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    show: Callable[[Row], str]
    number: bool = True  # aligned to the right
    badge: bool = False  # drawn as a warning where it is not "finished"


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` is what the CSV holds; `columns` is how the page shows it."""

    name: str
    caption: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    total: Row | None = None

    def csv(self) -> str:
        out = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        return out.getvalue()


def text(title: str, key: str) -> Column:
    return Column(title, lambda r: str(r[key] or NONE), False)


def cell(title: str, key: str, show: Show) -> Column:
    return Column(title, lambda r: show(r[key]))


def ranged(title: str, key: str, show: Show) -> Column:
    """A value with its interval, kept as `key`, `key`_low and `key`_high."""
    return Column(title, lambda r: bracketed(r, key, show))


def bracketed(row: Row, key: str, show: Show) -> str:
    value, low, high = (row[k] for k in (key, f"{key}_low", f"{key}_high"))
    if value is None or low is None:
        return NONE if value is None else show(value)
    return f"{show(value)} [{show(low)}, {show(high)}]"


def pick(record: Any, fields: str) -> dict[str, Any]:
    """Fields of a record, named with spaces between; None where it has no such field.

    A refusal has none of the fields of the result that it stands for.
    """
    return {field: getattr(record, field, None) for field in fields.split()}


def spread(record: Any, fields: str) -> dict[str, Any]:
    """As `pick`; of each field also the ends of its interval."""
    row = {}
    for key, value in pick(record, fields).items():
        interval = getattr(record, f"{key}_interval", getattr(record, "interval", None))
        low, high = (interval.low, interval.high) if interval else (None, None)
        row |= {key: value, f"{key}_low": low, f"{key}_high": high}
    return row


def refused(found: Any) -> dict[str, str]:
    return {"refused": found.why if isinstance(found, Refusal) else ""}
