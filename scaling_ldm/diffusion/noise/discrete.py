"""Schedules given by a table of steps: DDPM's, Stable Diffusion's, the cosine.

numpy and jax only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm.diffusion.noise.schedule import (
    Real,
    Schedule,
    VariancePreserving,
    floats,
)


def _look_up(table: Any, index: Any) -> Any:
    """table[index]; under an explicit mesh the result is sharded as the index is."""
    if not isinstance(index, jax.Array) or jax.sharding.get_abstract_mesh().empty:
        return table[index]
    return table.at[index].get(out_sharding=jax.typeof(index).sharding)


@dataclasses.dataclass(frozen=True)
class Discrete(VariancePreserving):
    """A table of cumulative products, and its continuous interpolation.

    At whole t = 0 ... steps - 1, alpha(t)^2 = alphas_bar[t]. Between two whole steps,
    logsnr is linear in t (the interpolation of DPM-Solver and k-diffusion). Where the
    later of the two has an alpha of exactly zero, alpha is linear in t instead.

    Raises:
      ValueError: fewer than 2 steps, or alphas_bar that do not fall strictly from
        below 1 to at least 0.
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
        xp, t = floats(t)
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
        xp, logsnr = floats(logsnr)
        finite = np.isfinite(self._logsnr)
        table = -self._logsnr[finite]
        known = xp.asarray(np.append(table, table[-1] + 1), logsnr.dtype)
        # The two steps around each value. Found by counting, because a sharded array
        # cannot be searched.
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
        # 1e-9: the fraction i / steps is step i even where the product is rounded down.
        xp, u = floats(u)
        return xp.clip(xp.floor(u * self.steps + 1e-9), 0, self.steps - 1)

    def unit_time(self, t: Real) -> Real:
        return floats(t)[1] / self.steps


def from_betas(betas: Sequence[float] | np.ndarray) -> Discrete:
    """The schedule of a given table of step variances (Ho et al. 2020, eq. 2, 4).

    Args:
      betas: [steps], from the data to the noise.

    Raises:
      ValueError: fewer than 2 steps, or a beta outside (0, 1].
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
    """Betas evenly spaced (Ho et al. 2020, section 4).

    Args:
      steps: of the table, at least 2.
      beta_start, beta_end: the first and the last beta.

    Raises:
      ValueError: fewer than 2 steps, or a beta outside (0, 1].
    """
    return from_betas(np.linspace(beta_start, beta_end, steps))


def scaled_linear(
    steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Discrete:
    """Square roots of the betas evenly spaced: Stable Diffusion (Rombach et al. 2022).

    The default ends are those of Stable Diffusion 1 and 2.

    Args:
      steps, beta_start, beta_end: as for `linear`.

    Raises:
      ValueError: as `linear`.
    """
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(
    steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999
) -> Discrete:
    """alphas_bar follow a squared cosine (Nichol & Dhariwal 2021, eq. 17).

    Args:
      steps: of the table, at least 2.
      offset: s of the equation; it keeps the first betas from being tiny.
      beta_max: largest beta.

    Raises:
      ValueError: fewer than 2 steps.
    """
    u = np.arange(steps + 1) / steps
    bar = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - bar[1:] / bar[:-1], beta_max))


def zero_terminal_snr(schedule: Schedule) -> Discrete:
    """The same schedule with a last step of pure noise (Lin et al. 2023, algorithm 1).

    alpha is shifted to reach zero and scaled to keep its first value. A network on this
    schedule must predict v, x0 or flow: at pure noise, epsilon does not determine x0.

    Raises:
      ValueError: a schedule of continuous time.
    """
    if not isinstance(schedule, Discrete):
        raise ValueError(f"only tables can be rescaled, not {schedule!r}")
    root = np.sqrt(np.asarray(schedule.alphas_bar))
    first, last = root[0], root[-1]
    bar = ((root - last) * first / (first - last)) ** 2
    return Discrete(tuple(bar.tolist()))
