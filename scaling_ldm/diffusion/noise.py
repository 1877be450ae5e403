"""Noise schedules: how much signal and noise there is at time t; numpy and jax only.

A noisy picture is x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I). Time grows from
data to noise. All that a schedule says follows from its log signal-to-noise ratio

    logsnr(t) = log(alpha(t)^2 / sigma(t)^2),

and from which of three kinds it is:

    variance preserving   alpha^2 + sigma^2 = 1
    rectified flow        alpha + sigma = 1
    variance exploding    alpha = 1

Arithmetic follows the argument: jax arrays give float32 (or wider, if they are) inside
or outside jit; Python numbers and numpy arrays give numpy float64, which is what
samplers compute their coefficients from. Nothing is ever computed in bfloat16.

| schedule | t of data ... noise | source |
|---|---|---|
| `linear` | 0 ... steps - 1 | Ho 2020 |
| `scaled_linear` | 0 ... steps - 1 | Rombach 2022 |
| `cosine` | 0 ... steps - 1 | Nichol & Dhariwal 2021 |
| `vp_sde`, `vp_cosine` | 0 ... 1 | Song 2021, Salimans & Ho 2022 |
| `rectified_flow` | 0 ... 1 | Liu 2022, Lipman 2022 |
| `edm` | sigma itself | Karras 2022 |
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Real = TypeVar("Real", float, np.ndarray, jax.Array)


def _library(value: Any) -> tuple[Any, Any]:
    """(jax.numpy, array of at least float32) or (numpy, float64 array)."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize >= 4:
            return jnp, value
        return jnp, value.astype(jnp.float32)
    return np, np.asarray(value, np.float64)


def _look_up(table: Any, index: Any) -> Any:
    """table[index]; under an explicit mesh the answer lies where the index does."""
    if not isinstance(index, jax.Array) or jax.sharding.get_abstract_mesh().empty:
        return table[index]
    return table.at[index].get(out_sharding=jax.typeof(index).sharding)


def _softplus(xp: Any, value: Any) -> Any:
    return xp.logaddexp(value, 0.0)


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """alpha, sigma and logsnr of time, and time of logsnr.

    Every method takes a number or an array of any shape and works elementwise. A
    schedule is immutable and hashable: it may be a static argument of jax.jit.
    """

    @property
    @abc.abstractmethod
    def t_noise(self) -> float:
        """The time of the most noise: where sampling starts."""

    @property
    @abc.abstractmethod
    def t_data(self) -> float:
        """The time of the least noise that the schedule knows."""

    @property
    def prior_std(self) -> float:
        """Standard deviation of x at `t_noise`, from which sampling starts."""
        return 1.0

    @abc.abstractmethod
    def logsnr(self, t: Real) -> Real:
        """log(alpha^2 / sigma^2); inf where sigma = 0, -inf where alpha = 0."""

    @abc.abstractmethod
    def time(self, logsnr: Real) -> Real:
        """The inverse of `logsnr`, clipped to the schedule's range."""

    @abc.abstractmethod
    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        """(alpha, sigma) at a log signal-to-noise ratio, which may be infinite."""

    def at_fraction(self, u: Real) -> Real:
        """Maps [0, 1) onto the schedule's times, data to noise, evenly in t."""
        return self.t_data + (self.t_noise - self.t_data) * _library(u)[1]

    def unit_time(self, t: Real) -> Real:
        """t as a number of order one: what this library's denoisers are given."""
        return _library(t)[1]

    def alpha(self, t: Real) -> Real:
        """The signal's factor."""
        return self.from_logsnr(self.logsnr(t))[0]

    def sigma(self, t: Real) -> Real:
        """The noise's factor: its standard deviation."""
        return self.from_logsnr(self.logsnr(t))[1]


class _VariancePreserving(Schedule):
    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = _library(logsnr)
        return (
            xp.exp(-0.5 * _softplus(xp, -logsnr)),
            xp.exp(-0.5 * _softplus(xp, logsnr)),
        )


@dataclasses.dataclass(frozen=True)
class Discrete(_VariancePreserving):
    """A table of cumulative products, and its continuous interpolation.

    At whole t = 0 ... steps - 1, alpha(t)^2 = alphas_bar[t]. In between, logsnr is
    linear in t (the interpolation of DPM-Solver and k-diffusion); next to a terminal
    alpha of exactly zero, alpha is.
    """

    alphas_bar: tuple[float, ...] = dataclasses.field(repr=False)

    def __repr__(self) -> str:
        first, last = self._logsnr[0], self._logsnr[-1]
        return f"Discrete({self.steps} steps, logsnr {first:.3g} to {last:.3g})"

    def __post_init__(self) -> None:
        table = np.asarray(self.alphas_bar)
        if len(table) < 2:
            raise ValueError(f"a schedule needs at least 2 steps, got {len(table)}")
        falls = np.all(np.diff(table) < 0) and table[0] < 1 and table[-1] >= 0
        if not falls:
            raise ValueError(
                "alphas_bar must fall strictly from below 1 to no less than 0, got "
                f"{table[0]} ... {table[-1]}"
            )

    @property
    def steps(self) -> int:
        return len(self.alphas_bar)

    @property
    def t_noise(self) -> float:
        return float(self.steps - 1)

    @property
    def t_data(self) -> float:
        return 0.0

    @functools.cached_property
    def _logsnr(self) -> np.ndarray:
        bar = np.asarray(self.alphas_bar)
        with np.errstate(divide="ignore"):
            return np.log(bar) - np.log1p(-bar)

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """The variance added by each step, float64 [steps] (Ho et al. 2020, eq. 2)."""
        bar = np.asarray(self.alphas_bar)
        return 1.0 - bar / np.concatenate([[1.0], bar[:-1]])

    def logsnr(self, t: Real) -> Real:
        xp, t = _library(t)
        table = xp.asarray(self._logsnr, t.dtype)
        t = xp.clip(t, 0, self.steps - 1)
        low = xp.clip(xp.floor(t), 0, self.steps - 2)
        part = t - low
        low = low.astype(int)
        a, b = _look_up(table, low), _look_up(table, low + 1)
        to_zero = xp.isinf(b)
        linear = a + part * (xp.where(to_zero, a, b) - a)
        if not np.isinf(self._logsnr[-1]):
            return linear
        # alpha falls linearly to zero over the last interval.
        bar = (1 - part) ** 2 * self.alphas_bar[-2]
        bar = xp.where(to_zero, bar, 0.5)
        last = xp.where(
            bar > 0, xp.log(xp.where(bar > 0, bar, 1)) - xp.log1p(-bar), -np.inf
        )
        return xp.where(to_zero, last, linear)

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = _library(logsnr)
        finite = np.isfinite(self._logsnr)
        table = -self._logsnr[finite]
        known = xp.asarray(np.append(table, table[-1] + 1), logsnr.dtype)
        # Between which steps; counted, as a sharded array cannot be searched.
        wanted = xp.clip(-logsnr, known[0], known[-2])
        each = known.reshape((1,) * wanted.ndim + (-1,))
        low = xp.sum(each <= wanted[..., None], axis=-1, dtype=int) - 1
        low = xp.clip(low, 0, len(known) - 2)
        a, b = _look_up(known, low), _look_up(known, low + 1)
        t = low + (wanted - a) / (b - a)
        if finite[-1]:
            return t
        alpha = self.from_logsnr(logsnr)[0]
        last = self.steps - 1 - alpha / math.sqrt(self.alphas_bar[-2])
        return xp.where(logsnr < self._logsnr[-2], last, t)

    def at_fraction(self, u: Real) -> Real:
        # A fraction i / steps is step i, whatever the product's last bit says.
        xp, u = _library(u)
        return xp.clip(xp.floor(u * self.steps + 1e-9), 0, self.steps - 1)

    def unit_time(self, t: Real) -> Real:
        return _library(t)[1] / self.steps


@dataclasses.dataclass(frozen=True)
class _VpSde(_VariancePreserving):
    beta_min: float
    beta_max: float

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 1e-5

    def logsnr(self, t: Real) -> Real:
        # -2 log alpha is the integral of beta; sigma^2 / alpha^2 = expm1 of that.
        xp, t = _library(t)
        integral = t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)
        with np.errstate(divide="ignore"):
            return -xp.log(xp.expm1(integral))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = _library(logsnr)
        last = 0.5 * (self.beta_min + self.beta_max)
        integral = xp.minimum(_softplus(xp, -logsnr), last)
        root = xp.sqrt(
            self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral
        )
        return xp.clip(2 * integral / (self.beta_min + root), self.t_data, 1)


@dataclasses.dataclass(frozen=True)
class _VpCosine(_VariancePreserving):
    logsnr_limit: float

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 0.0

    def _angles(self) -> tuple[float, float]:
        low = math.atan(math.exp(-0.5 * self.logsnr_limit))
        return low, math.pi / 2 - 2 * low

    def logsnr(self, t: Real) -> Real:
        xp, t = _library(t)
        start, span = self._angles()
        return -2 * xp.log(xp.tan(start + span * t))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = _library(logsnr)
        start, span = self._angles()
        return xp.clip((xp.arctan(xp.exp(-0.5 * logsnr)) - start) / span, 0, 1)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """What `rectified_flow` makes."""

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 0.0

    def logsnr(self, t: Real) -> Real:
        xp, t = _library(t)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log1p(-t) - xp.log(t))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = _library(logsnr)
        return xp.exp(-_softplus(xp, 0.5 * logsnr))

    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = _library(logsnr)
        return (
            xp.exp(-_softplus(xp, -0.5 * logsnr)),
            xp.exp(-_softplus(xp, 0.5 * logsnr)),
        )

    def alpha(self, t: Real) -> Real:
        return 1 - _library(t)[1]

    def sigma(self, t: Real) -> Real:
        return _library(t)[1]


@dataclasses.dataclass(frozen=True)
class Edm(Schedule):
    """What `edm` makes."""

    sigma_min: float
    sigma_max: float

    @property
    def t_noise(self) -> float:
        return self.sigma_max

    @property
    def t_data(self) -> float:
        return self.sigma_min

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def logsnr(self, t: Real) -> Real:
        xp, t = _library(t)
        with np.errstate(divide="ignore"):
            return -2 * xp.log(t)

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = _library(logsnr)
        return xp.clip(xp.exp(-0.5 * logsnr), self.sigma_min, self.sigma_max)

    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = _library(logsnr)
        return xp.ones_like(logsnr), xp.exp(-0.5 * logsnr)

    def sigma(self, t: Real) -> Real:
        return _library(t)[1]

    def unit_time(self, t: Real) -> Real:
        xp, t = _library(t)
        return 0.25 * xp.log(t)


def from_betas(betas: Any) -> Discrete:
    """The schedule of a given table of step variances (Ho et al. 2020, eq. 2, 4).

    Raises:
      ValueError: a beta outside (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    if not np.all((betas > 0) & (betas <= 1)):
        raise ValueError(
            f"betas must lie in (0, 1], got {betas.min()} to {betas.max()}"
        )
    return Discrete(tuple(np.cumprod(1.0 - betas).tolist()))


def linear(
    steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Discrete:
    """Betas evenly spaced (Ho et al. 2020, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, steps))


def scaled_linear(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Discrete:
    """Square roots of the betas evenly spaced: Stable Diffusion (Rombach et al. 2022).

    The ends are those of Stable Diffusion 1 and 2.
    """
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(
    steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999
) -> Discrete:
    """alphas_bar follow a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""
    u = np.arange(steps + 1) / steps
    bar = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - bar[1:] / bar[:-1], beta_max))


def zero_terminal_snr(schedule: Discrete) -> Discrete:
    """The same schedule, its last step pure noise (Lin et al. 2023, algorithm 1).

    alpha is shifted to reach zero and scaled to keep its first value. Predict v, x0 or
    flow under it: noise says nothing about the picture where there is only noise.
    """
    if not isinstance(schedule, Discrete):
        raise ValueError(f"only tables can be rescaled, not {schedule!r}")
    root = np.sqrt(np.asarray(schedule.alphas_bar))
    first, last = root[0], root[-1]
    bar = ((root - last) * first / (first - last)) ** 2
    return Discrete(tuple(bar.tolist()))


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Continuous time, beta linear in t (Song et al. 2021, eq. 32-33).

    Samplers stop at t = 1e-5 unless told otherwise: the score diverges at 0.
    """
    if not 0 < beta_min < beta_max:
        raise ValueError(f"0 < beta_min < beta_max, got {beta_min} and {beta_max}")
    return _VpSde(beta_min, beta_max)


def vp_cosine(logsnr_limit: float = 20.0) -> Schedule:
    """Continuous time, alpha = cos (Salimans & Ho 2022, section 2; Kingma & Gao 2023).

    Args:
      logsnr_limit: logsnr runs from +limit at t = 0 to -limit at t = 1.
    """
    if not logsnr_limit > 0:
        raise ValueError(f"logsnr_limit must be positive, got {logsnr_limit}")
    return _VpCosine(logsnr_limit)


def rectified_flow() -> Schedule:
    """alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022, sigma_min = 0)."""
    return RectifiedFlow()


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """alpha = 1, sigma = t: variance exploding (Karras et al. 2022, table 1)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return Edm(sigma_min, sigma_max)


def shift_time(t: Real, factor: float) -> Real:
    """Moves times of [0, 1] towards noise (Esser et al. 2024, eq. 23).

    t -> factor t / (1 + (factor - 1) t); for a rectified flow logsnr falls by
    2 log(factor) everywhere. factor = 1 leaves t alone.
    """
    t = _library(t)[1]
    return factor * t / (1 + (factor - 1) * t)


def resolution_shift(pixels: int, base_pixels: int) -> float:
    """The factor of `shift_time` that keeps the noise level as resolution grows.

    sqrt(pixels / base_pixels): averaging n equally noisy pixels divides the noise's
    standard deviation by sqrt(n) (Esser et al. 2024, section 5.3.2).
    """
    return math.sqrt(pixels / base_pixels)


SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "vp_sde": vp_sde,
    "vp_cosine": vp_cosine,
    "rectified_flow": rectified_flow,
    "edm": edm,
}
