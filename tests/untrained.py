"""What training leaves of a run, without training it: nothing is compiled."""

import dataclasses

import jax
import numpy as np

from scaling_ldm import records
from scaling_ldm.records import measurements, table
from scaling_ldm.training import checkpoint, mesh, train_step


def finish(experiment, workdir, spec, at=(), loss=0.5, seed=1):
    """Leaves checkpoints with random parameters, a record and a loss at the end.

    Args:
      at: the steps of the checkpoints before the last one.
    """
    functions = train_step.train_functions(
        experiment, spec.width, spec.depth, unroll=False
    )
    abstract = train_step.abstract_state(functions)
    device_mesh, rng = mesh.build(experiment.mesh, {}), np.random.default_rng(seed)
    folder = workdir / "runs" / spec.run_id
    saved = checkpoint.Checkpoints(
        folder / "checkpoints", spec, keep=experiment.train.keep_checkpoints
    )
    for step in (*at, spec.steps):
        state = jax.tree.map(
            lambda leaf, sharding: jax.device_put(
                rng.normal(scale=0.1, size=leaf.shape).astype(leaf.dtype), sharding
            ),
            abstract,
            mesh.shardings(device_mesh, abstract),
        )
        position = checkpoint.ResumeState(data={}, seconds=0.0, restarts=0)
        saved.save(step, state, position)
        saved.wait()
    saved.close()
    planned = dataclasses.asdict(spec) | {
        "status": "finished",
        "flops": spec.planned_flops,
    }
    record = records.TrainRecord(
        **{
            field.name: planned.get(field.name, "" if field.type == "str" else 0)
            for field in dataclasses.fields(records.TrainRecord)
        }
    )
    records.write_text(folder / "record.json", records.dumps(record))
    of = {"metric": "loss", "weights": "ema", "protocol_hash": ""}
    row = measurements.measurement(spec, step=spec.steps, value=loss, **of)
    table.append_rows(folder / table.FILE, [row])
