"""Reads a working directory and writes its report: a page, figures and tables.

    path = scaling_ldm.report.write("runs/quickstart")

It reads `runs.jsonl`, which must be there, and what it finds of `experiment.json`,
`runs/<run_id>/record.json`, `measurements.jsonl`, `metrics.jsonl` and `attempts.jsonl`,
the names in `runs/<run_id>/checkpoints`, `laws.json`, `samples/record.json` and the
pictures that it names, `evaluations.jsonl`, `frontier.json` and `environment.json`. It
writes `report/index.html`, `report/figures/*.png` and `*.pdf`, and
`report/tables/*.csv`; of these, measurements.csv has every row of the table of
measurements that could be read. The same inputs give the same bytes. No jax is
imported.

May import: records, laws, frontier, workdir.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from scaling_ldm import records
from scaling_ldm.laws import converted, fit
from scaling_ldm.laws.converted import ConvertedStudy
from scaling_ldm.laws.published import PublishedLaw
from scaling_ldm.records import places
from scaling_ldm.report import (
    evaluation_tables,
    figures,
    frontier_tables,
    goodput_tables,
    law_tables,
    page,
    published_laws,
    rate_tables,
    reading,
    run_tables,
    study,
    training_quality,
)
from scaling_ldm.report.table import Table

__all__ = ["write"]

# The published law drawn beside each fitted one: the same design, at larger budgets.
BESIDE = {
    "N_opt": "liang2024_in_context_n_opt",
    "D_opt": "liang2024_in_context_d_opt",
    "L_opt": "liang2024_in_context_loss",
}


def write(workdir: str | os.PathLike, published: Sequence[str] = ()) -> pathlib.Path:
    """Writes `workdir`/report and returns the path of its index.html.

    Args:
      published: studies of laws/published.json whose laws are drawn in the figures;
        "all": every one. As config.report.published.

    Raises:
      FileNotFoundError: `workdir` holds no plan.
      KeyError: there is no such published study.
    """
    names, unknown = converted.named(published)
    if unknown:
        raise KeyError(f"no published laws {unknown}; known: {converted.studies()}")
    overlaid = [converted.converted(name) for name in names]
    workdir = places.place(workdir)
    found = reading.read(workdir)
    beside = {q: fit.published()[key] for q, key in BESIDE.items()}
    pictures = figures.draw(found, beside, overlaid)
    tables = _tables(found, list(beside.values()), overlaid)
    folder = workdir / "report"
    for name, kinds in (("figures", ("png", "pdf")), ("tables", ("csv",))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for kind in kinds:  # an earlier report may have had parts that this one lacks
            for old in (folder / name).glob(f"*.{kind}"):
                old.unlink(missing_ok=True)  # another report may do the same
    for picture in pictures:
        for kind, data in (("png", picture.png), ("pdf", picture.pdf)):
            path = folder / "figures" / f"{picture.name}.{kind}"
            records.write_file(path, lambda file, data=data: file.write(data))
    for table in tables:
        records.write_text(folder / "tables" / f"{table.name}.csv", table.csv())
    rows = [row for run in found.runs for row in found.rows.get(run.run_id, ())]
    records.write_csv(rows, folder / "tables" / "measurements.csv")
    index = folder / "index.html"
    records.write_text(index, page.render(found, pictures, tables))
    return index


def _tables(
    found: study.Study, beside: list[PublishedLaw], overlaid: list[ConvertedStudy]
) -> list[Table]:
    """Every table that has rows; `runs`, `ledger` and `costs` always."""
    every = [
        law_tables.published_laws(found, list(fit.published().values())),
        published_laws.table(overlaid, max(found.budgets())),
        *law_tables.tables(found, beside),
        *rate_tables.tables(found),
        *([run_tables.losses(found)] if found.varied else []),
        run_tables.strata(found),
        goodput_tables.whole(found),
        goodput_tables.runs(found),
        run_tables.samples(found),
        evaluation_tables.evaluations(found),
        run_tables.pairs("config", found.config, "The resolved configuration."),
        run_tables.pairs("environment", found.environment, "Where this was run."),
    ]
    if found.frontier is not None:
        every += frontier_tables.tables(found.frontier)
    every += map(training_quality.pairs, training_quality.comparisons(found))
    always = [run_tables.runs(found), run_tables.ledger(found), run_tables.costs(found)]
    return [*always, *(table for table in every if table.rows)]
