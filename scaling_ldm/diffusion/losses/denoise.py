"""The training loss: draw t, corrupt, predict, compare, weigh; functions of arrays.

    x_t = alpha(t) x0 + sigma(t) eps,   loss = mean_t w(t) mean (prediction - target)^2

Any schedule of `noise` and any kind of `prediction` will do. Everything is computed in
float32 and stays finite at both ends of a schedule.

**Weightings** are formulas of the signal-to-noise ratio SNR = alpha^2 / sigma^2, each
stated for the squared error in which its paper states it:

| name | of the error in | weight | source |
|---|---|---|---|
| `uniform` | the network's own space | 1 | Ho et al. 2020, eq. 14 |
| `min_snr` | x0 | min(SNR, gamma) | Hang et al. 2023, section 3.4 |
| `truncated_snr` | x0 | max(SNR, 1) | Salimans & Ho 2022, section 4 |
| `p2` | epsilon | 1 / (k + SNR)^gamma | Choi et al. 2022 |
| `sigmoid` | epsilon | sigmoid(bias - log SNR) | Kingma & Gao 2023 |

The errors of two kinds of prediction differ by a factor: from x0 = c x + d p follows
|x0' - x0|^2 = d^2 |p' - p|^2. So a weight w of the x0 error is a weight d^2 w of the
error of p, with d from `prediction.PREDICTIONS`. min_snr becomes min(SNR, gamma) / SNR
for epsilon and min(SNR, gamma) / (SNR + 1) for v. Only `uniform` is a different loss
for each kind.

Weights are not normalised. Kingma & Gao write their loss as an integral over log SNR. A
weight here multiplies the density of log SNR, which the schedule and the distribution
of t determine. Their integral has the further factor -dlogsnr/dt. It is left out here,
as in Hang et al. and Choi et al.

**Distributions of t** (`timestep_sampling`) are increasing functions of a standard
normal draw. Their value is a fraction of the schedule, 0 at the data and 1 at the
noise. So the quantile q of t is the function's value at the normal's quantile q, and
validation takes its strata in this way.

| name | fraction of the schedule | source |
|---|---|---|
| `uniform` | Phi(normal) | Ho et al. 2020, algorithm 1 |
| `logit_normal` | sigmoid(location + scale normal) | Esser et al. 2024, section 3.1 |
| `cosmap` | 1 - 1 / (1 + tan(pi/2 Phi(normal))) | Esser et al. 2024, section 3.1 |

Paper B trains flow on rectified flow with `logit_normal`. It does not state location
and scale; this library assumes 0 and 1.

References: Ho 2006.11239, Salimans & Ho 2202.00512, Choi 2204.00227, Kingma & Gao
2303.00848, Hang 2303.09556, Esser 2403.03206.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion import prediction as predictions
from scaling_ldm.diffusion.noise import Real
from scaling_ldm.diffusion.shapes import LatentBHWC, ValueB

Batch = dict[str, Any]  # arrays by name

# Of weights. Beyond it, the noise or the picture is lost in float32 rounding.
LOGSNR_LIMIT = 20.0


@dataclasses.dataclass(frozen=True)
class Weighting:
    """A weight of the squared error of one kind of prediction.

    of: a name of `prediction.PREDICTIONS`; "" is the kind that the network predicts.
    weight: float32 [B] of logsnr [B], which is finite.
    """

    of: str
    weight: Callable[[jax.Array], jax.Array]


def uniform_weight() -> Weighting:
    """The plain mean squared error of what the network predicts."""
    return Weighting("", jnp.ones_like)


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma): no noise level has a larger weight than that of SNR = gamma."""
    return Weighting("x0", lambda logsnr: jnp.minimum(jnp.exp(logsnr), gamma))


def truncated_snr() -> Weighting:
    """max(SNR, 1): the larger of the x0 and epsilon errors."""
    return Weighting("x0", lambda logsnr: jnp.maximum(jnp.exp(logsnr), 1.0))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma: less weight on levels with little noise."""
    return Weighting("epsilon", lambda logsnr: (k + jnp.exp(logsnr)) ** -gamma)


def sigmoid(bias: float = 0.0) -> Weighting:
    """sigmoid(bias - logsnr); a larger bias puts more weight on levels of little noise.

    Hoogeboom et al. 2024 (arXiv 2410.19324) call it the sigmoid loss.
    """
    return Weighting("epsilon", lambda logsnr: jax.nn.sigmoid(bias - logsnr))


# The functions of the names in config.WEIGHTINGS.
WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": uniform_weight,
    "min_snr": min_snr,
    "truncated_snr": truncated_snr,
    "p2": p2,
    "sigmoid": sigmoid,
}

TimestepSampling = Callable[[Real], Real]


def _special(value: Any) -> Any:
    """Functions of float32 for jax arrays, of float64 for numpy arrays."""
    return jax.scipy.special if isinstance(value, jax.Array) else scipy.special


def uniform_times() -> TimestepSampling:
    """Every fraction is equally likely."""
    return lambda normal: _special(normal).ndtr(normal)


def logit_normal(location: float = 0.0, scale: float = 1.0) -> TimestepSampling:
    """Most draws in the middle; a positive location moves them towards noise."""
    return lambda normal: _special(normal).expit(location + scale * normal)


def cosmap() -> TimestepSampling:
    """On a rectified flow, log SNR is distributed as on a cosine schedule.

    tan is written as sin / cos, with cos(pi/2 u) = sin(pi/2 (1 - u)). It is then exact
    at both ends.
    """

    def fraction(normal: Real) -> Real:
        xp: Any = jnp if isinstance(normal, jax.Array) else np
        rising = xp.sin(np.pi / 2 * _special(normal).ndtr(normal))
        falling = xp.sin(np.pi / 2 * _special(normal).ndtr(-normal))
        return rising / (rising + falling)

    return fraction


# The functions of the names in config.TIMESTEP_SAMPLING.
TIMESTEP_SAMPLING: dict[str, Callable[..., TimestepSampling]] = {
    "uniform": uniform_times,
    "logit_normal": logit_normal,
    "cosmap": cosmap,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionObjective:
    """What a network learns: schedule, prediction, weights, distribution of times."""

    schedule: noise.Schedule
    prediction: str  # a name of prediction.PREDICTIONS
    weighting: Weighting
    timestep_sampling: TimestepSampling
    time_shift: float = 1.0  # factor of noise.shift_time, applied to the fraction
    caption_dropout: float  # probability of the null condition in training

    def times(self, normal: Real) -> Real:
        """Times of the schedule from standard normal draws; numpy's give float64."""
        fraction = noise.shift_time(self.timestep_sampling(normal), self.time_shift)
        return self.schedule.at_fraction(fraction)

    def weight(self, t_B: ValueB) -> ValueB:
        """The weight of each sample's squared error in the prediction's own space.

        Beyond +-LOGSNR_LIMIT it is the weight at the limit, which is finite for every
        kind. Without noise or without a picture the formula may be 0 times infinity.
        """
        logsnr = jnp.clip(self.schedule.logsnr(t_B), -LOGSNR_LIMIT, LOGSNR_LIMIT)
        alpha, sigma = self.schedule.from_logsnr(logsnr)
        stated_in = self.weighting.of or self.prediction
        _, factor = predictions.factors(self.prediction, stated_in, alpha, sigma)
        return self.weighting.weight(logsnr) * factor**2


def drop_captions(cond: Batch, uncond: Batch, drop_B: jax.Array) -> Batch:
    """Replaces the condition by the null condition where drop_B is true.

    `uncond` holds one unbatched array for each array of `cond` that can be dropped. The
    other arrays stay.
    """
    dropped = dict(cond)
    for name, nothing in uncond.items():
        value = cond[name]
        drop = drop_B.reshape(drop_B.shape + (1,) * (value.ndim - 1))
        dropped[name] = jnp.where(drop, nothing[None], value)
    return dropped


def per_example_loss(
    apply: Callable[..., Any],
    params: Any,
    x0_BHWC: LatentBHWC,
    eps_BHWC: LatentBHWC,
    t_B: ValueB,
    cond: Batch,
    objective: DiffusionObjective,
) -> ValueB:
    """Mean squared error of each sample's prediction, unweighted, float32 [B].

    Args:
      apply: a denoiser's apply; its time is `schedule.unit_time(t)`.
      x0_BHWC: the data.
      eps_BHWC: standard normal noise of the same shape.
      t_B: times of the objective's schedule.
      cond: the arrays of the denoiser's conditioning.
      objective: gives the schedule and the kind of prediction.
    """
    schedule, kind = objective.schedule, objective.prediction
    alpha, sigma = schedule.alpha(t_B), schedule.sigma(t_B)
    x_t = predictions.corrupt(x0_BHWC, eps_BHWC, alpha, sigma)
    predicted = apply(params, x_t, schedule.unit_time(t_B), cond)
    wanted = predictions.target(kind, x0_BHWC, eps_BHWC, alpha, sigma)
    return jnp.mean((predicted - wanted) ** 2, axis=(1, 2, 3))


def loss(
    apply: Callable[..., Any],
    params: Any,
    batch: Batch,
    uncond: Batch,
    key: jax.Array,
    *,
    objective: DiffusionObjective,
) -> jax.Array:
    """The training loss of one batch, a float32 scalar.

    Args:
      apply: a denoiser's apply; its time is `schedule.unit_time(t)`.
      batch: "x" [B, H, W, C] and the arrays of the denoiser's conditioning.
      uncond: the null condition, unbatched arrays; a coarse "image" has none.
      key: of this step; noise, t and dropout depend on it alone.
      objective: what is predicted, at which times, with which weights.
    """
    drawn = draw(batch, key)
    return loss_of_rows(apply, params, batch, uncond, drawn, objective=objective)


def draw(batch: Batch, key: jax.Array) -> Batch:
    """What is random in a step: "noise" like x, "time" [B] and "drop" [B], float32.

    "time" is standard normal and "drop" uniform in [0, 1). A row's values depend on the
    key, the row's place and the size of the batch.

    Args:
      batch: "x" [B, H, W, C].
    """
    x = batch["x"]
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    shape, each = x.shape[:1], batch_sharding(x, ndim=1)
    return {
        "noise": jax.random.normal(noise_key, x.shape, out_sharding=batch_sharding(x)),
        "time": jax.random.normal(time_key, shape, out_sharding=each),
        "drop": jax.random.uniform(drop_key, shape, out_sharding=each),
    }


def loss_of_rows(
    apply: Callable[..., Any],
    params: Any,
    batch: Batch,
    uncond: Batch,
    drawn: Batch,
    *,
    objective: DiffusionObjective,
) -> jax.Array:
    """The mean loss of some rows of a batch, a float32 scalar; see `loss`.

    Args:
      drawn: the same rows of what `draw` gave.
    """
    x0 = batch["x"].astype(jnp.float32)
    cond = {name: value for name, value in batch.items() if name != "x"}
    t = objective.times(drawn["time"])
    cond = drop_captions(cond, uncond, drawn["drop"] < objective.caption_dropout)
    error = per_example_loss(apply, params, x0, drawn["noise"], t, cond, objective)
    return jnp.mean(objective.weight(t) * error)


def batch_sharding(x: jax.Array, ndim: int | None = None) -> Any:
    """The sharding of x's batch axis for an array of `ndim` axes; None if no mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    sharding = jax.typeof(x).sharding
    rest = (None,) * ((x.ndim if ndim is None else ndim) - 1)
    return sharding.update(spec=jax.sharding.PartitionSpec(sharding.spec[0], *rest))
