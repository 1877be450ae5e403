"""Reads a working directory and writes its report: a page, figures and tables.

    path = scaling_ldm.report.write("runs/quickstart")

What it reads, all relative to the working directory: `runs.jsonl` (needed),
`experiment.json`, `runs/<run_id>/record.json` and `metrics.jsonl`, the names in
`runs/<run_id>/checkpoints`, `laws.json`, `samples/record.json` and the images it names,
`evaluations.jsonl`, `frontier.json`, `environment.json`. What it writes:
`report/index.html`, `report/figures/*.png` and `*.pdf`, `report/tables/*.csv`. The same
inputs give the same bytes. No jax is imported.

May import: records, laws, frontier, workdir.
"""

from __future__ import annotations

import os
import pathlib

from scaling_ldm import records
from scaling_ldm.laws import fit
from scaling_ldm.report import (
    figures,
    frontier_section,
    law_tables,
    page,
    run_tables,
    study,
)
from scaling_ldm.report.table import Table

__all__ = ["write"]

# The published law drawn beside each fitted one: the same design, at larger budgets.
BESIDE = {
    "N_opt": "liang2024_in_context_n_opt",
    "D_opt": "liang2024_in_context_d_opt",
    "L_opt": "liang2024_in_context_loss",
}


def write(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir`/report and returns the path of its index.html.

    Raises:
      FileNotFoundError: `workdir` holds no plan.
    """
    workdir = pathlib.Path(workdir)
    found = study.read(workdir)
    published = fit.published()
    beside = {q: published[key] for q, key in BESIDE.items()}
    pictures = figures.draw(found, beside)
    tables = _tables(found, list(published.values()), list(beside.values()))
    folder = workdir / "report"
    for name, kinds in (("figures", ("png", "pdf")), ("tables", ("csv",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for kind in kinds:  # an earlier report may have had parts that this one lacks
            for old in (folder / name).glob(f"*.{kind}"):
                old.unlink()
    for picture in pictures:
        (folder / "figures" / f"{picture.name}.png").write_bytes(picture.png)
        (folder / "figures" / f"{picture.name}.pdf").write_bytes(picture.pdf)
    for table in tables:
        records.write_text(folder / "tables" / f"{table.name}.csv", table.csv())
    index = folder / "index.html"
    records.write_text(index, page.render(found, pictures, tables))
    return index


def _tables(found: study.Study, published: list, beside: list) -> list[Table]:
    """Every table the study has rows for; `runs`, `plan` and `ledger` always."""
    optional = [
        law_tables.minima(found),
        law_tables.laws(found, beside),
        law_tables.held_out(found),
        law_tables.parametric(found),
        law_tables.excluded(found),
        run_tables.samples(found),
        run_tables.evaluations(found),
    ]
    if found.frontier is not None:
        optional += frontier_section.tables(found.frontier)
    if found.config:
        optional.append(run_tables.pairs("config", "", found.config))
    if found.environment:
        optional.append(run_tables.pairs("environment", "", found.environment))
    return [
        run_tables.runs(found),
        run_tables.plan(found),
        run_tables.ledger(found),
        run_tables.costs(found),
        law_tables.published_laws(found, published),
        *(table for table in optional if table is not None),
    ]
