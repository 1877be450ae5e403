"""Euler and Heun on the probability-flow ODE, in the coordinate where it is straight.

For a rectified flow that is x against t. For the others it is y = x / alpha against
sigma / alpha, as in Karras et al. 2022 (section 4): dy/dsigma = (y - x0) / sigma.
"""

from __future__ import annotations

from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.samplers import ddim_ddpm
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.time_grid import TimeGrid


def euler(grid: TimeGrid) -> SolverTable:
    """First order. In both coordinates, Euler is DDIM without noise, also in inversion.

    In x / alpha: alpha' (x0 + sigma' / alpha' (x / alpha - x0) alpha / sigma).
    """
    return ddim_ddpm.ddim(grid)


def heun(grid: TimeGrid) -> SolverTable:
    """Second order: two evaluations per step, or one if it ends without noise.

    Karras et al. 2022, algorithm 1 without churn. Where alpha = 0, x / alpha does not
    exist, and the step is Euler's.

    Raises:
      ValueError: a grid towards noise.
    """
    if grid.inverts:
        raise ValueError("heun cannot invert; euler and ddim can")
    straight = isinstance(grid.schedule, noise.RectifiedFlow)
    table = SolverTable(history=2, saves=True)
    for a, b in grid.pairs:
        if straight:
            scale_a, scale_b, sigma_a, sigma_b = 1.0, 1.0, a.sigma, b.sigma
        else:
            scale_a, scale_b = a.alpha, b.alpha
            sigma_a = a.sigma / a.alpha if a.alpha else 0.0
            sigma_b = b.sigma / b.alpha
        keep = b.sigma / a.sigma
        first = dict(x=keep, m=[b.alpha - a.alpha * keep])
        if b.sigma == 0 or scale_a == 0:
            table.add(a, b, **first)
            continue
        table.add(a, b, **first, save=True, ends_step=False)
        # y = x / scale and dy/dsigma = (y - x0) / sigma at both ends of the step.
        half = 0.5 * (sigma_b - sigma_a)
        table.add(
            b,
            b,
            s=scale_b / scale_a * (1 + half / sigma_a),
            x=half / sigma_b,
            m=[-scale_b * half / sigma_b, -scale_b * half / sigma_a],
        )
    return table
