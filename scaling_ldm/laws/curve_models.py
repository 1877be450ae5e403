"""Smooth curves through the losses of all budgets: parabolas, or one shared shape.

A model says what the curves are and how far each run is from them. `predicted_errors`
are those of runs that are left out in turn. They decide between the two models, without
a look at any law.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

from scaling_ldm.laws import shared_shape
from scaling_ldm.laws.isoflop_curve import IsoflopCurve

UNEQUAL = 0.01  # p of Bartlett's test below which the noise of budgets differs
_ROUNDING = 1e-12  # part of a loss

Points = Float[np.ndarray, "points"]
Budgets = Float[np.ndarray, "k"]
Noise = Sequence[np.ndarray]  # of each budget: [draws, points]


@dataclasses.dataclass(frozen=True)
class CurveModel:
    """Curves fitted to the losses of all budgets."""

    name: str  # "parabola" | "shape"
    fitted: list[Points]  # of each budget
    residuals: list[Points]
    leverage: list[Points]
    design: np.ndarray  # [all points, coefficients], of small changes of the losses
    weights: Budgets  # of the squares of each budget, mean 1
    vertices: Float[np.ndarray, "k 3"]  # ln N, ln D and loss; NaN: no minimum
    curvature: Budgets  # half the second derivative there
    exponents: tuple[float, float] | None  # a and b of a shared shape
    redraw: Callable[[Noise, np.random.Generator], np.ndarray]

    @property
    def dof(self) -> np.ndarray:
        """Degrees of freedom of the residuals of each budget."""
        return np.array([np.sum(1 - h) for h in self.leverage])

    @property
    def squares(self) -> np.ndarray:
        """Sum of squares of the residuals of each budget."""
        return np.array([np.sum(r**2) for r in self.residuals])

    def left_out_error(self, curves: Sequence[IsoflopCurve]) -> float:
        """The rms error at runs that are left out in turn, without the ends of grids.

        An end is no run that a curve through the others interpolates. Budgets with more
        noise weigh less.
        """
        total = count = 0.0
        parts = zip(curves, self.residuals, self.leverage, self.weights, strict=True)
        for c, residuals, leverage, weight in parts:
            inner = (c.x > c.x.min()) & (c.x < c.x.max())
            errors = residuals[inner] / np.maximum(1 - leverage[inner], 1e-9)
            total += weight * float(np.sum(errors**2))
            count += weight * float(inner.sum())
        return math.sqrt(total / count)


def parabolas(curves: Sequence[IsoflopCurve], weights=None) -> CurveModel:
    """A parabola for each budget."""

    def redraw(noise, rng):
        return np.stack(
            [
                c.parabola_minimum(c.coefs + part @ c.solve.T)
                for c, part in zip(curves, noise, strict=True)
            ],
            1,
        )

    return CurveModel(
        name="parabola",
        fitted=[c.design @ c.coefs for c in curves],
        residuals=[c.residuals for c in curves],
        leverage=[c.leverage for c in curves],
        design=_blocks([c.design for c in curves]),
        weights=np.ones(len(curves)) if weights is None else weights,
        vertices=np.array([c.parabola_minimum(c.coefs) for c in curves]),
        curvature=np.array([c.coefs[2] for c in curves]),
        exponents=None,
        redraw=redraw,
    )


def _blocks(designs: Sequence[np.ndarray]) -> np.ndarray:
    rows, width = sum(map(len, designs)), designs[0].shape[1]
    found, start = np.zeros((rows, width * len(designs))), 0
    for k, design in enumerate(designs):
        found[start : start + len(design), k * width : (k + 1) * width] = design
        start += len(design)
    return found


def bartlett(squares: np.ndarray, dof: np.ndarray) -> float:
    """p of residuals that differ as much between budgets without unequal noise."""
    if len(dof) < 2 or not squares.sum() > 0:
        return 1.0
    with np.errstate(divide="ignore"):
        log_ratio = np.log(squares.sum() / dof.sum()) - np.log(squares / dof)
    c = 1 + (np.sum(1 / dof) - 1 / dof.sum()) / (3 * (len(dof) - 1))
    return float(scipy.stats.chi2.sf(np.sum(dof * log_ratio) / c, len(dof) - 1))


def shapes(curves: Sequence[IsoflopCurve]) -> CurveModel | None:
    """Curves of one shape; None where the runs are too few for it.

    The variance of the noise, which the prior of the exponents is weighed against, is
    that of the residuals: three rounds from those of the parabolas.
    """
    if sum(len(c.x) - 3 for c in curves) < 3:
        return None
    x, y = (shared_shape.padded([getattr(c, v) for c in curves]) for v in ("x", "y"))
    there = shared_shape.padded([np.ones(len(c.x)) for c in curves])
    floor = (_ROUNDING * max(float(np.abs(c.y).max()) for c in curves)) ** 2
    squares = np.array([np.sum(c.residuals**2) for c in curves])
    dof = np.array([float(c.dof) for c in curves])
    prior, start = np.full((1, 2), shared_shape.PRIOR), None
    for _ in range(3):
        variances = np.full(len(curves), squares.sum() / dof.sum())
        if bartlett(squares, dof) < UNEQUAL:
            variances = squares / dof
        variances = np.maximum(variances, floor)
        weights = there / variances[:, None]
        found = shared_shape.solve(x, y[None], weights, prior, start)
        model, start = _of_shape(curves, found, variances), found.exponents
        squares, dof = model.squares, model.dof
    return model


def _of_shape(
    curves: Sequence[IsoflopCurve], found: shared_shape.Shapes, variances: np.ndarray
) -> CurveModel:
    """The model of one set of curves of a shared shape."""
    ln, designs, tangents = found.exponents, [], []
    a, b = np.exp(ln[0])
    for c, (_, slope, bend) in zip(curves, found.coefs[0], strict=True):
        one, two, left, right = shared_shape.basis(c.x, a, b)
        designs.append(np.stack([np.ones_like(one), one, two], 1))
        of_left, of_right = shared_shape.amplitudes(slope, bend, a, b)
        by_ln = -of_left * a * c.x * left, of_right * b * c.x * right
        tangents.append(np.stack(by_ln, 1))
    fitted = [v @ c for v, c in zip(designs, found.coefs[0], strict=True)]
    design = np.concatenate([_blocks(designs), np.concatenate(tangents)], 1)
    sizes = [len(c.x) for c in curves]
    scale = np.repeat(variances**-0.5, sizes)
    of_prior = np.zeros((2, design.shape[1]))
    of_prior[:, -2:] = np.eye(2) / shared_shape.PRIOR_SPREAD
    every = np.concatenate([design * scale[:, None], of_prior])
    size = np.linalg.norm(every, axis=0)
    q = np.linalg.qr(every / np.where(size > 0, size, 1))[0][: len(scale)]
    x = shared_shape.padded([c.x for c in curves])
    there = shared_shape.padded([np.ones(n) for n in sizes])

    def place(minima):
        parts = [
            c.place(minima[:, i, 0], minima[:, i, 1]) for i, c in enumerate(curves)
        ]
        return np.stack(parts, 1)

    def redraw(noise, rng):
        losses = shared_shape.padded(
            [f + part for f, part in zip(fitted, noise, strict=True)]
        )
        spread = shared_shape.PRIOR_SPREAD
        prior = ln + spread * rng.standard_normal((len(losses), 2))
        weights = there / variances[:, None]
        return place(shared_shape.solve(x, losses, weights, prior, ln).minima())

    minima = found.minima()
    return CurveModel(
        name="shape",
        fitted=fitted,
        residuals=[c.y - f for c, f in zip(curves, fitted, strict=True)],
        leverage=np.split(np.sum(q * q, 1), np.cumsum(sizes)[:-1]),
        design=design,
        weights=variances.mean() / variances,
        vertices=place(minima)[0],
        curvature=minima[0, :, 2],
        exponents=(float(a), float(b)),
        redraw=redraw,
    )
