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

from scaling_ldm import config, flops, optim, tasks

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
class Functions:
    """The pure functions of one size.

    task: what is learnt.
    init(key) -> TrainState
    step(state, batch, null, hyper) -> (state, metrics): metrics are float32 scalars
      "loss" (before the update), "loss_smoothed", "gradient_norm", "learning_rate".
      `hyper` holds "key" (of the run), "peak" and "warmup": data, so runs of one size
      share a compiled step.
    """

    task: tasks.Task
    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@functools.lru_cache(maxsize=64)
def build(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Functions:
    """The functions of the network `width` x `depth` under an experiment's recipe."""
    cfg = experiment.optimizer
    task = tasks.task(experiment, width, depth, unroll)
    optimizer = optim.adamw(cfg)

    def init(key: jax.Array) -> TrainState:
        params = task.init(key)
        return TrainState(
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt=optimizer.init(params),
            step=jnp.int32(0),
            smoothed_loss=jnp.float32(0),
        )

    def step(
        state: TrainState, batch: Batch, null: Batch, hyper: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(hyper["key"], state.step)
        value, gradient = jax.value_and_grad(task.loss)(state.params, batch, null, key)
        with jax.named_scope("optimizer"):
            direction, opt = optimizer.update(gradient, state.opt, state.params)
            rate = optim.learning_rate(state.step, hyper["peak"], hyper["warmup"])
            params = optim.descend(state.params, direction, rate)
            done = state.step + 1
            ema = optim.average(state.ema, params, done, cfg.ema_decay)
        first = state.step == 0
        smoothed = jnp.where(first, value, 0.9 * state.smoothed_loss + 0.1 * value)
        metrics = {
            "loss": value,
            "loss_smoothed": smoothed,
            "gradient_norm": optim.global_norm(gradient),
            "learning_rate": rate,
        }
        return TrainState(
            params=params, ema=ema, opt=opt, step=done, smoothed_loss=smoothed
        ), metrics

    return Functions(task=task, init=init, step=step)


def abstract_state(functions: Functions) -> TrainState:
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
class Cost:
    """What one optimizer step takes, counted on abstract values."""

    flops: flops.FlopCount
    state_bytes: int  # parameters, EMA, optimizer and gradients
    activation_bytes: int  # kept from forward to backward, whole batch


def cost(experiment: config.Experiment, functions: Functions, batch_size: int) -> Cost:
    """Counts one step at `batch_size`; compiles nothing, touches no device."""
    state = abstract_state(functions)
    batch = abstract_batch(experiment, batch_size)
    batch = {name: batch[name] for name in ("x", *functions.task.conditioning)}
    null = {
        name: jax.ShapeDtypeStruct(batch[name].shape[1:], batch[name].dtype)
        for name in functions.task.conditioning
        if name != "image"
    }
    key = jax.eval_shape(lambda: jax.random.key(0))

    def residuals(params: Any, batch: Batch, null: Batch, key: jax.Array) -> Any:
        return jax.vjp(lambda p: functions.task.loss(p, batch, null, key), params)[1]

    kept = jax.eval_shape(residuals, state.params, batch, null, key)
    params_bytes = _nbytes(state.params)
    return Cost(
        flops=flops.count(
            jax.value_and_grad(functions.task.loss), state.params, batch, null, key
        ),
        state_bytes=_nbytes(state) + params_bytes,
        activation_bytes=max(_nbytes(kept) - params_bytes, 0),
    )


def _nbytes(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
