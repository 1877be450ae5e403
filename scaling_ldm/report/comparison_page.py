"""The page of a comparison: compare.json -> compare/index.html, figures and tables."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from html import escape

from scaling_ldm import records
from scaling_ldm.laws import comparison_summary
from scaling_ldm.records import LawComparison, Refusal, places
from scaling_ldm.report import comparison_figures, comparison_tables, html, style
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import Plot
from scaling_ldm.report.table import Table

FILE, FOLDER = "compare.json", "compare"
_FOLDED = ("offsets", "minima", "left_out")
_TITLES = {
    "budgets": "At stated budgets",
    "offsets": "Laws of the loss with an offset",
    "minima": "Minima",
    "left_out": "Without each budget in turn",
}


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir`/compare and returns the path of its index.html.

    Raises:
      FileNotFoundError: there is no compare.json.
      Damaged: it holds something else.
    """
    workdir = places.place(workdir)
    found = records.read_jsonl(workdir / FILE)
    if not all(isinstance(one, (LawComparison, Refusal)) for one in found):
        raise records.Damaged(f"{workdir / FILE}: it holds no comparison")
    folder = workdir / FOLDER
    for name, kinds in (("figures", ("png", "pdf")), ("tables", ("csv",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for kind in kinds:  # an earlier comparison may have had parts that this lacks
            for old in (folder / name).glob(f"*.{kind}"):
                old.unlink(missing_ok=True)
    parts = []
    for number, one in enumerate(found, 1):
        suffix = f"_{number}" if len(found) > 1 else ""
        plot, tables = None, []
        if isinstance(one, LawComparison):
            plot = comparison_figures.draw(one, f"laws{suffix}")
            tables = comparison_tables.tables(one, suffix)
        if plot is not None:
            for kind, data in (("png", plot.png), ("pdf", plot.pdf)):
                path = folder / "figures" / f"{plot.name}.{kind}"
                records.write_file(path, lambda file, data=data: file.write(data))
        for table in tables:
            records.write_text(folder / "tables" / f"{table.name}.csv", table.csv())
        parts.append(_part(one, plot, tables, suffix))
    index = folder / "index.html"
    records.write_text(index, _page(found, parts))
    return index


def _page(found: Sequence[LawComparison | Refusal], parts: Sequence[str]) -> str:
    names = dict.fromkeys(_title(one) for one in found)
    title = "; ".join(names)
    headline = "".join(
        _heading(one, len(found))
        + html.paragraphs([f"{comparison_summary.verdict(one)}."])
        if isinstance(one, LawComparison)
        else _heading(one, len(found)) + html.paragraphs([f"{one.why}."], "Refused:")
        for one in found
    )
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<div class="headline">{headline}</div>',
            *filter(None, parts),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style.sheet(body)}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _title(one: LawComparison | Refusal) -> str:
    if isinstance(one, Refusal):
        return one.group
    return f"{one.second} against {one.first}"


def _heading(one: LawComparison | Refusal, count: int) -> str:
    """Which comparison it is, where there are several."""
    if count < 2:
        return ""
    of = f", {fmt.measure(one.metric, '')}" if isinstance(one, LawComparison) else ""
    return f'<p class="group">{escape(_title(one) + of)}</p>'


def _part(
    found: LawComparison | Refusal,
    plot: Plot | None,
    tables: Sequence[Table],
    suffix: str,
) -> str:
    """What one comparison rests on; a refusal stands in the headline alone."""
    if isinstance(found, Refusal):
        return ""
    of = {table.name.removesuffix(suffix): table for table in tables}
    measure = fmt.measure(found.metric, found.weights)
    crossing = comparison_summary.crossing_said(found)
    pieces = [
        f"<h2>{escape(f'{_title(found)}: {measure}')}</h2>" if suffix else "",
        html.paragraphs([_how(found, measure), f"{crossing}."]),
        html.paragraphs([f"{note}." for note in found.notes], kind="alarm"),
        html.figure(plot, "wide"),
        html.table(of.get("laws")),
        '<p class="soft">Paper B (arXiv 2410.08184, section 4) reads exponents so: on '
        "the same data, the better model has the smaller exponent of N and the larger "
        "one of D; for the same model, better data have the smaller exponent of D. "
        "Here only a lower loss counts as better.</p>",
        html.shown(_TITLES["budgets"], of.get("budgets")),
    ]
    pieces += [html.folded(_TITLES[name], html.table(of.get(name))) for name in _FOLDED]
    pieces.append(html.folded("Left out", html.paragraphs(found.excluded)))
    return "\n".join(filter(None, pieces))


def _how(found: LawComparison, measure: str) -> str:
    """What was compared, and whether runs were paired."""
    said = (
        f"Compared is the {measure} over {len(found.budgets)} budgets from "
        f"{fmt.scientific(found.budgets[0])} to {fmt.scientific(found.budgets[-1])} "
        "FLOPs. "
    )
    if not found.paired:
        return said + (
            "Runs are not paired, as plans, seeds or data differ: the noise of both "
            "sides counts as independent."
        )
    return said + (
        "Runs are paired: they share shapes, seeds and data. The drawn errors of their "
        f"least losses have a correlation of {fmt.plain(found.correlation, 2)}."
    )
