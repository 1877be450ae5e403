"""Exact log p(x0) by the probability-flow ODE; pure functions of arrays.

An ODE makes the samples of a diffusion model. Along it, log p changes by minus the
divergence of its velocity (Chen et al. 2018, eq. 8; Song et al. 2021, arXiv 2011.13456,
eq. 39). Its integral from data to noise gives log p(x0), and the latent. This is the
density of the samples that a deterministic sampler with small steps makes.

**The variable.** Let z = x / sqrt(alpha^2 + sigma^2) and phi = atan(sigma / alpha).
Then every schedule is the same circle, z = cos(phi) x0 + sin(phi) eps, and its ODE is

    dz / dphi = v = cos(phi) eps_hat - sin(phi) x0_hat,

which is finite from data to pure noise for all kinds of prediction. The schedule enters
only through the network's t. Near the data, structure of size s appears at phi ~ s. So
steps are taken in q = log((pi / 2) / phi), which is 0 at pure noise and gives the same
steps to each halving of the noise.

**The ends.** The ODE starts at t_min > 0, where x0 is taken to be x / alpha. So the
measured density is that of x0 + (sigma / alpha) eps. In a direction in which p has
width s, this costs about (sigma / (alpha s))^2 / 2 nats, less on average. That is
negligible for the continuous schedules, whose default t_min has logsnr 12 to 20. It is
visible for tables, which have no times below t = 0 (scaled_linear: sigma / alpha =
0.029 there). The ODE ends at t_max with the prior that samplers start from, N(0, I) for
most, even where the schedule leaves some signal (scaled_linear: alpha = 0.068). That
difference belongs to the model, and is counted.

**The divergence** is the trace of a D x D matrix of derivatives. `ExactTrace` uses D
directions. `HutchinsonTrace` uses a few random ones, the same along the whole path. It
has no bias, and its error per dim falls with D and with the number of probes.

**Solvers** are in `ode_solvers`.

>>> import jax
>>> from scaling_ldm import noise
>>> from scaling_ldm.diffusion.losses import ode_likelihood
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

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion import prediction as predictions
from scaling_ldm.diffusion.losses import likelihood
from scaling_ldm.diffusion.losses.likelihood import Network
from scaling_ldm.diffusion.losses.ode_solvers import (
    AdaptiveSolver,
    Field,
    FixedStepSolver,
    State,
    integrate,
)

PROBE_DISTRIBUTIONS = {
    "rademacher": jax.random.rademacher,
    "gaussian": jax.random.normal,
}


def _forward(f: Any, z: jax.Array, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
    push = jax.vmap(lambda e: jax.jvp(f, (z,), (e,)), out_axes=(None, 0))
    return push(probes)


def _backward(f: Any, z: jax.Array, probes: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, pull = jax.vjp(f, z)
    return out, jax.vmap(pull)(probes)[0]


DERIVATIVES = {"jvp": _forward, "vjp": _backward}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactTrace:
    """The whole trace: D directions at once, so for small D.

    derivative: "vjp", or "jvp" for networks that have a forward derivative; those with
      the attention of `attention.attend` have none. The numbers are the same; jvp needs
      less memory.
    """

    derivative: str = "vjp"

    def __post_init__(self) -> None:
        _check_derivative(self.derivative)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HutchinsonTrace:
    """The mean over probes e of e . J e (Hutchinson 1990; Grathwohl et al. 2019).

    probes: at least 1. All go through the network together, in a batch that is larger
      by this factor.
    distribution: "rademacher" (signs; the least variance, and none if J is diagonal) or
      "gaussian".
    derivative: as for ExactTrace.
    """

    probes: int = 1
    distribution: str = "rademacher"
    derivative: str = "vjp"

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")
        if self.distribution not in PROBE_DISTRIBUTIONS:
            known = ", ".join(PROBE_DISTRIBUTIONS)
            raise ValueError(f"distribution {self.distribution!r} is none of {known}")
        _check_derivative(self.derivative)


def _check_derivative(name: str) -> None:
    if name not in DERIVATIVES:
        known = ", ".join(DERIVATIVES)
        raise ValueError(f"derivative {name!r} is none of {known}")


class Likelihood(NamedTuple):
    """What `bits_per_dim` returns.

    bits_per_dim, nats: -log p(x0) per value, and of the whole sample.
    latent: x at t_max, from which a deterministic sampler would give x0.
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
    divergence: ExactTrace | HutchinsonTrace = HutchinsonTrace(),  # noqa: B008, immutable
    solver: FixedStepSolver | AdaptiveSolver = AdaptiveSolver(),  # noqa: B008, immutable
    spacing: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> Likelihood:
    """-log p(x0) in bits per dim. Call it under jax.jit: compiled once.

    Args:
      network: (x [B, ...], t [B], cond) -> prediction, t in the schedule's own unit
        (fractional for a table). A sample's prediction must not depend on the other
        samples. Channels of a learned variance are left out.
      schedule: any of noise.SCHEDULES.
      x0: [B, ...].
      key: one typed key, or one for each sample (`likelihood.sample_keys`).
      prediction: the network's kind, a name of `prediction.PREDICTIONS`.
      cond: given to the network as it is.
      divergence, solver: see the head of this module.
      spacing: None for continuous data and latents. Otherwise the distance between the
        levels of x0 (`likelihood.spacing`). Noise is added to fill the gaps, and
        -log2(spacing) to the bits per dim, 7 for 1 / 128. The sum is a bound on the
        code length of the levels.
      t_min: the time of x0, by default `t_data`, or the time of logsnr 20 if `t_data`
        has no noise.
      t_max: by default `t_noise`.

    Raises:
      ValueError: an unknown prediction; one that does not determine x0 at t_max; a
        t_min without noise.
    """
    t_min = likelihood.least_noise(schedule, t_min)
    t_max = schedule.t_noise if t_max is None else t_max
    predictions.kind(prediction)
    likelihood.check_network(network, schedule, prediction)
    if not predictions.is_defined(prediction, "x0", float(schedule.alpha(t_max)), 1.0):
        raise ValueError(
            f"{prediction} does not determine x0 at t_max = {t_max:g}, which has no "
            "signal: give a smaller t_max"
        )
    x0 = likelihood.floating(x0)
    dims = likelihood.count_values(x0)
    keys = likelihood.sample_keys(key, x0)
    probe_keys, gap_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if spacing is not None:
        x0 = likelihood.dequantise(x0, gap_keys, spacing=spacing)

    velocity = _velocity(network, schedule, prediction, cond)
    probes, scale = _probes(divergence, probe_keys, x0)
    field = _with_divergence(
        velocity, probes, scale, DERIVATIVES[divergence.derivative]
    )
    start, end = _angle(schedule, t_min), _angle(schedule, t_max)
    q = math.log(math.pi / 2 / start), math.log(math.pi / 2 / end)
    state = math.cos(start) * x0, jnp.zeros_like(likelihood.sum_values(x0))
    (z, change), evaluations = integrate(field, state, q, solver)

    std = schedule.prior_std / _norm(schedule, schedule.t_noise)
    prior = -0.5 * likelihood.sum_values((z / std) ** 2)
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
        said = network(x, likelihood.time_of_all(schedule.time(logsnr), x), cond)
        said = likelihood.without_variance(said, x)
        v = predictions.convert(said, x, alpha, sigma, source=prediction, to="v")
        return (-phi / norm) * v

    return velocity


def _probes(
    divergence: ExactTrace | HutchinsonTrace, keys: jax.Array, x: jax.Array
) -> tuple[jax.Array, float]:
    """(directions [P, B, ...], factor of the sum over them)."""
    if isinstance(divergence, ExactTrace):
        dims = likelihood.count_values(x)
        basis = jnp.eye(dims, dtype=x.dtype).reshape(dims, 1, *x.shape[1:])
        return basis + jnp.zeros_like(x)[None], 1.0
    draw = PROBE_DISTRIBUTIONS[divergence.distribution]
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
        inner = jax.vmap(likelihood.sum_values)(probes * along)
        return out, scale * jnp.sum(inner, axis=0)

    return field
