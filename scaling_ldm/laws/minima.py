"""IsoFLOP minima: one parabola per budget, and the bootstrap of their vertices.

Per budget the loss is fitted by a parabola in ln N (Chinchilla approach 2; Liang et al.
2024, arXiv 2410.08184). Its vertex is N_opt and L_opt; D_opt is ln D interpolated
linearly in ln N between the budget's runs, because C = 6 N D does not hold exactly.

Uncertainty is a residual bootstrap. A parabola has 6 to 8 points, so resampling its
points (case bootstrap) would often lose one side or leave three sizes. Residuals are
pooled over budgets unless Bartlett's test finds their noise to differ (p < 1%), and
corrected for few degrees of freedom (see `forms`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from scaling_ldm.laws import forms
from scaling_ldm.laws.points import IsoflopPoint, run_name
from scaling_ldm.laws.shared_noise import SharedNoise, groups, shared_noise
from scaling_ldm.records import Interval, Parabola, Refusal

MIN_SIZES = 4  # a parabola has three coefficients
NEAR_BUDGET = (
    0.1  # relative difference below which two budgets may be meant to be equal
)
MINIMUM = "isoFLOP minimum"  # what a refusal is about

Points = Float[np.ndarray, "points"]
Design = Float[np.ndarray, "points 3"]
Solve = Float[np.ndarray, "3 points"]
Coefs = Float[np.ndarray, "3"]
ManyCoefs = Float[np.ndarray, "*many 3"]
Budgets = Float[np.ndarray, "k"]
Vertices = Float[np.ndarray, "k 3"]
DrawnVertices = Float[np.ndarray, "draws k 3"]


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

    def vertex(self, coefs: ManyCoefs) -> ManyCoefs:
        """(ln N, ln D, loss) at the minimum; NaN where there is none."""
        c0, c1, c2 = np.moveaxis(coefs, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(c2 > 0, -c1 / (2 * c2), np.nan)
        loss = c0 - c2 * at**2
        sizes = np.unique(self.x)
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
    grid = f"the grid of {sizes[0]:.4g} to {sizes[-1]:.4g} parameters"
    if coefs[2] <= 1e-12 * max(1e-300, np.abs(y).max()):
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason="no upward-opening parabola",
            detail=f"curvature {coefs[2]:.4g} per (ln N)^2 over {grid}",
        )
    n_opt = math.exp(min(700.0, curve.vertex(coefs)[0]))
    if not sizes[0] < n_opt < sizes[-1]:
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason="vertex outside the grid",
            detail=f"vertex at {n_opt:.4g} parameters, outside {grid}",
        )
    means = np.array([y[n == s].mean() for s in sizes])
    if means.argmin() in (0, len(sizes) - 1):
        return Refusal(
            quantity=MINIMUM,
            budget_flops=budget,
            reason="smallest loss at the edge of the grid",
            detail=f"loss {means.min():.6g} at {sizes[means.argmin()]:.4g} parameters, "
            f"an end of {grid}",
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


def _draw(
    curves: Sequence[IsoflopCurve], draws: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[str]]:
    """Bootstrap coefficients per curve, [draws, 3] each, and notes."""
    rss = np.array([np.sum(c.residuals**2) for c in curves])
    dof = np.array([c.dof for c in curves])
    notes: list[str] = []
    together = len(curves) > 1
    exact = max(np.abs(c.y).max() for c in curves) * 1e-12
    if together and rss.sum() / dof.sum() > exact**2:
        # Bartlett's statistic from the residual variances of the parabolas.
        with np.errstate(divide="ignore"):
            log_ratio = np.log(rss.sum() / dof.sum()) - np.log(rss / dof)
        c = 1 + (np.sum(1 / dof) - 1 / dof.sum()) / (3 * (len(curves) - 1))
        p = scipy.stats.chi2.sf(np.sum(dof * log_ratio) / c, len(curves) - 1)
        if p < 0.01:
            together = False
            notes.append(
                f"loss noise differs between budgets (Bartlett p = {p:.2g}): each "
                "parabola's intervals use its own residuals only"
            )
    parts = [forms.exchangeable(c.residuals, c.leverage, c.dof) for c in curves]
    common = None
    if together:
        pool = np.concatenate(parts)
        mean_square = float(np.mean(pool**2))
        if mean_square > 0:
            pool = pool * math.sqrt(rss.sum() / dof.sum() / mean_square)
        common = pool, np.sqrt(dof.sum() / rng.chisquare(dof.sum(), (draws, 1)))
        if mean_square > exact**2 and (shared := _shared(curves, draws, rng)):
            if shared.p < 0.05:
                notes.append(
                    "losses of one size, or trajectory, share "
                    f"{np.median(shared.rho):.0%} of their noise between budgets "
                    f"({np.quantile(shared.rho, 0.05):.0%} to "
                    f"{np.quantile(shared.rho, 0.95):.0%}): the intervals allow for it"
                )
            noise = shared.noise(pool / np.sqrt(np.mean(pool**2)), rng)
            ends = np.cumsum([len(c.x) for c in curves])[:-1]
            each = zip(curves, np.split(noise, ends, axis=1), strict=True)
            return [c.coefs + part @ c.solve.T for c, part in each], notes
    out = []
    for c, part in zip(curves, parts, strict=True):
        if common is None:
            pool, scale = part, np.sqrt(c.dof / rng.chisquare(c.dof, (draws, 1)))
        else:
            pool, scale = common
        noise = rng.choice(pool, (draws, len(c.x))) * scale
        out.append(c.coefs + noise @ c.solve.T)
    return out, notes


def _shared(
    curves: Sequence[IsoflopCurve], draws: int, rng: np.random.Generator
) -> SharedNoise | None:
    """The noise that budgets have in common; None if no size is at two of them."""
    sizes = np.exp(np.concatenate([c.x + c.centre for c in curves])).tolist()
    runs = [run for c in curves for run in c.runs]
    group = groups(sizes, runs, [c.budget for c in curves for _ in c.x])
    if group is None:
        return None
    residuals = np.concatenate([c.residuals for c in curves])
    return shared_noise(residuals, [c.design for c in curves], group, draws, rng)


def _cubic_note(fitted: Sequence[tuple[IsoflopCurve, Interval]]) -> list[str]:
    """A line if a cubic term would move minima out of their intervals; else none.

    The term has one coefficient for all budgets, which an F-test compares with the
    pooled residuals. If it is significant (p <= 1%), each curve's minimum with the term
    is compared with the interval from its parabola.
    """
    dof = sum(c.dof for c, _ in fitted) - 1
    if dof < 1:
        return []
    bent = [c.x**3 - c.design @ (c.solve @ c.x**3) for c, _ in fitted]
    power = sum(float(q @ q) for q in bent)
    g = sum(float(q @ c.residuals) for q, (c, _) in zip(bent, fitted, strict=True))
    g /= power
    rss = sum(float(np.sum(c.residuals**2)) for c, _ in fitted) - g * g * power
    p = scipy.stats.f.sf(g * g * power / max(rss / dof, 1e-300), 1, dof)
    shifts, out = [], 0
    for c, interval in fitted:
        _, c1, c2 = c.solve @ (c.y - g * c.x**3)
        root = c2 * c2 - 3 * g * c1
        at = -c1 / (c2 + math.sqrt(root)) if root > 0 and c2 > 0 else math.nan
        n = math.exp(at + c.centre) if abs(at) < 100 else math.nan
        shifts.append(n / math.exp(c.vertex(c.coefs)[0]) - 1)
        out += not interval.low <= n <= interval.high and not abs(shifts[-1]) < 0.01
    if p > 0.01 or not out:
        return []
    return [
        f"a cubic term common to all budgets (p = {p:.2g}) would move N_opt by "
        f"{min(shifts):+.1%} to {max(shifts):+.1%}, outside its interval at {out} of "
        f"{len(fitted)} budgets: the curves are lopsided; narrow the grid or set window"
    ]


@dataclasses.dataclass(frozen=True)
class Minima:
    """The minima of all budgets; `k` of them have a parabola."""

    parabolas: list[Parabola | Refusal]  # one for each budget, ascending
    budgets: Budgets  # those with a parabola
    centre: Vertices  # (ln N, ln D, loss)
    draws: DrawnVertices
    losses: tuple[float, float]  # least and largest loss of the runs of these budgets
    notes: list[str]


def find_minima(
    curves: Sequence[IsoflopCurve | Refusal],
    draws: int,
    level: float,
    seed: Sequence[int],
) -> Minima:
    """The minimum of each curve, with the bootstrap of all vertices.

    Args:
      curves: one per budget, ascending; refusals are handed on.
      draws: of the bootstrap.
      level: of the intervals.
      seed: of the draws.
    """
    good = [c for c in curves if isinstance(c, IsoflopCurve)]
    rng = np.random.default_rng(seed)
    drawn, notes = _draw(good, draws, rng) if good else ([], [])
    results: dict[float, tuple[Parabola | Refusal, np.ndarray]] = {}
    fitted: list[tuple[IsoflopCurve, Interval]] = []
    for c, coefs in zip(good, drawn, strict=True):
        vertices = c.vertex(coefs)
        at = vertices[:, 0] - c.centre
        inside = np.mean((at > c.x.min()) & (at < c.x.max()))  # False where NaN
        if 1 - inside > forms.MAX_FAILED_DRAWS:
            refusal = Refusal(
                quantity=MINIMUM,
                budget_flops=c.budget,
                reason="minimum not identified",
                detail=f"{1 - inside:.0%} of {draws} bootstrap draws have no minimum "
                "inside the grid",
            )
            results[c.budget] = (refusal, vertices)
            continue
        lost = int(np.isnan(at).sum())
        if lost:
            notes.append(
                f"at {c.budget:.6g} FLOPs {lost} of {draws} bootstrap draws have no "
                "minimum; intervals and laws leave them out"
            )
        x, d, loss = c.vertex(c.coefs)
        n_interval = forms.percentiles(np.exp(np.minimum(vertices[:, 0], 700)), level)
        fitted.append((c, n_interval))
        parabola = Parabola(
            budget_flops=c.budget,
            points=len(c.x),
            curvature=float(c.coefs[2]),
            n_opt=math.exp(x),
            d_opt=math.exp(d),
            l_opt=float(loss),
            n_opt_interval=n_interval,
            d_opt_interval=forms.percentiles(
                np.exp(np.minimum(vertices[:, 1], 700)), level
            ),
            l_opt_interval=forms.percentiles(vertices[:, 2], level),
            rmse=math.sqrt(float(np.sum(c.residuals**2)) / c.dof),
        )
        results[c.budget] = (parabola, vertices)
    kept = [c for c in good if isinstance(results[c.budget][0], Parabola)]
    losses = np.concatenate([c.y for c in kept]) if kept else np.zeros(1)
    return Minima(
        parabolas=[
            c if isinstance(c, Refusal) else results[c.budget][0] for c in curves
        ],
        budgets=np.array([c.budget for c in kept]),
        centre=np.array([c.vertex(c.coefs) for c in kept]).reshape(-1, 3),
        draws=np.stack([results[c.budget][1] for c in kept], 1)
        if kept
        else np.empty((draws, 0, 3)),
        losses=(float(losses.min()), float(losses.max())),
        notes=notes + _cubic_note(fitted),
    )
