"""IsoFLOP curves of one shape: L_i(x) = E_i + A_i e^(-a x) + B_i e^(b x), x = ln N.

A surface L = E + A / N^alpha + B / D^beta is such a curve at each budget, with
a = alpha and b = beta, because ln D falls as ln N rises. So a and b are common to all
budgets, and E_i, A_i and B_i are of each budget alone. The curve is steeper on the side
of the larger exponent. Its minimum is at ln(a A / (b B)) / (a + b). With a, b -> 0 it
is a parabola.

For given a and b, the rest is linear least squares (`separable`). A grid of a and b is
searched, and steps of Gauss and Newton refine the best. Few or noisy runs say little
about a and b. So each has a prior, log-normal around 0.35 by a factor 1.65:
loss surfaces of language models have exponents between 0.22 and 0.71 (arXiv
2603.22339). Many or precise runs outweigh it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from scaling_ldm.laws import separable
from scaling_ldm.laws.separable import Coefs, Losses, Pairs, Runs

PRIOR = math.log(0.35)  # of ln a and ln b
PRIOR_SPREAD = 0.5  # standard deviation of it
LOW, HIGH = math.log(0.02), math.log(2.0)  # of ln a and ln b; those of a surface
_GRID = np.linspace(LOW, HIGH, 17)
Number = float | np.ndarray
_STEPS, _STEPS_NEARBY = 30, 3  # of Gauss and Newton, at most


def padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays whose last axis differs in length, as one with zeros at the ends.

    Returns:
      [..., k, points] of k arrays [..., points of each].
    """
    most = max(part.shape[-1] for part in parts)
    found = [
        np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, most - p.shape[-1])]) for p in parts
    ]
    return np.stack(found, -2)


def basis(x: np.ndarray, a: Number, b: Number) -> tuple[np.ndarray, ...]:
    """Two columns that span e^(-a x) and e^(b x) beside 1, and these two.

    The columns become x and x^2 as a, b -> 0. All of shapes that broadcast.
    """
    left, right, both = np.exp(-a * x), np.exp(b * x), a + b
    bent = 2 * (a * right + b * left - both) / (a * b * both)
    return (right - left) / both, bent, left, right


def amplitudes(
    slope: Number, bend: Number, a: Number, b: Number
) -> tuple[Number, Number]:
    """A and B of E + A e^(-a x) + B e^(b x) from the coefficients of `basis`."""
    return (2 * bend / a - slope) / (a + b), (2 * bend / b + slope) / (a + b)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Curves of one shape, of many sets of losses at once."""

    exponents: Pairs  # ln a and ln b
    coefs: Coefs  # of 1 and `basis`

    def minima(self) -> np.ndarray:
        """x, loss, and half the second derivative at the minima: [draws, k, 3].

        NaN where a curve has no minimum.
        """
        a, b = np.exp(self.exponents).T[:, :, None]
        mean, slope, bend = np.moveaxis(self.coefs, -1, 0)
        A, B = amplitudes(slope, bend, a, b)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where((A > 0) & (B > 0), np.log(a * A / (b * B)) / (a + b), np.nan)
        one, two, left, right = basis(at, a, b)
        second = a * a * A * left + b * b * B * right
        return np.stack([at, mean + slope * one + bend * two, second / 2], -1)


def solve(
    x: Runs,
    losses: Losses,
    weights: Runs,
    prior: Pairs,
    start: Float[np.ndarray, "one 2"] | None = None,
) -> Shapes:
    """The curves of least squares, plus those of the prior.

    Args:
      x: ln N of the runs minus its mean over the budget.
      losses: of the runs, for each draw.
      weights: 1 / the variance of the noise of a run; 0 where there is none.
      prior: of each draw, the centre of the prior of ln a and ln b.
      start: ln a and ln b near the answer; None: a grid is searched, for one draw.
    """

    def columns(ln):
        a, b = np.exp(ln).T[:, :, None, None]
        one, two, left, right = basis(x, a, b)

        def tangents(slope, bend):
            A, B = amplitudes(slope, bend, a, b)
            return -A * a * x * left, B * b * x * right

        return separable.Columns(one, two, tangents)

    problem = separable.Problem(
        columns=columns,
        losses=losses,
        weights=weights,
        prior=prior,
        precision=PRIOR_SPREAD**-2,
        low=LOW,
        high=HIGH,
        longest=_GRID[1] - _GRID[0],
    )
    steps = _STEPS if start is None else _STEPS_NEARBY
    if start is None:
        start = _searched(problem)
    found = separable.solve(problem, np.broadcast_to(start, prior.shape), steps)
    return Shapes(found.pair, found.coefs)


def _searched(problem: separable.Problem) -> Pairs:
    """The best place on a grid, of one set of losses."""
    places = np.array(list(itertools.product(_GRID, _GRID)))
    losses = np.broadcast_to(problem.losses, (len(places), *problem.losses.shape[1:]))
    prior = np.broadcast_to(problem.prior, places.shape)
    every = dataclasses.replace(problem, losses=losses, prior=prior)
    objective = separable.evaluate(every, places).objective
    return places[[objective.argmin()]]
