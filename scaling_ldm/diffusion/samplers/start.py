"""Where sampling starts: drawn or given noise, or an image; jax only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion.samplers import compiled_loop
from scaling_ldm.diffusion.samplers.planning import SamplingPlan, SourceImage


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GivenNoise:
    """Standard normal noise that is used in place of draws.

    Attributes:
      initial: [B, ...], the noise to start from, such as an inversion returns.
      steps: [evaluations, B, ...], for the steps of a stochastic sampler.
    """

    initial: Any = None
    steps: Any = None


class Start(NamedTuple):
    """The state before the first step, and what later steps need of it."""

    x: jax.Array  # [B, ...] at the grid's first point
    initial: Any  # [B, ...], the noise in x, for inpainting, or None
    keys: Any  # one key per sample, [B], or None
    step_noise: Any  # [evaluations, B, ...], or None
    image: Any  # [B, ...], the known image, or None
    mask: Any  # [B, ...], 1 where something new is wanted, or None


def begin(
    plan: SamplingPlan,
    key: Any,
    shape: tuple[int, ...] | jax.ShapeDtypeStruct | None,
    noise: Any,
    image: SourceImage | None,
) -> Start:
    """Checks the arrays, makes one key per sample and draws the initial noise.

    Args:
      plan: of the run.
      Other arguments as for `sample`.

    Raises:
      ValueError: shapes that are missing or differ; no key where noise is drawn.
    """
    noise = noise if isinstance(noise, GivenNoise) else GivenNoise(initial=noise)
    source = SourceImage(None) if image is None else image
    if image is not None and image.image is None:
        raise ValueError("the image is None; only plan and cost accept that")
    if source.invert and noise.initial is not None:
        raise ValueError(
            "an inversion begins at its image: leave out mask and initial noise"
        )
    drawn = shape if isinstance(shape, jax.ShapeDtypeStruct) else None
    initial, pixels = _floats(noise.initial, source.image)
    batch = _batch_shape(shape if drawn is None else drawn.shape, initial, pixels)

    stochastic, rows = plan.table.stochastic, len(plan.table.rows)
    replays = stochastic and noise.steps is not None
    draws = (initial is None and not source.invert) or (stochastic and not replays)
    if key is None and draws:
        raise ValueError("give a key: there is noise to draw")
    if replays and noise.steps.shape != (rows, *batch):
        raise ValueError(
            f"step noise of shape {noise.steps.shape}, needed: {(rows, *batch)}"
        )

    given = initial if initial is not None else pixels
    dtype = jnp.float32 if given is None else given.dtype
    sharding = None if given is None else sharding_of(given)
    if drawn is not None and given is not None and drawn.sharding is not None:
        raise ValueError("a sharding is for drawn samples: place noise and image first")
    if drawn is not None and given is None:
        dtype = jnp.float64 if drawn.dtype == jnp.float64 else jnp.float32
        sharding = drawn.sharding
        if sharding is not None and _named(sharding) is None:
            raise ValueError(f"sharding must be a NamedSharding, got {type(sharding)}")
    keys = None if key is None else _keys(key, batch[0], sharding)
    if source.invert:
        x, fresh = pixels, None
    else:
        fresh = _draw(keys, batch, dtype) if initial is None else initial
        first = plan.grid.points[0]
        if pixels is not None and (source.mask is None or source.strength < 1):
            x = first.alpha * pixels + first.sigma * fresh
        else:
            x = fresh * plan.start_std
    inpaints = source.mask is not None
    return Start(
        x=x,
        initial=fresh if inpaints else None,
        keys=keys if stochastic and not replays else None,
        step_noise=jnp.asarray(noise.steps, dtype) if replays else None,
        image=pixels if inpaints else None,
        mask=widen(source.mask, batch, dtype) if inpaints else None,
    )


def sharding_of(array: Any) -> jax.sharding.NamedSharding | None:
    """The named sharding of an array that is not traced, or None."""
    return None if isinstance(array, jax.core.Tracer) else _named(array.sharding)


def _named(sharding: Any) -> jax.sharding.NamedSharding | None:
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return sharding if named else None


def widen(value: Any, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """A value broadcast to a shape."""
    value = jnp.asarray(value, dtype)
    return value if value.shape == shape else jnp.broadcast_to(value, shape)


def _floats(*given: Any) -> list[Any]:
    """All as float64 if one of them is, else as float32; None stays None."""
    arrays = [None if value is None else jnp.asarray(value) for value in given]
    wide = any(a is not None and a.dtype == jnp.float64 for a in arrays)
    dtype = jnp.float64 if wide else jnp.float32
    return [None if a is None else a.astype(dtype) for a in arrays]


def _batch_shape(shape: Any, initial: Any, image: Any) -> tuple[int, ...]:
    shapes = {
        name: tuple(value)
        for name, value in (
            ("shape", shape),
            ("noise", None if initial is None else initial.shape),
            ("image", None if image is None else image.shape),
        )
        if value is not None
    }
    if not shapes:
        raise ValueError(
            "give shape, noise or image: they state how many samples and their size"
        )
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    return next(iter(shapes.values()))


def _keys(
    key: Any, batch: int, sharding: jax.sharding.NamedSharding | None
) -> jax.Array:
    """One key per sample, sharded over the batch axis as the samples are."""
    typed = isinstance(key, jax.Array)
    if not typed or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError("key must be a typed key: jax.random.key(seed)")
    if key.ndim and key.shape != (batch,):
        raise ValueError(f"keys of shape {key.shape} for {batch} samples")
    keys = key if key.ndim else _fold(key, batch)
    if sharding is not None and len(sharding.spec):
        split = jax.sharding.PartitionSpec(sharding.spec[0])
        keys = jax.device_put(keys, jax.sharding.NamedSharding(sharding.mesh, split))
    return keys


@functools.partial(jax.jit, static_argnums=1)
def _fold(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(keys: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The initial noise, from fold_in(key, 0); row i of the loop uses i + 1."""
    first = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    return compiled_loop.normal(first, jax.ShapeDtypeStruct(shape, dtype))
