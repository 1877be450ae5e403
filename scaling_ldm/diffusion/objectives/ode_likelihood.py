"""Exact log p(x0) by the probability-flow ODE; pure functions of arrays.

A diffusion model's samples can be made by an ODE, and along it log p changes by minus
the divergence of its velocity (Chen et al. 2018, eq. 8; Song et al. 2021, arXiv
2011.13456, eq. 39). Integrating from data to noise gives log p(x0) of the very samples
that a deterministic sampler with small steps makes, and their latent.

**The variable.** With z = x / sqrt(alpha^2 + sigma^2) and the angle phi = atan(sigma /
alpha) every schedule is the same circle, z = cos(phi) x0 + sin(phi) eps, and its ODE is

    dz / dphi = v = cos(phi) eps_hat - sin(phi) x0_hat,

finite from data to pure noise for all kinds of prediction; which schedule it was enters
only through the network's t. Near the data structure of size s appears at phi ~ s, so
steps are taken in q = log((pi / 2) / phi), which falls to 0 at pure noise and resolves
each octave of noise alike.

**The ends.** The ODE starts at t_min > 0, where x0 is taken to be x / alpha: what is
measured is the density of x0 + (sigma / alpha) eps. Where p has width s in a direction
this costs about (sigma / (alpha s))^2 / 2 nats in that direction, less on average. That
is nothing for the continuous schedules, whose default t_min has logsnr 12 to 20, and
visible for tables, which know nothing below t = 0 (scaled_linear: sigma / alpha = 0.029
there). It ends at t_max with the prior that samplers start from, N(0, I) for most, even
where the schedule leaves some signal (scaled_linear: alpha = 0.068): that mismatch is
the model's own, and counts.

**The divergence** is a trace of D x D derivatives: `Exact` takes D directions, and
`Hutchinson` a few random ones, the same along the whole path, without bias whatever
their number. Its error per dim shrinks with D and with the number of probes.

**Solvers.** `Adaptive` is Dormand & Prince's pair with one step size for the whole
batch: its error norm is the worst sample's, a single number on all devices, so all
hosts take the same steps. It is written here because diffrax (0.7.2, Apache-2.0, four
more packages) refuses arrays sharded over the explicit mesh axes that this library
uses; for one non-stiff ODE without gradients it would save some 60 lines.
`Fixed` makes the number of evaluations, and so the cost, known beforehand.

>>> import jax
>>> from scaling_ldm import noise
>>> from scaling_ldm.diffusion.objectives import ode_likelihood
>>> schedule = noise.rectified_flow()
>>> def network(params, x, t, cond):  # the flow eps - x0 of data N(0, params^2)
...     t = t[:, None]
...     return x * (t - (1 - t) * params**2) / ((1 - t) ** 2 * params**2 + t**2)
>>> @jax.jit  # compiled once; parameters are arguments, not constants
... def measure(params, x0, key):
...     apply = lambda x, t, cond: network(params, x, t, cond)
...     return ode_likelihood.bits_per_dim(apply, schedule, x0, key, prediction="flow")
>>> x0 = 0.5 * jax.random.normal(jax.random.key(0), (4, 16))
>>> got = measure(0.5, x0, jax.random.key(1))
>>> want = -jax.scipy.stats.norm.logpdf(x0, scale=0.5).mean(1) / jax.numpy.log(2)
>>> bool(abs(got.bits_per_dim - want).max() < 1e-3)
True
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion import prediction as predictions
from scaling_ldm.diffusion.objectives import likelihood
from scaling_ldm.diffusion.objectives.likelihood import Network

State = tuple[jax.Array, jax.Array]  # z [B, ...] and the integral of the divergence [B]
Field = Callable[[jax.Array, State], State]


@dataclasses.dataclass(frozen=True)
class _Tableau:
    """An explicit Runge-Kutta method (Hairer et al. 1993, section II.1)."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]  # of each stage
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
LAWS = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
    """All D derivatives: D directions at once, so for small D."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hutchinson:
    """The mean over probes e of e . J e (Hutchinson 1990; Grathwohl et al. 2019).

    probes: at least 1; they go through the network together, as a batch that many
      times as large would.
    law: "rademacher" (signs; the least variance, none for a diagonal J) or "gaussian".
    """

    probes: int = 1
    law: str = "rademacher"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")
        if self.law not in LAWS:
            raise ValueError(f"law {self.law!r} is none of {', '.join(LAWS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """Equal steps in q: "heun" (order 2, 2 evaluations) or "rk4" (order 4, 4)."""

    method: str = "rk4"
    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Dormand & Prince 1980, order 5(4), six evaluations a step.

    A step's error may be atol + rtol |z| in the root mean square of each sample, and as
    much per dim in its log density (nats). After max_steps, or where no step is small
    enough (a network that gives NaN; a tolerance below the arithmetic's), the result is
    NaN: never that of a shorter path.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000


class Likelihood(NamedTuple):
    """What `bits_per_dim` returns.

    bits_per_dim, nats: -log p(x0) per value, and of the whole sample.
    latent: x at t_max: what a deterministic sampler would have started from.
    evaluations: of the network with its directional derivatives, an int32 scalar.
    """

    bits_per_dim: jax.Array  # [B]
    nats: jax.Array  # [B]
    latent: jax.Array  # [B, ...]
    evaluations: jax.Array  # []


def bits_per_dim(
    network: Network,
    schedule: noise.Schedule,
    x0: jax.Array,
    key: jax.Array,
    *,
    prediction: str,
    cond: Any = None,
    divergence: Exact | Hutchinson = Hutchinson(),  # noqa: B008, immutable
    solver: Fixed | Adaptive = Adaptive(),  # noqa: B008, immutable
    spacing: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    derivative: str = "vjp",
) -> Likelihood:
    """-log p(x0) in bits per dim. Call it under jax.jit: compiled once.

    Args:
      network: (x [B, ...], t [B], cond) -> prediction, t in the schedule's own unit
        (fractional for a table). No sample may see another. Channels of a learned
        variance are left out.
      schedule: any of noise.SCHEDULES.
      x0: [B, ...].
      key: one typed key, or one for each sample (`likelihood.sample_keys`).
      prediction: the network's kind, a name of `prediction.PREDICTIONS`.
      cond: handed to the network as it is.
      divergence, solver: how; see the module.
      spacing: None for continuous data and latents. If given, x0 are levels this far
        apart (`likelihood.spacing`): noise is added to fill the gaps and -log2(spacing)
        to the bits per dim, 7 for 1 / 128, which then bound the levels' code length.
      t_min: where x0 is put, by default `t_data`, or the time of logsnr 20 if that has
        no noise.
      t_max: by default `t_noise`.
      derivative: "vjp", or "jvp" for networks that have a forward derivative, which
        attention of `attention.attend` has not; the same numbers, less memory.

    Raises:
      ValueError: an unknown prediction or derivative, one that says nothing of x0 at
        t_max, or a t_min without noise.
    """
    if derivative not in DERIVATIVES:
        known = ", ".join(DERIVATIVES)
        raise ValueError(f"derivative {derivative!r} is none of {known}")
    t_min = likelihood.least_noise(schedule, t_min)
    t_max = schedule.t_noise if t_max is None else t_max
    predictions.kind(prediction)
    if not predictions.is_defined(prediction, "x0", float(schedule.alpha(t_max)), 1.0):
        raise ValueError(
            f"{prediction} says nothing of x0 at t_max = {t_max:g}, which has no "
            "signal: give a smaller t_max"
        )
    x0 = likelihood.floating(x0)
    dims = likelihood.values(x0)
    keys = likelihood.sample_keys(key, x0)
    probe_keys, gap_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if spacing is not None:
        x0 = likelihood.dequantise(x0, gap_keys, spacing=spacing)

    velocity = _velocity(network, schedule, prediction, cond)
    probes, scale = _probes(divergence, probe_keys, x0)
    field = _with_divergence(velocity, probes, scale, DERIVATIVES[derivative])
    start, end = _angle(schedule, t_min), _angle(schedule, t_max)
    q = math.log(math.pi / 2 / start), math.log(math.pi / 2 / end)
    state = math.cos(start) * x0, jnp.zeros_like(likelihood.total(x0))
    if isinstance(solver, Fixed):
        (z, change), evaluations = _fixed(field, state, q, solver)
    else:
        (z, change), evaluations = _adaptive(field, state, q, solver)

    std = schedule.prior_std / _norm(schedule, schedule.t_noise)
    prior = -0.5 * likelihood.total((z / std) ** 2)
    prior = prior - dims * math.log(std * math.sqrt(2 * math.pi))
    nats = -(prior + change + dims * math.log(math.cos(start)))
    if spacing is not None:
        nats = nats - dims * math.log(spacing)
    return Likelihood(
        bits_per_dim=likelihood.bits_per_dim(nats, x0),
        nats=nats,
        latent=z * _norm(schedule, t_max),
        evaluations=evaluations,
    )


def _norm(schedule: noise.Schedule, t: float) -> float:
    return math.hypot(float(schedule.alpha(t)), float(schedule.sigma(t)))


def _angle(schedule: noise.Schedule, t: float) -> float:
    return math.atan2(float(schedule.sigma(t)), float(schedule.alpha(t)))


def _velocity(
    network: Network, schedule: noise.Schedule, prediction: str, cond: Any
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(q, z) -> dz / dq = -phi v."""

    def velocity(q: jax.Array, z: jax.Array) -> jax.Array:
        # sin(pi / 2 - phi), not cos(phi): exact to the last digits next to pure noise.
        phi = math.pi / 2 * jnp.exp(-q)
        cosine = jnp.sin(-math.pi / 2 * jnp.expm1(-q))
        logsnr = 2 * (jnp.log(cosine) - jnp.log(jnp.sin(phi)))
        alpha, sigma = schedule.from_logsnr(logsnr)
        norm = jnp.sqrt(alpha**2 + sigma**2)
        x = norm * z
        said = network(x, likelihood.full(schedule.time(logsnr), x), cond)
        said = likelihood.prediction_alone(said, x)
        v = predictions.convert(said, x, alpha, sigma, source=prediction, to="v")
        return (-phi / norm) * v

    return velocity


def _probes(
    divergence: Exact | Hutchinson, keys: jax.Array, x: jax.Array
) -> tuple[jax.Array, float]:
    """(directions [P, B, ...], factor of the sum over them)."""
    if isinstance(divergence, Exact):
        dims = likelihood.values(x)
        basis = jnp.eye(dims, dtype=x.dtype).reshape(dims, 1, *x.shape[1:])
        return basis + jnp.zeros_like(x)[None], 1.0
    draw = LAWS[divergence.law]
    shape = divergence.probes, *x.shape[1:]
    probes = jax.vmap(lambda key: draw(key, shape, x.dtype), out_axes=1)(keys)
    return probes, 1.0 / divergence.probes


def _with_divergence(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    probes: jax.Array,
    scale: float,
    derive: Callable[..., tuple[jax.Array, jax.Array]],
) -> Field:
    """(q, (z, _)) -> (dz / dq, its divergence)."""

    def field(q: jax.Array, state: State) -> State:
        out, along = derive(lambda z: velocity(q, z), state[0], probes)
        inner = jax.vmap(likelihood.total)(probes * along)
        return out, scale * jnp.sum(inner, axis=0)

    return field


def _forward(f: Any, z: jax.Array, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
    push = jax.vmap(lambda e: jax.jvp(f, (z,), (e,)), out_axes=(None, 0))
    return push(probes)


def _backward(f: Any, z: jax.Array, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, pull = jax.vjp(f, z)
    return out, jax.vmap(pull)(probes)[0]


DERIVATIVES = {"jvp": _forward, "vjp": _backward}


def _stages(
    field: Field,
    q: jax.Array,
    h: jax.Array,
    state: State,
    slopes: State,
    tableau: _Tableau,
    first: int | jax.Array,
) -> State:
    """Slopes [stages, ...] of one step, those before `first` given.

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
    field: Field, state: State, q: tuple[float, float], solver: Fixed
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
    q: jax.Array
    h: jax.Array  # the next step's length, positive
    state: State
    slope: State  # at q, once a step has been taken
    error: jax.Array  # of the last accepted step
    steps: jax.Array


def _adaptive(
    field: Field, state: State, q: tuple[float, float], solver: Adaptive
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


def _error(miss: State, old: State, new: State, solver: Adaptive) -> jax.Array:
    """The worst sample's error over what is allowed: one number for the batch."""
    dims = likelihood.values(miss[0])
    size = jnp.maximum(jnp.abs(old[0]), jnp.abs(new[0]))
    z = likelihood.mean((miss[0] / (solver.atol + solver.rtol * size)) ** 2)
    size = jnp.maximum(jnp.abs(old[1]), jnp.abs(new[1])) / dims
    density = jnp.abs(miss[1]) / dims / (solver.atol + solver.rtol * size)
    return jnp.max(jnp.maximum(jnp.sqrt(z), density))
