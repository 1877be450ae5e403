"""Least squares of curves that are linear but for two numbers, for many draws at once.

For given numbers the linear coefficients follow exactly (variable projection; Golub and
Pereyra 1973, SIAM J. Numer. Anal. 10, 413), so steps of Gauss and Newton are of the two
alone (Kaufman 1975, BIT 15, 49).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

_SMALL = 1e-7  # a step that moves both numbers by less is the last

Runs = Float[np.ndarray, "k points"]  # of each budget; padded where it has fewer
Losses = Float[np.ndarray, "draws k points"]
Pairs = Float[np.ndarray, "draws 2"]  # the two numbers
Coefs = Float[np.ndarray, "draws k 3"]
Draws = Float[np.ndarray, "draws"]


@dataclasses.dataclass(frozen=True)
class Columns:
    """Two columns beside a constant, and how the curve moves with the numbers."""

    one: np.ndarray  # of shapes that broadcast to [draws, k, points]
    two: np.ndarray
    # Coefficients of both, [draws, k, 1] -> derivatives of the curve by both numbers,
    # but for what the columns can do themselves.
    tangents: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Losses, and a family of curves for them.

    Each budget has a constant and coefficients of its own; the pair is common.
    """

    columns: Callable[[Pairs], Columns]
    losses: Losses
    weights: Runs  # 1 / the variance of the noise of a run; 0 where there is none
    prior: Pairs  # of each draw, the centre of a normal prior
    precision: float  # 1 / its variance; 0: no prior
    low: float  # bounds of both numbers
    high: float
    longest: float  # step of either number


@dataclasses.dataclass(frozen=True)
class Solution:
    """The least squares of each draw."""

    pair: Pairs
    coefs: Coefs  # of the constant and of both columns
    objective: Draws  # weighted squares of the residuals and of the prior
    step: Pairs  # that would follow


def solve(problem: Problem, start: Pairs, steps: int) -> Solution:
    """The least squares near a start."""
    best = evaluate(problem, start)
    part = np.ones((len(start), 1))  # of a step; less after one that did not help
    for _ in range(steps):
        far = np.abs(best.step).max(1, keepdims=True) / problem.longest
        step = part * best.step / np.maximum(far, 1)
        if np.abs(step).max() < _SMALL:
            break
        new = evaluate(problem, np.clip(best.pair + step, problem.low, problem.high))
        lower = new.objective < best.objective
        part = np.where(lower[:, None], np.minimum(2 * part, 1), part / 4)
        kept = {
            key: np.where(lower.reshape(-1, *[1] * (v.ndim - 1)), v, vars(best)[key])
            for key, v in vars(new).items()
        }
        best = Solution(**kept)
    return best


def evaluate(problem: Problem, pair: Pairs) -> Solution:
    """The least squares at a given pair of each draw."""
    weights = problem.weights
    there = (weights > 0).astype(np.float64)
    count = there.sum(-1, keepdims=True)

    def mean(v):
        return np.sum(v * there, -1, keepdims=True) / count

    def centred(v):
        return (v - mean(v)) * there

    found = problem.columns(pair)
    one, two = centred(found.one), centred(found.two)
    g11, g12, g22 = (np.sum(v, -1) for v in (one * one, one * two, two * two))
    det = g11 * g22 - g12 * g12

    def off(v):
        """What the columns leave of v, and their coefficients in it."""
        p1, p2 = np.sum(one * v, -1), np.sum(two * v, -1)
        c1, c2 = (g22 * p1 - g12 * p2) / det, (g11 * p2 - g12 * p1) / det
        return v - c1[..., None] * one - c2[..., None] * two, c1, c2

    def total(v):
        return np.sum(v * weights, (-2, -1))

    rest, c1, c2 = off(centred(problem.losses))
    t1, t2 = (off(centred(v))[0] for v in found.tangents(c1[..., None], c2[..., None]))
    precision, far = problem.precision, problem.prior - pair
    h11, h12, h22 = total(t1 * t1), total(t1 * t2), total(t2 * t2)
    h11, h22 = h11 + precision, h22 + precision
    g1, g2 = total(t1 * rest), total(t2 * rest)
    g1, g2 = g1 + far[:, 0] * precision, g2 + far[:, 1] * precision
    constant = mean(problem.losses) - c1[..., None] * mean(found.one)
    constant = (constant - c2[..., None] * mean(found.two))[..., 0]
    step = np.stack([h22 * g1 - h12 * g2, h11 * g2 - h12 * g1], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = np.nan_to_num(step / (h11 * h22 - h12 * h12)[:, None], posinf=0.0)
    return Solution(
        pair=pair,
        coefs=np.stack([constant, c1, c2], -1),
        objective=total(rest * rest) + precision * np.sum(far**2, 1),
        step=step,
    )
