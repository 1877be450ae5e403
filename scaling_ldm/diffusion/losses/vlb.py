"""The variational bound on -log p(x0) in bits per dim; pure functions of arrays.

For a chain of T steps (Ho et al. 2020, arXiv 2006.11239, eq. 5),

    -log p(x0) <= E_q[ KL(q(x_T | x0) || N(0, I))                            prior
                     + sum_t KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))    terms[t]
                     - log p(x0 | x_1) ].                                    terms[0]

Rows are counted from 0 as in `noise.Discrete`: row t has the network's evaluation at
time t, and row 0 is the decoder. If the data are `levels` evenly spaced values in
[-1, 1], the decoder's Gaussian is cut into bins (ibid., eq. 13). For continuous data
and latents (`levels=None`) it is a density; `likelihood` says what the number then
means.

The variance of p is one of

    fixed_small    that of q(x_{t-1} | x_t, x0)      Ho et al. 2020, section 3.2
    fixed_large    beta_t                            ibid.
    learned        between them, by the network      Nichol & Dhariwal 2021, eq. 15

At row 0 the variance of q(x_{t-1} | x_t, x0) is zero, so another one is used there. For
pictures (`levels` is a number), fixed_small and fixed_large both use that of q at row
1, as the published numbers do. For continuous data (`levels=None`) both use beta_0,
which is the noise that row 0 has; otherwise the bound would be up to 0.2 bits per dim
higher. The range of a learned variance goes from that of q at row 1 to beta_0.

A network with a learned variance has twice the channels in its last axis: the
prediction, then w in [-1, 1]. The log variance is linear in w, as for `samplers`.

>>> import jax, jax.numpy as jnp
>>> from scaling_ldm import noise
>>> from scaling_ldm.diffusion.losses import vlb
>>> schedule = noise.cosine(50)
>>> def network(params, x, t, cond):  # predicts x0: knows the mean alone
...     return jnp.full_like(x, params)
>>> @jax.jit  # compiled once; parameters are arguments, not constants
... def measure(params, x0, key):
...     apply = lambda x, t, cond: network(params, x, t, cond)
...     return vlb.bits_per_dim(apply, schedule, x0, key, prediction="x0")
>>> x0 = jnp.round(jnp.linspace(0, 255, 2 * 8 * 8 * 3)).reshape(2, 8, 8, 3) / 127.5 - 1
>>> bound = measure(0.0, x0, jax.random.key(0))
>>> bound.total.shape, bound.terms.shape  # bits per dim: pictures, steps x pictures
((2,), (50, 2))
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion import prediction as predictions
from scaling_ldm.diffusion.losses import likelihood
from scaling_ldm.diffusion.losses.likelihood import Network
from scaling_ldm.diffusion.prediction import VARIANCES
from scaling_ldm.diffusion.samplers.compiled_loop import normal


class Bound(NamedTuple):
    """A discrete bound; bits per dim unless said otherwise."""

    total: jax.Array  # [B], the prior and the sum of the terms
    prior: jax.Array  # [B]
    terms: jax.Array  # [T, B], row 0 the decoder
    x0_mse: jax.Array  # [T, B], mean squared error of x0
    eps_mse: jax.Array  # [T, B], mean squared error of the noise


class ContinuousBound(NamedTuple):
    """The bound of infinitely many steps; bits per dim."""

    total: jax.Array  # [B], the sum of the others
    prior: jax.Array  # [B]
    decoder: jax.Array  # [B]
    diffusion: jax.Array  # [B]


def bits_per_dim(
    network: Network,
    schedule: noise.Discrete,
    x0: jax.Array,
    key: jax.Array,
    *,
    prediction: str,
    cond: Any = None,
    variance: str = "fixed_small",
    levels: int | None = 256,
    clip: float | None = None,
) -> Bound:
    """The bound of every step, with one draw of noise for each.

    It costs T = schedule.steps evaluations, one after another, in the memory of one.
    (`estimate` costs a single evaluation.) Call it under jax.jit: compiled once.

    Args:
      network: (x [B, ...], t [B], cond) -> prediction, t in the schedule's own unit.
      schedule: variance preserving, with a table.
      x0: [B, ...], data in [-1, 1] if `levels` is a number.
      key: one typed key, or one for each sample (`likelihood.sample_keys`).
      prediction: the network's kind, a name of `prediction.PREDICTIONS`.
      cond: given to the network as it is.
      variance: one of VARIANCES.
      levels: of the data; None for continuous data and latents.
      clip: x0 estimates are clipped to [-clip, clip]. The published numbers of Ho et
        al. and Nichol & Dhariwal have 1. It is a part of the model: sample with it too.

    Raises:
      ValueError: an unknown variance or prediction, a schedule without a table, or a
        prediction that does not determine x0 where the schedule has no signal.
    """
    likelihood.check_network(network, schedule, prediction)
    chain = _chain(schedule, prediction, variance, levels, clip)
    x0 = likelihood.floating(x0)
    keys = likelihood.sample_keys(key, x0)

    def row(_: None, inputs: Any) -> tuple[None, tuple[jax.Array, ...]]:
        step, table = inputs
        t = likelihood.time_of_all(step, x0)
        eps = normal(likelihood.fold_in(keys, step), x0)
        return None, _term(chain, table, network, x0, eps, t, cond)

    steps = jnp.arange(schedule.steps)
    _, (nats, x0_mse, eps_mse) = jax.lax.scan(row, None, (steps, chain.table(x0)))
    terms = likelihood.bits_per_dim(nats, x0)
    prior = likelihood.prior_bits(schedule.alphas_bar[-1], x0)
    return Bound(prior + jnp.sum(terms, axis=0), prior, terms, x0_mse, eps_mse)


def estimate(
    network: Network,
    schedule: noise.Discrete,
    x0: jax.Array,
    key: jax.Array,
    *,
    prediction: str,
    cond: Any = None,
    variance: str = "fixed_small",
    levels: int | None = 256,
    clip: float | None = None,
    draws: int = 1,
) -> jax.Array:
    """An unbiased estimate of `bits_per_dim(...).total`, [B], from `draws` rows.

    It costs `draws` evaluations. Each sample has its own rows, one from each of `draws`
    equal strata of 0 ... T - 1. So the rows are uniform, and the variance falls faster
    than 1 / draws. A data set's number is the average over samples. Other arguments are
    those of `bits_per_dim`.

    Raises:
      ValueError: as `bits_per_dim`, or draws < 1.
    """
    likelihood.check_network(network, schedule, prediction)
    chain = _chain(schedule, prediction, variance, levels, clip)
    x0 = likelihood.floating(x0)
    keys = likelihood.sample_keys(key, x0)
    table = chain.table(x0)

    def one(_: None, draw: jax.Array) -> tuple[None, jax.Array]:
        u, eps = _stratified(keys, draw, draws, x0)
        t = schedule.at_fraction(u)
        at_t = jax.tree.map(lambda column: _rows(column, t), table)
        return None, schedule.steps * _term(chain, at_t, network, x0, eps, t, cond)[0]

    _, nats = jax.lax.scan(one, None, jnp.arange(_positive(draws)))
    prior = likelihood.prior_bits(schedule.alphas_bar[-1], x0)
    return prior + likelihood.bits_per_dim(jnp.mean(nats, axis=0), x0)


def continuous(
    network: Network,
    schedule: noise.Schedule,
    x0: jax.Array,
    key: jax.Array,
    *,
    prediction: str,
    cond: Any = None,
    levels: int | None = 256,
    draws: int = 1,
    t_min: float | None = None,
    t_max: float | None = None,
) -> ContinuousBound:
    """The bound of infinitely many steps (Kingma et al. 2021, arXiv 2107.00630).

    Its middle part is 1/2 the integral over logsnr of E |eps - eps_hat|^2 (eq. 15-18).
    Of the schedule only the ends matter to it, so any schedule will do, also one that
    does not preserve variance. It is estimated without bias at `draws` random logsnr,
    uniform and stratified for each sample, which costs `draws` evaluations. The decoder
    depends on the data and not on the network. Over levels it is p(x0 | z) ~ q(z | x0),
    as in the paper. For continuous data it is N(x0; z / alpha, sigma^2 / alpha^2), and
    its expectation is exact.

    Args:
      schedule: any of noise.SCHEDULES.
      t_min: the least noise, by default `t_data`, or the time of logsnr 20 if `t_data`
        has no noise. Below it the decoder takes over. Less noise lowers the bound,
        until the network's errors at such noise raise it again.
      t_max: the most noise, by default `t_noise`, or the time of logsnr -20 if
        `t_noise` has no signal. The prior is compared with the data there.
      network, x0, key, prediction, cond, levels, draws: as for `bits_per_dim`.

    Raises:
      ValueError: an unknown prediction, draws < 1, or a t_min without noise.
    """
    predictions.kind(prediction)
    likelihood.check_network(network, schedule, prediction)
    x0 = likelihood.floating(x0)
    keys = likelihood.sample_keys(key, x0)
    high = float(schedule.logsnr(likelihood.least_noise(schedule, t_min)))
    low = float(schedule.logsnr(likelihood.most_noise(schedule, t_max)))

    def one(_: None, draw: jax.Array) -> tuple[None, jax.Array]:
        u, eps = _stratified(keys, draw, draws, x0)
        logsnr = high + u * (low - high)
        alpha, sigma = schedule.from_logsnr(logsnr)
        x = predictions.corrupt(x0, eps, alpha, sigma)
        said = network(x, schedule.time(logsnr), cond)
        said = likelihood.without_variance(said, x)
        said = predictions.convert(
            said, x, alpha, sigma, source=prediction, to="epsilon"
        )
        return None, likelihood.sum_values((eps - said) ** 2)

    _, squares = jax.lax.scan(one, None, jnp.arange(_positive(draws)))
    diffusion = 0.5 * (high - low) * jnp.mean(squares, axis=0)
    diffusion = likelihood.bits_per_dim(diffusion, x0)
    prior = likelihood.prior_bits(float(np.exp(-np.logaddexp(-low, 0))), x0)
    eps = normal(likelihood.fold_in(keys, draws), x0)
    decoder = likelihood.decoder_nats(x0, eps, np.exp(-high / 2), levels)
    decoder = likelihood.bits_per_dim(decoder, x0)
    return ContinuousBound(prior + decoder + diffusion, prior, decoder, diffusion)


@dataclasses.dataclass(frozen=True)
class _Chain:
    """The checked settings of a chain, and its constants."""

    schedule: noise.Discrete
    prediction: str
    variance: str
    levels: int | None
    clip: float | None

    def table(self, x: jax.Array) -> dict[str, jax.Array]:
        """The constants of all rows, each [T], computed in float64, in the dtype of x.

        mean: factor of x0 in the mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7).
        true, low, high: log variances of q and of the ends of the learned range; `low`
        and `high` coincide where the variance is fixed.
        """
        bar = np.asarray(self.schedule.alphas_bar)
        before = np.concatenate([[1.0], bar[:-1]])
        betas = self.schedule.betas
        small = betas * (1 - before) / (1 - bar)
        small[0] = small[1]
        large = betas.copy()
        if self.variance != "learned":
            small[0] = large[0] = betas[0] if self.levels is None else small[1]
        low = large if self.variance == "fixed_large" else small
        high = small if self.variance == "fixed_small" else large
        columns = {
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "snr": bar / (1 - bar),
            "mean": betas * np.sqrt(before) / (1 - bar),
            "true": np.log(small),
            "low": np.log(low),
            "high": np.log(high),
        }
        return {name: jnp.asarray(c, x.dtype) for name, c in columns.items()}


def _chain(
    schedule: noise.Discrete,
    prediction: str,
    variance: str,
    levels: int | None,
    clip: float | None,
) -> _Chain:
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is none of {', '.join(VARIANCES)}")
    if not isinstance(schedule, noise.Discrete):
        raise ValueError(
            "a bound with steps needs a schedule with a table (noise.Discrete), got "
            f"{type(schedule).__name__}: see `continuous` and `ode_likelihood`"
        )
    predictions.kind(prediction)
    alpha = schedule.alphas_bar[-1] ** 0.5
    if not predictions.is_defined(prediction, "x0", alpha, 1.0):
        raise ValueError(
            f"{prediction} does not determine x0 at the schedule's last step, which "
            "has no signal: use x0, v or flow"
        )
    return _Chain(schedule, prediction, variance, levels, clip)


def _term(
    chain: _Chain,
    at_t: dict[str, jax.Array],
    network: Network,
    x0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    cond: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nats, squared error of x0, of eps) of the rows t [B], each [B].

    at_t: the constants of these rows: scalars, or [B].
    """
    c = {name: predictions.batched(value, x0) for name, value in at_t.items()}
    x = c["alpha"] * x0 + c["sigma"] * eps
    said = network(x, t, cond)
    log_variance = c["low"]
    if chain.variance == "learned":
        _check_channels(said, x0)
        place = said[..., x0.shape[-1] :]
        place = 0.5 * (place + 1)
        log_variance = place * c["high"] + (1 - place) * c["low"]
    said = likelihood.without_variance(said, x)
    x0_hat = predictions.convert(
        said, x, at_t["alpha"], at_t["sigma"], source=chain.prediction, to="x0"
    )
    if chain.clip is not None:
        x0_hat = jnp.clip(x0_hat, -chain.clip, chain.clip)
    square = (x0 - x0_hat) ** 2
    # KL of two Gaussians whose means differ by `mean` (x0 - x0_hat).
    gap = c["true"] - log_variance
    precision = jnp.exp(-log_variance)
    step = 0.5 * (jnp.expm1(gap) - gap + c["mean"] ** 2 * precision * square)
    if chain.levels is None:
        end = 0.5 * (np.log(2 * np.pi) + log_variance + precision * square)
    else:
        end = -likelihood.log_bin(x0, x0_hat, jnp.exp(0.5 * log_variance), chain.levels)
    first = predictions.batched(t == 0, x0)
    nats = likelihood.sum_values(jnp.where(first, end, step))
    mse = likelihood.mean_values(square)
    return nats, mse, at_t["snr"] * mse


def _stratified(
    keys: jax.Array, draw: jax.Array, draws: int, x0: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(u [B] uniform in the stratum `draw` of [0, 1), eps [B, ...])."""
    own = jax.vmap(jax.random.split)(likelihood.fold_in(keys, draw))
    u = jax.vmap(lambda key: jax.random.uniform(key, (), x0.dtype))(own[:, 0])
    return (draw.astype(x0.dtype) + u) / draws, normal(own[:, 1], x0)


def _rows(column: jax.Array, t: jax.Array) -> jax.Array:
    sharding = likelihood.batch_sharding(t)
    return column.at[t.astype(jnp.int32)].get(out_sharding=sharding)


def _positive(draws: int) -> int:
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    return draws


def _check_channels(said: jax.Array, x0: jax.Array) -> None:
    wanted = (*x0.shape[:-1], 2 * x0.shape[-1])
    if said.shape != wanted:
        raise ValueError(
            f"a network with a learned variance gives {wanted} (the prediction, then "
            f"the variance's place in its range), got {said.shape}"
        )
