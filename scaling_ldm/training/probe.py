"""Measures how long a training step of a plan takes on this machine.

The cheapest and the most expensive size of the plan take a few steps on noise. The step
times of the other sizes are interpolated linearly in FLOPs. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.training import (
    mesh,
    objective_checks,
    optimizer,
    progress,
    signals,
    time_left,
    train_step,
)

SECONDS = 2.0  # least total time of the timed steps
MOST_DISPATCHES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step of a run, and its FLOPs."""

    spec: records.RunSpec
    seconds: float

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s over all devices."""
        return self.spec.flops_per_step / self.seconds


def run(experiment: config.Experiment, specs: Sequence[records.RunSpec]) -> None:
    """Probes the plan on the devices of this job, and says what it would take here.

    Raises:
      ConfigError: the mesh or a batch size does not fit the devices.
    """
    ordered = sorted(specs, key=lambda spec: spec.flops_per_step)
    alike = ordered[0].flops_per_step == ordered[-1].flops_per_step
    found = []
    for spec in ordered[:1] if alike else (ordered[0], ordered[-1]):
        own = config.with_overrides(experiment, spec.overrides)
        sizes = {
            "config.train.batch_size": spec.batch_size,
            "config.train.microbatch": own.train.microbatch,
        }
        device_mesh = mesh.build(own.mesh, sizes)
        with jax.set_mesh(device_mesh):
            found.append(
                StepTime(spec=spec, seconds=step_seconds(own, spec, device_mesh))
            )
    for line in lines(found, specs, jax.device_count(), jax.devices()[0].device_kind):
        progress.say(line)


def step_seconds(
    experiment: config.Experiment, spec: records.RunSpec, device_mesh: jax.sharding.Mesh
) -> float:
    """Seconds of one optimizer step, without compilation and the input pipeline.

    Args:
      experiment: with the run's overrides.
    """
    compiled = train_step.compile_functions(
        train_step.compiled_part(experiment), spec.width, spec.depth, device_mesh
    )
    rng, many = np.random.default_rng(0), experiment.train.steps_per_dispatch
    local = mesh.rows_of_process(device_mesh, spec.batch_size)
    abstract, none = objective_checks.abstract_inputs(
        experiment, compiled.objective, len(local)
    )

    def filled(shape: jax.ShapeDtypeStruct, *stacked: int) -> np.ndarray:
        size = (*stacked, *shape.shape)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.standard_normal(size, np.float32).astype(shape.dtype)
        return np.ones(size, shape.dtype)

    def arrays(shapes: Any, *stacked: int) -> dict[str, np.ndarray]:
        stored = objective_checks.as_stored(experiment, shapes)
        return {name: filled(shape, *stacked) for name, shape in stored.items()}

    stacked = () if many == 1 else (many,)
    batch = mesh.put(
        device_mesh,
        arrays(abstract, *stacked),
        mesh.STACKED_BATCHES if stacked else mesh.BATCH,
    )
    uncond = mesh.put(device_mesh, arrays(none), mesh.REPLICATED)
    numbers = optimizer.schedule_numbers(
        experiment.optimizer, spec.learning_rate, spec.warmup_steps, spec.steps
    )
    hyper = mesh.put(device_mesh, numbers, mesh.REPLICATED)
    key = jax.device_put(
        jax.random.key(spec.seed), mesh.named_sharding(device_mesh, mesh.REPLICATED)
    )
    hyper |= {"key": key}
    flag = mesh.request_flags(device_mesh, signals.GO_ON)
    count = mesh.put(device_mesh, np.int32(many), mesh.REPLICATED)
    state = compiled.init(key)
    steps, begin = 0, time.perf_counter()
    for dispatch in range(MOST_DISPATCHES):
        if dispatch == 1:  # the first one waits for compilation
            begin, steps = time.perf_counter(), 0
        if many == 1:
            state, metrics = compiled.step(state, batch, uncond, hyper, flag)
        else:
            state, metrics = compiled.steps(state, batch, count, uncond, hyper, flag)
        jax.block_until_ready(metrics)
        steps += many
        if dispatch and mesh.any_process(time.perf_counter() - begin > SECONDS):
            break
    return (time.perf_counter() - begin) / steps


def lines(
    found: Sequence[StepTime],
    specs: Sequence[records.RunSpec],
    devices: int,
    kind: str,
) -> list[str]:
    """Lines with what was measured, and with the time of the plan at that speed.

    Args:
      found: of the cheapest and of the most expensive step; one if all cost the same.
      kind: of the devices, as jax calls it.
    """
    sizes = [
        f"probe  {one.spec.width} x {one.spec.depth}  {1000 * one.seconds:.3g} ms a "
        f"step  {progress.format_rate(one.flops_per_second / devices)} per device"
        for one in found
    ]
    flops = [one.spec.flops_per_step for one in found]
    seconds = [one.seconds for one in found]
    total = sum(
        spec.steps * float(np.interp(spec.flops_per_step, flops, seconds))
        for spec in specs
    )
    speed = sum(spec.planned_flops for spec in specs) / total / devices
    return [
        *sizes,
        f"probe  {len(specs)} runs take {time_left.format_duration(total)} on "
        f"{devices} x {kind}, without compilation, encoding, measuring and "
        "checkpoints; for times of a plan, set "
        f"config.plan.flops_per_second_per_device = {speed:.3g}",
    ]
