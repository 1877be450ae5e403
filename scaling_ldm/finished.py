"""Runs that are finished: the best of them, and its weights from the checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from scaling_ldm import checkpoint, config, mesh, meters, records
from scaling_ldm import step as step_lib


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


def averaged(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> Any:
    """The averaged (EMA) parameters of a finished run, sharded as in training.

    Args:
      step: of the checkpoint; None: the last that reads back.

    Raises:
      CheckpointError: no checkpoint can be read.
    """
    functions = step_lib.build(experiment, spec.width, spec.depth, unroll=False)
    abstract = step_lib.abstract_state(functions)
    checkpoints = checkpoint.Checkpoints(
        workdir / "runs" / spec.run_id / "checkpoints",
        spec,
        experiment.train.keep_checkpoints,
        meters.say,
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
            f"{spec.run_id} has no readable checkpoint"
            + ("" if step is None else f" of step {step}")
        )
    return restored.state.ema


def steps(workdir: pathlib.Path, spec: records.RunSpec) -> list[int]:
    """The steps of a run whose checkpoints are there, ascending."""
    folder = workdir / "runs" / spec.run_id / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
