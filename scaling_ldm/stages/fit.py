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
) -> records.FitResult | None:
    """Fits the runs that are trained; the others are named in the result.

    Returns:
      The result, or None if the plan has no budgets.
    """
    if not experiment.plan.budgets_flops:
        progress.say("no laws to fit: plan.steps gives every size the same steps")
        return None
    cfg, found, missing = experiment.fit, [], []
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
    result = dataclasses.replace(result, excluded=(*missing, *result.excluded))
    records.write_text(workdir / "laws.json", records.dumps(result) + "\n")
    for line in fit.summary(result):
        progress.say(line)
    return result
