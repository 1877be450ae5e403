"""Runge-Kutta solvers of an ODE, with equal or adaptive steps; jax only.

The state is a batch of samples and one scalar per sample. `AdaptiveSolver` uses one
step size for the whole batch. Its error norm is that of the worst sample, a single
number on all devices, so all hosts take the same steps. It is written here because
diffrax (0.7.2, Apache-2.0, four more packages) refuses arrays that are sharded over the
explicit mesh axes of this library. For this one non-stiff ODE without gradients it
would save some 60 lines. `FixedStepSolver` makes the number of evaluations, and so the
cost, known beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scaling_ldm.diffusion.losses import likelihood

State = tuple[jax.Array, jax.Array]  # z [B, ...] and one number per sample [B]
Field = Callable[[jax.Array, State], State]  # (q, state) -> d state / dq


@dataclasses.dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta method (Hairer et al. 1993, section II.1)."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]  # coefficients of each stage
    weights: tuple[float, ...]

    def matrix(self) -> np.ndarray:
        stages = len(self.nodes)
        matrix = np.zeros((stages, stages))
        for i, row in enumerate(self.rows):
            matrix[i, : len(row)] = row
        return matrix


METHODS = {
    "heun": _Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": _Tableau(
        (0, 1 / 2, 1 / 2, 1),
        ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
# Hairer et al. 1993, table II.5.2. The last stage is the next step's first.
DORMAND_PRINCE = _Tableau(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
DORMAND_PRINCE_ERROR = (
    71 / 57600,
    0,
    -71 / 16695,
    71 / 1920,
    -17253 / 339200,
    22 / 525,
    -1 / 40,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedStepSolver:
    """Equal steps in q: "heun" (order 2, 2 evaluations) or "rk4" (order 4, 4).

    Raises:
      ValueError: fewer than 1 step; an unknown method.
    """

    method: str = "rk4"
    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveSolver:
    """Dormand & Prince 1980, order 5(4), six evaluations per step.

    The error of a step is at most atol + rtol |z|, as a root mean square over each
    sample. The scalar of each sample has the same limit per dim. The result is NaN, and
    never that of a shorter path, if max_steps are not enough or if no step is small
    enough. The latter happens if the network gives NaN, or if the tolerance is below
    the rounding error.
    """

    rtol: ArrayLike = 1e-5
    atol: ArrayLike = 1e-5
    max_steps: int = 1000


def integrate(
    field: Field,
    state: State,
    q: tuple[float, float],
    solver: FixedStepSolver | AdaptiveSolver,
) -> tuple[State, jax.Array]:
    """Follows the field from q[0] down to q[1].

    Returns:
      the state at q[1], and the evaluations of the field, an int32 scalar.
    """
    if isinstance(solver, FixedStepSolver):
        return _fixed(field, state, q, solver)
    return _adaptive(field, state, q, solver)


def _stages(
    field: Field,
    q: jax.Array,
    h: jax.Array,
    state: State,
    slopes: State,
    tableau: _Tableau,
    first: int | jax.Array,
) -> State:
    """The slopes [stages, ...] of one step; those before `first` are given.

    A loop, so that the network is traced and compiled once.
    """
    nodes = jnp.asarray(tableau.nodes, q.dtype)
    matrix = jnp.asarray(tableau.matrix(), q.dtype)

    def stage(i: jax.Array, slopes: State) -> State:
        new = field(q + nodes[i] * h, _ahead(state, h, matrix[i], slopes))
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), slopes, new)

    return jax.lax.fori_loop(first, len(tableau.nodes), stage, slopes)


def _ahead(state: State, h: jax.Array, row: jax.Array, slopes: State) -> State:
    """state + h sum_j row[j] slopes[j]."""
    return jax.tree.map(lambda s, k: s + h * _weighted(row, k), state, slopes)


def _weighted(row: jax.Array, slopes: jax.Array) -> jax.Array:
    # Not a matrix product: accelerators round those to bfloat16 or TF32 by default.
    row = row.reshape(row.shape + (1,) * (slopes.ndim - 1))
    return jnp.sum(row * slopes, axis=0)


def _room(state: State, stages: int) -> State:
    return jax.tree.map(lambda x: jnp.stack([jnp.zeros_like(x)] * stages), state)


def _fixed(
    field: Field, state: State, q: tuple[float, float], solver: FixedStepSolver
) -> tuple[State, jax.Array]:
    tableau = METHODS[solver.method]
    dtype = state[0].dtype
    grid = np.linspace(*q, solver.steps + 1)
    h = jnp.asarray((q[1] - q[0]) / solver.steps, dtype)
    weights = jnp.asarray(tableau.weights, dtype)
    empty = _room(state, len(tableau.nodes))

    def step(state: State, q: jax.Array) -> tuple[State, None]:
        slopes = _stages(field, q, h, state, empty, tableau, first=0)
        return _ahead(state, h, weights, slopes), None

    state, _ = jax.lax.scan(step, state, jnp.asarray(grid[:-1], dtype))
    return state, jnp.int32(solver.steps * len(tableau.nodes))


class _Walk(NamedTuple):
    """Where an adaptive integration is."""

    q: jax.Array
    h: jax.Array  # the next step's length, positive
    state: State
    slope: State  # at q, once a step has been taken
    error: jax.Array  # error of the last accepted step
    steps: jax.Array


def _adaptive(
    field: Field, state: State, q: tuple[float, float], solver: AdaptiveSolver
) -> tuple[State, jax.Array]:
    """Proportional-integral control (Hairer & Wanner 1996, section IV.2)."""
    start, end = (jnp.asarray(value, state[0].dtype) for value in q)
    tableau = DORMAND_PRINCE
    weights = jnp.asarray(tableau.weights, start.dtype)
    error_weights = jnp.asarray(DORMAND_PRINCE_ERROR, start.dtype)
    room = _room(state, len(tableau.nodes))
    smallest = 16 * jnp.finfo(start.dtype).eps * (q[0] - q[1])

    def going(walk: _Walk) -> jax.Array:
        return (walk.q > end) & (walk.steps < solver.max_steps) & (walk.h > smallest)

    def step(walk: _Walk) -> _Walk:
        last = walk.h >= walk.q - end
        h = jnp.minimum(walk.h, walk.q - end)
        slopes = jax.tree.map(lambda all_, k: all_.at[0].set(k), room, walk.slope)
        first = jnp.where(walk.steps == 0, 0, 1)  # the first step has no slope yet
        slopes = _stages(field, walk.q, -h, walk.state, slopes, tableau, first)
        new = _ahead(walk.state, -h, weights, slopes)
        miss = jax.tree.map(lambda k: h * _weighted(error_weights, k), slopes)
        error = _error(miss, walk.state, new, solver)
        accept = error <= 1  # false for NaN
        grow = 0.9 * jnp.maximum(error, 1e-8) ** -0.17 * walk.error**0.04
        there = jnp.where(last, end, walk.q - h), new, jnp.maximum(error, 1e-4)
        here = walk.q, walk.state, walk.error
        q, state, past = jax.tree.map(lambda a, b: jnp.where(accept, a, b), there, here)
        slope = jax.tree.map(lambda k: jnp.where(accept, k[-1], k[0]), slopes)
        h = h * jnp.clip(grow, 0.2, 10)  # NaN ends the walk
        return _Walk(q, h, state, slope, past, walk.steps + 1)

    walk = _Walk(
        q=start,
        h=jnp.asarray(0.1, start.dtype),  # a tenth of an e-folding of noise
        state=state,
        slope=jax.tree.map(jnp.zeros_like, state),
        error=jnp.ones((), start.dtype),
        steps=jnp.int32(0),
    )
    walk = jax.lax.while_loop(going, step, walk)
    state = jax.tree.map(lambda x: jnp.where(walk.q > end, jnp.nan, x), walk.state)
    return state, 1 + (len(tableau.nodes) - 1) * walk.steps


def _error(miss: State, old: State, new: State, solver: AdaptiveSolver) -> jax.Array:
    """The worst sample's error over what is allowed: one number for the batch."""
    dims = likelihood.count_values(miss[0])
    size = jnp.maximum(jnp.abs(old[0]), jnp.abs(new[0]))
    z = likelihood.mean_values((miss[0] / (solver.atol + solver.rtol * size)) ** 2)
    size = jnp.maximum(jnp.abs(old[1]), jnp.abs(new[1])) / dims
    density = jnp.abs(miss[1]) / dims / (solver.atol + solver.rtol * size)
    return jnp.max(jnp.maximum(jnp.sqrt(z), density))
