"""UniPC: a predictor of order 1 to 3; the next evaluation corrects its step.

Zhao et al. 2023, algorithms 5-8, in the x0 form. In the terms of dpm_solver.py, with
r_k = (lambda_k - lambda) / h the places of other evaluations,

    x' = sigma'/sigma x + alpha' (w0 m + sum_k C_k (m_k - m) / r_k),
    sum_k C_k r_k^(i-1) = i! w_i    for as many i as there are k.

In the predictor, k runs over earlier evaluations; in the corrector, also over the new
one, with r = 1. Where there is only one k, the paper takes C = B(h) / 2 instead, with
B = h ("bh1") or B = w0 ("bh2").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from scaling_ldm.diffusion.samplers import dpm_solver
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.time_grid import TimeGrid

FORMS = ("bh1", "bh2")


def _coefficients(h: float, places: Sequence[float], form: str) -> list[float]:
    """The coefficient of m, then those of the m_k, without the factor alpha'."""
    w = dpm_solver.weights(h, count=len(places) + 1)
    if not places:
        return [w[0]]
    if len(places) == 1:
        solved = np.asarray([(h if form == "bh1" else w[0]) / 2])
    else:
        powers = np.vander(places, increasing=True).T
        moments = [math.factorial(i) * w[i] for i in range(1, len(w))]
        solved = np.linalg.solve(powers, moments)
    each = solved / np.asarray(places)
    return [w[0] - each.sum(), *each]


def unipc(
    grid: TimeGrid,
    *,
    order: int = 2,
    form: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
) -> SolverTable:
    """One evaluation per step: it corrects the last step and predicts the next.

    Args:
      order: of the predictor, 1 to 3; the corrector adds one.
      form: B(h), "bh1" or "bh2".
      corrector: False uses the predictor alone.
      lower_order_final: let the order fall to 1 at the end, at any number of steps.

    Raises:
      ValueError: an unknown order or form, or a grid towards noise.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    if grid.inverts:
        raise ValueError("unipc cannot invert; ddim can")
    table = SolverTable(history=order + 1, saves=corrector)
    before = 0  # order of the step that led here
    for i, (a, b) in enumerate(grid.pairs):
        past = [grid.points[i - j] for j in range(i + 1)]  # a, and those before it
        keep_x, keep_s, m = 1.0, 0.0, np.zeros(4)
        if corrector and i and past[1].alpha:
            c, h = past[1], a.lam - past[1].lam
            places = [(p.lam - c.lam) / h for p in past[2 : before + 1]] + [1.0]
            old, *others = _coefficients(h, places, form)
            keep_x, keep_s = 0.0, a.sigma / c.sigma
            m[0], m[1], m[2 : before + 1] = others[-1], old, others[:-1]
            m *= a.alpha
        now = min(order, i + 1)
        if b.sigma == 0:
            now = 1
        elif lower_order_final:
            now = min(now, grid.steps - i)
        while now > 1 and not past[now - 1].alpha:
            now -= 1
        h = b.lam - a.lam
        places = [(p.lam - a.lam) / h for p in past[1:now]]
        keep = b.sigma / a.sigma
        step = np.zeros(4)
        step[:now] = b.alpha * np.asarray(_coefficients(h, places, form))
        used = max(now, before + 1 if keep_s else 1)
        table.add(
            a,
            b,
            x=keep * keep_x,
            s=keep * keep_s,
            m=(keep * m + step)[:used],
            save=(keep_x, keep_s, m[:used]) if corrector else False,
        )
        before = now
    return table


unipc1 = functools.partial(unipc, order=1)
unipc2 = functools.partial(unipc, order=2)
unipc3 = functools.partial(unipc, order=3)
