"""What a training step holds on one device, by tracing it for a mesh of devices.

The step is traced under a mesh of described devices, so that each array has its shape
on one device. `flops.memory` finds the peak. Nothing is compiled. A trace takes
seconds: a network is traced once for each mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
)

from scaling_ldm import config, records
from scaling_ldm.config import objective_kind
from scaling_ldm.flops import memory, peaks
from scaling_ldm.training import (
    capacity,
    mesh,
    objective_checks,
    optimizer,
    progress,
    train_step,
)

# A plan traces only this many networks, those that need most, and only if a device
# needs at least LARGE bytes. A trace takes seconds, and smaller networks fit anyway.
TRACED = 3
LARGE = 2**30


def estimated(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> list[records.RunSpec]:
    """The rows of a plan. The largest ones get the estimated peak of a step.

    The others keep state and saved activations, so `is_lower_bound` is true of them:

    - rows below `LARGE`;
    - all but the `TRACED` largest networks;
    - architectures of `capacity.NOT_TRACED`;
    - objectives of a user's own, which may not be made for a mesh;
    - devices that do not share batch, passes and parameters evenly;
    - GPUs with cuDNN's attention, if cuDNN is not installed here;
    - devices without a row in `flops.peaks.PEAKS`, such as CPUs.
    """
    cfg, found, done = experiment.plan, list(rows), {}
    wanted = _estimable(experiment, rows)
    total = min(len({key for _, _, key in wanted}), TRACED)
    shown = progress.Progress("plan", total, "steps traced", 5.0, at_once=False)
    for i, own, key in wanted:
        row = found[i]
        if key not in done and len(done) == TRACED:
            continue
        if key not in done:
            try:
                done[key] = step_memory(
                    *(own, row.width, row.depth, cfg.devices, own.mesh.fsdp),
                    cfg.accelerator,
                ).total
            except config.ConfigError:
                continue  # no kernel of attention here; the devices may well have one
            shown.show(len(done))
        found[i] = dataclasses.replace(row, memory_bytes_per_device=done[key])
    return found


def _estimable(
    experiment: config.Experiment, rows: Sequence[records.RunSpec]
) -> list[tuple[int, config.Experiment, Any]]:
    """Rows whose step can be traced, the largest first: (place, experiment, key).

    Rows of one key have the same step.
    """
    cfg, found = experiment.plan, []
    order = range(len(rows))
    for i in sorted(order, key=lambda i: -rows[i].memory_bytes_per_device):
        row = rows[i]
        own = config.with_overrides(experiment, row.overrides)
        if row.memory_bytes_per_device < LARGE or cfg.accelerator not in peaks.PEAKS:
            break
        if own.model.architecture in capacity.NOT_TRACED:
            continue
        sizes = row.batch_size, own.train.microbatch
        if not divides_evenly(*sizes, cfg.devices, own.mesh.fsdp):
            continue
        if objective_kind.is_own(own.objective_kind):
            continue
        found.append((i, own, (train_step.compiled_part(own), row.width, row.depth)))
    return found


def is_lower_bound(experiment: config.Experiment, row: records.RunSpec) -> bool:
    """Whether the memory of a plan's row is that of state and saved activations."""
    fsdp = config.with_overrides(experiment, row.overrides).mesh.fsdp
    parts = capacity.step_bytes(
        row.state_bytes, row.activation_bytes, experiment.plan.devices, fsdp
    )
    return row.memory_bytes_per_device == parts


def divides_evenly(batch_size: int, microbatch: int, devices: int, fsdp: int) -> bool:
    """Whether the devices share a batch, its passes and the parameters evenly."""
    return devices % fsdp == batch_size % devices == microbatch % devices == 0


def step_memory(
    experiment: config.Experiment,
    width: int,
    depth: int,
    devices: int,
    fsdp: int,
    accelerator: str,
) -> memory.PeakMemory:
    """The peak of one optimizer step at `train.batch_size`, on one of the devices.

    With `train.steps_per_dispatch`, batches waiting on the device are not counted.

    Args:
      devices: of the job.
      fsdp: how many of them share one copy of the state.
      accelerator: the kind of device, a key of `flops.peaks.PEAKS`.

    Raises:
      ValueError: `divides_evenly` is false.
    """
    rows = experiment.train.batch_size, experiment.train.microbatch
    if not divides_evenly(*rows, devices, fsdp):
        raise ValueError(
            f"{rows[0]} rows in passes of {rows[1]} on {devices} devices, of which "
            f"{fsdp} share parameters"
        )
    backend = "tpu" if accelerator.startswith("tpu") else "gpu"
    part = train_step.compiled_part(experiment)
    unroll = experiment.model.unroll == "always"
    return _step_memory(part, width, depth, (devices // fsdp, fsdp), unroll, backend)


@functools.lru_cache(maxsize=64)
def _step_memory(
    part: config.Experiment,
    width: int,
    depth: int,
    shape: tuple[int, int],
    unroll: bool,
    backend: str,
) -> memory.PeakMemory:
    devices = AbstractMesh(
        shape,
        mesh.AXES,
        axis_types=(AxisType.Explicit,) * 2,
        abstract_device=_DEVICES[backend],
    )

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        return jax.tree.map(lambda leaf: _sharded(leaf, devices, spec), tree)

    with jax.sharding.use_abstract_mesh(devices):
        functions = train_step.train_functions(part, width, depth, unroll)
        state = train_step.abstract_state(functions)
        state = jax.tree.map(
            lambda leaf, spec: _sharded(leaf, devices, spec),
            state,
            mesh.partition_specs(state, shape[1]),
        )
        inputs = objective_checks.abstract_inputs(
            part, functions.objective, part.train.batch_size
        )
        batch, uncond = (objective_checks.as_stored(part, one) for one in inputs)
        hyper = optimizer.schedule_numbers(part.optimizer, 1.0, 1, 1)
        hyper |= {"key": jax.eval_shape(lambda: jax.random.key(0))}
        jaxpr = jax.make_jaxpr(functions.step)(
            state,
            placed(batch, mesh.BATCH),
            placed(uncond, mesh.REPLICATED),
            placed(hyper, mesh.REPLICATED),
        )
    compiler = memory.COMPILERS[backend]
    if not part.mesh.overlap_collectives:
        compiler = dataclasses.replace(compiler, postpones=False)
    donated = len(jax.tree.leaves(state))
    return memory.peak(jaxpr, compiler, donated=donated)


# Kinds of devices as jax names them: the choice of an attention kernel goes by them.
_DEVICES = {
    "tpu": AbstractDevice(device_kind="TPU", num_cores=None, platform="tpu"),
    "gpu": AbstractDevice(device_kind="NVIDIA", num_cores=None, platform="cuda"),
}


def _sharded(leaf: Any, devices: AbstractMesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(devices, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
