"""The gradient of a step, of the whole batch at once or in passes over parts of it.

With `train.microbatch`, a step goes over its batch in passes. Everything random is
drawn for the whole batch before the first one, so the passes change results only by
rounding. Each device takes a part of its own rows in every pass, and no row moves. The
gradients of the passes are added up in float32 by arrays that are sharded like the
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scaling_ldm import config
from scaling_ldm.models import layers
from scaling_ldm.training import objective

_SPLIT = "scaling_ldm.training.objective.MeanLoss"

# (loss, (aux after the step, metrics)), gradient
Result = tuple[tuple[jax.Array, tuple[Any, dict[str, jax.Array]]], Any]
# Refuses (ConfigError) aux and metrics that are not what an objective's fields say.
Check = Callable[[Any, dict[str, jax.Array]], None]


def passes(cfg: config.TrainConfig) -> int:
    """How many passes a step of this many pictures takes."""
    return cfg.batch_size // cfg.microbatch if cfg.microbatch else 1


def check(experiment: config.Experiment, learnt: objective.Objective) -> None:
    """Refuses passes for an objective whose loss cannot be taken in parts.

    Raises:
      ConfigError: its loss is no `MeanLoss`, or its state has leaves that are not
        floating-point numbers, so they have no mean over the passes.
    """
    if passes(experiment.train) == 1:
        return
    where = (
        f"config.train.microbatch = {experiment.train.microbatch} with the objective "
        f"{experiment.objective_kind}"
    )
    if not isinstance(learnt.loss, objective.MeanLoss):
        raise config.ConfigError(
            f"{where}: its loss cannot be taken in parts of a batch; set "
            f"config.train.microbatch = 0, or make it a {_SPLIT}"
        )

    def aux_of(params: Any) -> Any:
        return learnt.init_aux(jax.random.key(0), params)

    aux = jax.eval_shape(aux_of, layers.initial_shapes(learnt.init))
    odd = [
        f"{jax.tree_util.keystr(path)} is {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(aux)
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if odd:
        raise config.ConfigError(
            f"{where}: the mean of its state over passes cannot be taken: aux"
            f"{'; aux'.join(odd)}; set config.train.microbatch = 0"
        )


def loss(
    learnt: objective.Objective, averages: Any, aux: Any, step: Any
) -> Callable[..., Any]:
    """(params, batch, uncond, key) -> (loss, (aux after the step, metrics))."""

    def of_batch(params: Any, batch: Any, uncond: Any, key: jax.Array) -> Any:
        value, after, measured = learnt.loss(
            params,
            averages,
            aux,
            objective.widened(batch),
            objective.widened(uncond),
            step,
            key,
        )
        return value, (after, measured)

    return of_batch


def gradient(
    learnt: objective.Objective, microbatch: int, refuse: Check
) -> Callable[..., Result]:
    """(params, averages, aux, batch, uncond, step, key) -> `Result`.

    Args:
      microbatch: rows of a pass; 0: those of the batch.
      refuse: is called with aux and metrics of the loss, while it is traced.

    Raises:
      ValueError: (the function) the microbatch does not divide the rows of the batch on
        each device.
    """

    def whole(
        params: Any,
        averages: Any,
        aux: Any,
        batch: Any,
        uncond: Any,
        step: Any,
        key: Any,
    ) -> Result:
        function = loss(learnt, averages, aux, step)
        found = jax.value_and_grad(function, has_aux=True)(params, batch, uncond, key)
        refuse(*found[0][1])
        return found

    def in_passes(
        params: Any,
        averages: Any,
        aux: Any,
        batch: Any,
        uncond: Any,
        step: Any,
        key: Any,
    ) -> Result:
        rows = batch["x"].shape[0]
        if rows == microbatch:
            return whole(params, averages, aux, batch, uncond, step, key)
        assert isinstance(learnt.loss, objective.MeanLoss)  # `check` has refused others
        of_rows = learnt.loss.of_rows
        uncond = objective.widened(uncond)
        drawn = _on_rows_of(batch["x"], learnt.loss.draw(batch, key))
        parts = split((batch, drawn), microbatch)
        count = rows // microbatch

        def loss_of(params: Any, part: Any) -> Any:
            batch, drawn = part
            batch = objective.widened(batch)
            value, after, measured = of_rows(
                params, averages, aux, batch, uncond, step, drawn
            )
            return value, (after, measured)

        def one(total: Any, part: Any) -> tuple[Any, None]:
            (value, rest), slope = jax.value_and_grad(loss_of, has_aux=True)(
                params, part
            )
            after, measured = rest
            refuse(after, measured)
            return _with_pass(total, value, after, measured, slope), None

        zero = _before_the_first(learnt, params, aux)
        ((value, measured, slope), after, _), _ = jax.lax.scan(one, zero, parts)

        def mean(total: jax.Array, like: Any) -> jax.Array:
            return (total / count).astype(like.dtype)

        after = jax.tree.map(lambda m, like: m.astype(like.dtype), after, aux)
        measured = {name: total / count for name, total in measured.items()}
        return (value / count, (after, measured)), jax.tree.map(mean, slope, params)

    return in_passes if microbatch else whole


def _with_pass(total: Any, value: Any, after: Any, measured: Any, slope: Any) -> Any:
    """(sums of loss, metrics and gradient; mean of aux; passes), with one pass more."""
    sums, mean, done = total
    sums = jax.tree.map(_add, sums, (value, measured, slope))
    # A running mean, so that what does not change keeps its bits.
    mean = jax.tree.map(lambda m, a: _add(m, _add(-m, a) / (done + 1)), mean, after)
    return sums, mean, done + 1


def _before_the_first(learnt: objective.Objective, params: Any, aux: Any) -> Any:
    """Sums of loss, metrics and gradient, the mean of aux, and passes done: zeros."""
    sums = (
        jnp.float32(0),
        {name: jnp.float32(0) for name in learnt.metrics},
        jax.tree.map(_zeros, params),
    )
    return sums, jax.tree.map(_zeros, aux), jnp.int32(0)


def _on_rows_of(x: Any, drawn: Any) -> Any:
    """What is drawn, spread over devices as the rows of x are."""
    if jax.sharding.get_abstract_mesh().empty:
        return drawn
    over = jax.typeof(x).sharding.spec[0]
    return jax.tree.map(
        lambda a: jax.reshard(a, PartitionSpec(over, *(None,) * (a.ndim - 1))), drawn
    )


def _zeros(like: jax.Array) -> jax.Array:
    """A float32 accumulator, sharded like an array."""
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.zeros(like.shape, jnp.float32)
    return jnp.zeros(like.shape, jnp.float32, device=jax.typeof(like).sharding)


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    if not jax.sharding.get_abstract_mesh().empty:
        more = jax.reshard(more, jax.typeof(total).sharding.spec)
    return total + more.astype(jnp.float32)


def split(tree: Any, microbatch: int) -> Any:
    """Arrays [passes, microbatch, ...] of arrays [rows, ...]; no row leaves its device.

    Pass i takes part i of each device's rows.

    Raises:
      ValueError: the microbatch does not divide the rows, or the devices do not divide
        the microbatch.
    """

    def parts(a: jax.Array) -> jax.Array:
        rows, rest = a.shape[0], a.shape[1:]
        mesh = jax.sharding.get_abstract_mesh()
        over = None if mesh.empty else jax.typeof(a).sharding.spec[0]
        names = over if isinstance(over, tuple) else (over,) if over else ()
        devices = math.prod(mesh.shape[name] for name in names)
        if rows % microbatch or microbatch % devices:
            raise ValueError(
                f"passes of {microbatch} rows over {rows} rows on {devices} devices"
            )
        count, each = rows // microbatch, microbatch // devices
        if not names:
            return a.reshape(count, each, *rest)
        free = (None,) * len(rest)
        own = jax.lax.reshape(
            a,
            (devices, count, each, *rest),
            out_sharding=PartitionSpec(over, None, None, *free),
        )
        return jax.lax.reshape(
            jnp.moveaxis(own, 1, 0),
            (count, microbatch, *rest),
            out_sharding=PartitionSpec(None, over, *free),
        )

    return jax.tree.map(parts, tree)
