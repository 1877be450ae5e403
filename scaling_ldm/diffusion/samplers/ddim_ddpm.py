"""DDIM and DDPM: steps through the Gaussian posterior of the noising process.

With x0 estimated at (alpha, sigma), a step to (alpha', sigma') is

    x' = alpha' x0 + sqrt(sigma'^2 - std^2) (x - alpha x0) / sigma + std z.

Song et al. 2020 (DDIM), eq. 12: std is eta times that of the posterior. eta = 0 is
deterministic; eta = 1 is Ho et al. 2020 (DDPM) with the smaller variance.
"""

from __future__ import annotations

import math

import numpy as np

from scaling_ldm.diffusion.prediction import VARIANCES
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.time_grid import GridPoint, TimeGrid


def _posterior(a: GridPoint, b: GridPoint) -> tuple[float, float]:
    """(the variance of q(x_b | x_a, x0), that of q(x_a | x_b)).

    The second is the beta of Ho et al. 2020. Both hold for any alpha and sigma.
    """
    kept = a.alpha / b.alpha
    added = a.sigma**2 - (kept * b.sigma) ** 2
    return added * b.sigma**2 / a.sigma**2, added


def ddim(
    grid: TimeGrid, *, eta: float = 0.0, keeps_epsilon: bool = False
) -> SolverTable:
    """Song et al. 2020, eq. 12. On a reversed grid, its inversion (appendix F).

    Args:
      eta: the share of the posterior's noise: 0 is deterministic, 1 is DDPM.
      keeps_epsilon: with an x0_transform, step along the epsilon of the network; else
        along that of the limited x0. They are use_clipped_model_output=False and True
        of diffusers.

    Raises:
      ValueError: eta outside [0, 1], or above 0 for an inversion.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if grid.inverts:
        if eta:
            raise ValueError("an inversion is deterministic: eta must be 0")
        return _toward_noise(grid)
    table = SolverTable(
        stochastic=eta > 0, history=1 + keeps_epsilon, unlimited=keeps_epsilon
    )
    for a, b in grid.pairs:
        std = eta * math.sqrt(_posterior(a, b)[0])
        keep = math.sqrt(b.sigma**2 - std**2) / a.sigma
        # alpha' of the (limited) x0, and the rest of the x0 that epsilon is made of.
        m = (b.alpha, -a.alpha * keep)
        table.add(a, b, x=keep, m=m if keeps_epsilon else [sum(m)], z=std)
    return table


def _toward_noise(grid: TimeGrid) -> SolverTable:
    """The same step in terms of epsilon, without division by sigma, which may be 0."""
    table = SolverTable(form="epsilon")
    for a, b in grid.pairs:
        keep = b.alpha / a.alpha
        table.add(a, b, x=keep, m=[b.sigma - a.sigma * keep])
    return table


def ddpm(grid: TimeGrid, *, variance: str = "fixed_small") -> SolverTable:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any subset of the steps.

    Args:
      variance: "fixed_small", that of the posterior; "fixed_large", beta (both section
        3.2); "learned", between them, as the network predicts in a second half of its
        output channels (Nichol & Dhariwal 2021, eq. 15). The last step, to sigma = 0,
        adds no noise.

    Raises:
      ValueError: an unknown variance, or a grid towards noise.
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance {variance!r} is none of {', '.join(VARIANCES)}")
    if grid.inverts:
        raise ValueError("ddpm cannot invert; ddim can")
    table = SolverTable(stochastic=True, learned_variance=variance == "learned")
    for a, b in grid.pairs:
        small, large = _posterior(a, b)
        x = a.alpha / b.alpha * b.sigma**2 / a.sigma**2
        m = [b.alpha * large / a.sigma**2]
        if b.sigma == 0:
            table.add(a, b, x=x, m=m)
        elif variance == "learned":
            bounds = (float(np.log(small)), float(np.log(large)))
            table.add(a, b, x=x, m=m, z=1.0, log_variance=bounds)
        else:
            std = math.sqrt(small if variance == "fixed_small" else large)
            table.add(a, b, x=x, m=m, z=std)
    return table
