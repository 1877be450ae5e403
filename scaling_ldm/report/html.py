"""Pieces of the page: words, figures and tables as HTML."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable
from html import escape

from scaling_ldm.report.format import NONE
from scaling_ldm.report.plotting import Plot
from scaling_ldm.report.table import Column, Row, Table

MOST_ROWS = 12  # a longer table is folded away
# Lines must not be broken inside these: a size, a number with its unit, an interval,
# names and ranges with a digit and a hyphen in them.
_WHOLE = re.compile(
    r"\b\d+ x \d+\b|\b\d+ px\b|\[[^\[\]&]{1,40}\]"
    r"|(?<![\w.+-])(?=[\w.+-]*\d)[\w.+]{1,16}(?:-[\w.+]{1,16})+(?<=\w)(?![\w+-]|\.\w)"
)


def prose(words: str) -> str:
    """Words as HTML; what belongs together stays on one line."""
    return _WHOLE.sub(r'<span class="whole">\g<0></span>', escape(words))


def paragraphs(lines: Iterable[str], label: str = "", kind: str = "") -> str:
    """Lines of plain words, a paragraph each.

    Args:
      lines: the words.
      label: a warning in front of each line.
      kind: the class of a box around them all.
    """
    bad = f'<span class="bad">{escape(label)}</span> ' if label else ""
    body = "".join(f"<p>{bad}{prose(line)}</p>" for line in lines)
    return f'<div class="{kind}">{body}</div>' if body and kind else body


def folded(title: str, inside: str) -> str:
    if not inside:
        return ""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def shown(title: str, found: Table | None) -> str:
    """A table under its title; a long one is folded away, as figures show its data."""
    if found is None or len(found.rows) <= MOST_ROWS:
        inside = table(found)
        return f"<h3>{escape(title)}</h3>{inside}" if inside else ""
    return folded(f"{title} ({len(found.rows)})", table(found))


def _file(folder: str, name: str, kind: str) -> str:
    """A link to a file of the report beside the page: a PDF or CSV file."""
    there = urllib.parse.quote(f"{folder}/{name}.{kind}")
    return f' <a href="{there}">{kind.upper()}</a>'


def figure(picture: Plot | None, kind: str = "") -> str:
    if picture is None:
        return ""
    return (
        f'<figure><div class="scroll {kind}">{picture.svg}</div>'
        f"<figcaption>{prose(picture.caption)}{_file('figures', picture.name, 'pdf')}"
        "</figcaption></figure>"
    )


def table(found: Table | None) -> str:
    """A table as HTML; columns in which no row has anything are left out."""
    if found is None or not found.rows:
        return ""
    columns = [c for c in found.columns if any(c.show(r) != NONE for r in found.rows)]
    head = "".join(
        f"<th{'' if c.number else ' class=words'}>{prose(c.title)}</th>"
        for c in columns
    )
    body = "".join(f"<tr>{_cells(columns, row)}</tr>" for row in found.rows)
    foot = ""
    if found.total is not None:
        foot = f"<tfoot><tr>{_cells(columns, found.total)}</tr></tfoot>"
    words = prose(found.caption) + _file("tables", found.name, "csv")
    caption = f'<p class="caption">{words}</p>'
    return (
        f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def _cells(columns: Iterable[Column], row: Row) -> str:
    cells = []
    for c in columns:
        words = c.show(row)
        long = len(words) > 36 and not c.number  # elsewhere a cell is one line
        bad = c.badge and words != "finished"
        names = ["words"] * (not c.number) + ["long"] * long + ["bad"] * bad
        kind = f' class="{" ".join(names)}"' if names else ""
        cells.append(f"<td{kind}>{prose(words) if long else escape(words)}</td>")
    return "".join(cells)
