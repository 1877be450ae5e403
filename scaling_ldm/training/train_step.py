"""From an experiment and a size to the pure functions of a run: init, step, evaluate.

Plan counts and measures these functions on abstract values, train compiles them: there
is one definition of a training step. Nothing here touches a file, a clock or a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, flops
from scaling_ldm.training import mesh, objective
from scaling_ldm.training import optimizer as optimizer_lib

Batch = dict[str, jax.Array]
METRICS = ("loss", "loss_smoothed", "gradient_norm", "learning_rate")  # of each step


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "ema", "opt", "step", "smoothed_loss"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes. `step` counts optimizer updates done."""

    params: Any
    ema: Any
    opt: Any
    step: jax.Array
    smoothed_loss: jax.Array  # EMA(0.9) of the loss of each step, as in paper B


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFunctions:
    """The pure functions of one size.

    objective: what is learnt.
    init(key) -> TrainState
    step(state, batch, null, hyper) -> (state, metrics): metrics are float32 scalars
      "loss" (before the update), "loss_smoothed", "gradient_norm", "learning_rate".
      `hyper` holds "key" (of the run), "peak" and "warmup": data, so runs of one size
      share a compiled step.
    """

    objective: objective.Objective
    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=64)
def train_functions(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> TrainFunctions:
    """The functions of the network `width` x `depth` under an experiment's recipe."""
    cfg = experiment.optimizer
    learnt = objective.build(experiment, width, depth, unroll)
    optimizer = optimizer_lib.adamw(cfg)

    def init(key: jax.Array) -> TrainState:
        params = learnt.init(key)
        return TrainState(
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt=optimizer.init(params),
            step=jnp.int32(0),
            smoothed_loss=jnp.float32(0),
        )

    def step(
        state: TrainState, batch: Batch, uncond: Batch, hyper: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(hyper["key"], state.step)
        value, gradient = jax.value_and_grad(learnt.loss)(
            state.params, batch, uncond, key
        )
        with jax.named_scope("optimizer"):
            direction, opt = optimizer.update(gradient, state.opt, state.params)
            rate = optimizer_lib.learning_rate(
                state.step, hyper["peak"], hyper["warmup"]
            )
            params = optimizer_lib.descend(state.params, direction, rate)
            done = state.step + 1
            ema = optimizer_lib.average(state.ema, params, done, cfg.ema_decay)
        first = state.step == 0
        smoothed = jnp.where(first, value, 0.9 * state.smoothed_loss + 0.1 * value)
        metrics = {
            "loss": value,
            "loss_smoothed": smoothed,
            "gradient_norm": optimizer_lib.global_norm(gradient),
            "learning_rate": rate,
        }
        return TrainState(
            params=params, ema=ema, opt=opt, step=done, smoothed_loss=smoothed
        ), metrics

    return TrainFunctions(objective=learnt, init=init, step=step)


def abstract_state(functions: TrainFunctions) -> TrainState:
    """The state's shapes and types; allocates nothing."""
    return jax.eval_shape(lambda: functions.init(jax.random.key(0)))


def abstract_batch(experiment: config.Experiment, rows: int) -> Batch:
    """Shapes and types of what a source gives, `rows` pictures of it."""
    s, e = experiment.data.text_tokens, experiment.model.text_width
    words = experiment.reads_words
    kinds = {
        "x": (experiment.data.shape, jnp.float32),
        "text": ((s,), jnp.int32) if words else ((s, e), jnp.float32),
        "mask": ((s,), jnp.bool_),
        "label": ((), jnp.int32),
        "image": (experiment.data.shape, jnp.float32),
    }
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype)
        for name, (shape, dtype) in kinds.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one optimizer step takes, counted on abstract values."""

    flops: flops.FlopCount
    state_bytes: int  # parameters, EMA, optimizer and gradients
    activation_bytes: int  # kept from forward to backward, whole batch


def cost(
    experiment: config.Experiment, functions: TrainFunctions, batch_size: int
) -> StepCost:
    """Counts one step at `batch_size`; compiles nothing, touches no device."""
    state = abstract_state(functions)
    batch = abstract_batch(experiment, batch_size)
    batch = {name: batch[name] for name in ("x", *functions.objective.conditioning)}
    uncond = {
        name: jax.ShapeDtypeStruct(batch[name].shape[1:], batch[name].dtype)
        for name in functions.objective.conditioning
        if name != "image"
    }
    key = jax.eval_shape(lambda: jax.random.key(0))

    def residuals(params: Any, batch: Batch, uncond: Batch, key: jax.Array) -> Any:
        return jax.vjp(
            lambda p: functions.objective.loss(p, batch, uncond, key), params
        )[1]

    kept = jax.eval_shape(residuals, state.params, batch, uncond, key)
    params_bytes = _nbytes(state.params)
    return StepCost(
        flops=flops.count(
            jax.value_and_grad(functions.objective.loss),
            state.params,
            batch,
            uncond,
            key,
        ),
        state_bytes=_nbytes(state) + params_bytes,
        activation_bytes=max(_nbytes(kept) - params_bytes, 0),
    )


def _nbytes(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledFunctions:
    """The compiled functions of one size on one mesh, and what they take."""

    functions: TrainFunctions
    state: TrainState  # abstract, with shardings
    init: Any
    step: Any  # one optimizer step; metrics are scalars
    steps: Any  # the first `count` of stacked batches; metrics are [batches]
    per_example_loss: Any


@functools.lru_cache(maxsize=64)
def compile_functions(
    experiment: config.Experiment,
    width: int,
    depth: int,
    device_mesh: jax.sharding.Mesh,
) -> CompiledFunctions:
    """Jitted functions, compiled at first use; runs of one size share them."""
    unroll = experiment.model.unroll
    functions = train_functions(
        experiment,
        width,
        depth,
        unroll=unroll == "always"
        or (unroll == "auto" and jax.default_backend() == "cpu"),
    )
    abstract = abstract_state(functions)
    placed = mesh.shardings(device_mesh, abstract)
    whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)

    def step(
        state: TrainState, batch: Any, uncond: Any, hyper: Any, stop: jax.Array
    ) -> tuple[TrainState, Any]:
        state, metrics = functions.step(state, batch, uncond, hyper)
        return state, metrics | {"stop": stop.sum()}

    def steps(
        state: TrainState,
        batches: Any,
        count: jax.Array,
        uncond: Any,
        hyper: Any,
        stop: jax.Array,
    ) -> tuple[TrainState, Any]:
        def body(i: jax.Array, carry: Any) -> Any:
            state, metrics = carry
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
            )
            state, new = functions.step(state, batch, uncond, hyper)
            return state, jax.tree.map(lambda m, n: m.at[i].set(n), metrics, new)

        rows = batches["x"].shape[0]
        metrics = {name: jnp.zeros(rows) for name in METRICS}
        state, metrics = jax.lax.fori_loop(0, count, body, (state, metrics))
        return state, metrics | {"stop": stop.sum()}

    compiled = functools.partial(
        jax.jit,
        compiler_options=None if experiment.train.optimize_code else _plain_code(),
    )
    return CompiledFunctions(
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
        per_example_loss=compiled(
            functions.objective.per_example_loss, out_shardings=whole
        ),
    )


def _plain_code() -> dict[str, int | bool] | None:
    """Options for what runs seldom: on a CPU, LLVM would take longer than the run."""
    if jax.default_backend() != "cpu":
        return None
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
