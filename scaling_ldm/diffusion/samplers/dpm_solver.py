"""DPM-Solver++ of orders 1 to 3, multistep and singlestep, for the ODE and the SDE.

With lambda = log(alpha / sigma), the solution over a step h = lambda' - lambda is exact
except for the estimate x0(lambda) (Lu et al. 2022, "DPM-Solver++", eq. 9; SDE: eq. 14):

    x' = sigma'/sigma e^{-(k-1) h} x + alpha' integral_0^h k e^{-k (h-u)} x0(u) du

with k = 1 for the ODE and k = 2 for the SDE, which adds noise of standard deviation
sigma' sqrt(1 - e^{-2h}). The polynomial D0 + D1 u/h + D2 (u/h)^2 / 2 replaces x0(u). It
is fitted to the latest evaluations and gives the weights

    w0 = 1 - e^{-kh},   w1 = 1 - w0 / (kh),   w2 = 1/2 - w1 / (kh),

and order 1, 2 or 3. The "midpoint" form has w0 / 2 in place of w1 at order 2, and no
curvature at order 3 of singlestep solvers. Singlestep solvers reach order 3 with stages
at 1/3 and 2/3 of the step (points even in lambda). With other stages they reach only
order 2, because the first stage is an estimate of first order. At the last step
sigma' = 0 and h is infinite. Only D0 has a meaning there, so its order is 1.

The authors' code, and code derived from it, halves the curvature D2 of the third-order
multistep solver, which reduces its order to 2. `curvature=0.5` does the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.time_grid import GridPoint, TimeGrid

SOLVERS = ("midpoint", "heun")
FEW_STEPS = 15  # with fewer, the order falls at the end (Lu et al.'s settings)


def weights(h: float, k: int = 1, count: int = 3) -> list[float]:
    """w0, w1, ... of a step h in lambda; h may be infinite."""
    found = [-math.expm1(-k * h)]
    for i in range(1, count):
        found.append(1 / math.factorial(i) - found[-1] / (k * h))
    return found


def _differences(
    w: Sequence[float], ratios: Sequence[float], solver: str, curvature: float
) -> list[float]:
    """Coefficients of m_0, m_1, m_2.

    Args:
      w: w0, w1, w2.
      ratios: (lambda distance from m_0 to m_1, from m_1 to m_2) / h; as many as the
        order has earlier evaluations.
    """
    if not ratios:
        return [w[0]]
    if len(ratios) == 1:
        slope = (w[0] / 2 if solver == "midpoint" else w[1]) / ratios[0]
        return [w[0] + slope, -slope]
    # With d0 = (m0 - m1) / r0 and d1 = (m1 - m2) / r1, the parabola through all three
    # has D1 = d0 + r0 / (r0 + r1) (d0 - d1) and D2 = 2 (d0 - d1) / (r0 + r1).
    r0, r1 = ratios
    bend = (w[1] * r0 + 2 * curvature * w[2]) / (r0 + r1)
    of_d0, of_d1 = w[1] + bend, -bend
    return [w[0] + of_d0 / r0, -of_d0 / r0 + of_d1 / r1, -of_d1 / r1]


def _check(grid: TimeGrid, order: int, solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is none of {', '.join(SOLVERS)}")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if grid.inverts:
        raise ValueError("DPM-Solver++ cannot invert; ddim can")


def multistep(
    grid: TimeGrid,
    *,
    order: int,
    stochastic: bool = False,
    solver: str = "midpoint",
    lower_order_final: bool = True,
    curvature: float = 1.0,
) -> SolverTable:
    """One evaluation per step; earlier ones are reused (Lu et al. 2022, algorithm 2).

    Args:
      order: 1 (DDIM), 2 or 3. The first steps have fewer earlier evaluations, and so a
        lower order.
      stochastic: solve the SDE.
      solver: the form of order 2, "midpoint" or "heun".
      lower_order_final: with fewer than 15 steps, let the order fall to 1 at the end.
      curvature: factor of D2 at order 3.

    Raises:
      ValueError: an unknown order or solver, or a grid towards noise.
    """
    _check(grid, order, solver)
    k = 2 if stochastic else 1
    table = SolverTable(history=order, stochastic=stochastic)
    for i, (a, b) in enumerate(grid.pairs):
        now = min(order, i + 1)
        if b.sigma == 0:
            now = 1
        elif lower_order_final and grid.steps < FEW_STEPS:
            now = min(now, grid.steps - i)
        # A point at alpha = 0 is infinitely far in lambda: it gives no difference.
        while now > 1 and not grid.points[i - now + 1].alpha:
            now -= 1
        h = b.lam - a.lam
        lams = [grid.points[i - j].lam for j in range(now)]
        ratios = [(lams[j] - lams[j + 1]) / h for j in range(now - 1)]
        m = _differences(weights(h, k), ratios, solver, curvature)
        table.add(
            a,
            b,
            x=b.sigma / a.sigma * (math.exp(-h) if stochastic else 1.0),
            m=[b.alpha * c for c in m],
            z=b.sigma * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0,
        )
    return table


def _orders(grid: TimeGrid, order: int, lower_order_final: bool) -> list[int]:
    """The evaluations of each step; their sum is the grid's number of steps.

    There are as many full steps as fit, then one for the rest (Lu et al. 2022,
    "DPM-Solver", section 3.4: n = 3K closes with orders 2 and 1).
    """
    full, rest = divmod(grid.steps, order)
    orders = [order] * full + ([rest] if rest else [])
    # If the grid ends without noise, its last step is infinitely long in lambda.
    split = grid.points[-1].sigma == 0 or (lower_order_final and not rest)
    if split and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    return orders


def singlestep(
    grid: TimeGrid,
    *,
    order: int,
    stochastic: bool = False,
    solver: str | None = None,
    lower_order_final: bool = True,
    shared_noise: bool = True,
) -> SolverTable:
    """Steps of `order` evaluations each, at successive points of the grid.

    Lu et al. 2022 ("DPM-Solver", algorithms 1-2, in the ++ form). A step begins at a
    point of the grid. The next points are its stages, and the one after them is its
    end. So n steps of the grid cost n evaluations, as with other solvers.

    Args:
      order: 1, 2 or 3. Where the last points are too few for a full step, its order is
        lower. A step that ends without noise is of order 1.
      stochastic: solve the SDE, stages included.
      solver: "midpoint" (the default at order 2) or "heun" (at order 3).
      lower_order_final: always close with a step of order 1.
      shared_noise: for the SDE: the stages of a step follow one Brownian path. False
        draws new noise for each stage, as published code does, at a lower order.

    Raises:
      ValueError: an unknown order or solver, or a grid towards noise.
    """
    solver = ("midpoint" if order < 3 else "heun") if solver is None else solver
    _check(grid, order, solver)
    table = SolverTable(history=order, saves=order > 1, stochastic=stochastic)
    start = 0
    for size in _orders(grid, order, lower_order_final):
        group = grid.points[start : start + size + 1]
        if group[0].alpha:
            for stage in range(1, size + 1):
                _stage(table, group[: stage + 1], stochastic, solver, stage == size)
            if stochastic and shared_noise:
                _share(table, group)
        else:  # a point at alpha = 0 is infinitely far from its stages
            for pair in zip(group[:-1], group[1:], strict=True):
                _stage(table, pair, stochastic, solver, True)
        start += size
    return table


def _stage(
    table: SolverTable,
    points: Sequence[GridPoint],
    stochastic: bool,
    solver: str,
    last: bool,
) -> None:
    """Adds a row: from the start of a step, points[0], to points[-1]."""
    k = 2 if stochastic else 1
    start, to = points[0], points[-1]
    evaluated = points[:-1]
    h = to.lam - start.lam
    w0, w1, w2 = weights(h, k)
    places = [(p.lam - start.lam) / h for p in evaluated[1:]]
    first = not places
    if first:
        m = [w0]
    elif len(places) == 1:
        slope = (w0 / 2 if solver == "midpoint" else w1) / places[0]
        m = [slope, w0 - slope]
    elif solver == "midpoint":
        slope = w1 / places[1]
        m = [slope, 0.0, w0 - slope]
    else:
        # The parabola through the start and both stages.
        r1, r2 = places
        of_1 = (2 * w2 - w1 * r2) / (r1 * (r1 - r2))
        of_2 = (2 * w2 - w1 * r1) / (r2 * (r2 - r1))
        m = [of_2, of_1, w0 - of_1 - of_2]
    keep = to.sigma / start.sigma * (math.exp(-h) if stochastic else 1.0)
    table.add(
        evaluated[-1],
        to,
        x=keep if first else 0.0,
        s=0.0 if first else keep,
        m=[to.alpha * c for c in m],
        z=to.sigma * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0,
        save=first,
        ends_step=last,
    )


def _share(table: SolverTable, points: Sequence[GridPoint]) -> None:
    """Rewrites the last step so that all its stages follow one Brownian path.

    As added, each stage goes from the start of the step to its own end, with noise of
    its own. Rewritten, a stage goes on from b, where the stage before ended, to its own
    end c. So it keeps the noise up to b, and only the noise from b to c is new. The
    state at b is multiplied by

        keep = (c.sigma / b.sigma) * exp(-h),    h = c.lam - b.lam.

    That state holds the predictions m with the coefficients of the stage before. So
    keep times these is subtracted from this stage's own coefficients: without noise,
    the stage ends where it ended before it was rewritten.
    """
    stages = len(points) - 1
    rows = table.rows[-stages:]
    for i in range(1, stages):
        b, c = points[i], points[i + 1]
        h = c.lam - b.lam
        keep = c.sigma / b.sigma * math.exp(-h)
        before = (0.0, *rows[i - 1].x_m)  # after it, one newer m was added in front
        table.rows[i - stages] = rows[i]._replace(
            x_x=keep,
            x_s=0.0,
            x_m=tuple(m - keep * n for m, n in zip(rows[i].x_m, before, strict=True)),
            x_z=c.sigma * math.sqrt(-math.expm1(-2 * h)),
        )


dpm1 = functools.partial(multistep, order=1, stochastic=False)
dpm2m = functools.partial(multistep, order=2, stochastic=False)
dpm3m = functools.partial(multistep, order=3, stochastic=False)
dpm2s = functools.partial(singlestep, order=2, stochastic=False)
dpm3s = functools.partial(singlestep, order=3, stochastic=False)
sde_dpm1 = functools.partial(multistep, order=1, stochastic=True)
sde_dpm2m = functools.partial(multistep, order=2, stochastic=True)
sde_dpm3m = functools.partial(multistep, order=3, stochastic=True)
sde_dpm2s = functools.partial(singlestep, order=2, stochastic=True)
