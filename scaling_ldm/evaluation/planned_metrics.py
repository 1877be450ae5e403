"""Refuses, in a plan, metrics of the fit that no run will have."""

from __future__ import annotations

import contextlib
import pathlib

from scaling_ldm import config, records
from scaling_ldm.config import names, objective_kind
from scaling_ldm.records.measurements import LOSS, STRATA, TRAIN_LOSS, stratum


def of_no_run(experiment: config.Experiment, workdir: pathlib.Path | None) -> list[str]:
    """A line for each metric of config.fit.metrics that no run can have.

    A user's own objective may have any metric, and so may rows measured earlier.
    """
    known = {LOSS, TRAIN_LOSS, *map(stratum, range(STRATA))}
    strange = [metric for metric in experiment.fit.metrics if metric not in known]
    own = objective_kind.is_own(experiment.objective_kind)
    if not strange or own or not experiment.plan.budgets_flops:
        return []
    from scaling_ldm.evaluation import measures  # a second that few plans need

    cfg = experiment.evaluate
    if cfg.network != "none":
        for metric in cfg.metrics:
            known.update(measures.names(metric, cfg.network))
    if workdir is not None and (workdir / "runs.jsonl").exists():
        with contextlib.suppress(records.MeasurementConflict):  # fit says which
            known.update(row.metric for row in records.read_table(workdir))
    found = []
    for metric in strange:
        if metric not in known:
            close = names.nearest(metric, known)
            hint = f"did you mean {close}? " if close else ""
            found.append(
                f"config.fit.metrics = {experiment.fit.metrics}: no run will have "
                f"{metric}; {hint}these settings measure {', '.join(sorted(known))}"
            )
    return found
