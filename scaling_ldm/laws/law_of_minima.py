"""One power law over budgets, through the minima of their curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from scaling_ldm.laws import forms
from scaling_ldm.laws.minima import Minima
from scaling_ldm.records import Interval, PowerLaw, Refusal

QUANTITIES = ("N_opt", "D_opt", "L_opt")
MIN_BUDGETS = 3  # a line has two


Predict = Callable[..., tuple[float, Interval]]


def _exp_interval(middle: float, i: Interval) -> Interval:
    """The interval of exp(middle + error); where it overflows it is infinite."""
    with np.errstate(over="ignore"):
        low, high = np.exp([middle + i.low, middle + i.high])
    return Interval(low=float(low), high=float(high), level=i.level)


def fit_law(
    minima: Minima, index: int, level: float, extend: float, seed: Sequence[int]
) -> tuple[PowerLaw | Refusal, Predict | None, list[str]]:
    """One law with bootstrap intervals, its prediction of a new minimum, and notes.

    The prediction uses the noise of the new minimum's logarithm if it is given.
    Otherwise the noise is drawn from the errors of the fitted minima.
    """
    name = QUANTITIES[index]
    budgets, value = minima.budgets, minima.centre[:, index]
    if len(budgets) < MIN_BUDGETS:
        have = "budget has" if len(budgets) == 1 else "budgets have"
        reason = f"fewer than {MIN_BUDGETS} budgets"
        detail = f"{len(budgets)} {have} a parabola"
        return Refusal(quantity=name, reason=reason, detail=detail), None, []
    samples = minima.draws[:, :, index]
    if name == "L_opt":
        y = value
        with np.errstate(invalid="ignore", divide="ignore"):
            value, samples = np.log(value), np.log(samples)
    else:
        y = np.exp(value)
    law = forms.power_law(
        budgets, y, x_name="budget_flops", y_name=name, confidence=level, extend=extend
    )
    if isinstance(law, Refusal):
        return law, None, []
    usable = np.all(np.isfinite(samples), axis=1)
    if usable.sum() < 20:
        refusal = Refusal(
            quantity=name,
            reason="minimum not identified",
            detail=f"{usable.sum()} of {len(usable)} bootstrap draws have all minima",
        )
        return refusal, None, []
    samples = samples[usable]
    u = np.log(budgets)
    design = np.stack([np.ones_like(u), u], axis=1)
    solve = np.linalg.pinv(design)
    noise = samples - value
    lines = noise @ solve.T  # [draws, 2]: error of (ln coef, exponent)
    scatter = np.sqrt(np.sum((noise - lines @ design.T) ** 2, 1) / (len(u) - 2))
    notes, ratio = [], 1.0
    if law.rmse_log > max(1e-9, np.quantile(scatter, 0.95)):
        ratio = law.rmse_log / float(np.median(scatter))
        notes.append(
            f"{name}: minima scatter about the power law {ratio:.1f} times what the "
            "noise of the losses explains; intervals widened by that (does it bend?)"
        )
    lines, noise = lines * ratio, noise * ratio
    rng = np.random.default_rng(seed)
    fresh = rng.permutation(noise)[
        np.arange(len(noise)), rng.integers(len(u), size=len(noise))
    ]

    def predict(x: float, own_noise: np.ndarray | None = None):
        middle = math.log(law(x))
        extra = fresh if own_noise is None else ratio * own_noise[: len(lines)]
        i = forms.percentiles(lines[: len(extra)] @ [1.0, math.log(x)] + extra, level)
        return law(x), _exp_interval(middle, i)

    coef = forms.percentiles(lines[:, 0], level)
    exponent = forms.percentiles(lines[:, 1], level)
    band = []
    for x in forms.band_grid(budgets, extend):
        i = predict(float(x))[1]
        band.append((float(x), i.low, i.high))
    complete = dataclasses.replace(
        law,
        coef_interval=_exp_interval(math.log(law.coef), coef),
        exponent_interval=Interval(
            low=law.exponent + exponent.low,
            high=law.exponent + exponent.high,
            level=level,
        ),
        band=tuple(band),
    )
    return complete, predict, notes
