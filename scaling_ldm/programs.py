"""The compiled functions of one size on one mesh, and the set it is validated on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, mesh, tasks
from scaling_ldm import data as data_lib
from scaling_ldm import step as step_lib
from scaling_ldm.objectives import validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled functions of one size on one mesh, and what they take."""

    functions: step_lib.Functions
    state: step_lib.TrainState  # abstract, with shardings
    init: Any
    step: Any  # one optimizer step; metrics are scalars
    steps: Any  # the first `count` of stacked batches; metrics are [batches]
    errors: Any


@functools.lru_cache(maxsize=64)
def compile_for(
    experiment: config.Experiment,
    width: int,
    depth: int,
    device_mesh: jax.sharding.Mesh,
) -> Program:
    """Jitted functions, compiled at first use; runs of one size share them."""
    unroll = experiment.model.unroll
    functions = step_lib.build(
        experiment,
        width,
        depth,
        unroll=unroll == "always"
        or (unroll == "auto" and jax.default_backend() == "cpu"),
    )
    abstract = step_lib.abstract_state(functions)
    placed = mesh.shardings(device_mesh, abstract)
    whole = mesh.named(device_mesh, mesh.WHOLE)

    def step(
        state: step_lib.TrainState, batch: Any, null: Any, hyper: Any, stop: jax.Array
    ) -> tuple[step_lib.TrainState, Any]:
        state, metrics = functions.step(state, batch, null, hyper)
        return state, metrics | {"stop": stop.sum()}

    def steps(
        state: step_lib.TrainState,
        batches: Any,
        count: jax.Array,
        null: Any,
        hyper: Any,
        stop: jax.Array,
    ) -> tuple[step_lib.TrainState, Any]:
        def body(i: jax.Array, carry: Any) -> Any:
            state, metrics = carry
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
            )
            state, new = functions.step(state, batch, null, hyper)
            return state, jax.tree.map(lambda m, n: m.at[i].set(n), metrics, new)

        rows = batches["x"].shape[0]
        metrics = {name: jnp.zeros(rows) for name in step_lib.METRICS}
        state, metrics = jax.lax.fori_loop(0, count, body, (state, metrics))
        return state, metrics | {"stop": stop.sum()}

    compiled = functools.partial(
        jax.jit,
        compiler_options=None if experiment.train.optimize_code else _plain_code(),
    )
    return Program(
        functions=functions,
        state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            placed,
        ),
        init=jax.jit(
            functions.init, out_shardings=placed, compiler_options=_plain_code()
        ),
        step=compiled(step, donate_argnums=0, out_shardings=(placed, whole)),
        steps=compiled(steps, donate_argnums=0, out_shardings=(placed, whole)),
        errors=compiled(functions.task.errors, out_shardings=whole),
    )


def _plain_code() -> dict[str, int | bool] | None:
    """Options for what runs seldom: on a CPU, LLVM would take longer than the run."""
    if jax.default_backend() != "cpu":
        return None
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """One batch of the validation set on the devices; the same for every run."""

    batch: Any
    times: jax.Array
    indices: jax.Array
    key: jax.Array
    samples: int  # rows that count; the rest fill the last batch


def held_out_batches(
    experiment: config.Experiment,
    device_mesh: jax.sharding.Mesh,
    source: data_lib.Source,
    names: Sequence[str],
) -> list[HeldOutBatch]:
    """The whole validation set, with each sample's time and noise index."""
    cfg = experiment.validation
    times = validation.stratified_times(
        cfg.samples, tasks.objective(experiment.objective), seed=cfg.seed
    )
    rows = mesh.rows_of_process(device_mesh, cfg.batch_size)
    key = jax.device_put(jax.random.key(cfg.seed), mesh.named(device_mesh, mesh.WHOLE))
    batches = []
    for start in range(0, cfg.samples, cfg.batch_size):
        index = np.arange(start, start + cfg.batch_size, dtype=np.int32) % cfg.samples
        mine = index[rows]
        given = source.rows(mine.astype(np.int64))
        batches.append(
            HeldOutBatch(
                batch=mesh.put(device_mesh, {name: given[name] for name in names}),
                times=mesh.put(device_mesh, times[mine]),
                indices=mesh.put(device_mesh, mine),
                key=key,
                samples=min(cfg.batch_size, cfg.samples - start),
            )
        )
    return batches


def validation_loss(
    program: Program, params: Any, held_out: Sequence[HeldOutBatch]
) -> float:
    """The mean error over the validation samples, in float64."""
    errors = [
        np.asarray(
            program.errors(params, b.batch, b.times, b.indices, b.key), np.float64
        )[: b.samples]
        for b in held_out
    ]
    return float(np.mean(np.concatenate(errors)))
