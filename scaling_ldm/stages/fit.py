"""The fit stage: the table of measurements -> laws.json, with laws or refusals.

The number of each run at its last planned step is fitted, and that of a trajectory at
each of its smaller budgets. An evaluation of a checkpoint belongs to the step of it.

Where a study has an axis of learning rates, the best rates and their law are fitted,
too. Their groups are those of the other axes.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from scaling_ldm import config, records
from scaling_ldm.config import axes, names, run_names
from scaling_ldm.laws import best_rates, fit, rates, summary
from scaling_ldm.records import results, trajectories
from scaling_ldm.records.measurements import in_words
from scaling_ldm.training import progress
from scaling_ldm.workdir import runs


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> list[records.FitResult | records.RateFit]:
    """Fits each metric in each group of runs; runs without a number are named.

    Returns:
      What laws.json has: a FitResult for each group and metric, ordered by group; none
      if the plan has no budgets. Then a RateFit for each group of runs that differ in
      their rate, if there is an axis of rates.

    Raises:
      ConfigError: no run has a metric that is asked for, or two rows with the same key
        have different values.
    """
    budgets, varied = (
        experiment.plan.budgets_flops,
        run_names.varies_rate(experiment.plan),
    )
    if not budgets:
        progress.say("no laws to fit: plan.steps gives every size the same steps")
    if not budgets and not varied:
        return []
    groups: dict[str, list[records.RunSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.group, []).append(spec)
    try:
        rows = results.at_points(records.read_table(workdir), specs)
    except records.MeasurementConflict as e:
        raise config.ConfigError(f"the laws cannot be fitted: {e}") from e
    _check_metrics(experiment, rows, groups)
    evaluations = records.read_evaluations(workdir)
    found: list[records.FitResult | records.RateFit] = []
    for group, of_group in groups.items() if budgets else ():
        for metric in experiment.fit.metrics:
            result = _fit(
                experiment, metric, workdir, group, of_group, rows, evaluations
            )
            _say(group, fit.summary(result))
            found.append(result)
    if varied:
        best = _rates(experiment, workdir, specs, rows)
        for result in best:
            _say(result.group, summary.rates_summary(result))
        found += best
    records.write_jsonl(workdir / "laws.json", found)
    return found


def _say(group: str, lines: Sequence[str]) -> None:
    if group:
        progress.say(f"{group}:")
    for line in lines:
        progress.say(line)


def _weights(
    experiment: config.Experiment, metric: str, specs: Sequence[records.RunSpec]
) -> str:
    """The weights of one group whose numbers are fitted."""
    kept = config.with_overrides(experiment, specs[0].overrides).optimizer.averages
    return results.weights_meant(metric, experiment.fit.weights, kept)


def _check_metrics(
    experiment: config.Experiment,
    rows: Sequence[records.Measurement],
    groups: dict[str, list[records.RunSpec]],
) -> None:
    """Refuses a metric, or weights of it, that no run has (ConfigError).

    Args:
      rows: of the last steps of runs; without any, nothing is refused.
    """
    problems, cfg = [], experiment.fit
    for beginning in cfg.protocols if rows else ():
        hashes = {r.protocol_hash for r in rows if r.metric in cfg.metrics}
        if not any(name.startswith(beginning) for name in hashes):
            problems.append(
                f"config.fit.protocols = {cfg.protocols}: no number that is fitted "
                f"has a protocol {beginning}...; there are {', '.join(sorted(hashes))}"
            )
    there = sorted({row.metric for row in rows})
    for metric in cfg.metrics if rows else ():
        if metric not in there:
            close = names.nearest(metric, there)
            hint = f"did you mean {close}? " if close else ""
            problems.append(
                f"config.fit.metrics = {cfg.metrics}: no run has {metric} at its last "
                f"step; {hint}there are {', '.join(there)}"
            )
            continue
        measured = sorted({row.weights for row in rows if row.metric == metric})
        wanted = {_weights(experiment, metric, specs) for specs in groups.values()}
        if not wanted & set(measured):
            problems.append(
                f"config.fit.weights = {cfg.weights!r}: no run has "
                f"{in_words(metric)} of {', '.join(sorted(wanted))} at its last step; "
                f"there are {', '.join(measured)}"
            )
    if problems:
        raise config.ConfigError("\n".join(problems))


def _fit(
    experiment: config.Experiment,
    metric: str,
    workdir: pathlib.Path,
    group: str,
    specs: Sequence[records.RunSpec],
    rows: Sequence[records.Measurement],
    evaluations: Sequence[records.EvalRecord],
) -> records.FitResult:
    """The laws of one group. Runs that differ in their seed alone are replicates."""
    found, missing = [], []
    for spec in specs:
        record = runs.read_record(workdir, spec.run_id)
        if record is None:
            missing.append(f"{spec.run_id}: not trained yet")
        else:
            found.append(record)
            path = runs.run_files(workdir, spec.run_id).measurements
            missing += [
                f"{spec.run_id}: nothing was measured at {point.budget_flops:.6g} FLOPs"
                for point in trajectories.unmeasured(path, record, spec)
            ]
    cfg = experiment.fit
    result = fit.fit_records(
        found,
        rows,
        metric=metric,
        weights=_weights(experiment, metric, specs),
        size=cfg.size,
        asked=cfg.protocols,
        protocols={r.protocol_hash: r.protocol for r in evaluations},
        confidence=cfg.confidence,
        bootstrap=cfg.bootstrap,
        seed=cfg.seed,
        estimator=cfg.estimator,
        window=cfg.window or None,
        huber=cfg.huber or None,
        extend=cfg.extend,
    )
    return dataclasses.replace(
        result, excluded=(*missing, *result.excluded), group=group
    )


def _rates(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
    rows: Sequence[records.Measurement],
) -> list[records.RateFit]:
    """The best rates of each group of runs that differ in their rate, by metric."""
    groups: dict[str, list[records.RunSpec]] = {}
    within = axes.SEED, axes.RATE, axes.BATCH
    for spec in specs:
        name = run_names.group_of(experiment.plan, spec.overrides, within)
        groups.setdefault(name, []).append(spec)
    found = []
    for name, of_group in groups.items():
        trained = [runs.read_record(workdir, spec.run_id) for spec in of_group]
        missing = [
            f"{spec.run_id}: not trained yet"
            for spec, record in zip(of_group, trained, strict=True)
            if record is None
        ]
        for metric in experiment.fit.metrics:
            result = _rate_fit(
                experiment, metric, of_group, [r for r in trained if r], rows
            )
            excluded = (*missing, *result.excluded)
            found.append(dataclasses.replace(result, excluded=excluded, group=name))
    return found


def _rate_fit(
    experiment: config.Experiment,
    metric: str,
    specs: Sequence[records.RunSpec],
    trained: Sequence[records.TrainRecord],
    rows: Sequence[records.Measurement],
) -> records.RateFit:
    """The best rates of one group. Cells that are planned at one rate are not asked."""
    cfg, weights = experiment.fit, _weights(experiment, metric, specs)
    planned: dict[tuple[float, ...], set[float]] = {}
    ends: dict[tuple[float, ...], list[results.Point]] = {}
    budgets: dict[str, float] = {}
    for point in [p for spec in specs for p in spec.points()]:
        cell = point.params, point.tokens, point.batch_size
        planned.setdefault(cell, set()).add(point.learning_rate)
        ends.setdefault(cell, []).append((point.run_id, point.steps))
        size = float(getattr(point, cfg.size))
        key = best_rates.name_of(size, point.tokens, point.batch_size)
        budgets[key] = point.budget_flops
    asked = [p for c, several in planned.items() if len(several) > 1 for p in ends[c]]
    try:
        result = rates.rate_records(
            trained,
            rows,
            metric=metric,
            weights=weights,
            size=cfg.size,
            asked=cfg.protocols,
            points=asked,
            confidence=cfg.confidence,
        )
    except ValueError as e:  # a metric or protocols that are no one loss
        nothing = rates.rate_law([], metric=metric, size=cfg.size)
        refused = records.Refusal(quantity=rates.LAW, reason=str(e), detail="")
        return dataclasses.replace(nothing, law=refused, weights=weights)
    if not experiment.plan.budgets_flops:  # each size has its own
        return result
    return dataclasses.replace(
        result, best=tuple(_with_budget(best, budgets) for best in result.best)
    )


def _with_budget(
    best: records.BestRate | records.Refusal, budgets: Mapping[str, float]
) -> records.BestRate | records.Refusal:
    """With the planned budget of its cell, which is found by its name."""
    name = best.group if isinstance(best, records.Refusal) else ""
    if isinstance(best, records.BestRate):
        name = best_rates.name_of(best.params, best.tokens, best.batch_size)
    return dataclasses.replace(best, budget_flops=budgets.get(name))
