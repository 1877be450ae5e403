"""The runs of a working directory: their files, records and weights.

Everything that reads or names the files of a run does it through this module. What is
there can be found without loading an accelerator stack.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import axes
from scaling_ldm.training.run_files import RunFiles
from scaling_ldm.training.trained_model import TrainedModel


def run_files(workdir: pathlib.Path, run_id: str) -> RunFiles:
    """Where the files of a run are."""
    return RunFiles(workdir / "runs" / run_id)


def record_paths(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """The records of all runs that are over, sorted."""
    yield from sorted(workdir.glob("runs/*/record.json"))


def read_record(workdir: pathlib.Path, run_id: str) -> records.TrainRecord | None:
    """The record of a run that is over, or None."""
    path = run_files(workdir, run_id).record
    return records.read(path) if path.exists() else None


def read_record_of(
    workdir: pathlib.Path, spec: records.RunSpec
) -> records.TrainRecord | None:
    """The record of a planned run that is over, or None.

    Raises:
      ConfigError: the record is of another recipe, number of steps or budget.
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
    return record


def write_record(workdir: pathlib.Path, record: records.TrainRecord) -> None:
    """Writes the record of a run; after this the run is over."""
    path = run_files(workdir, record.run_id).record
    records.write_text(path, records.dumps(record))


def best(
    workdir: pathlib.Path, specs: Sequence[records.RunSpec]
) -> records.RunSpec | None:
    """The finished run with the lowest validation loss; None when there is none."""
    found = [
        (record.validation_loss_ema, spec)
        for spec in specs
        if (record := read_record(workdir, spec.run_id)) is not None
        and record.status == "finished"
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


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
    found = best(workdir, [spec for spec in specs if spec.run_id == name])
    if found is None:
        finished = [s.run_id for s in specs if best(workdir, [s]) is not None]
        raise config.ConfigError(
            f"config.generate.run = {name!r}: not a finished run; finished are "
            f"{', '.join(finished) or 'none'}"
        )
    return found


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
    weights: str = "ema",
) -> TrainedModel:
    """Weights of a run that has a checkpoint of this step.

    Args:
      experiment: of the study; the run's overrides are applied to it.
      step: of the checkpoint; None for the end of the run.
      weights: "ema" for the average or "raw".
    """
    experiment = config.with_overrides(experiment, spec.overrides)
    step = spec.steps if step is None else step
    return TrainedModel(
        run_id=spec.run_id,
        width=spec.width,
        depth=spec.depth,
        step=step,
        train_flops=float(step * spec.flops_per_step),
        load=functools.partial(
            _load, experiment, workdir, spec, step=step, weights=weights
        ),
        ema=weights == "ema",
        overrides=spec.overrides,
    )


def _load(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    device_mesh: Any,
    step: int,
    weights: str,
) -> Any:
    """The parameters of a run at a step, or their average, sharded as in training.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    import jax

    from scaling_ldm.training import checkpoint, mesh, progress, train_step

    functions = train_step.train_functions(
        experiment, spec.width, spec.depth, unroll=False
    )
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
    )
    saved.close()
    if restored is None:
        raise checkpoint.CheckpointError(
            f"{spec.run_id} has no readable checkpoint of step {step}"
        )
    return {"ema": restored.state.ema, "raw": restored.state.params}[weights]


def checkpoint_steps(workdir: pathlib.Path, spec: records.RunSpec) -> list[int]:
    """The steps of a run whose checkpoints are on disk, ascending."""
    folder = run_files(workdir, spec.run_id).checkpoints
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
