"""Which rows of a plan are still to be trained.

A row is missing while it has no record. A run that ended with a loss that is not finite
has one, so it is not missing. A row that another command trains at this moment is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from scaling_ldm import config, records
from scaling_ldm.workdir import ownership, runs


def rows(
    workdir: pathlib.Path, numbered: Iterable[tuple[int, records.RunSpec]]
) -> list[tuple[int, records.RunSpec]]:
    """Those of the given rows (number in the plan, spec) that have no record.

    Raises:
      ConfigError: a record is of another recipe, number of steps or budget.
      Damaged: a record cannot be read.
    """
    return [
        (number, spec)
        for number, spec in numbered
        if runs.read_record_of(workdir, spec) is None
    ]


def of_plan(
    experiment: config.Experiment, workdir: pathlib.Path
) -> list[tuple[int, records.RunSpec]]:
    """The missing rows of the plan in a working directory; nothing is written.

    Raises:
      ConfigError: there is no plan, or the directory is another experiment's.
      NewerVersion: a newer version of the library wrote it.
      Damaged: a file cannot be read.
    """
    if not (workdir / "runs.jsonl").exists():
        raise config.ConfigError(
            f"no plan in {workdir}: run --stages=plan,encode there first"
        )
    ownership.check(ownership.as_made(experiment, workdir, ()), workdir)
    return rows(workdir, enumerate(records.read_plan(workdir)))


def show(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Prints the number and the run_id of each missing row; raises as `of_plan`."""
    for number, spec in of_plan(experiment, workdir):
        print(number, spec.run_id, flush=True)
