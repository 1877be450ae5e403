"""The plan as text for people: its rows, their totals, and cautions.

A caution names something that makes losses hard to interpret, or stated devices that
cannot run a step. The plan still runs.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

from scaling_ldm import config, data, records
from scaling_ldm.config import run_names
from scaling_ldm.data import stored_split
from scaling_ldm.laws.narrate import duration, si
from scaling_ldm.training import capacity, packing, step_memory
from scaling_ldm.workdir import proposals

LONG_WARMUP = 0.25  # share of a run's steps; a longer warm-up gives a caution

_COLUMNS = (
    ("run", lambda k, r: str(k)),
    ("budget", lambda k, r: f"{r.budget_flops:.6g}"),
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
    ("time", lambda k, r: duration(3600 * r.hours * r.own_share)),
)


def _axis_column(path: str) -> tuple[str, Callable[[int, records.RunSpec], str]]:
    return path, lambda _, row: run_names.value_text(row.overrides[path])


def show(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    rows: Mapping[int, records.RunSpec],
) -> None:
    """Prints `table` of some rows of the plan, {number: row}, and what is held out.

    With config.plan.next, also which runs to add.
    """
    pictures = data.training_pictures(experiment, workdir)
    lines = [table(experiment, [*rows.values()], min(rows), pictures)]
    if experiment.plan.next:
        lines += proposals.lines(experiment, workdir, records.read_plan(workdir))
    print("\n".join([*lines, *stored_split.lines(experiment, workdir)]), flush=True)


def table(
    experiment: config.Experiment,
    rows: Sequence[records.RunSpec],
    first: int = 0,
    pictures: Mapping[str, int] | None = None,
) -> str:
    """The plan as text: one line for each run, then the totals and the assumptions.

    An axis has a column of its own, and so have epochs, where they are known.

    Args:
      first: the number of the first row; with --run, a row keeps its number.
      pictures: of `data.training_pictures`.
    """
    cfg = experiment.plan
    varied = dict.fromkeys(path for row in rows for path in row.overrides)
    columns = [*_COLUMNS[:3], *map(_axis_column, varied), *_COLUMNS[3:]]
    if any(row.rate_source for row in rows):
        after = [name for name, _ in columns].index("lr") + 1
        columns.insert(after, ("rate from", lambda _, row: row.rate_source))
    if any(row.smaller_budgets for row in rows):
        columns.insert(2, ("points", lambda _, row: str(len(row.points()))))
    if any(row.trunk for row in rows):
        after = [name for name, _ in columns].index("steps") + 1
        columns.insert(after, ("from the trunk", lambda _, row: str(row.shared_steps)))
    if pictures:
        seen = [epochs(experiment, row, pictures) for row in rows]
        columns.insert(-1, ("epochs", lambda k, _: f"{seen[k - first]:.3g}"))
    cells = [[name for name, _ in columns]]
    cells += [[f(first + i, row) for _, f in columns] for i, row in enumerate(rows)]
    memory = [name for name, _ in columns].index("GiB/device")
    for line, row in zip(cells[1:], rows, strict=True):
        if step_memory.is_lower_bound(experiment, row):
            line[memory] = ">" + line[memory]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    if cfg.flops_per_second_per_device:
        speed = (
            f"{cfg.flops_per_second_per_device:.3g} FLOP/s per device (stated in "
            "config.plan.flops_per_second_per_device)"
        )
    else:
        speed = f"{cfg.utilisation:.0%} of peak (assumed, config.plan.utilisation)"
    total = duration(3600 * sum(row.hours * row.own_share for row in rows))
    lines += [
        "",
        f"{len(rows)} runs, {_spent(rows):.4g} FLOPs, "
        f"{si(sum(row.images * row.own_share for row in rows))} images, {total} on "
        f"{cfg.devices} x {cfg.accelerator} at {speed}.",
        "FLOPs are 2 x multiply-adds, forward and backward, counted. Memory is an "
        f"estimate of a step's peak on {_devices(cfg.devices)}; after > it is state / "
        f"{experiment.mesh.fsdp} (fsdp) + saved activations / {cfg.devices} alone. "
        "Time is that of training steps; compilation, encoding, measuring and "
        "checkpoints come on top.",
    ]
    if line := reused(rows):
        lines.append(line)
    if (most := experiment.mesh.runs) > 1:
        packs = packing.packs(experiment, [*enumerate(rows)], most)
        lines.append(packing.line(packs, most))
    if not pictures and experiment.encoded:
        lines.append("How often a run sees a picture is known when they are encoded.")
    return "\n".join([*lines, *cautions(experiment, rows, pictures)])


def _spent(rows: Sequence[records.RunSpec]) -> float:
    """Training FLOPs of these runs, without the steps that they take from others."""
    return sum(row.planned_flops * row.own_share for row in rows)


def reused(rows: Sequence[records.RunSpec]) -> str:
    """What trajectories and branches save; "" where there are none."""
    spent = _spent(rows)
    if branches := [row for row in rows if row.trunk]:
        separate = sum(row.planned_flops for row in rows)
        hours = duration(3600 * sum(row.hours for row in rows))
        return (
            f"{len(branches)} of them are decay branches of the others "
            f"(config.plan.reuse). Separate runs would take {separate:.4g} FLOPs and "
            f"{hours}, {separate / spent:.3g} times as much."
        )
    points = [point for row in rows for point in row.points()]
    if len(points) == len(rows):
        return ""
    separate = sum(point.planned_flops for point in points)
    hours = duration(3600 * sum(point.hours for point in points))
    return (
        f"They are measured at {len(points)} points, one for each size and budget "
        f"(config.plan.reuse). Separate runs would take {separate:.4g} FLOPs and "
        f"{hours}, {separate / spent:.3g} times as much."
    )


def cautions(
    experiment: config.Experiment,
    rows: Sequence[records.RunSpec],
    pictures: Mapping[str, int] | None = None,
) -> list[str]:
    """A line for each thing that makes the losses of these runs hard to interpret.

    And one for each reason why the stated devices cannot run a step.
    """
    found = [*_narrow(experiment, rows), *_short(rows)]
    found += [*_too_large(experiment, rows), *_uneven(experiment, rows)]
    found += repeated(experiment, rows, pictures or {})
    return [f"caution: {line}" for line in found]


def _narrow(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> list[str]:
    """Widths that are smaller than the values of one patch."""
    narrow: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        own = config.with_overrides(experiment, row.overrides)
        side, channels = own.model.patch_size, own.data.shape[2]
        patched = own.model.architecture not in config.CONVOLUTIONAL
        if patched and row.width < side * side * channels:
            narrow.setdefault((side, channels), set()).add(row.width)
    return [
        f"a patch has {side * side * channels} values (config.model.patch_size = "
        f"{side}, {channels} channels), and widths {_listed(widths)} are below that: "
        "such a network cannot hold a whole patch, and its loss may hardly fall with "
        "compute; take smaller patches or larger widths"
        for (side, channels), widths in narrow.items()
    ]


def _short(rows: Sequence[records.RunSpec]) -> list[str]:
    """Runs that are warmed up for a large part of their steps."""
    every = [point for row in rows for point in row.points()]
    short = [row for row in every if row.warmup_steps > LONG_WARMUP * row.steps]
    if not short:
        return []
    worst = max(short, key=lambda row: row.warmup_steps / row.steps)
    return [
        f"in {_runs(short)} the warm-up is more than {LONG_WARMUP:.0%} of the steps, "
        f"up to {worst.warmup_steps} of {worst.steps} ({worst.run_id}): they hardly "
        "train at config.optimizer.learning_rate; see config.optimizer.warmup_*"
    ]


def _too_large(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> list[str]:
    """Runs whose step needs more memory than the stated accelerator has."""
    name = experiment.plan.accelerator
    there = capacity.stated_bytes(name)
    if there is None:
        return []
    large = [row for row in rows if row.memory_bytes_per_device > there]
    if not large:
        return []
    most = max(large, key=lambda row: row.memory_bytes_per_device)
    return [
        f"in {_runs(large)} a step needs more than a {name} has, up to "
        f"{most.memory_bytes_per_device / 2**30:.2f} of {there / 2**30:.2f} GiB "
        f"({most.run_id}): see config.mesh.fsdp, config.model.remat, "
        "config.train.microbatch and config.plan.devices"
    ]


def _uneven(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> list[str]:
    """Batches that the stated devices cannot share evenly."""
    devices = experiment.plan.devices
    if capacity.is_cpu(experiment.plan.accelerator):
        return []
    found = {
        f"config.train.batch_size = {row.batch_size}": row.batch_size for row in rows
    }
    for field, size in (
        ("train.microbatch", experiment.train.microbatch),
        ("validation.batch_size", experiment.validation.batch_size),
    ):
        found[f"config.{field} = {size}"] = size
    uneven = [name for name, size in found.items() if size % devices]
    if not uneven:
        return []
    return [
        f"config.plan.devices = {devices} does not divide {' and '.join(uneven)}: "
        "training refuses this on so many devices"
    ]


def repeated(
    experiment: config.Experiment,
    rows: Sequence[records.RunSpec],
    pictures: Mapping[str, int],
) -> list[str]:
    """Runs that see pictures more than once."""
    if not pictures:
        return []
    seen = {row.run_id: epochs(experiment, row, pictures) for row in rows}
    again = [row for row in rows if seen[row.run_id] > 1]
    if not again:
        return []
    most = max(again, key=lambda row: seen[row.run_id])
    total = f"{sum(pictures.values()):,} to train on"
    return [
        f"{_runs(again)}: pictures are seen again ({total}), up to "
        f"{seen[most.run_id]:.3g} times ({most.run_id}): laws of these losses hold for "
        "repeated data"
    ]


def epochs(
    experiment: config.Experiment, row: records.RunSpec, pictures: Mapping[str, int]
) -> float:
    """How often a run sees each picture; of a mix, those of the part seen most often.

    Args:
      pictures: of `data.training_pictures`.
    """
    shares = dict(experiment.data.mix) or {"": 1.0}
    return records.epochs(row.images, shares, pictures)


def _runs(rows: Sequence[records.RunSpec]) -> str:
    return "1 run" if len(rows) == 1 else f"{len(rows)} runs"


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
