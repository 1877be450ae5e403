"""The pure functions of a training run, and their compiled forms.

The plan counts and measures these functions on abstract values, and training compiles
them: there is one definition of a training step. Nothing here touches a file or a
clock, and nothing runs on a device before the first call.
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
from scaling_ldm.models import attention_backends, layers
from scaling_ldm.training import (
    accumulation,
    compiler_options,
    mesh,
    objective,
    objective_checks,
    optimizer,
    packs,
    rate_policies,
    width_scaling,
)

Batch = objective.Batch
# What each step measures.
METRICS = ("loss", "loss_smoothed", "gradient_norm", "learning_rate")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes: arrays, or their shapes, or their shardings.

    params: the parameters.
    averages: name -> an average of the parameters, each of `optimizer.averages`.
    opt: the state of the optimizer.
    step: int32; optimizer updates done.
    smoothed_loss: float32; EMA(0.9) of the loss of each step, as in paper B.
    aux: the state of the objective; {} if it has none.

    As a tree, and so in a checkpoint, an average stands under its name beside the other
    fields. The order is that of version 0.1.0, which had the fields params, ema, opt,
    step and smoothed_loss; a checkpoint's checksum depends on the order. An empty aux
    is no part of the tree.
    """

    params: Any
    averages: dict[str, Any]
    opt: Any
    step: Any
    smoothed_loss: Any
    aux: Any = dataclasses.field(default_factory=dict)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        names = tuple(self.averages)
        has_aux = not (isinstance(self.aux, dict) and not self.aux)
        values = {**vars(self), **self.averages}
        key = jax.tree_util.GetAttrKey
        order = _tree_order(names, has_aux)
        return [(key(name), values[name]) for name in order], (names, has_aux)

    @classmethod
    def tree_unflatten(cls, about: tuple[Any, bool], values: Any) -> TrainState:
        names, has_aux = about
        found = dict(zip(_tree_order(names, has_aux), values, strict=True))
        return cls(averages={name: found.pop(name) for name in names}, **found)


def _tree_order(averages: tuple[str, ...], has_aux: bool) -> tuple[str, ...]:
    """The names of a state's parts, in their order in the tree."""
    first = tuple(name for name in averages if name == config.EMA)
    others = (name for name in averages if name != config.EMA)
    aux = ("aux",) if has_aux else ()
    return ("params", *first, "opt", "step", "smoothed_loss", *others, *aux)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainFunctions:
    """The pure functions of one size.

    objective: what is learnt.
    metrics: the names of METRICS, then those of the objective's own.
    init(key) -> TrainState
    start(key, params) -> TrainState: of given parameters, before the first step.
    step(state, batch, uncond, hyper) -> (state, metrics): metrics are the float32
      scalars of `metrics`; the loss is that before the update. `hyper` holds "key" (of
      the run) and `optimizer.schedule_numbers` as data, so runs of one size share a
      compiled step.
    """

    objective: objective.Objective
    metrics: tuple[str, ...]
    init: Callable[[jax.Array], TrainState]
    start: Callable[[jax.Array, Any], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def compiled_part(experiment: config.Experiment) -> config.Experiment:
    """The experiment without its plan, and without what the functions take as data.

    Data are the seed, the learning rate, and the weights to start from. So runs that
    differ only in these share compiled functions. The rate is set to infinity, so that
    a function that reads it by mistake gives infinite numbers.
    """
    return dataclasses.replace(
        experiment,
        plan=config.PlanConfig(),
        train=dataclasses.replace(
            experiment.train,
            seed=0,
            init_from="",
            init_exceptions=(),
            init_checksum="",
        ),
        optimizer=rate_policies.compiled_part(experiment.optimizer),
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
    accumulation.check(experiment, learnt)
    factors = rate_policies.scaling(experiment, width, depth)
    adamw = optimizer.adamw(cfg, factors)

    def start(key: jax.Array, params: Any) -> TrainState:
        aux = learnt.init_aux(jax.random.fold_in(key, 1), params)
        return TrainState(
            params=params,
            averages={name: jax.tree.map(jnp.copy, params) for name in cfg.averages},
            opt=adamw.init(params),
            step=jnp.int32(0),
            smoothed_loss=jnp.float32(0),
            # A copy, because a step may not get the same buffer in two arguments.
            aux=jax.tree.map(jnp.copy, aux) if jax.tree.leaves(aux) else {},
        )

    def init(key: jax.Array) -> TrainState:
        params = learnt.init(key)
        if factors is not None:
            params = width_scaling.multiply(params, factors.initial)
        return start(key, params)

    def step(
        state: TrainState, batch: Batch, uncond: Batch, hyper: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(hyper["key"], state.step)

        def refuse(aux: Any, measured: dict[str, jax.Array]) -> None:
            objective_checks.check_loss(
                experiment, learnt, state.aux, aux, measured, METRICS
            )

        (value, (aux, measured)), gradient = accumulation.gradient(
            learnt, experiment.train.microbatch, refuse
        )(state.params, state.averages, state.aux, batch, uncond, state.step, key)
        with jax.named_scope("optimizer"):
            direction, opt = adamw.update(gradient, state.opt, state.params)
            rate = optimizer.scheduled_rate(cfg, state.step, hyper)
            params = optimizer.descend(state.params, direction, rate)
            done = state.step + 1
            averages = {
                name: optimizer.average(cfg, name, before, params, done)
                for name, before in state.averages.items()
            }
        first = state.step == 0
        smoothed = jnp.where(first, value, 0.9 * state.smoothed_loss + 0.1 * value)
        metrics = {
            "loss": value,
            "loss_smoothed": smoothed,
            "gradient_norm": optimizer.global_norm(gradient),
            "learning_rate": rate,
        }
        return TrainState(
            params=params,
            averages=averages,
            opt=opt,
            step=done,
            smoothed_loss=smoothed,
            aux=aux,
        ), metrics | measured

    return TrainFunctions(
        objective=learnt,
        metrics=(*METRICS, *learnt.metrics),
        init=init,
        start=start,
        step=step,
    )


def abstract_state(functions: TrainFunctions) -> TrainState:
    """The state's shapes and types; allocates nothing."""
    return _abstract_state(functions, jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=64)
def _abstract_state(functions: TrainFunctions, _: Any) -> TrainState:
    """`abstract_state` under a mesh, which the shapes' own shardings name."""
    params = layers.initial_shapes(functions.objective.init)
    return jax.eval_shape(lambda p: functions.start(jax.random.key(0), p), params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one optimizer step takes, counted on abstract values.

    flops: of the loss, its gradient and the objective's state; 2 per multiply-add.
    params: the shapes of the parameters.
    state_bytes: of parameters, averages, optimizer, objective's state and gradients.
      Passes over parts of a batch hold a sum of gradients besides.
    activation_bytes: kept from forward to backward, for the rows of one pass.
    """

    flops: flops.FlopCount
    params: Any
    state_bytes: int
    activation_bytes: int


def cost(
    experiment: config.Experiment, functions: TrainFunctions, batch_size: int
) -> StepCost:
    """Counts one step at `batch_size`; compiles nothing, touches no device."""
    state = abstract_state(functions)
    learnt = functions.objective
    batch, uncond = objective_checks.abstract_inputs(experiment, learnt, batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))

    kept_bytes = 0

    def gradient(state: TrainState, *inputs: Any) -> Any:
        """Of the whole batch; tracing is slow, so one trace gives residuals, too."""
        nonlocal kept_bytes
        loss = accumulation.loss(learnt, state.averages, state.aux, state.step)
        value, pullback, _ = jax.vjp(
            lambda params: loss(params, *inputs), state.params, has_aux=True
        )
        kept_bytes = _nbytes(pullback)
        return pullback(jnp.ones_like(value))

    counted = flops.count(gradient, state, batch, uncond, key)
    params_bytes = _nbytes(state.params)
    passes = accumulation.passes(experiment.train)
    return StepCost(
        flops=counted,
        params=state.params,
        state_bytes=_nbytes(state) + params_bytes,
        activation_bytes=max(kept_bytes - params_bytes, 0) // passes,
    )


def _nbytes(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledFunctions:
    """The compiled functions of one size on one mesh.

    objective: what is learnt.
    metrics: as in `TrainFunctions`.
    abstract_state: shapes, types and shardings of the state.
    init(key) -> TrainState
    start(key, params) -> TrainState
    step(state, batch, uncond, hyper, request) -> (state, metrics): one optimizer step;
      metrics are scalars. "request" is the largest of the processes' requests.
    steps(state, batches, count, uncond, hyper, request) -> (state, metrics): the first
      `count` of stacked batches; metrics are [batches].
    per_example_loss: as in `Objective`.
    slots: states of single runs <-> the state of a pack.

    On a mesh of packed runs `init`, `start` and `abstract_state` are of one run. Of the
    others, the arguments state, count, hyper and params and all results have a leading
    axis of runs.
    """

    objective: objective.Objective
    metrics: tuple[str, ...]
    abstract_state: TrainState
    init: Any
    start: Any
    step: Any
    steps: Any
    per_example_loss: Any
    slots: packs.Slots


@functools.lru_cache(maxsize=64)
def compile_functions(
    experiment: config.Experiment,
    width: int,
    depth: int,
    device_mesh: jax.sharding.Mesh,
) -> CompiledFunctions:
    """The functions of one size, compiled at their first call; its runs share them."""
    platform = compiler_options.platform_of(device_mesh)
    attention_backends.check(experiment.model.attention, platform)
    unrolled = {"always", "auto"} if platform == "cpu" else {"always"}
    functions = train_functions(
        experiment, width, depth, unroll=experiment.model.unroll in unrolled
    )
    abstract = abstract_state(functions)
    placed = mesh.shardings(device_mesh, abstract)
    every_run = functools.partial(packs.on_every_run, device_mesh)
    run, flags = mesh.PACKED, mesh.flags_spec(device_mesh)
    after: Any = placed, mesh.named_sharding(device_mesh, mesh.REPLICATED)
    if mesh.RUNS in device_mesh.axis_names:
        after = (mesh.named_sharding(device_mesh, run),) * 2

    def step(
        state: TrainState, batch: Any, uncond: Any, hyper: Any, request: jax.Array
    ) -> tuple[TrainState, Any]:
        state, metrics = functions.step(state, batch, uncond, hyper)
        return state, metrics | {"request": request.max()}

    def per_example_loss(params: Any, batch: Batch, *draws: Any) -> jax.Array:
        batch = objective.widened(batch)
        return functions.objective.per_example_loss(params, batch, *draws)

    options = compiler_options.quick_to_compile(platform)
    quick = functools.partial(jax.jit, out_shardings=placed, compiler_options=options)
    jit = functools.partial(
        jax.jit, compiler_options=None if experiment.train.optimize_code else options
    )
    return CompiledFunctions(
        objective=functions.objective,
        metrics=functions.metrics,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            placed,
        ),
        init=quick(functions.init),
        start=quick(functions.start),
        step=jit(
            every_run(step, (run, mesh.BATCH, mesh.REPLICATED, run, flags)),
            donate_argnums=0,
            out_shardings=after,
        ),
        steps=jit(
            every_run(
                _several(functions),
                (run, mesh.STACKED_BATCHES, run, mesh.REPLICATED, run, flags),
            ),
            donate_argnums=0,
            out_shardings=after,
        ),
        per_example_loss=jit(
            every_run(per_example_loss, (run, *(mesh.BATCH,) * 3, mesh.REPLICATED)),
            out_shardings=after[1],
        ),
        slots=packs.slots(device_mesh, options),
    )


def _several(functions: TrainFunctions) -> Callable[..., tuple[TrainState, Any]]:
    """`CompiledFunctions.steps` of one run, before it is compiled."""

    def steps(
        state: TrainState,
        batches: Any,
        count: jax.Array,
        uncond: Any,
        hyper: Any,
        request: jax.Array,
    ) -> tuple[TrainState, Any]:
        def body(i: jax.Array, carry: Any) -> Any:
            state, metrics = carry
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
            )
            state, new = functions.step(state, batch, uncond, hyper)
            return state, jax.tree.map(lambda m, n: m.at[i].set(n), metrics, new)

        rows = batches["x"].shape[0]
        metrics = {name: jnp.zeros(rows) for name in functions.metrics}
        state, metrics = jax.lax.fori_loop(0, count, body, (state, metrics))
        return state, metrics | {"request": request.max()}

    return steps
