"""Runs that are finished: the best of them, and its weights from the checkpoint.

Which checkpoints there are can be read without loading an accelerator stack.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaling_ldm import config, records
from scaling_ldm.training.trained_model import TrainedModel

if TYPE_CHECKING:
    import jax


def best(
    workdir: pathlib.Path, specs: Sequence[records.RunSpec]
) -> records.RunSpec | None:
    """The finished run with the lowest validation loss; None when there is none."""
    found = [
        (record.validation_loss_ema, spec)
        for spec in specs
        if (path := workdir / "runs" / spec.run_id / "record.json").exists()
        and (record := records.loads(path.read_text())).status == "finished"
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def run_to_sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.RunSpec | None:
    """config.generate.run, or the best finished run; None when none is finished.

    Raises:
      ConfigError: the run that is named is not in the plan, or not finished.
    """
    name = experiment.generate.run
    if not name:
        return best(workdir, specs)
    found = best(workdir, [spec for spec in specs if spec.run_id == name])
    if found is None:
        finished = [s.run_id for s in specs if best(workdir, [s]) is not None]
        raise config.ConfigError(
            f"config.generate.run = {name!r}: not a finished run; finished are "
            f"{', '.join(finished) or 'none'}"
        )
    return found


def trained_model(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    step: int | None = None,
) -> TrainedModel:
    """The averaged weights of a finished run.

    Args:
      step: of the checkpoint; None: of the run's end.
    """
    step = spec.steps if step is None else step
    return TrainedModel(
        run_id=spec.run_id,
        width=spec.width,
        depth=spec.depth,
        step=step,
        train_flops=float(step * spec.flops_per_step),
        load=functools.partial(_averaged, experiment, workdir, spec, step=step),
    )


def _averaged(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
    step: int,
) -> Any:
    """The averaged (EMA) parameters of a run at a step, sharded as in training.

    Raises:
      CheckpointError: its checkpoint cannot be read.
    """
    import jax

    from scaling_ldm.training import checkpoint, mesh, progress, train_step

    functions = train_step.train_functions(
        experiment, spec.width, spec.depth, unroll=False
    )
    abstract = train_step.abstract_state(functions)
    checkpoints = checkpoint.Checkpoints(
        workdir / "runs" / spec.run_id / "checkpoints",
        spec,
        experiment.train.keep_checkpoints,
        progress.say,
    )
    restored = checkpoints.restore(
        jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            mesh.shardings(device_mesh, abstract),
        ),
        step,
    )
    checkpoints.close()
    if restored is None:
        raise checkpoint.CheckpointError(
            f"{spec.run_id} has no readable checkpoint of step {step}"
        )
    return restored.state.ema


def checkpoint_steps(workdir: pathlib.Path, spec: records.RunSpec) -> list[int]:
    """The steps of a run whose checkpoints are there, ascending."""
    folder = workdir / "runs" / spec.run_id / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
