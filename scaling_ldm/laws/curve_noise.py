"""The noise of runs, drawn from the residuals of a model of their curves.

A curve has 6 to 8 runs, so resampling runs (case bootstrap) would often lose one side
or leave three sizes. So residuals are resampled. They are pooled over budgets unless
Bartlett's test finds their noise to differ (p < 1%), and corrected for few degrees of
freedom (see `forms`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from scaling_ldm.laws import forms
from scaling_ldm.laws.curve_models import UNEQUAL, CurveModel, bartlett
from scaling_ldm.laws.isoflop_curve import IsoflopCurve
from scaling_ldm.laws.points import run_name
from scaling_ldm.laws.shared_noise import SharedNoise, groups, shared_noise

SHARED = "losses of one size, or trajectory, share"  # begins a note
_LEFT = 1e-3  # share of the squares that the other runs must have to judge one
_FAR = 0.05  # chance that a run of a study without far ones is named


def draw(
    curves: Sequence[IsoflopCurve],
    model: CurveModel,
    draws: int,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[str]]:
    """The noise of each budget's runs, [draws, its points], and notes."""
    squares, dof, notes = model.squares, model.dof, []
    together, exact = len(curves) > 1, _rounding(curves)
    if together and squares.sum() / dof.sum() > exact**2:
        p = bartlett(squares, dof)
        if p < UNEQUAL:
            together = False
            notes.append(
                f"loss noise differs between budgets (Bartlett p = {p:.2g}): each "
                "curve's intervals use its own residuals only"
            )
    parts = [
        forms.exchangeable(r, h, n)
        for r, h, n in zip(model.residuals, model.leverage, dof, strict=True)
    ]
    if not together:
        scales = [np.sqrt(n / rng.chisquare(n, (draws, 1))) for n in dof]
        each = zip(curves, parts, scales, strict=True)
        return [rng.choice(p, (draws, len(c.x))) * s for c, p, s in each], notes
    pool = np.concatenate(parts)
    mean_square = float(np.mean(pool**2))
    if mean_square > 0:
        pool = pool * math.sqrt(squares.sum() / dof.sum() / mean_square)
    scale = np.sqrt(dof.sum() / rng.chisquare(dof.sum(), (draws, 1)))
    if mean_square > exact**2 and (shared := _shared(curves, model, draws, rng)):
        if shared.p < 0.05:
            notes.append(
                f"{SHARED} {np.median(shared.rho):.0%} of their noise between budgets "
                f"({np.quantile(shared.rho, 0.05):.0%} to "
                f"{np.quantile(shared.rho, 0.95):.0%}): the intervals allow for it"
            )
        noise = shared.noise(pool / np.sqrt(np.mean(pool**2)), rng)
        return np.split(noise, np.cumsum([len(c.x) for c in curves])[:-1], 1), notes
    return [rng.choice(pool, (draws, len(c.x))) * scale for c in curves], notes


def _rounding(curves: Sequence[IsoflopCurve]) -> float:
    """Residuals below this are rounding."""
    return max(float(np.abs(c.y).max()) for c in curves) * 1e-12


def _shared(
    curves: Sequence[IsoflopCurve],
    model: CurveModel,
    draws: int,
    rng: np.random.Generator,
) -> SharedNoise | None:
    """The noise that budgets have in common; None if no size is at two of them."""
    sizes = np.exp(np.concatenate([c.x + c.centre for c in curves])).tolist()
    runs = [run for c in curves for run in c.runs]
    group = groups(sizes, runs, [c.budget for c in curves for _ in c.x])
    if group is None:
        return None
    residuals = np.concatenate(model.residuals)
    return shared_noise(residuals, model.design, group, draws, rng)


def far_runs(curves: Sequence[IsoflopCurve], model: CurveModel) -> list[str]:
    """A line for each run whose loss is too far from its curve for noise.

    The studentised deletion residual is compared with the t quantile at 5% over the
    number of runs (Bonferroni). Each budget is compared with its own noise where that
    differs between budgets, its furthest run left out.
    """
    squares, dof = model.squares, model.dof
    every, found = sum(len(c.x) for c in curves), []
    for i, c in enumerate(curves):
        r, left = model.residuals[i], np.maximum(1 - model.leverage[i], 1e-9)
        without = squares.copy()  # the furthest run, which would look like noise
        without[i] = max(squares[i] - float(np.max(r * r / left)), 0.0)
        total, free = squares[i], dof[i]
        if bartlett(without, dof) >= UNEQUAL:
            total, free = squares.sum(), dof.sum()
        if free < 2 or total <= _rounding(curves) ** 2 * free:
            continue
        rest = (total - r * r / left) / (free - 1)
        known = rest * free > _LEFT * total  # without it, the others' noise is not
        t = np.where(known, r / np.sqrt(np.where(known, rest, 1.0) * left), 0.0)
        limit = float(scipy.stats.t.isf(_FAR / every / 2, free - 1))
        found += [
            f"{run_name(c.budget, math.exp(c.x[j] + c.centre))}: its loss {c.y[j]:.6g} "
            f"lies {r[j]:+.2g} off the curve of its budget, {abs(t[j]):.1f} standard "
            f"deviations of the other runs (limit {limit:.1f}): was it trained as they "
            "were?"
            for j in np.flatnonzero(np.abs(t) > limit)
        ]
    return found
