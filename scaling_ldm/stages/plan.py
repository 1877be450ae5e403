"""Experiment -> the runs of its study and what they will cost; uses no device."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

from scaling_ldm import config, records
from scaling_ldm.flops import peaks
from scaling_ldm.models import denoisers
from scaling_ldm.training import optimizer, train_step
from scaling_ldm.training.objective import Objective


def plan(experiment: config.Experiment) -> list[records.RunSpec]:
    """One RunSpec per budget and size, in the order they run.

    The sizes of a budget are those of `plan.sizes` that are nearest, in log N, to its
    expected optimum. The number of steps is such that the counted FLOPs meet the
    budget. With `plan.steps`, every size takes that many steps, and its budget is what
    they cost.

    Raises:
      ConfigError: a run has fewer than `plan.minimum_steps` steps, or its whole number
        of steps misses the budget by more than 1%.
    """
    cfg = experiment.plan
    ladder = sorted(
        (_size(experiment, width, depth) for width, depth in cfg.sizes),
        key=lambda size: size.params_without_embeddings,
    )
    rows, problems = [], []
    if cfg.steps:
        if cfg.steps < cfg.minimum_steps:
            raise config.ConfigError(
                f"config.plan.steps = {cfg.steps}, fewer than "
                f"config.plan.minimum_steps = {cfg.minimum_steps}"
            )
        return [
            _row(experiment, float(cfg.steps * size.cost.flops.model), size)
            for size in ladder
        ]
    for budget in cfg.budgets_flops:
        for size in _around(ladder, budget, cfg):
            row = _row(experiment, budget, size)
            rows.append(row)
            name = f"{budget:.3g} FLOPs, {row.width} x {row.depth}"
            if row.steps < cfg.minimum_steps:
                problems.append(
                    f"{name}: {row.steps} steps of {row.batch_size} pictures, fewer "
                    f"than config.plan.minimum_steps = {cfg.minimum_steps}; raise the "
                    "budget, lower train.batch_size, or take a smaller size"
                )
            elif abs(row.planned_flops / budget - 1) > 0.01:
                problems.append(
                    f"{name}: {row.steps} whole steps spend {row.planned_flops:.4g} "
                    "FLOPs, more than 1% from the budget; lower train.batch_size"
                )
    if problems:
        raise config.ConfigError(
            "this plan cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    """One size of the ladder: its parameters, its objective, the cost of one step."""

    width: int
    depth: int
    params: int
    params_without_embeddings: int
    objective: Objective
    cost: train_step.StepCost


def _size(experiment: config.Experiment, width: int, depth: int) -> _Size:
    functions = train_step.train_functions(experiment, width, depth, unroll=False)
    params, bare = denoisers.count_params(functions.objective)
    return _Size(
        width=width,
        depth=depth,
        params=params,
        params_without_embeddings=bare,
        objective=functions.objective,
        cost=train_step.cost(experiment, functions, experiment.train.batch_size),
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


def _row(experiment: config.Experiment, budget: float, size: _Size) -> records.RunSpec:
    cfg, batch_size = experiment.plan, experiment.train.batch_size
    cost, width, depth = size.cost, size.width, size.depth
    flops_per_step = cost.flops.model
    steps = max(round(budget / flops_per_step), 1)
    images = steps * batch_size
    image_tokens = images * size.objective.image_tokens
    text_tokens = images * size.objective.other_tokens
    shards = experiment.mesh.fsdp
    return records.RunSpec(
        run_id=f"{budget:.3e}-{width}x{depth}".replace("+", ""),
        study=experiment.name,
        budget_flops=budget,
        planned_flops=float(steps * flops_per_step),
        flops_per_step=flops_per_step,
        hardware_flops_per_step=cost.flops.hardware,
        width=width,
        depth=depth,
        heads=experiment.model.heads_at(width),
        params=size.params,
        params_without_embeddings=size.params_without_embeddings,
        batch_size=batch_size,
        steps=steps,
        images=images,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        tokens=image_tokens + text_tokens,
        learning_rate=optimizer.peak_learning_rate(experiment.optimizer, width),
        warmup_steps=round(experiment.optimizer.warmup_fraction * steps),
        seed=experiment.train.seed,
        state_bytes=cost.state_bytes,
        activation_bytes=cost.activation_bytes,
        memory_bytes_per_device=cost.state_bytes // shards
        + cost.activation_bytes // cfg.devices,
        accelerator=cfg.accelerator,
        hours=_hours(experiment, steps * flops_per_step),
        utilisation=cfg.utilisation,
        recipe_hash=experiment.recipe_hash,
    )


def _hours(experiment: config.Experiment, total_flops: float) -> float:
    """Hours on the named accelerator at the stated utilisation or measured speed.

    Raises:
      ConfigError: there is neither a known peak nor a measured speed.
    """
    cfg = experiment.plan
    speed = cfg.flops_per_second_per_device
    if not speed:
        row, dtype = peaks.PEAKS.get(cfg.accelerator), experiment.model.compute_dtype
        if row is None or dtype not in row.flops_per_second:
            known = [n for n, r in peaks.PEAKS.items() if dtype in r.flops_per_second]
            raise config.ConfigError(
                f"config.plan.accelerator = {cfg.accelerator!r} has no published peak "
                f"for {dtype}; known: {', '.join(known)}. For other hardware set "
                "config.plan.flops_per_second_per_device to a measured speed"
            )
        speed = row.flops_per_second[dtype] * cfg.utilisation
    return total_flops / (speed * cfg.devices) / 3600


def write(rows: Sequence[records.RunSpec], workdir: pathlib.Path) -> None:
    """Writes `runs.jsonl`, the one list of runs that the other stages read.

    A file that is this already is left alone: other processes may be reading it.
    """
    path = workdir / "runs.jsonl"
    text = "".join(records.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        records.write_text(path, text)


_COLUMNS = (
    ("run", lambda k, r: str(k)),
    ("budget", lambda k, r: f"{r.budget_flops:.3g}"),
    ("width x depth", lambda k, r: f"{r.width} x {r.depth}"),
    ("params", lambda k, r: si(r.params)),
    ("w/o embed.", lambda k, r: si(r.params_without_embeddings)),
    ("FLOPs/step", lambda k, r: f"{r.flops_per_step:.3g}"),
    ("batch", lambda k, r: str(r.batch_size)),
    ("steps", lambda k, r: str(r.steps)),
    ("images", lambda k, r: si(r.images)),
    ("image tok.", lambda k, r: si(r.image_tokens)),
    ("text tok.", lambda k, r: si(r.text_tokens)),
    ("tok./param", lambda k, r: f"{r.tokens / r.params_without_embeddings:.0f}"),
    ("lr", lambda k, r: f"{r.learning_rate:.2g}"),
    ("GiB/device", lambda k, r: f"{r.memory_bytes_per_device / 2**30:.2f}"),
    ("hours", lambda k, r: f"{r.hours:.3g}"),
)


def table(
    experiment: config.Experiment, rows: Sequence[records.RunSpec], first: int = 0
) -> str:
    """The plan as text: one line for each run, then the totals and the assumptions.

    Args:
      first: the number of the first row; with --run, a row keeps its number.
    """
    cfg = experiment.plan
    cells = [[name for name, _ in _COLUMNS]]
    cells += [[f(first + i, row) for _, f in _COLUMNS] for i, row in enumerate(rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    if cfg.flops_per_second_per_device:
        speed = f"{cfg.flops_per_second_per_device:.3g} FLOP/s a device (measured)"
    else:
        speed = f"{cfg.utilisation:.0%} of peak (assumed)"
    hours = sum(row.hours for row in rows)
    lines += [
        "",
        f"{len(rows)} runs, {sum(row.planned_flops for row in rows):.4g} FLOPs, "
        f"{si(sum(row.images for row in rows))} images, {hours:.3g} hours on "
        f"{cfg.devices} x {cfg.accelerator} at {speed}.",
        "FLOPs are 2 x multiply-adds, forward and backward, counted. Memory is state / "
        f"{experiment.mesh.fsdp} (fsdp) + saved activations / {cfg.devices} devices; "
        "the compiler's temporaries come on top.",
    ]
    return "\n".join(lines)


def si(value: float) -> str:
    """Three significant digits with k, M, G, T."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}P"
