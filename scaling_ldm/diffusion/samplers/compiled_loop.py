"""The compiled loop: evaluate the network, combine, repeat; jax only.

There is one program per network, batch shape and kind of guidance. The coefficients of
a sampler are the rows of a packed table (solver_table.py), which is an argument of that
program. So another number of steps, grid, schedule, prediction or guidance scale needs
no new compilation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.diffusion import prediction
from scaling_ldm.diffusion.samplers.guidance import combine
from scaling_ldm.diffusion.samplers.solver_table import HISTORY, SolverTable

# Rows of a packed table. One program serves every sampler of up to this many
# evaluations. A longer one doubles the number and compiles once more.
MAX_EVALUATIONS = 1024

COLUMNS = (
    ("t", 1),
    ("out_x", 1),  # m_0 = out_x x + out_n network(x, t)
    ("out_n", 1),
    ("x_x", 1),
    ("x_s", 1),
    ("x_m", HISTORY),
    ("x_z", 1),
    ("s_x", 1),
    ("s_s", 1),
    ("s_m", HISTORY),
    ("to_alpha", 1),
    ("to_sigma", 1),
    ("ends_step", 1),
    ("guided", 1),
    ("log_small", 1),
    ("log_large", 1),
)


@dataclasses.dataclass(frozen=True)
class LoopBuild:
    """The settings that are compiled into the loop because they change the program."""

    history: int  # how many m_k the loop keeps
    saves: bool
    stochastic: bool
    unlimited: bool  # m_1 is m_0 without the x0_transform
    learned_variance: bool
    guided: str  # "none", "batched" or "sequential"
    interval: bool  # some evaluations may skip the unconditional half
    channels: int | None  # how many of the first are guided; None: all
    inpaints: bool
    x0_transform: Callable[[jax.Array], jax.Array] | None


class LoopState(NamedTuple):
    """What the loop carries from row to row."""

    x: jax.Array  # [B, ...]
    s: Any  # [B, ...], the saved state, or None
    m: tuple[jax.Array, ...]  # earlier estimates, newest first
    nfe: jax.Array  # network evaluations of each sample so far, int32


class LoopInputs(NamedTuple):
    """Arrays that the loop reads; None for those that it does not."""

    params: Any
    cond: Any
    uncond: Any
    scale: Any  # guidance scale, scalar or [B]
    rescale: Any  # rescale of guidance, scalar
    keys: Any  # one per sample, [B]
    step_noise: Any  # [rows, B, ...], in place of keys
    image: Any  # inpainting: the known image [B, ...],
    mask: Any  # 1 where it is not known,
    image_noise: Any  # and the noise that is added to it


def pack(
    table: SolverTable,
    *,
    kind: str,
    time: Callable[[float], float],
    covers: Callable[[float], bool],
) -> np.ndarray:
    """The rows as one float64 array [rows, columns], padded with rows of zeros.

    Args:
      kind: of the network's prediction.
      time: from the schedule's t to the network's.
      covers: whether guidance acts at a time.

    Raises:
      ValueError: the prediction does not determine what the sampler combines.
    """
    columns: list[list[float]] = []
    for row in table.rows:
        at = row.at
        if not prediction.is_defined(kind, table.form, at.alpha, at.sigma):
            raise ValueError(
                f"a prediction of {kind!r} does not determine {table.form} at "
                f"t = {at.t:g}, where alpha = {at.alpha:g} and sigma = {at.sigma:g}; "
                f"{_REMEDY[table.form]}, or choose a grid that does not evaluate there"
            )
        out_x, out_n = prediction.factors(kind, table.form, at.alpha, at.sigma)
        small, large = row.log_variance or (0.0, 0.0)
        columns.append(
            [
                float(time(at.t)),
                float(out_x),
                float(out_n),
                row.x_x,
                row.x_s,
                *_filled(row.x_m),
                row.x_z,
                row.s_x,
                row.s_s,
                *_filled(row.s_m),
                row.to.alpha,
                row.to.sigma,
                float(row.ends_step),
                float(covers(at.t)),
                small,
                large,
            ]
        )
    rows = MAX_EVALUATIONS
    while rows < len(columns):
        rows *= 2
    packed = np.zeros((rows, sum(width for _, width in COLUMNS)))
    packed[: len(columns)] = columns
    return packed


_REMEDY = {
    "x0": "predict x0, v or flow",
    "epsilon": 'predict epsilon, v or flow, or end the grid before: end="schedule"',
}


def _filled(values: tuple[float, ...]) -> list[float]:
    return [float(v) for v in values] + [0.0] * (HISTORY - len(values))


def _unpack(row: jax.Array) -> dict[str, jax.Array]:
    """Named scalars, and [HISTORY] for x_m and s_m."""
    named, start = {}, 0
    for name, width in COLUMNS:
        named[name] = row[start] if width == 1 else row[start : start + width]
        start += width
    return named


def begin(x: jax.Array, build: LoopBuild) -> LoopState:
    """The state before the first evaluation.

    There are no m_k yet. Their places hold x, and every row has weight 0 for them.
    """
    return LoopState(
        x=x,
        s=x if build.saves else None,
        m=(x,) * build.history,
        nfe=jnp.int32(0),
    )


def advance(
    network: Callable[..., jax.Array],
    build: LoopBuild,
    state: LoopState,
    packed: np.ndarray | jax.Array,
    start: Any,
    stop: Any,
    inputs: LoopInputs,
) -> LoopState:
    """Runs rows start ... stop - 1 of the packed table.

    Traced bounds give a while loop; Python integers give a scan, which has a gradient.
    """

    def body(i: Any, state: LoopState) -> LoopState:
        row = _unpack(
            jax.lax.dynamic_index_in_dim(packed, jnp.asarray(i), keepdims=False)
        )
        return _row(network, build, state, row, i, inputs)

    return jax.lax.fori_loop(start, stop, body, state)


compiled = jax.jit(advance, static_argnums=(0, 1))


def _row(
    network: Callable[..., jax.Array],
    build: LoopBuild,
    state: LoopState,
    row: dict[str, jax.Array],
    i: Any,
    inputs: LoopInputs,
) -> LoopState:
    x = state.x
    out, variance, nfe = _evaluate(network, build, x, row, inputs)
    found = row["out_x"] * x + row["out_n"] * out
    new = found if build.x0_transform is None else build.x0_transform(found)
    m = (new, found) if build.unlimited else (new, *state.m[: build.history - 1])

    def mix(name: str) -> jax.Array:
        total = row[f"{name}_x"] * x
        if build.saves:
            total += row[f"{name}_s"] * state.s
        for k in range(build.history):
            total += row[f"{name}_m"][k] * m[k]
        return total

    updated = mix("x")
    if build.stochastic:
        scale = row["x_z"]
        if variance is not None:
            # Nichol & Dhariwal 2021, eq. 15; the network's -1 ... 1 as 0 ... 1.
            share = 0.5 * (variance + 1)
            log = share * row["log_large"] + (1 - share) * row["log_small"]
            scale = scale * jnp.exp(0.5 * log)
        updated += scale * _noise(i, x, inputs)
    if build.inpaints:
        known = row["to_alpha"] * inputs.image + row["to_sigma"] * inputs.image_noise
        replace = row["ends_step"] * (1 - inputs.mask)
        updated = jnp.where(
            replace > 0, known * replace + updated * (1 - replace), updated
        )
    return LoopState(
        x=updated,
        s=mix("s") if build.saves else None,
        m=m,
        nfe=state.nfe + nfe,
    )


def _noise(i: Any, x: jax.Array, inputs: LoopInputs) -> jax.Array:
    """Standard normal noise of row i; each sample's comes from its own key."""
    if inputs.step_noise is not None:
        return jax.lax.dynamic_index_in_dim(inputs.step_noise, i, keepdims=False)
    return normal(jax.vmap(lambda key: jax.random.fold_in(key, i + 1))(inputs.keys), x)


def normal(keys: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """[B, ...] standard normal; row b comes from keys[b] alone."""
    draw = functools.partial(jax.random.normal, shape=like.shape[1:], dtype=like.dtype)
    return jax.vmap(draw)(keys)


def _evaluate(
    network: Callable[..., jax.Array],
    build: LoopBuild,
    x: jax.Array,
    row: dict[str, jax.Array],
    inputs: LoopInputs,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """(the guided prediction, the learned variance or None, evaluations per sample)."""

    def call(x: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array | None]:
        t = jnp.full_like(x[(slice(None), *(0,) * (x.ndim - 1))], row["t"])
        if inputs.params is None:
            out = network(x, t, cond)
        else:
            out = network(inputs.params, x, t, cond)
        _check_output(out, x, build.learned_variance)
        if not build.learned_variance:
            return out.astype(x.dtype), None
        out, variance = jnp.split(out.astype(x.dtype), 2, axis=-1)
        return out, variance

    def conditional() -> tuple[jax.Array, jax.Array | None, Any]:
        return *call(x, inputs.cond), jnp.int32(1)

    if build.guided == "none":
        return conditional()

    def both() -> tuple[jax.Array, jax.Array | None, Any]:
        if build.guided == "batched":
            cond = jax.tree.map(_interleave, inputs.cond, inputs.uncond)
            out, variance = call(_interleave(x, x), cond)
            c, u = _halves(out, x)
            variance = None if variance is None else _halves(variance, x)[0]
        else:
            c, variance = call(x, inputs.cond)
            u, _ = call(x, inputs.uncond)
        guided = combine(
            c, u, inputs.scale, rescale=inputs.rescale, channels=build.channels
        )
        return guided, variance, jnp.int32(2)

    if build.interval:
        return jax.lax.cond(row["guided"] > 0, both, conditional)
    return both()


def _check_output(out: Any, x: jax.Array, learned_variance: bool) -> None:
    """Refuses a wrong shape, which could be broadcast unnoticed."""
    wanted = x.shape
    if learned_variance:
        wanted = (*x.shape[:-1], 2 * x.shape[-1])
    if getattr(out, "shape", None) == wanted:
        return
    got = f"an array of shape {out.shape}" if hasattr(out, "shape") else repr(type(out))
    hint = ""
    if getattr(out, "shape", None) == (*x.shape[:-1], 2 * x.shape[-1]):
        hint = (
            "; if the second half of its channels is a variance, use ddpm with "
            'variance="learned", or leave that half out'
        )
    raise ValueError(f"the network gave {got} for x of {x.shape}, not {wanted}{hint}")


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """a_0, b_0, a_1, b_1, ...: so each device keeps its rows of a sharded batch."""
    both = jnp.stack([a, b], axis=1)
    return both.reshape((2 * a.shape[0], *a.shape[1:]))


def _halves(x: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_interleave`, sharded as `like` is."""
    pairs = x.reshape((x.shape[0] // 2, 2, *x.shape[1:]))
    first, second = pairs[:, 0], pairs[:, 1]
    if jax.sharding.get_abstract_mesh().empty:
        return first, second
    # A reshape drops mesh axes of size 1.
    spec = jax.typeof(like).sharding.spec
    return jax.reshard(first, spec), jax.reshard(second, spec)
