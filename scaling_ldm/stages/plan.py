"""The plan stage: an experiment -> its runs and their cost; uses no device."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import axes, nested, run_names
from scaling_ldm.evaluation import planned_metrics
from scaling_ldm.flops import peaks
from scaling_ldm.laws import tuned_rates
from scaling_ldm.models import denoisers
from scaling_ldm.records import trajectories
from scaling_ldm.records.runs import steps_of
from scaling_ldm.training import (
    capacity,
    optimizer,
    progress,
    rate_policies,
    step_memory,
    tracing,
    train_step,
)
from scaling_ldm.training.objective import Objective
from scaling_ldm.workdir import init_record, initial_weights, laws_from, tuned_from


@tracing.collecting_seldom()
def plan(
    experiment: config.Experiment, workdir: pathlib.Path | None = None
) -> list[records.RunSpec]:
    """One RunSpec per budget, combination of axes, and size, in the order they run.

    The sizes of a budget are those of `plan.sizes` that are nearest, in log N, to its
    expected optimum; N is that of the combination's network. The number of steps is
    such that the counted FLOPs meet the budget. With `plan.steps`, every size takes
    that many steps, and its budget is what they cost. With nested budgets, there is
    one RunSpec for each combination and size, that of its largest budget. With
    `plan.from_laws`, there is one size and budget for each combination.

    Args:
      workdir: of the study. It records the FLOPs spent on the weights that runs start
        from, so these may be gone.

    Raises:
      ConfigError: a run has fewer than `plan.minimum_steps` steps, its whole number of
        steps misses the budget by more than 1%, or an axis makes it impossible; the
        message has all such runs. Or the weights to start from do not fit.
    """
    if experiment.plan.from_laws:
        experiment = laws_from.one_run(experiment, workdir)
    cfg = experiment.plan
    possible, problems = _possible(experiment)
    problems = [*capacity.problems_of_plan(experiment), *problems]
    problems += planned_metrics.of_no_run(experiment, workdir)
    if problems:  # reported before FLOPs are counted, which takes longer
        raise _refusal(problems)
    variants = _variants(experiment, possible)
    rows, problems = [], []
    texts = run_names.budget_texts(cfg.budgets_flops)
    if cfg.steps:
        rows = [
            _row(variant, float(cfg.steps * size.cost.flops.model), size)
            for variant in variants
            for size in variant.ladder
            if variant.allows(None, size)
        ]
    for budget in cfg.budgets_flops:
        for variant in variants:
            for size in _around(variant.ladder, budget, cfg):
                if variant.allows(budget, size):
                    rows.append(_row(variant, budget, size, texts[budget]))
    if not cfg.steps:
        problems = [line for row in rows for line in _problems(row, cfg)]
        problems += _values_of_no_run(cfg, rows)
    rows, untuned = _tuned(experiment, rows, workdir)
    problems += untuned
    if cfg.reuse == nested.NESTED and not problems:
        rows, problems = trajectories.joined(rows)
    if cfg.reuse == nested.DECAY and not problems:
        rows, problems = trajectories.branched(rows, _stable(experiment, rows))
    if problems:
        raise _refusal(problems)
    return _started(experiment, rows, workdir)


def _stable(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> dict[str, int]:
    """run_id -> the steps of a run before its rate falls."""
    own = {r.run_id: config.with_overrides(experiment, r.overrides) for r in rows}
    return {
        r.run_id: optimizer.stable_steps(own[r.run_id].optimizer, r.steps) for r in rows
    }


def _tuned(
    experiment: config.Experiment,
    rows: list[records.RunSpec],
    workdir: pathlib.Path | None,
) -> tuple[list[records.RunSpec], list[str]]:
    """The rows with their measured rates (policy "tuned"), and why some have none.

    Raises:
      ConfigError: there are no measured rates.
    """
    if not tuned_from.is_tuned(experiment):
        return rows, []
    cfg, fit = experiment.optimizer, tuned_from.rates(experiment, workdir)
    found, problems = [], []
    for row in rows:
        params, by_law = getattr(row, fit.size), cfg.tuned_sizes == "law"
        rate = tuned_rates.tuned_rate(
            fit, params, row.batch_size, cfg.tuned_budget, by_law
        )
        if isinstance(rate, records.Refusal):
            size = f"{row.width} x {row.depth}"
            problems.append(f"{size}: {rate.what}: {rate.why}")
            continue
        given = {"learning_rate": rate.rate, "rate_source": rate.source}
        found.append(dataclasses.replace(row, **given))
    return found, list(dict.fromkeys(problems))


def _started(
    experiment: config.Experiment,
    rows: list[records.RunSpec],
    workdir: pathlib.Path | None,
) -> list[records.RunSpec]:
    """The rows with the FLOPs spent on the weights that they start from.

    Raises:
      ConfigError: these weights do not fit the network of a row, or are not there.
    """
    rows = step_memory.estimated(experiment, rows)
    if not experiment.train.init_from:
        return rows
    known = None if workdir is None else init_record.read(workdir)
    if initial_weights.is_there(experiment) or known is None:
        initial_weights.check(experiment, rows)
        spent = initial_weights.find(experiment).flops
    else:
        spent = known["pretraining_flops"]
    return [dataclasses.replace(row, pretraining_flops=spent) for row in rows]


def _problems(row: records.RunSpec, cfg: config.PlanConfig) -> list[str]:
    """Why a row cannot meet its budget; at most one reason."""
    name = f"{row.budget_flops:.3g} FLOPs, {row.width} x {row.depth}"
    name += f", {_values(row.overrides)}" if row.overrides else ""
    if row.steps < cfg.minimum_steps:
        return [
            f"{name}: {row.steps} steps of {row.batch_size} pictures, fewer "
            f"than config.plan.minimum_steps = {cfg.minimum_steps}; raise the "
            "budget, lower train.batch_size, or take a smaller size"
        ]
    if abs(row.planned_flops / row.budget_flops - 1) > 0.01:
        return [
            f"{name}: {row.steps} whole steps spend {row.planned_flops:.4g} "
            "FLOPs, more than 1% from the budget; lower train.batch_size"
        ]
    return []


def _values_of_no_run(
    cfg: config.PlanConfig, rows: Sequence[records.RunSpec]
) -> list[str]:
    """A line for each value of an axis that no run has."""
    return [
        f"no run has {name} {run_names.value_text(value)}: config.plan.axes_only "
        "excludes every size that its budgets use; see config.plan.sizes_per_budget"
        for name, values in cfg.axes
        for value in values
        if not any(axes.chosen(row.overrides, name) == value for row in rows)
    ]


def _refusal(problems: Iterable[str]) -> config.ConfigError:
    return config.ConfigError(
        "this plan cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
    )


def _values(overrides: Mapping[str, Any]) -> str:
    """A run's value of each axis, for people."""
    return ", ".join(
        f"{path} {run_names.value_text(value)}" for path, value in overrides.items()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Variant:
    """One value of each axis, the experiment with them, and its sizes by parameters."""

    study: config.Experiment
    overrides: Mapping[str, Any]
    experiment: config.Experiment
    ladder: list[_Size]

    def allows(self, budget: float | None, size: _Size) -> bool:
        """Whether these values are for this budget (None: there are none) and size."""
        at = (size.width, size.depth)
        return axes.allows(self.study.plan, self.overrides, budget, at)


_Sizes = list[tuple[int, int]]


def _possible(
    study: config.Experiment,
) -> tuple[list[tuple[Mapping[str, Any], _Sizes]], list[str]]:
    """Every combination of values of the axes with the sizes that it can have.

    Returns:
      The combinations (one, if there are no axes), and a line for each reason why a
      requested run is impossible.
    """
    cfg, found = study.plan, []
    bad: dict[str, list[str]] = {}
    for overrides in axes.combinations(cfg):
        experiment, sizes = config.with_overrides(study, overrides), []
        for size in cfg.sizes:
            problems = axes.problems_of_run(experiment, size) if overrides else []
            if not problems:
                sizes.append(size)
            elif any(
                axes.allows(cfg, overrides, budget, size)
                for budget in cfg.budgets_flops or (None,)
            ):
                name = f"{size[0]} x {size[1]}, {_values(overrides)}"
                for problem in problems:
                    bad.setdefault(problem, []).append(name)
        if sizes:
            found.append((overrides, sizes))
    return found, [f"{'; '.join(runs)}: {why}" for why, runs in bad.items()]


def _variants(
    study: config.Experiment, possible: Sequence[tuple[Mapping[str, Any], _Sizes]]
) -> list[_Variant]:
    """The combinations of `_possible` with the costs of their sizes, counted once."""
    found, traced = [], {}
    wanted = []
    for overrides, sizes in possible:
        experiment = config.with_overrides(study, overrides)
        keys = [(train_step.compiled_part(experiment), size) for size in sizes]
        wanted.append((overrides, experiment, keys))
    total = len({key for _, _, keys in wanted for key in keys})
    shown = progress.Progress("plan", total, "networks counted", 5.0, at_once=False)
    for overrides, experiment, keys in wanted:
        for key in keys:
            if key not in traced:
                traced[key] = _size(key[0], *key[1])
                shown.show(len(traced))
        ladder = [traced[key] for key in keys]
        ladder.sort(key=lambda size: size.params_without_embeddings)
        found.append(
            _Variant(
                study=study, overrides=overrides, experiment=experiment, ladder=ladder
            )
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    """One size of the ladder: its parameters, its objective, the cost of one step."""

    width: int
    depth: int
    params: int
    params_without_embeddings: int
    objective: Objective
    cost: train_step.StepCost


@functools.lru_cache(maxsize=64)
def _size(part: config.Experiment, width: int, depth: int) -> _Size:
    """A size of experiments with this `compiled_part`, whatever their budgets are."""
    functions = train_step.train_functions(part, width, depth, unroll=False)
    cost = train_step.cost(part, functions, part.train.batch_size)
    # Tracing a network's initial values takes long: they are not traced once more.
    embeddings = functions.objective.embeddings
    params, bare = denoisers.count_shapes(cost.params, embeddings)
    return _Size(
        width=width,
        depth=depth,
        params=params,
        params_without_embeddings=bare,
        objective=functions.objective,
        cost=cost,
    )


def _around(ladder: list[_Size], budget: float, cfg: config.PlanConfig) -> list[_Size]:
    """The neighbouring sizes whose mean log N is nearest to the expected optimum."""
    count = min(cfg.sizes_per_budget or len(ladder), len(ladder))
    expected = math.log(cfg.expected_coef) + cfg.expected_exponent * math.log(budget)
    log_n = [math.log(size.params_without_embeddings) for size in ladder]

    def distance(start: int) -> float:
        return abs(sum(log_n[start : start + count]) / count - expected)

    start = min(range(len(ladder) - count + 1), key=distance)
    return ladder[start : start + count]


def _row(
    variant: _Variant, budget: float, size: _Size, text: str = ""
) -> records.RunSpec:
    """The run of a size at a budget, which is `text` in its id; "": four digits."""
    experiment = variant.experiment
    cfg, batch_size = experiment.plan, experiment.train.batch_size
    cost, width, depth = size.cost, size.width, size.depth
    flops_per_step = cost.flops.model
    steps = steps_of(budget, flops_per_step)
    images = steps * batch_size
    image_tokens = images * size.objective.image_tokens
    text_tokens = images * size.objective.other_tokens
    tokens, bare = image_tokens + text_tokens, size.params_without_embeddings
    return records.RunSpec(
        run_id=run_names.run_id(
            variant.study,
            text or run_names.budget_texts([budget])[budget],
            f"{width}x{depth}",
            variant.overrides,
        ),
        study=experiment.name,
        budget_flops=budget,
        planned_flops=float(steps * flops_per_step),
        flops_per_step=flops_per_step,
        hardware_flops_per_step=cost.flops.hardware,
        width=width,
        depth=depth,
        heads=experiment.model.heads_at(width),
        params=size.params,
        params_without_embeddings=bare,
        batch_size=batch_size,
        steps=steps,
        images=images,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        tokens=tokens,
        learning_rate=rate_policies.peak_learning_rate(
            experiment.optimizer, width, (bare, tokens, batch_size)
        ),
        warmup_steps=optimizer.warmup_steps(experiment.optimizer, steps, batch_size),
        seed=experiment.train.seed,
        state_bytes=cost.state_bytes,
        activation_bytes=cost.activation_bytes,
        memory_bytes_per_device=capacity.step_bytes(
            cost.state_bytes, cost.activation_bytes, cfg.devices, experiment.mesh.fsdp
        ),
        accelerator=cfg.accelerator,
        hours=_hours(experiment, steps * flops_per_step),
        utilisation=cfg.utilisation,
        recipe_hash=experiment.recipe_hash,
        overrides=variant.overrides,
        group=run_names.group_of(cfg, variant.overrides),
    )


def _hours(experiment: config.Experiment, total_flops: float) -> float:
    """Hours on the named accelerator at the stated utilisation or speed."""
    cfg = experiment.plan
    speed = cfg.flops_per_second_per_device
    if not speed:
        peak = peaks.PEAKS[cfg.accelerator]
        speed = peak.flops_per_second[experiment.model.compute_dtype] * cfg.utilisation
    return total_flops / (speed * cfg.devices) / 3600


def write(rows: Sequence[records.RunSpec], workdir: pathlib.Path) -> None:
    """Writes `runs.jsonl`, the one list of runs that the other stages read.

    A file with the same content is left alone: other processes may be reading it.
    """
    path = workdir / "runs.jsonl"
    text = "".join(records.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_bytes() != text.encode():
        records.write_text(path, text)
