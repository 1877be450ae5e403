"""Where a decay branch starts (plan.reuse): the state of its trunk, to the bit.

Until its rate falls, a short run of the schedule "wsd" takes the steps of a longer one.
So it reads the longer run's state, its averages, and its place in the data from that
step's checkpoint, and goes on by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.training import checkpoint, progress, run_files
from scaling_ldm.training.run_files import RunFiles


def start(
    spec: records.RunSpec, files: RunFiles, abstract_state: Any
) -> checkpoint.Restored | None:
    """The state with which a run leaves its trunk.

    Args:
      files: of the run; those of the trunk are beside them.
      abstract_state: as of `Checkpoints.restore`.

    Returns:
      None for a run without a trunk, and where the trunk failed before: this run would
      fail at the same step, and is trained from its start.

    Raises:
      ConfigError: the trunk is not trained, or its checkpoint was removed.
      CheckpointError: its checkpoint cannot be read.
    """
    if not spec.trunk:
        return None
    trunk, step = RunFiles(files.folder.parent / spec.trunk), spec.shared_steps
    where = f"{spec.run_id} leaves {spec.trunk} at step {step} (config.plan.reuse)"
    if not trunk.record.is_file():  # until then its folder belongs to who trains it
        raise config.ConfigError(
            f"{where}, which is not trained yet: train that row of the plan first"
        )
    record = records.read(trunk.record, records.TrainRecord)
    if step not in run_files.steps(trunk.checkpoints):
        if record.status != "finished":
            progress.say(
                f"{spec.run_id} is trained from its start: {spec.trunk} ended at step "
                f"{record.steps} ({record.status})"
            )
            return None
        raise config.ConfigError(
            f"{where}, but there is no such checkpoint in {trunk.checkpoints}: put it "
            f"back, or remove {trunk.folder} to train that run again"
        )
    whole = dataclasses.replace(spec, run_id=spec.trunk, steps=spec.trunk_steps)
    saved = checkpoint.Checkpoints(
        trunk.checkpoints, whole, len(run_files.steps(trunk.checkpoints)), progress.say
    )
    with contextlib.closing(saved):
        found = saved.restore(abstract_state, only=step)
    if found is None:
        raise config.ConfigError(f"{where}, whose checkpoint was removed meanwhile")
    started = dataclasses.replace(
        found.progress,
        seconds=0.0,
        restarts=-1,  # to leave the trunk is no restart
        shared_steps=step,
    )
    return dataclasses.replace(found, progress=started)
