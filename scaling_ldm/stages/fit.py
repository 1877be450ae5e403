"""Training records -> laws.json: the fitted laws, or the reasons why there are none."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from scaling_ldm import config, records
from scaling_ldm.laws import fit
from scaling_ldm.training import progress
from scaling_ldm.workdir import runs


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> list[records.FitResult]:
    """Fits each group of runs; those that are not trained are named in its result.

    Returns:
      A result for each group, as they are in laws.json; none if the plan has no
      budgets.
    """
    if not experiment.plan.budgets_flops:
        progress.say("no laws to fit: plan.steps gives every size the same steps")
        return []
    groups: dict[str, list[records.RunSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.group, []).append(spec)
    results = [_fit(experiment.fit, workdir, *group) for group in groups.items()]
    records.write_jsonl(workdir / "laws.json", results)
    for result in results:
        if result.group:
            progress.say(f"{result.group}:")
        for line in fit.summary(result):
            progress.say(line)
    return results


def _fit(
    cfg: config.FitConfig,
    workdir: pathlib.Path,
    group: str,
    specs: Sequence[records.RunSpec],
) -> records.FitResult:
    """The laws of one group. Runs that differ in their seed alone are replicates."""
    found, missing = [], []
    for spec in specs:
        record = runs.read_record(workdir, spec.run_id)
        if record is None:
            missing.append(f"{spec.run_id}: not trained yet")
        else:
            found.append(record)
    result = fit.fit_records(
        found,
        metric=cfg.metric,
        size=cfg.size,
        confidence=cfg.confidence,
        bootstrap=cfg.bootstrap,
        seed=cfg.seed,
    )
    return dataclasses.replace(
        result, excluded=(*missing, *result.excluded), group=group
    )
