"""The runs of a working directory: their files, records and weights.

Everything that reads or names the files of a run does so through this module. Finding
them loads no accelerator stack.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import axes
from scaling_ldm.config.names import nearest
from scaling_ldm.records import results, table, trajectories
from scaling_ldm.records.measurements import LOSS
from scaling_ldm.training.run_files import RunFiles, steps
from scaling_ldm.training.trained_model import TrainedModel


def run_files(workdir: pathlib.Path, run_id: str) -> RunFiles:
    """Where the files of a run are."""
    return RunFiles(workdir / "runs" / run_id)


def record_paths(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """The records of all runs that are over, sorted."""
    yield from sorted(workdir.glob("runs/*/record.json"))


def read_record(workdir: pathlib.Path, run_id: str) -> records.TrainRecord | None:
    """The record of a run that is over, or None.

    Raises:
      Damaged: the file holds none, or that of another run.
    """
    path = run_files(workdir, run_id).record
    record = records.read(path, records.TrainRecord) if path.exists() else None
    if record is not None and record.run_id != run_id:
        raise records.Damaged(f"{path} is that of {record.run_id}")
    return record


def read_record_of(
    workdir: pathlib.Path, spec: records.RunSpec
) -> records.TrainRecord | None:
    """The record of a planned run that is over, or None.

    Raises:
      ConfigError: the record is of another recipe, number of steps or budget; or the
        run was not measured at a smaller budget of the trajectory.
    """
    record = read_record(workdir, spec.run_id)
    if record is None:
        return None
    held = record.recipe_hash, record.steps_planned, record.budget_flops
    if held != (spec.recipe_hash, spec.steps, spec.budget_flops):
        raise config.ConfigError(
            f"{run_files(workdir, spec.run_id).record} holds a run of another "
            f"experiment (recipe {held[0]}, {held[1]} steps, {held[2]} FLOPs; wanted "
            f"{spec.recipe_hash}, {spec.steps}, {spec.budget_flops}): use another "
            "--workdir"
        )
    path = run_files(workdir, spec.run_id).measurements
    if unmeasured := trajectories.unmeasured(path, record, spec):
        budgets = ", ".join(f"{point.budget_flops:.6g}" for point in unmeasured)
        raise config.ConfigError(
            f"{spec.run_id} was not measured at {budgets} FLOPs, as config.plan.reuse "
            f"asks: remove {run_files(workdir, spec.run_id).folder} to train it again, "
            "or use another --workdir"
        )
    return record


def write_record(workdir: pathlib.Path, record: records.TrainRecord) -> None:
    """Writes the record of a run, which marks the run as over."""
    path = run_files(workdir, record.run_id).record
    records.write_text(path, records.dumps(record))


def finished(
    workdir: pathlib.Path, specs: Sequence[records.RunSpec]
) -> list[records.RunSpec]:
    """The runs that are finished."""
    return [
        spec
        for spec in specs
        if (record := read_record(workdir, spec.run_id)) is not None
        and record.status == "finished"
    ]


def last_loss(
    workdir: pathlib.Path,
    spec: records.RunSpec,
    weights: str = "",
    experiment: Mapping[str, Any] | None = None,
) -> float:
    """The held-out loss at the last planned step of a run; nan: not measured.

    Args:
      weights: "raw", or an average's name; "": the first average of the run.
      experiment: `table.experiment_of(workdir)`, if it has been read.

    Raises:
      ConfigError: it was measured by several protocols, so the loss is not unique.
    """
    if experiment is None:
        experiment = table.experiment_of(workdir)
    rows = table.rows_of_run(workdir / "runs" / spec.run_id, spec, experiment)
    kept = table.averages_of(experiment, spec.overrides)
    weights = results.weights_meant(LOSS, weights, kept)
    found = {
        (row.protocol_hash, row.value)
        for row in results.of(results.at_end(rows, [spec]), LOSS, weights)
    }
    if len(found) > 1:
        said = ", ".join(f"{value} (protocol {name})" for name, value in sorted(found))
        raise config.ConfigError(
            f"{spec.run_id} has several held-out losses of {weights}: {said}"
        )
    return found.pop()[1] if found else math.nan


def best(
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
    experiment: Mapping[str, Any] | None = None,
) -> records.RunSpec | None:
    """The finished run with the lowest validation loss; None when there is none.

    The loss is that of the first average.

    Args:
      experiment: `table.experiment_of(workdir)`, if it has been read.

    Raises:
      Damaged: the loss of a finished run is not in its file, and may be the lowest.
    """
    candidates = finished(workdir, specs)
    if len(candidates) < 2:  # nothing to compare: no table is read
        return next(iter(candidates), None)
    if experiment is None:
        experiment = table.experiment_of(workdir)

    def loss(spec: records.RunSpec) -> float:
        found = last_loss(workdir, spec, experiment=experiment)
        if math.isnan(found):
            files = run_files(workdir, spec.run_id)
            raise records.Damaged(
                f"{files.measurements} lacks the held-out loss of the last step, "
                f"{spec.steps}",
                f"put a copy back; or remove {files.record}, and --stages train "
                "measures it again",
            )
        return found

    return min(candidates, key=loss)


def run_to_sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.RunSpec | None:
    """config.generate.run, or the best finished run; None when none is finished.

    Raises:
      ConfigError: the run that is named is not in the plan, or not finished; or none
        is named, and the losses of the runs cannot be compared.
    """
    name = experiment.generate.run
    if not name:
        if not axes.measured_alike([spec.overrides for spec in specs]):
            raise no_best_run()
        return best(workdir, specs)
    over = {spec.run_id: spec for spec in finished(workdir, specs)}
    if name not in over:
        raise config.ConfigError(
            f"config.generate.run = {name!r}: not a finished run; finished are "
            f"{', '.join(over) or 'none'}"
        )
    return over[name]


def check_run_to_sample(
    experiment: config.Experiment, specs: Sequence[records.RunSpec]
) -> None:
    """Refuses a config.generate.run that is not in the plan (ConfigError)."""
    name, known = experiment.generate.run, [spec.run_id for spec in specs]
    if name and name not in known:
        close = nearest(name, known)
        hint = f"did you mean {close}? " if close else ""
        raise config.ConfigError(
            f"config.generate.run = {name!r}: no run of the plan; {hint}runs.jsonl has "
            f"all {len(known)}, the first is {known[0]}"
        )


def no_best_run() -> config.ConfigError:
    """The refusal to choose among runs whose losses measure different things."""
    return config.ConfigError(
        "config.plan.axes varies what the held-out loss measures "
        f"({', '.join(axes.MEASURES)}), so no run is the best one: name a run_id of "
        "runs.jsonl in config.generate.run, or leave out generate, evaluate and export "
        "(--stages plan,encode,train,fit,report)"
    )


def trained_model(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    step: int | None = None,
    weights: str | None = None,
) -> TrainedModel:
    """Weights of a run that has a checkpoint of this step.

    Args:
      experiment: of the study; the run's overrides are applied to it.
      step: of the checkpoint; None for the end of the run.
      weights: "raw" or one of optimizer.averages; None or "" for the first of these.

    Raises:
      ConfigError: the run keeps no such weights.
    """
    experiment = config.with_overrides(experiment, spec.overrides)
    kept = experiment.optimizer.averages
    weights = weights or kept[0]
    if weights not in (config.RAW, *kept):
        raise config.ConfigError(
            f"{spec.run_id} keeps no weights {weights!r}; known: "
            f"{', '.join((config.RAW, *kept))}. `reconstructed` makes others."
        )

    at = spec.steps if step is None else step

    def load(device_mesh: Any) -> Any:
        return _restored(experiment, workdir, spec, device_mesh, at, weights)

    return _model(workdir, spec, at, weights, load)


def reconstructed(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    sigma_rel: float,
    step: int | None = None,
    largest_error: float = 0.1,
) -> TrainedModel:
    """An average of any width, from those in all checkpoints of a run on disk.

    Args:
      sigma_rel: its width, as in `averages.Profile`.
      step: its last step; the error is large unless there is a checkpoint of it. None
        for the end of the run.
      largest_error: of its profile, as in `averages.reconstruct`.

    Raises:
      ConfigError: the run keeps no power-function averages.
      AverageError: the checkpoints do not give this average.
    """
    from scaling_ldm.training import averages

    experiment = config.with_overrides(experiment, spec.overrides)
    widths = {
        name: width
        for name in experiment.optimizer.averages
        if (width := config.sigma_rel_of(name)) is not None
    }
    if not widths:
        raise config.ConfigError(
            f"config.optimizer.averages = {experiment.optimizer.averages}: others are "
            f"made from power-function averages, such as {config.power_average(0.05)!r}"
        )
    step = spec.steps if step is None else step
    wanted = averages.Profile(sigma_rel=sigma_rel, step=step)
    stored = {
        averages.Profile(sigma_rel=width, step=s): name
        for s in checkpoint_steps(workdir, spec)
        for name, width in widths.items()
    }
    found = averages.checked_combination(list(stored), wanted, largest_error)
    terms = dict(zip(stored, found.coefficients, strict=True))

    def load(device_mesh: Any) -> Any:
        def parts() -> Iterator[tuple[float, Any]]:
            for profile, coefficient in terms.items():
                at, name = profile.step, stored[profile]
                yield (
                    coefficient,
                    _restored(experiment, workdir, spec, device_mesh, at, name),
                )

        return averages.weighted_sum(parts())

    name = f"{config.power_average(sigma_rel)} from {len(terms)} averages"
    return _model(workdir, spec, step, name, load)


def words_of(workdir: pathlib.Path, spec: records.RunSpec) -> tuple[str, ...] | None:
    """The words that a run learnt, by id; None: it reads none, or is an older run."""
    from scaling_ldm.data import vocabulary

    path = run_files(workdir, spec.run_id).vocabulary
    found = vocabulary.read(path, spec.recipe_hash)
    return None if found is None else found.words


def label_names_of(workdir: pathlib.Path, spec: records.RunSpec) -> tuple[str, ...]:
    """The names of the labels that a run learnt; (): none, or an older version's."""
    from scaling_ldm.data import label_names

    path = run_files(workdir, spec.run_id).label_names
    return label_names.read(path, spec.recipe_hash)


def _model(
    workdir: pathlib.Path,
    spec: records.RunSpec,
    step: int,
    weights: str,
    load: Callable[[Any], Any],
) -> TrainedModel:
    return TrainedModel(
        run_id=spec.run_id,
        width=spec.width,
        depth=spec.depth,
        step=step,
        train_flops=float(step * spec.flops_per_step),
        load=load,
        weights=weights,
        overrides=spec.overrides,
        words=words_of(workdir, spec),
        label_names=label_names_of(workdir, spec),
    )


def _restored(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    device_mesh: Any,
    step: int,
    weights: str,
) -> Any:
    """Weights of a run at a step, sharded as in training; nothing else is read.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    import jax

    from scaling_ldm.training import (
        checkpoint,
        mesh,
        progress,
        storage_faults,
        train_step,
    )

    recipe = train_step.compiled_part(experiment)  # runs of a size share its functions
    functions = train_step.train_functions(recipe, spec.width, spec.depth, unroll=False)
    abstract = train_step.abstract_state(functions)
    saved = checkpoint.Checkpoints(
        run_files(workdir, spec.run_id).checkpoints,
        spec,
        experiment.train.keep_checkpoints,
        progress.say,
    )
    restored = saved.restore(
        jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            mesh.shardings(device_mesh, abstract),
        ),
        step,
        "params" if weights == config.RAW else weights,
    )
    saved.close()
    if restored is None:
        folder = run_files(workdir, spec.run_id).checkpoints
        before = [s for s in steps(folder) if s < step]
        missing = FileNotFoundError("there is no such folder")
        raise storage_faults.damaged_end(folder, step, max(before, default=0), missing)
    return restored.state


def checkpoint_steps(workdir: pathlib.Path, spec: records.RunSpec) -> list[int]:
    """The steps of a run whose checkpoints are on disk, ascending."""
    return steps(run_files(workdir, spec.run_id).checkpoints)
