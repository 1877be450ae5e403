"""Noise that runs of different budgets have in common, because they share something.

Runs of one size and seed see the same pictures in the same order from the same start,
and points of one trajectory are the same run. What is noise at one budget is then
partly the same noise at the next, and the errors of the minima are not independent.

The residuals of all curves are r = M (own + common), with M the projection off the
curves. The common part has one value for each size, or trajectory. Its share of the
variance, rho, is read from T = |Z'r|^2 / |r|^2, where Z has a column for each size: T
is large where residuals of a size agree. Few budgets leave rho uncertain. So each draw
of the bootstrap has its own, from the confidence distribution of rho: the rho at which
T is the u-quantile of what rho gives, with u uniform (Schweder and Hjort 2002, Scand.
J. Stat. 29, 309). No test decides whether there is a common part.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

SHARES = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97])
_SIMULATED = 400  # sets of residuals of each share

Points = Float[np.ndarray, "points"]
Groups = Int[np.ndarray, "points"]
Draws = Float[np.ndarray, "draws"]


@dataclasses.dataclass(frozen=True)
class SharedNoise:
    """How much noise points have in common, as far as the residuals say it."""

    group: Groups  # points of equal numbers share noise
    rho: Draws  # the common part of the variance
    scale: Draws  # standard deviation of the noise of a run
    p: float  # of residuals that agree as much without a common part

    def noise(self, unit: Points, rng: np.random.Generator) -> np.ndarray:
        """Drawn noise [draws, points] from a pool of numbers of unit variance."""
        draws, points = len(self.rho), len(self.group)
        own = rng.choice(unit, (draws, points))
        common = rng.choice(unit, (draws, int(self.group.max()) + 1))[:, self.group]
        share = self.rho[:, None]
        noise = np.sqrt(1 - share) * own + np.sqrt(share) * common
        return self.scale[:, None] * noise


def groups(
    sizes: Sequence[float], runs: Sequence[str], budgets: Sequence[float]
) -> Groups | None:
    """A number for each point, equal where points may share noise.

    Points of one run share it. Where no run has several points, those of one size do.
    None: nothing is at two budgets.
    """
    counts = collections.Counter(run for run in runs if run)
    several = any(count > 1 for count in counts.values())
    keys = [
        run if several and run else f"{size:.6g}"
        for size, run in zip(sizes, runs, strict=True)
    ]
    places = collections.Counter(key for key, _ in {*zip(keys, budgets, strict=True)})
    if max(places.values(), default=0) < 2:
        return None
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def shared_noise(
    residuals: Points,
    design: np.ndarray,
    group: Groups,
    draws: int,
    rng: np.random.Generator,
) -> SharedNoise:
    """The share of common noise that these residuals allow, for each draw.

    Args:
      residuals: of the curves of all budgets, one after the other; not all 0.
      design: [points, coefficients] of these curves.
      group: as from `groups`.
      draws: of the bootstrap.
      rng: of the draws.
    """
    off = np.eye(len(residuals)) - design @ np.linalg.pinv(design)
    z = np.eye(int(group.max()) + 1)[group]
    squares = float(residuals @ residuals)
    agreement = float(np.sum((residuals @ z) ** 2)) / squares
    own = rng.standard_normal((_SIMULATED, len(group))) @ off
    common = rng.standard_normal((_SIMULATED, z.shape[1])) @ (z.T @ off)
    totals, below = [], []
    for share in SHARES:
        r = np.sqrt(1 - share) * own + np.sqrt(share) * common
        totals.append(np.sum(r * r, 1))
        below.append(np.mean(np.sum((r @ z) ** 2, 1) / totals[-1] <= agreement))
    chance = np.minimum.accumulate(below)  # of a T up to that of the residuals
    u = rng.uniform(size=draws)
    rho = np.interp(-u, -chance, SHARES)  # 0 above chance[0]
    nearest = np.abs(rho[:, None] - SHARES).argmin(1)
    total = np.array(totals)[nearest, rng.integers(_SIMULATED, size=draws)]
    return SharedNoise(group, rho, np.sqrt(squares / total), float(1 - chance[0]))
