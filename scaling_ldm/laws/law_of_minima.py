"""A straight line in log-log over budgets, through the minima of their curves.

The minima may scatter about a law by more than the noise of the losses explains. How
much more is as uncertain as the few budgets make it, so each bootstrap draw has its own
scatter, of which `excess_scatter` says the source. It moves the drawn minima and the
new minimum of a prediction. No test at a usual level decides whether there is scatter:
such a test rarely finds it in three or four budgets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from scaling_ldm.laws import forms
from scaling_ldm.laws.minima import Minima
from scaling_ldm.records import Interval, OffsetLaw, PowerLaw, Refusal

QUANTITIES = ("N_opt", "D_opt", "L_opt")
MIN_BUDGETS = 3  # a line has two
MIN_SPAN = 2.0  # largest over smallest budget
# With 1, 2, ... degrees of freedom: the share of laws without scatter that draw none.
# Larger shares leave too little where scatter is once or twice the noise: in simulated
# laws the exponent is then covered in less than 85%. Smaller ones widen calm laws.
CALM = (0.6, 0.7)
_EXACT = 1e-9  # deviations of logarithms below this are rounding

Draws = Float[np.ndarray, "draws"]
Places = Float[np.ndarray, "places"]
# Budgets, and the drawn relative errors of a measured minimum there, if it has some, in
# the order of the draws of the law -> the law's values, and the ends of the intervals
# of a minimum measured there.
Predict = Callable[[Places, Draws | None], tuple[Places, Places, Places]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law of one quantity, what it predicts, and doubts; or why there is none."""

    law: PowerLaw | OffsetLaw | Refusal
    predict: Predict | None = None
    notes: tuple[str, ...] = ()


def unusable(minima: Minima, name: str) -> Refusal | None:
    """Why no law of `name` goes through these budgets; None if one may."""
    k = len(minima.budgets)
    reason = detail = ""
    if k < MIN_BUDGETS:
        reason = f"fewer than {MIN_BUDGETS} budgets"
        detail = f"{k} budget{' has' if k == 1 else 's have'} a parabola"
    elif (span := minima.budgets.max() / minima.budgets.min()) < MIN_SPAN:
        reason = f"budgets span less than a factor {MIN_SPAN:g}"
        detail = f"{minima.budgets.min():.6g} to {minima.budgets.max():.6g} FLOPs, a "
        detail += f"factor {span:.3g}"
    elif name == "L_opt" and minima.losses[0] <= 0:
        low, high = minima.losses
        reason = "loss changes sign" if high > 0 else "loss not positive"
        detail = f"losses from {low:.6g} to {high:.6g}; a power law is of positive ones"
    return Refusal(quantity=name, reason=reason, detail=detail) if reason else None


def excess_scatter(
    squares: float, dof: int, drawn: Draws, variance: float, rng: np.random.Generator
) -> Draws:
    """The scatter of minima about a law beyond their noise, a deviation for each draw.

    The squares about the law are (noise + scatter^2) times a chi2 with `dof` degrees of
    freedom. Solved for the scatter, with a drawn chi2, this is the Q-profile
    (Viechtbauer 2007, Stat. Med. 26, 37; as a generalised interval: Iyer, Wang and
    Mathew 2004, JASA 99, 1060). Where the squares are below the share `CALM` of those
    that noise alone gives, there is none.

    Args:
      squares: sum of squares about the law.
      dof: budgets minus constants, at least 1.
      drawn: the sums of squares of draws that have noise and no scatter.
      variance: of the noise of a minimum, mean over budgets.
      rng: of the draws.
    """
    if not scattered(squares, dof, drawn):
        return np.zeros(len(drawn))
    total = squares / rng.chisquare(dof, len(drawn))
    return np.sqrt(np.maximum(0.0, total - variance))


def scattered(squares: float, dof: int, drawn: Draws) -> bool:
    """Whether squares about a law are not those of a calm share of noise alone."""
    usual = float(np.quantile(drawn, CALM[min(dof, len(CALM)) - 1]))
    return squares > max(_EXACT**2 * dof, usual)


def scatter_note(
    name: str, squares: float, dof: int, drawn: Draws, variance: float
) -> tuple[str, ...]:
    """A line if noise alone gives such squares in fewer than 5% of cases."""
    if squares <= max(_EXACT**2 * dof, float(np.quantile(drawn, 0.95))):
        return ()
    ratio = math.sqrt(squares / max(float(np.median(drawn)), 1e-300))
    scatter = math.sqrt(max(0.0, squares / dof - variance))
    return (
        f"{name}: minima scatter about the law {min(ratio, 1e6):.1f} times what the "
        f"noise of the losses explains, by {scatter:.2g} beyond it (in logarithms); "
        "the intervals allow for it",
    )


def noise_variance(noise: np.ndarray) -> float:
    """Of a minimum, mean over budgets; from quartiles, as a few draws may lie far off.

    Args:
      noise: drawn errors [draws, k].
    """
    low, high = np.quantile(noise, [0.25, 0.75], axis=0)
    return float(np.mean(((high - low) / 1.349) ** 2))


def usable_draws(
    minima: Minima, index: int
) -> tuple[np.ndarray, np.ndarray, Refusal | None]:
    """Drawn relative errors [usable draws, k] of a quantity, and which are usable."""
    value, samples = minima.centre[:, index], minima.draws[:, :, index]
    if QUANTITIES[index] == "L_opt":
        value, samples = np.log(value), np.log(np.where(samples > 0, samples, np.nan))
    usable = np.all(np.isfinite(samples), axis=1)
    if usable.sum() >= 20:
        return samples[usable] - value, usable, None
    detail = f"{usable.sum()} of {len(usable)} bootstrap draws have all minima"
    reason = "minimum not identified"
    refusal = Refusal(quantity=QUANTITIES[index], reason=reason, detail=detail)
    return samples, usable, refusal


def fit_law(
    minima: Minima, index: int, level: float, extend: float, seed: Sequence[int]
) -> Fitted:
    """The power law of one quantity, with bootstrap intervals."""
    name = QUANTITIES[index]
    if refusal := unusable(minima, name):
        return Fitted(refusal)
    noise, usable, refusal = usable_draws(minima, index)
    if refusal:
        return Fitted(refusal)
    budgets, value = minima.budgets, minima.centre[:, index]
    law = forms.power_law(
        budgets,
        value if name == "L_opt" else np.exp(value),
        x_name="budget_flops",
        y_name=name,
        confidence=level,
        extend=extend,
    )
    if isinstance(law, Refusal):
        return Fitted(law)
    u, rng = np.log(budgets), np.random.default_rng(seed)
    centre, dof = u.mean(), len(budgets) - 2
    design = np.stack([np.ones_like(u), u - centre], axis=1)
    solve = np.linalg.pinv(design)
    drawn = np.sum((noise - (noise @ solve.T) @ design.T) ** 2, 1)
    squares, variance = law.rmse_log**2 * dof, noise_variance(noise)
    scatter = excess_scatter(squares, dof, drawn, variance, rng)
    moved = scatter[:, None] * rng.standard_normal((len(noise), len(u) + 1))
    fresh = noise[np.arange(len(noise)), rng.integers(len(u), size=len(noise))]
    lines = (noise + moved[:, :-1]) @ solve.T  # errors of (ln y at the centre, slope)

    def predict(x, own=None):
        new = moved[:, -1] - (fresh if own is None else own[usable])
        at = np.stack([np.ones(len(x)), np.log(x) - centre], axis=1)
        error = lines @ at.T + new[:, None]
        low, high = forms.central(error, level)
        middle = law.coef * np.asarray(x) ** law.exponent
        with np.errstate(over="ignore"):
            return middle, middle * np.exp(low), middle * np.exp(high)

    at_one = forms.percentiles(lines @ [1.0, -centre], level)  # of ln coef
    exponent = forms.percentiles(lines[:, 1], level)
    in_the_middle = math.log(law(math.exp(centre)))
    grid = forms.band_grid(budgets, extend)
    complete = dataclasses.replace(
        law,
        coef_interval=_exp_interval(math.log(law.coef), at_one),
        exponent_interval=interval(
            law.exponent + exponent.low, law.exponent + exponent.high, level
        ),
        band=forms.band(grid, *predict(grid)[1:]),
        middle=math.exp(centre),
        middle_coef=math.exp(in_the_middle),
        middle_coef_interval=_exp_interval(
            in_the_middle, forms.percentiles(lines[:, 0], level)
        ),
    )
    notes = scatter_note(name, squares, dof, drawn, variance)
    return Fitted(complete, predict, notes)


def left_out(minima: Minima) -> np.ndarray:
    """ln N and ln D of each budget by the lines through all other budgets: [k, 2]."""
    u, v = np.log(minima.budgets), minima.centre[:, :2]
    design = np.stack([np.ones_like(u), u - u.mean()], 1)
    hat = design @ np.linalg.pinv(design)
    return v - (v - hat @ v) / (1 - np.diag(hat))[:, None]


def interval(low: float, high: float, level: float) -> Interval:
    return Interval(low=float(low), high=float(high), level=level)


def _exp_interval(middle: float, i: Interval) -> Interval:
    """The interval of exp(middle + error); where it overflows it is infinite."""
    with np.errstate(over="ignore"):
        return interval(np.exp(middle + i.low), np.exp(middle + i.high), i.level)
