"""Schedules given by a formula of continuous time; numpy and jax only."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from scaling_ldm.diffusion.noise.schedule import (
    Real,
    Schedule,
    VariancePreserving,
    floats,
    softplus,
)


@dataclasses.dataclass(frozen=True)
class _VpSde(VariancePreserving):
    beta_min: float
    beta_max: float

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 1e-5

    def logsnr(self, t: Real) -> Real:
        # -2 log alpha is the integral of beta; sigma^2 / alpha^2 = expm1 of it.
        xp, t = floats(t)
        integral = t * self.beta_min + 0.5 * t**2 * (self.beta_max - self.beta_min)
        with np.errstate(divide="ignore"):
            return -xp.log(xp.expm1(integral))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = floats(logsnr)
        last = 0.5 * (self.beta_min + self.beta_max)
        integral = xp.minimum(softplus(xp, -logsnr), last)
        root = xp.sqrt(
            self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral
        )
        return xp.clip(2 * integral / (self.beta_min + root), self.t_data, 1)


@dataclasses.dataclass(frozen=True)
class _VpCosine(VariancePreserving):
    logsnr_limit: float

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 0.0

    def _angles(self) -> tuple[float, float]:
        """(first angle, length) of the arc that t runs along."""
        low = math.atan(math.exp(-0.5 * self.logsnr_limit))
        return low, math.pi / 2 - 2 * low

    def logsnr(self, t: Real) -> Real:
        xp, t = floats(t)
        start, span = self._angles()
        return -2 * xp.log(xp.tan(start + span * t))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = floats(logsnr)
        start, span = self._angles()
        return xp.clip((xp.arctan(xp.exp(-0.5 * logsnr)) - start) / span, 0, 1)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """The class of `rectified_flow()`."""

    @property
    def t_noise(self) -> float:
        return 1.0

    @property
    def t_data(self) -> float:
        return 0.0

    def logsnr(self, t: Real) -> Real:
        xp, t = floats(t)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log1p(-t) - xp.log(t))

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = floats(logsnr)
        return xp.exp(-softplus(xp, 0.5 * logsnr))

    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = floats(logsnr)
        return (
            xp.exp(-softplus(xp, -0.5 * logsnr)),
            xp.exp(-softplus(xp, 0.5 * logsnr)),
        )

    def alpha(self, t: Real) -> Real:
        return 1 - floats(t)[1]

    def sigma(self, t: Real) -> Real:
        return floats(t)[1]


@dataclasses.dataclass(frozen=True)
class Edm(Schedule):
    """The class of `edm()`."""

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
        xp, t = floats(t)
        with np.errstate(divide="ignore"):
            return -2 * xp.log(t)

    def time(self, logsnr: Real) -> Real:
        xp, logsnr = floats(logsnr)
        return xp.clip(xp.exp(-0.5 * logsnr), self.sigma_min, self.sigma_max)

    def from_logsnr(self, logsnr: Real) -> tuple[Real, Real]:
        xp, logsnr = floats(logsnr)
        return xp.ones_like(logsnr), xp.exp(-0.5 * logsnr)

    def sigma(self, t: Real) -> Real:
        return floats(t)[1]

    def unit_time(self, t: Real) -> Real:
        xp, t = floats(t)
        return 0.25 * xp.log(t)


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Continuous time, beta linear in t (Song et al. 2021, eq. 32-33).

    `t_data` is 1e-5 and not 0, because the score diverges at 0.

    Raises:
      ValueError: not 0 < beta_min < beta_max.
    """
    if not 0 < beta_min < beta_max:
        raise ValueError(
            f"0 < beta_min < beta_max must hold, got {beta_min} and {beta_max}"
        )
    return _VpSde(beta_min, beta_max)


def vp_cosine(logsnr_limit: float = 20.0) -> Schedule:
    """Continuous time, alpha = cos (Salimans & Ho 2022, section 2; Kingma & Gao 2023).

    Args:
      logsnr_limit: logsnr runs from +limit at t = 0 to -limit at t = 1.

    Raises:
      ValueError: a limit that is not positive.
    """
    if not logsnr_limit > 0:
        raise ValueError(f"logsnr_limit must be positive, got {logsnr_limit}")
    return _VpCosine(logsnr_limit)


def rectified_flow() -> Schedule:
    """alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022, sigma_min = 0)."""
    return RectifiedFlow()


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """alpha = 1, sigma = t: variance exploding (Karras et al. 2022, table 1).

    Raises:
      ValueError: not 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"0 < sigma_min < sigma_max must hold, got {sigma_min} and {sigma_max}"
        )
    return Edm(sigma_min, sigma_max)
