"""Training records -> laws.json: the fitted laws, or the reasons why there are none."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from scaling_ldm import config, records
from scaling_ldm.laws import fit
from scaling_ldm.training import progress


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.FitResult | None:
    """Fits the runs that are trained; the others are named in the result.

    Returns:
      None where the plan has no budgets.
    """
    if not experiment.plan.budgets_flops:
        progress.say("no laws to fit: plan.steps gives every size the same steps")
        return None
    cfg, found, missing = experiment.fit, [], []
    for spec in specs:
        path = workdir / "runs" / spec.run_id / "record.json"
        if path.exists():
            found.append(records.loads(path.read_text()))
        else:
            missing.append(f"{spec.run_id}: not trained yet")
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
