"""Which runs to add to an isoFLOP study, to know the prediction of one budget better.

Each budget of the study has a parabola in ln N. Its coefficients are drawn many times
from their distribution (a parametric bootstrap with the noise that the budgets share).
Each draw has its own minima, law and prediction. A run that is not made yet would
measure a loss, which each draw predicts. By linear regression over the draws, knowing
that loss within its noise narrows the prediction from its variance V to

    V - cov(prediction, loss)^2 / (var(loss) + noise^2)

The run that narrows most for its FLOPs is taken. Then the draws are moved as if its
loss were known, and the next one is looked for (Evensen 1994, J. Geophys. Res. 99,
10143, the update of an ensemble; the choice is a greedy sequential design).

The candidates are runs at the budgets of the study: at another budget one run has no
parabola. Only the noise of the losses is narrowed, not the scatter of minima about a
law.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from scaling_ldm.laws import offset_law
from scaling_ldm.records import Refusal

MIN_BUDGETS = 3  # of a law
MIN_SIZES = 4  # of a parabola
DRAWS = 4000

Draws = Float[np.ndarray, "draws"]
Coefs = Float[np.ndarray, "draws 3"]


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """A run that may be added."""

    budget: float
    n: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextRun:
    """A proposed run, and the prediction after it and those before it.

    `factor` is the half width of the prediction's interval, as a factor.
    """

    budget: float
    n: float
    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """Runs in the order of what they narrow for their FLOPs."""

    quantity: str
    target: float  # the budget of the prediction
    level: float  # of the intervals
    factor: float  # before any run is added
    runs: tuple[NextRun, ...]


class _Budget:
    """The parabola of one budget, and draws of its coefficients."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        n, y = np.array(points).T
        self.centre = float(np.log(n).mean())
        x = np.log(n) - self.centre
        self.span = float(x.min()), float(x.max())
        self.design = np.stack([np.ones_like(x), x, x * x], 1)
        self.inverse = np.linalg.inv(self.design.T @ self.design)
        self.coefs = self.inverse @ self.design.T @ y
        self.squares = float(np.sum((y - self.design @ self.coefs) ** 2))
        self.dof = len(x) - 3
        self.sizes = len(np.unique(n))
        c1, c2 = self.coefs[1:]
        at = -c1 / (2 * c2) if c2 > 0 else math.nan
        self.has_minimum = self.span[0] < at < self.span[1]

    def row(self, n: float) -> np.ndarray:
        x = math.log(n) - self.centre
        return np.array([1.0, x, x * x])

    def minimum(self, coefs: Coefs) -> tuple[Draws, Draws]:
        """(ln N, loss) of drawn minima; those outside of a wider grid are its ends."""
        low, high = self.span
        wide = (high - low) / 2
        c0, c1, c2 = coefs.T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c2 > 0, -c1 / (2 * c2), np.sign(-c1) * np.inf)
        at = np.clip(np.nan_to_num(at), low - wide, high + wide)
        return at + self.centre, c0 + c1 * at + c2 * at * at


def propose(
    points: Sequence[tuple[float, float, float]],
    candidates: Sequence[tuple[float, float]],
    *,
    target: float,
    count: int,
    quantity: str = "N_opt",
    level: float = 0.9,
    seed: int = 0,
) -> Proposal | Refusal:
    """The runs that most narrow a prediction for their FLOPs.

    Args:
      points: (budget in FLOPs, N, loss) of the runs there are.
      candidates: (budget, N) of the runs that may be added, each once. Budgets that
        have no parabola are left out.
      target: the budget of the prediction, in FLOPs.
      count: how many runs to propose, at least 1.
      quantity: "N_opt", "D_opt" (as sure as N_opt: C = 6 N D) or "L_opt".
      level: of the interval that `factor` is about.
      seed: of the draws.

    Returns:
      A Refusal where there is no law to narrow, no residual noise is known, or no
      candidate is at a budget of the law.
    """
    budgets = _budgets(points)
    if len(budgets) < MIN_BUDGETS:
        detail = f"{len(budgets)} of them"
        return _refuse(
            quantity, f"fewer than {MIN_BUDGETS} budgets with a minimum", detail
        )
    dof = sum(b.dof for b in budgets.values())
    squares = sum(b.squares for b in budgets.values())
    if dof < 2 or squares <= 0:
        return _refuse(quantity, "the noise of the losses is not known", "")
    left = sorted({Run(*c) for c in candidates if c[0] in budgets})
    if not left:
        return _refuse(quantity, "no run to add at the budgets that have a minimum", "")
    rng = np.random.default_rng(seed)
    noise = np.sqrt(squares / rng.chisquare(dof, DRAWS))
    drawn = {
        c: b.coefs
        + noise[:, None]
        * (rng.standard_normal((DRAWS, 3)) @ np.linalg.cholesky(b.inverse).T)
        for c, b in budgets.items()
    }
    variance = squares / dof
    width = _half_width(level)

    def factor() -> float:
        return math.exp(
            width * float(np.std(_predict(budgets, drawn, target, quantity)))
        )

    first, chosen = factor(), []
    for _ in range(min(count, len(left))):
        said = _predict(budgets, drawn, target, quantity)
        best = _most(budgets, drawn, said, variance, left)
        left.remove(best)
        _learn(budgets, drawn, variance, best, rng)
        chosen.append(NextRun(budget=best.budget, n=best.n, factor=factor()))
    return Proposal(
        quantity=quantity, target=target, level=level, factor=first, runs=tuple(chosen)
    )


def _budgets(points: Sequence[tuple[float, float, float]]) -> dict[float, _Budget]:
    """The budgets whose runs have a minimum inside of their sizes."""
    found = {}
    for budget in sorted({p[0] for p in points}):
        runs = [(n, y) for c, n, y in points if c == budget]
        if len({n for n, _ in runs}) >= MIN_SIZES:
            one = _Budget(runs)
            if one.has_minimum:
                found[budget] = one
    return found


def _predict(
    budgets: dict[float, _Budget],
    drawn: dict[float, Coefs],
    target: float,
    quantity: str,
) -> Draws:
    """ln of the drawn predictions at a budget."""
    minima = [b.minimum(drawn[c]) for c, b in budgets.items()]
    u = np.log(list(budgets))
    centre = u.mean()
    if quantity == "L_opt":
        losses = np.stack([loss for _, loss in minima], 1)
        scale = losses.mean(0)
        fits = offset_law.solve(u - centre, np.maximum(losses, 1e-9 * scale), scale)
        return np.log(fits(np.array([math.log(target) - centre]))[:, 0])
    ln_n = np.stack([n for n, _ in minima], 1)
    slope = (u - centre) / np.sum((u - centre) ** 2)
    return ln_n.mean(1) + (ln_n @ slope) * (math.log(target) - centre)


def _most(
    budgets: dict[float, _Budget],
    drawn: dict[float, Coefs],
    said: Draws,
    variance: float,
    left: Sequence[Run],
) -> Run:
    """The run that takes most off the variance of the prediction, for its FLOPs."""
    off = said - said.mean()
    moments = {}
    for c, coefs in drawn.items():
        spread = coefs - coefs.mean(0)
        moments[c] = spread.T @ spread / len(off), off @ spread / len(off)

    def narrowed(run: Run) -> float:
        row, (of_coefs, together) = budgets[run.budget].row(run.n), moments[run.budget]
        seen = float(row @ of_coefs @ row) + variance
        return float(row @ together) ** 2 / seen / run.budget

    return max(left, key=narrowed)


def _learn(
    budgets: dict[float, _Budget],
    drawn: dict[float, Coefs],
    variance: float,
    run: Run,
    rng: np.random.Generator,
) -> None:
    """Moves the draws as if the loss of a run were known, at its expected value.

    Budgets are independent, so the coefficients of its own budget alone are moved.
    """
    coefs = drawn[run.budget]
    loss = coefs @ budgets[run.budget].row(run.n)
    seen = loss + math.sqrt(variance) * rng.standard_normal(len(loss))
    off, spread = seen - loss.mean(), coefs - coefs.mean(0)
    gain = np.mean(spread * (loss - loss.mean())[:, None], 0)
    gain = gain / (float(np.var(loss)) + variance)
    drawn[run.budget] = coefs - off[:, None] * gain


def _half_width(level: float) -> float:
    """Standard deviations on each side of a normal interval of this level."""
    return statistics.NormalDist().inv_cdf(0.5 + level / 2)


def _refuse(quantity: str, reason: str, detail: str) -> Refusal:
    return Refusal(quantity=f"next runs for {quantity}", reason=reason, detail=detail)
