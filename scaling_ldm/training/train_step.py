"""The pure functions of a training run, and their compiled forms.

The plan counts and measures these functions on abstract values, and training compiles
them: there is one definition of a training step. Nothing here touches a file or a
clock, and nothing runs on a device before the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, flops
from scaling_ldm.training import mesh, objective, optimizer

Batch = objective.Batch
# What each step measures.
METRICS = ("loss", "loss_smoothed", "gradient_norm", "learning_rate")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "ema", "opt", "step", "smoothed_loss"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes: arrays, or their shapes, or their shardings.

    params, ema: the parameters and their moving average.
    opt: the state of the optimizer.
    step: int32; optimizer updates done.
    smoothed_loss: float32; EMA(0.9) of the loss of each step, as in paper B.
    """

    params: Any
    ema: Any
    opt: Any
    step: Any
    smoothed_loss: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFunctions:
    """The pure functions of one size.

    objective: what is learnt.
    init(key) -> TrainState
    step(state, batch, uncond, hyper) -> (state, metrics): metrics are the float32
      scalars of METRICS; the loss is that before the update. `hyper` holds "key" (of
      the run), "peak" and "warmup" as data, so runs of one size share a compiled step.
    """

    objective: objective.Objective
    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def compiled_part(experiment: config.Experiment) -> config.Experiment:
    """The experiment without its plan, and without the seed and the learning rate.

    The functions take these two as data. So runs that differ in them alone share
    compiled functions. The rate is infinite, so that a function which read it would not
    pass unnoticed.
    """
    return dataclasses.replace(
        experiment,
        plan=config.PlanConfig(),
        train=dataclasses.replace(experiment.train, seed=0),
        optimizer=dataclasses.replace(experiment.optimizer, learning_rate=math.inf),
    )


@functools.lru_cache(maxsize=64)
def train_functions(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> TrainFunctions:
    """The functions of the network `width` x `depth` under an experiment's recipe.

    Args:
      unroll: whether the blocks are compiled one by one instead of in a loop.
    """
    cfg = experiment.optimizer
    learnt = objective.build(experiment, width, depth, unroll)
    adamw = optimizer.adamw(cfg)

    def init(key: jax.Array) -> TrainState:
        params = learnt.init(key)
        return TrainState(
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt=adamw.init(params),
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
            direction, opt = adamw.update(gradient, state.opt, state.params)
            rate = optimizer.learning_rate(state.step, hyper["peak"], hyper["warmup"])
            params = optimizer.descend(state.params, direction, rate)
            done = state.step + 1
            ema = optimizer.average(state.ema, params, done, cfg.ema_decay)
        first = state.step == 0
        smoothed = jnp.where(first, value, 0.9 * state.smoothed_loss + 0.1 * value)
        metrics = {
            "loss": value,
            "loss_smoothed": smoothed,
            "gradient_norm": optimizer.global_norm(gradient),
            "learning_rate": rate,
        }
        return TrainState(
            params=params, ema=ema, opt=opt, step=done, smoothed_loss=smoothed
        ), metrics

    return TrainFunctions(objective=learnt, init=init, step=step)


def abstract_state(functions: TrainFunctions) -> TrainState:
    """The state's shapes and types; allocates nothing."""
    return jax.eval_shape(lambda: functions.init(jax.random.key(0)))


def abstract_batch(
    experiment: config.Experiment, rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of `rows` pictures, with all that a source gives of them."""
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
    """What one optimizer step takes, counted on abstract values.

    flops: of the loss and its gradient; 2 for a multiply-add.
    state_bytes: of parameters, EMA, optimizer state and gradients.
    activation_bytes: kept from forward to backward, for the whole batch.
    """

    flops: flops.FlopCount
    state_bytes: int
    activation_bytes: int


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
    """The compiled functions of one size on one mesh.

    objective: what is learnt.
    abstract_state: shapes, types and shardings of the state.
    init(key) -> TrainState
    step(state, batch, uncond, hyper, stop) -> (state, metrics): one optimizer step;
      metrics are scalars. "stop" is the sum of the processes' stop flags.
    steps(state, batches, count, uncond, hyper, stop) -> (state, metrics): the first
      `count` of stacked batches; metrics are [batches].
    per_example_loss: as in `Objective`.
    """

    objective: objective.Objective
    abstract_state: TrainState
    init: Any
    step: Any
    steps: Any
    per_example_loss: Any


@functools.lru_cache(maxsize=64)
def compile_functions(
    experiment: config.Experiment,
    width: int,
    depth: int,
    device_mesh: jax.sharding.Mesh,
) -> CompiledFunctions:
    """The functions of one size, compiled at their first call; its runs share them."""
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
    replicated = mesh.named_sharding(device_mesh, mesh.REPLICATED)

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

    jit = functools.partial(
        jax.jit,
        compiler_options=None
        if experiment.train.optimize_code
        else _quick_to_compile(),
    )
    return CompiledFunctions(
        objective=functions.objective,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            placed,
        ),
        init=jax.jit(
            functions.init, out_shardings=placed, compiler_options=_quick_to_compile()
        ),
        step=jit(step, donate_argnums=0, out_shardings=(placed, replicated)),
        steps=jit(steps, donate_argnums=0, out_shardings=(placed, replicated)),
        per_example_loss=jit(
            functions.objective.per_example_loss, out_shardings=replicated
        ),
    )


def _quick_to_compile() -> dict[str, int | bool] | None:
    """Compiler options for what runs seldom; None for the usual ones.

    On a CPU, LLVM's optimisations would take longer than the run itself.
    """
    if jax.default_backend() != "cpu":
        return None
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
