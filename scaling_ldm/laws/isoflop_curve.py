"""The runs of one budget: their losses over ln N, and the parabola through them.

A budget whose runs have no minimum is refused here, whatever the curves through them
are later. D_opt is ln D interpolated linearly in ln N between the budget's runs,
because C = 6 N D does not hold exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from scaling_ldm.laws.points import IsoflopPoint, run_name
from scaling_ldm.records import Refusal

MIN_SIZES = 4  # a parabola has three coefficients
NEAR_BUDGET = (
    0.1  # relative difference below which two budgets may be meant to be equal
)
MINIMUM = "isoFLOP minimum"  # what a refusal is about
OUTSIDE = "vertex outside the grid"
AT_THE_EDGE = "smallest loss at the edge of the grid"

Points = Float[np.ndarray, "points"]
Design = Float[np.ndarray, "points 3"]
Solve = Float[np.ndarray, "3 points"]
Coefs = Float[np.ndarray, "3"]
ManyCoefs = Float[np.ndarray, "*many 3"]


@dataclasses.dataclass(frozen=True)
class IsoflopCurve:
    """The parabola of one budget; x is ln N minus its mean."""

    budget: float
    centre: float
    x: Points
    ln_d: Points
    y: Points  # loss
    design: Design  # 1, x, x^2
    solve: Solve  # the pseudo-inverse of `design`
    coefs: Coefs
    residuals: Points
    leverage: Points
    runs: tuple[str, ...]  # of each point; "": not known

    @property
    def dof(self) -> int:
        return len(self.x) - 3

    @property
    def sizes(self) -> Points:
        """The distinct x, ascending."""
        return np.unique(self.x)

    @property
    def grid(self) -> str:
        """The smallest and the largest size, in words."""
        low, high = np.exp(self.sizes[[0, -1]] + self.centre)
        return f"the grid of {low:.4g} to {high:.4g} parameters"

    def parabola_minimum(self, coefs: ManyCoefs) -> ManyCoefs:
        """(ln N, ln D, loss) at the minimum of parabolas; NaN where there is none."""
        c0, c1, c2 = np.moveaxis(coefs, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
        return self.place(at, c0 - c2 * at**2)

    def place(self, at: npt.ArrayLike, loss: npt.ArrayLike) -> ManyCoefs:
        """(ln N, ln D, loss) of minima at these x."""
        at, sizes = np.asarray(at), self.sizes
        ln_d = np.array([self.ln_d[self.x == s].mean() for s in sizes])
        k = np.clip(np.searchsorted(sizes, at), 1, len(sizes) - 1)
        slope = (ln_d[k] - ln_d[k - 1]) / (sizes[k] - sizes[k - 1])
        return np.stack(
            [at + self.centre, ln_d[k - 1] + slope * (at - sizes[k - 1]), loss], -1
        )


def fit_curve(points: Sequence[IsoflopPoint], near: int = 0) -> IsoflopCurve | Refusal:
    """The parabola of one budget, or the first reason why it has no minimum.

    Args:
      near: runs of other budgets that are nearly equal to this one.
    """
    budget = points[0].budget
    n, d, y = np.array([(p.n, p.d, p.loss) for p in points]).T
    sizes = np.unique(n)
    if len(sizes) < MIN_SIZES:
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason=f"fewer than {MIN_SIZES} sizes",
            detail=f"{len(sizes)} distinct size{'s' * (len(sizes) != 1)} in "
            f"{len(points)} usable run{'s' * (len(points) != 1)}"
            + (
                f"; {near} more have nearly this budget: give runs of one budget the "
                "budget that they were planned for"
                if near
                else ""
            ),
        )
    centre = float(np.mean(np.log(n)))
    x = np.log(n) - centre
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    solve = np.linalg.pinv(design)
    coefs = solve @ y
    curve = IsoflopCurve(
        budget=budget,
        centre=centre,
        x=x,
        ln_d=np.log(d),
        y=y,
        design=design,
        solve=solve,
        coefs=coefs,
        residuals=y - design @ coefs,
        leverage=np.sum(design * solve.T, axis=1),
        runs=tuple(p.run for p in points),
    )
    if coefs[2] <= 1e-12 * max(1e-300, np.abs(y).max()):
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason="no upward-opening parabola",
            detail=f"curvature {coefs[2]:.4g} per (ln N)^2 over {curve.grid}",
        )
    if refusal := outside(curve, curve.parabola_minimum(coefs)[0]):
        return refusal
    means = np.array([y[n == s].mean() for s in sizes])
    if means.argmin() in (0, len(sizes) - 1):
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason=AT_THE_EDGE,
            detail=f"loss {means.min():.6g} at {sizes[means.argmin()]:.4g} parameters, "
            f"an end of {curve.grid}",
        )
    return curve


def fit_curves(
    points: Sequence[IsoflopPoint], window: float | None
) -> tuple[list[IsoflopCurve | Refusal], list[str]]:
    """A curve or refusal per budget, and a line per point outside the window."""
    curves, excluded = [], []
    for budget in sorted({p.budget for p in points}):
        group = [p for p in points if p.budget == budget]
        if window is not None:
            losses = {
                n: np.mean([p.loss for p in group if p.n == n])
                for n in {p.n for p in group}
            }
            best = min(losses, key=lambda n: (losses[n], n))
            far = [p for p in group if abs(math.log(p.n / best)) > math.log(window)]
            excluded += [
                f"{run_name(p.budget, p.n)}: outside the window, a factor {window:g} "
                f"around the smallest loss at {best:.6g} (parabola only)"
                for p in far
            ]
            group = [p for p in group if p not in far]
        near = [p for p in points if 0 < abs(p.budget / budget - 1) < NEAR_BUDGET]
        curves.append(fit_curve(group, len(near)))
    return curves, excluded


def outside(curve: IsoflopCurve, ln_n: float) -> Refusal | None:
    """A refusal if a minimum is not between the sizes of its budget."""
    low, high = curve.sizes[[0, -1]] + curve.centre
    if low < ln_n < high:
        return None
    at = "no vertex"
    if math.isfinite(ln_n):
        at = f"vertex at {math.exp(min(700.0, ln_n)):.4g} parameters, outside"
    return Refusal(
        quantity=MINIMUM,
        budget_flops=curve.budget,
        reason=OUTSIDE,
        detail=f"{at} {curve.grid}",
    )
