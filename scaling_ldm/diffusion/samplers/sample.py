"""sample(...): from noise to pictures, with any network, in one compiled program.

Also the ways there and back that are the same loop on another grid: inversion,
image-to-image, inpainting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import flops
from scaling_ldm.diffusion.samplers import guidance as guidance_lib
from scaling_ldm.diffusion.samplers import loop
from scaling_ldm.diffusion.samplers.denoise import Denoise
from scaling_ldm.diffusion.samplers.grids import TimeGrid
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.plans import Rule, SamplingPlan, plan

Transform = Callable[[jax.Array], jax.Array]


class Trajectory(NamedTuple):
    """Every state a sampler went through, from the start to the end of each step."""

    x: jax.Array  # [steps + 1, B, ...]
    t: np.ndarray  # [steps + 1] float64, as alpha and sigma
    alpha: np.ndarray
    sigma: np.ndarray
    nfe: np.ndarray  # [steps + 1] evaluations of each sample so far


class SamplingProgress(NamedTuple):
    """What a callback is told."""

    step: int  # steps done
    steps: int
    nfe: int  # evaluations of each sample so far
    x: jax.Array  # [B, ...]


def sample(
    denoise: Denoise,
    key: jax.Array | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    initial: jax.Array | None = None,
    cond: Any = None,
    uncond: Any = None,
    sampler: str | Rule = "dpm++2m",
    steps: int = 20,
    grid: TimeGrid | str | Sequence[float] | None = None,
    guidance: Guidance | float | jax.Array | None = None,
    image: jax.Array | None = None,
    strength: float = 1.0,
    mask: jax.Array | None = None,
    invert: bool = False,
    x0_transform: Transform | None = None,
    step_noise: jax.Array | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    return_trajectory: bool = False,
    callback: Callable[[SamplingProgress], None] | None = None,
    callback_every: int = 1,
    **options: Any,
) -> Any:
    """Draws samples, or takes pictures part of the way or all the way back to noise.

    One program is compiled per network, batch shape, kind of guidance (none, one
    number, one per sample, ...) and build of the sampler (how many evaluations it
    combines, whether it draws noise). Changing steps (up to 1024 evaluations), grid,
    schedule, prediction kind, guidance scale or a sampler's numbers compiles nothing.
    Arithmetic is float32, or float64 if `initial` or `image` is; a network may compute
    in less.

    Args:
      denoise: what `denoiser` made.
      key: one key, of which sample i uses fold_in(key, i); or one per sample, [B].
        Sample i depends on its own key alone: not on the batch, nor on how that is
        split over devices.
      shape: [B, ...] of the samples, unless initial or image gives it.
      initial: standard normal noise to start from instead of drawing it, [B, ...];
        what an inversion returns.
      cond, uncond: trees of arrays for the network. With guidance, conditions whose
        arrays all have a first axis of B are evaluated in one batch with their
        unconditional ones.
      sampler: a name of SAMPLERS, or a function from a Grid to a Table.
      steps: of the grid, which is evaluations for every sampler but heun: 2 steps - 1.
      grid: the name of a spacing; or times, most noise first and without the end; or a
        Grid (samplers.grid, which also takes rho, shift and end). None: trailing on
        tables, karras for edm and heun, else uniform.
      guidance: a number, one per sample [B], or a Guidance. None: no guidance, and
        uncond is not evaluated.
      image: [B, ...], in the space of x0. With `invert`, what is taken to noise; with
        `mask`, what is kept where mask is 0; otherwise where image-to-image begins.
      strength: 0 ... 1, the share of the steps that is run. The image is noised to
        where they begin: 1 leaves next to nothing of it.
      mask: [B, ...] or broadcast to it, 1 where something new is wanted.
      invert: from image to its noise, along the deterministic ODE (ddim, euler).
      x0_transform: applied to every estimate of x0 (samplers.clip,
        samplers.dynamic_threshold). Compiled in.
      step_noise: [evaluations, B, ...], in place of a stochastic sampler's own draws.
      sharding: of the samples, when `shape` is given: over the batch axis.
      return_trajectory: also return every step's state. Nothing is kept otherwise.
      callback: called with a Progress (step, steps, nfe, x) every `callback_every`
        steps, and at the end.
      options: of the sampler. ddim: eta, 0 ... 1. ddpm: variance, "fixed_small",
        "fixed_large" or "learned". dpm++: solver, "midpoint" or "heun";
        lower_order_final; curvature (3m), 0.5 for the published third order;
        shared_noise (sde 2s), False for the published way. unipc: form, "bh1" or "bh2";
        corrector; lower_order_final.

    Returns:
      x [B, ...]; or (x, Trajectory).

    Raises:
      ValueError: unknown names or options; no key where noise is needed; guidance
        without uncond; a prediction that cannot be read on this grid.
    """
    initial, image = _floats(initial, image)
    batch = _batch_shape(shape, initial, image)
    _check(image, initial, mask, strength, invert, guidance, uncond, callback_every)
    todo = plan(
        denoise,
        sampler=sampler,
        steps=steps,
        grid=grid,
        guidance=guidance,
        strength=strength,
        invert=invert,
        **options,
    )
    table = todo.table
    if x0_transform is not None and table.form != "x0":
        raise ValueError("x0_transform does not apply to an inversion")
    replays = table.stochastic and step_noise is not None
    draws = (initial is None and not invert) or (table.stochastic and not replays)
    if key is None and draws:
        raise ValueError("give a key: there is noise to draw")
    needed = (len(table.rows), *batch)
    if replays and step_noise.shape != needed:
        raise ValueError(f"step_noise of shape {step_noise.shape}, needed: {needed}")

    # x at the grid's first point, and the noise in it.
    given = initial if initial is not None else image
    dtype = jnp.float32 if given is None else given.dtype
    if sharding is not None and not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(f"sharding must be a NamedSharding, got {type(sharding)}")
    if sharding is not None and given is not None:
        raise ValueError(
            "sharding is for drawn samples: place initial or image yourself"
        )
    if given is not None:
        sharding = _sharding(given)
    keys = None if key is None else _keys(key, batch[0], sharding)
    if invert:
        x, fresh = image, None
    else:
        fresh = _draw(keys, batch, dtype) if initial is None else initial
        first = todo.grid.points[0]
        if image is not None and (mask is None or strength < 1):
            x = first.alpha * image + first.sigma * fresh
        else:
            x = fresh * todo.start_std

    how = guidance if isinstance(guidance, Guidance) else Guidance(scale=guidance)
    guided = _guided(how, cond, uncond, batch[0])
    static = loop.Static(
        history=table.history,
        saves=table.saves,
        stochastic=table.stochastic,
        learned_variance=table.learned_variance,
        guided=guided,
        interval=guided != "none" and todo.skips,
        quirk=how.quirk,
        inpaints=mask is not None,
        x0_transform=x0_transform,
    )
    inputs = loop.Inputs(
        params=denoise.params,
        cond=cond,
        uncond=_like(uncond, cond) if guided == "batched" else uncond,
        scale=None if guided == "none" else _numbers(how.scale, dtype),
        rescale=None if how.rescale is None else _numbers(how.rescale, dtype),
        keys=keys if table.stochastic and not replays else None,
        step_noise=jnp.asarray(step_noise, dtype) if replays else None,
        image=image if mask is not None else None,
        mask=None if mask is None else _widen(mask, batch, dtype),
        image_noise=fresh if mask is not None else None,
    )
    if guided == "none":
        inputs = inputs._replace(uncond=None)
    run = _runner(denoise, static, todo, x, inputs)

    state = loop.begin(x, static)
    if callback is None and not return_trajectory:
        state = run(state, 0, len(table.rows))
        return state.x / todo.start_std if invert else state.x
    ends = [int(end) for end in table.step_ends]
    path, nfe, done = [state.x], [0], 0
    for step, end in enumerate(ends, start=1):
        told = callback and (step % callback_every == 0 or step == len(ends))
        if not (return_trajectory or told):
            continue
        state, done = run(state, done, end), end
        path.append(state.x)
        nfe.append(_counted(state, todo, done))
        if told:
            callback(SamplingProgress(step, len(ends), nfe[-1], state.x))
    x = state.x / todo.start_std if invert else state.x
    if not return_trajectory:
        return x
    rows = table.rows
    points = np.asarray([rows[0].at, *(rows[end - 1].to for end in ends)])
    return x, Trajectory(jnp.stack(path), *points.T, np.asarray(nfe))


def _floats(*given: Any) -> list[jax.Array | None]:
    """float64 arrays if one is that, else float32; those that are not given stay so."""
    arrays = [None if value is None else jnp.asarray(value) for value in given]
    wide = any(a is not None and a.dtype == jnp.float64 for a in arrays)
    dtype = jnp.float64 if wide else jnp.float32
    return [None if a is None else a.astype(dtype) for a in arrays]


def _batch_shape(
    shape: tuple[int, ...] | None, initial: Any, image: Any
) -> tuple[int, ...]:
    shapes = {
        name: tuple(value)
        for name, value in (
            ("shape", shape),
            ("initial", None if initial is None else initial.shape),
            ("image", None if image is None else image.shape),
        )
        if value is not None
    }
    if not shapes:
        raise ValueError("give shape, initial or image: how many samples, how large?")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    return next(iter(shapes.values()))


def _check(
    image: Any,
    initial: Any,
    mask: Any,
    strength: float,
    invert: bool,
    guidance: Any,
    uncond: Any,
    callback_every: int,
) -> None:
    if image is None and (mask is not None or invert or strength < 1):
        raise ValueError("mask, strength and invert need an image")
    if invert and (mask is not None or initial is not None):
        raise ValueError("an inversion begins at its image: no mask, no initial")
    if guidance is not None and uncond is None:
        raise ValueError("guidance needs uncond, the condition of the other half")
    if callback_every < 1:
        raise ValueError(f"callback_every must be at least 1, got {callback_every}")


def _numbers(value: Any, dtype: Any) -> Any:
    """An array of a dtype; numbers stay on the host until the compiled call."""
    library = jnp if isinstance(value, jax.Array) else np
    return library.asarray(value, dtype)


def _widen(value: Any, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    value = jnp.asarray(value, dtype)
    return value if value.shape == shape else jnp.broadcast_to(value, shape)


def _sharding(array: Any) -> jax.sharding.NamedSharding | None:
    found = None if isinstance(array, jax.core.Tracer) else array.sharding
    return found if isinstance(found, jax.sharding.NamedSharding) else None


def _keys(
    key: jax.Array, batch: int, sharding: jax.sharding.NamedSharding | None
) -> jax.Array:
    """One key per sample, split over devices as the samples are."""
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
    """The initial noise, from fold_in(key, 0); the loop's row i uses i + 1."""
    first = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    return loop.normal(first, jax.ShapeDtypeStruct(shape, dtype))


def _guided(how: Guidance, cond: Any, uncond: Any, batch: int) -> str:
    if how.scale is None:
        return "none"
    batches = guidance_lib.can_batch(cond, batch)
    if how.evaluation == "batched" and not batches:
        raise ValueError(
            "evaluation 'batched' needs conditions whose arrays all have a first axis "
            f"of {batch}; 'sequential' takes any"
        )
    if how.evaluation != "auto":
        return how.evaluation
    return "batched" if batches else "sequential"


def _like(uncond: Any, cond: Any) -> Any:
    """The unconditional arrays with a batch axis and where the conditional ones are."""

    def widen(u: Any, c: Any) -> jax.Array:
        u, where = _widen(u, c.shape), _sharding(c)
        return u if where is None else jax.device_put(u, where)

    return jax.tree.map(widen, uncond, jax.tree.map(jnp.asarray, cond))


def _runner(
    denoise: Denoise,
    static: loop.Static,
    todo: SamplingPlan,
    x: jax.Array,
    inputs: loop.Inputs,
) -> Callable[[loop.State, int, int], loop.State]:
    """(state, first row, row to stop before) -> state."""
    packed = todo.packed(x.dtype)
    leaves = jax.tree.leaves((x, inputs))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    # Inside somebody's jit the bounds are constants, so that one may differentiate.
    run = loop.advance if traced else loop.compiled
    packed = jnp.asarray(packed) if traced else packed

    def go(state: loop.State, start: int, stop: int) -> loop.State:
        return run(denoise.network, static, state, packed, start, stop, inputs)

    return go


def _counted(state: loop.State, todo: SamplingPlan, rows: int) -> int:
    """Evaluations as the loop counted them; they must be the plan's."""
    planned = sum(todo.evaluations[:rows])
    if isinstance(state.nfe, jax.core.Tracer):
        return planned
    if int(state.nfe) != planned:
        raise RuntimeError(f"{int(state.nfe)} evaluations, planned were {planned}")
    return planned


def cost(
    denoise: Denoise,
    shape: tuple[int, ...],
    *,
    cond: Any = None,
    uncond: Any = None,
    guidance: Any = None,
    decode: Callable[[jax.Array], Any] | None = None,
    **settings: Any,
) -> flops.FlopCount:
    """FLOPs of a whole `sample` of this shape: every evaluation, and the decoder.

    Nothing is computed: arrays may be jax.ShapeDtypeStruct. Matrix products and
    convolutions are counted, 2 x MAC (see scaling_ldm.flops).

    Args:
      shape: [B, ...].
      decode: from x to a picture, counted once.
      settings: sampler, steps, grid, strength, invert and the sampler's options.
    """
    todo = plan(denoise, guidance=guidance, **settings)
    twice = sum(each == 2 for each in todo.evaluations)
    once = len(todo.evaluations) - twice
    given = () if denoise.params is None else (denoise.params,)

    def whole(given: Any, x: jax.Array, t: jax.Array, cond: Any, uncond: Any) -> Any:
        def evaluate(condition: Any) -> Callable[[int, jax.Array], jax.Array]:
            def body(_: int, x: jax.Array) -> jax.Array:
                out = denoise.network(*given, x, t, condition)
                # A learned variance, a second half of the channels, ends here.
                return out[..., : x.shape[-1]].astype(x.dtype)

            return body

        x = jax.lax.fori_loop(0, once + twice, evaluate(cond), x)
        if twice:
            x = jax.lax.fori_loop(0, twice, evaluate(uncond), x)
        return x if decode is None else decode(x)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    t = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return flops.count(whole, given, x, t, cond, uncond)


def clip(limit: float) -> Transform:
    """Keeps estimates of x0 in [-limit, limit]."""
    return _clip(float(limit))


@functools.lru_cache(maxsize=64)
def _clip(limit: float) -> Transform:
    return lambda x0: jnp.clip(x0, -limit, limit)


def dynamic_threshold(quantile: float = 0.995, limit: float = 1.0) -> Transform:
    """Scales each estimate of x0 so that a quantile of |x0| is at most `limit`.

    Saharia et al. 2022, section 2.3: clip to s = max(limit, quantile of |x0|), then
    divide by s / limit.
    """
    return _dynamic_threshold(float(quantile), float(limit))


@functools.lru_cache(maxsize=64)
def _dynamic_threshold(quantile: float, limit: float) -> Transform:
    def transform(x0: jax.Array) -> jax.Array:
        flat = jnp.abs(x0.reshape(x0.shape[0], -1))
        s = jnp.maximum(jnp.quantile(flat, quantile, axis=1), limit)
        s = s.reshape((-1,) + (1,) * (x0.ndim - 1))
        return jnp.clip(x0, -s, s) * (limit / s)

    return transform
