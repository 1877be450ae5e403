"""What every noise schedule offers, and how times are shifted; numpy and jax only."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# A number gives a number, an array gives an array of the same library.
Real = TypeVar("Real", float | int, np.floating, np.ndarray, jax.Array)


def floats(value: Any) -> tuple[Any, Any]:
    """(jax.numpy, array of at least float32) or (numpy, float64 array)."""
    if isinstance(value, jax.Array):
        if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize >= 4:
            return jnp, value
        return jnp, value.astype(jnp.float32)
    return np, np.asarray(value, np.float64)


def softplus(xp: Any, value: Any) -> Any:
    """log(1 + e^value), with xp numpy or jax.numpy."""
    return xp.logaddexp(value, 0.0)


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """alpha, sigma and logsnr as functions of time, and time as a function of logsnr.

    Every method takes a number or an array of any shape and works elementwise. Numbers
    and numpy arrays give numpy float64. jax arrays give jax arrays, float32 or wider.
    A schedule is immutable and hashable: it may be a static argument of jax.jit.
    """

    @property
    @abc.abstractmethod
    def t_noise(self) -> float:
        """The time of the most noise, where sampling starts."""

    @property
    @abc.abstractmethod
    def t_data(self) -> float:
        """The time of the least noise that the schedule has."""

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
        """Maps [0, 1) onto the schedule's times, from data to noise, evenly in t."""
        return self.t_data + (self.t_noise - self.t_data) * floats(u)[1]

    def unit_time(self, t: Real) -> Real:
        """t as a number of order one, which this library's denoisers take."""
        return floats(t)[1]

    def alpha(self, t: Real) -> Real:
        """The factor of the signal."""
        return self.from_logsnr(self.logsnr(t))[0]

    def sigma(self, t: Real) -> Real:
        """The factor of the noise, which is its standard deviation."""
        return self.from_logsnr(self.logsnr(t))[1]


class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1."""

    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = floats(logsnr)
        return (
            xp.exp(-0.5 * softplus(xp, -logsnr)),
            xp.exp(-0.5 * softplus(xp, logsnr)),
        )


def shift_time(t: Real, factor: float) -> Real:
    """Moves times of [0, 1] towards noise (Esser et al. 2024, eq. 23).

    t -> factor t / (1 + (factor - 1) t). On a rectified flow, logsnr falls by
    2 log(factor) at every t. A factor of 1 leaves t as it is.
    """
    _, t = floats(t)
    return factor * t / (1 + (factor - 1) * t)
