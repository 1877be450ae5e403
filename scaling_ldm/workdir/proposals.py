"""Which runs to add to a fitted study (config.plan.next), as lines for people."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from scaling_ldm import config, records
from scaling_ldm.config import shapes
from scaling_ldm.laws import next_runs
from scaling_ldm.laws.narrate import si, table
from scaling_ldm.records import FitResult, Refusal, RunSpec, results
from scaling_ldm.workdir import laws_from, runs

_BEYOND = 1.5  # how far from the sizes of a budget a new one may lie, as a factor
Size = tuple[int, int]


def lines(
    experiment: config.Experiment, workdir: pathlib.Path, specs: Sequence[RunSpec]
) -> list[str]:
    """The proposals of config.plan.next for a study that is fitted, or a refusal.

    Args:
      specs: all runs of the plan.

    Raises:
      ConfigError: there are no laws in `workdir`, or those of several groups.
    """
    cfg = experiment.plan
    found = laws_from.read("", "config.plan.next", experiment.fit.metrics[0], workdir)
    fit = found.found
    assert isinstance(fit, FitResult)
    points = _points(workdir, specs, fit)
    sizes = _sizes(experiment, specs, fit)
    candidates = dict(_candidates(points, sizes))
    proposed = next_runs.propose(
        points,
        list(candidates),
        target=cfg.budget,
        count=cfg.next,
        quantity=cfg.next_of,
        level=experiment.fit.confidence,
        seed=experiment.fit.seed,
    )
    if isinstance(proposed, Refusal):
        return ["", f"no {proposed.what}: {proposed.why}"]
    return ["", *_said(experiment, proposed, candidates, sizes, specs)]


def _points(
    workdir: pathlib.Path, specs: Sequence[RunSpec], fit: FitResult
) -> list[tuple[float, float, float]]:
    """(budget, N, loss) of the finished runs that `fit` is of."""
    ours = [spec for spec in specs if spec.group == fit.group]
    rows = results.at_points(records.read_table(workdir), ours)
    of_fit = results.of(rows, fit.metric, fit.weights)
    over = {spec.run_id: runs.read_record(workdir, spec.run_id) for spec in ours}
    return [
        (row.budget_flops, float(getattr(row, fit.size)), row.value)
        for row in of_fit
        if row.protocol_hash == fit.protocol_hash
        and results.is_result(row, over.get(row.run_id))
        and math.isfinite(row.value)
    ]


def _sizes(
    experiment: config.Experiment, specs: Sequence[RunSpec], fit: FitResult
) -> dict[Size, float]:
    """The shapes of the plan and those between them -> N."""
    from scaling_ldm.training import shape_search  # it needs jax

    known = {(s.width, s.depth): float(getattr(s, fit.size)) for s in specs}
    widths = [width for width, _ in known]
    index = 0 if fit.size == "params" else 1
    for shape in shapes.family(experiment):
        if shape[0] > max(widths):
            break
        if shape[0] > min(widths) and shape not in known:
            if shapes.can_be_built(experiment, shape):
                counted = shape_search.counted(experiment, shape)
                known[shape] = float(counted[index])
    return known


def _candidates(
    points: Sequence[tuple[float, float, float]], sizes: Mapping[Size, float]
) -> Iterator[tuple[tuple[float, float], Size]]:
    """((budget, N), shape) of runs that are not there, near the sizes of a budget."""
    for budget in sorted({c for c, _, _ in points}):
        there = [n for c, n, _ in points if c == budget]
        for shape, n in sizes.items():
            near = min(there) / _BEYOND <= n <= max(there) * _BEYOND
            if near and not any(math.isclose(n, m, rel_tol=1e-9) for m in there):
                yield (budget, n), shape


def _said(
    experiment: config.Experiment,
    found: next_runs.Proposal,
    candidates: Mapping[tuple[float, float], Size],
    sizes: Mapping[Size, float],
    specs: Sequence[RunSpec],
) -> list[str]:
    level = f"{100 * found.level:g}%"
    said = [
        f"next runs, for {found.quantity} at {found.target:.4g} FLOPs, which the noise "
        f"of the losses leaves open by a factor {found.factor:.4g} ({level}):"
    ]
    cells = [["run", "budget", "width x depth", "N", "factor after it"]]
    chosen = []
    for number, run in enumerate(found.runs, 1):
        shape = candidates[run.budget, run.n]
        chosen.append((run.budget, shape))
        cells.append(
            [
                *(str(number), f"{run.budget:.4g}", f"{shape[0]} x {shape[1]}"),
                *(si(run.n), f"{run.factor:.4g}"),
            ]
        )
    said += table(cells)
    spent = sum(run.budget for run in found.runs)
    whole = sum(spec.planned_flops * spec.own_share for spec in specs)
    said.append(
        f"together {spent:.4g} FLOPs, {spent / whole:.2%} of what the plan takes"
    )
    every = {*experiment.plan.sizes, *(shape for _, shape in chosen)}
    ordered = sorted(every, key=lambda shape: sizes.get(shape, math.inf))
    listed = ", ".join(f"({w}, {d})" for w, d in ordered)
    said.append(f"plan them with --config.plan.sizes='({listed})'")
    said[-1] += " --config.plan.sizes_per_budget=0"
    if not experiment.plan.axes:
        rows = [
            experiment.plan.budgets_flops.index(budget) * len(ordered)
            + ordered.index(shape)
            for budget, shape in chosen
        ]
        said[-1] += f" --run={','.join(map(str, rows))}"
    return said
