"""A run's programs compiled for devices that are not here, and what they need there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.diffusion import samplers
from scaling_ldm.flops import collectives, peaks
from scaling_ldm.models import from_config
from scaling_ldm.training import (
    inference,
    mesh,
    objective_checks,
    optimizer,
    step_memory,
    topologies,
    train_step,
    xla_flags,
)

# Triton's tiles are found by timing them on a GPU; without one, larger products fail.
_NO_TIMING = {"xla_gpu_enable_triton_gemm": False}
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def compiled(
    experiment: config.Experiment,
    spec: records.RunSpec,
    topology: topologies.Topology,
    program: str,
) -> records.CompiledProgram:
    """Compiles one program of a run, and says what it needs on each device.

    Args:
      spec: the run; its overrides are applied to the experiment.
      program: one of config.names.PROGRAMS.

    Raises:
      ConfigError: the mesh or a batch does not fit the devices.
    """
    experiment = config.with_overrides(experiment, spec.overrides)
    batches = {
        "config.train.batch_size": experiment.train.batch_size,
        "config.train.microbatch": experiment.train.microbatch,
        "config.validation.batch_size": experiment.validation.batch_size,
    }
    device_mesh = mesh.build(experiment.mesh, batches, use=topology.devices)
    begin = time.perf_counter()
    model = experiment.model
    with jax.set_mesh(device_mesh):
        function, arguments = _PROGRAMS[program](experiment, spec, device_mesh)
        lowered = function.trace(*arguments).lower(
            lowering_platforms=(topology.platform,)
        )
        options = xla_flags.options(experiment.mesh, topology.platform)
        if topology.platform == "cuda":
            options |= _NO_TIMING
        try:
            found = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as e:
            if _OUT_OF_MEMORY not in str(e):
                raise
            numbers: dict[str, Any] = {"refusal": " ".join(str(e).split())[:600]}
        else:
            numbers = _numbers(found)
    return records.CompiledProgram(
        run_id=spec.run_id,
        study=spec.study,
        program=program,
        topology=topology.name,
        accelerator=topology.accelerator,
        devices=device_mesh.size,
        fsdp=device_mesh.shape["fsdp"],
        remat=model.remat_policy if model.remat else "none",
        microbatch=experiment.train.microbatch,
        overlap=experiment.mesh.overlap_collectives,
        device_bytes=peaks.PEAKS[topology.accelerator].memory_bytes,
        planned_bytes=step_memory.step_memory(
            experiment,
            spec.width,
            spec.depth,
            device_mesh.size,
            device_mesh.shape["fsdp"],
            topology.accelerator,
        ).total,
        seconds=time.perf_counter() - begin,
        **numbers,
    )


def _numbers(found: Any) -> dict[str, Any]:
    memory = found.memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": tuple(collectives.collectives(found.as_text())),
    }


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def _placed(device_mesh: jax.sharding.Mesh, tree: Any, spec: Any) -> Any:
    sharding = mesh.named_sharding(device_mesh, spec)
    return _abstract(tree, jax.tree.map(lambda _: sharding, tree))


def _key(device_mesh: jax.sharding.Mesh) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _placed(device_mesh, key, mesh.REPLICATED)


def _functions(
    experiment: config.Experiment,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
) -> train_step.CompiledFunctions:
    part = train_step.compiled_part(experiment)
    return train_step.compile_functions(part, spec.width, spec.depth, device_mesh)


def _train(
    experiment: config.Experiment,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
) -> tuple[Any, tuple[Any, ...]]:
    functions = _functions(experiment, spec, device_mesh)
    inputs = objective_checks.abstract_inputs(
        experiment, functions.objective, spec.batch_size
    )
    batch, uncond = (objective_checks.as_stored(experiment, one) for one in inputs)
    numbers = optimizer.schedule_numbers(
        experiment.optimizer, spec.learning_rate, spec.warmup_steps, spec.steps
    )
    hyper = _placed(device_mesh, numbers, mesh.REPLICATED)
    request = jax.ShapeDtypeStruct((device_mesh.size,), jnp.int32)
    rest = (
        _placed(device_mesh, uncond, mesh.REPLICATED),
        hyper | {"key": _key(device_mesh)},
        _placed(device_mesh, request, mesh.BATCH),
    )
    many = experiment.train.steps_per_dispatch
    if many == 1:
        return functions.step, (
            functions.abstract_state,
            _placed(device_mesh, batch, mesh.BATCH),
            *rest,
        )
    stacked = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((many, *a.shape), a.dtype), batch
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return functions.steps, (
        functions.abstract_state,
        _placed(device_mesh, stacked, mesh.STACKED_BATCHES),
        _placed(device_mesh, count, mesh.REPLICATED),
        *rest,
    )


def _loss(
    experiment: config.Experiment,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
) -> tuple[Any, tuple[Any, ...]]:
    functions = _functions(experiment, spec, device_mesh)
    rows = experiment.validation.batch_size
    batch, _ = objective_checks.abstract_inputs(experiment, functions.objective, rows)
    batch = objective_checks.as_stored(experiment, batch)
    times = jax.ShapeDtypeStruct((rows,), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return functions.per_example_loss, (
        functions.abstract_state.params,
        _placed(device_mesh, batch, mesh.BATCH),
        _placed(device_mesh, times, mesh.BATCH),
        _placed(device_mesh, numbers, mesh.BATCH),
        _key(device_mesh),
    )


def _sample(
    experiment: config.Experiment,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
) -> tuple[Any, tuple[Any, ...]]:
    functions = _functions(experiment, spec, device_mesh)
    network = from_config.denoiser(experiment, spec.width, spec.depth, unroll=False)
    sampling = experiment.generate
    rows = -(-sampling.batch_size // device_mesh.size) * device_mesh.size
    every = objective_checks.abstract_batch(experiment, rows)
    every = objective_checks.as_stored(experiment, every)
    cond = {name: every[name] for name in network.conditioning}
    cond = _placed(device_mesh, cond, mesh.BATCH)
    shape = _placed(
        device_mesh,
        jax.ShapeDtypeStruct((rows, *experiment.data.shape), np.float32),
        mesh.BATCH,
    )

    @jax.jit
    def draw(params: Any, keys: Any, cond: Any, uncond: Any) -> jax.Array:
        return samplers.sample(
            inference.denoise(experiment, network, params),
            keys,
            shape=shape,
            cond=cond,
            uncond=uncond,
            **inference.options(sampling),
        )

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = _placed(device_mesh, keys, mesh.BATCH)
    return draw, (functions.abstract_state.params, keys, cond, cond)


_PROGRAMS: dict[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    "train": _train,
    "loss": _loss,
    "sample": _sample,
}
