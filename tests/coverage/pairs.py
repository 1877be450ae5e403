"""Pairs of studies whose difference is known, for the coverage of `fit.compare`.

Each side of a pair is a scenario of `studies.py`. Its losses are made without noise.
The noise is then drawn for both sides together.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import studies

BASE = studies.Scenario(name="")
# At the middle budget 3% less of the loss above E, and other exponents.
BETTER = studies.Surface(near=0.1455, alpha=0.36, beta=0.3)
# The losses of the base are equal to those of the first at twice the middle budget. To
# those of the second they are nowhere equal.
CROSSES = studies.Surface(near=0.152, alpha=0.36, beta=0.3)
LATE = studies.Surface(near=0.1635, alpha=0.33, beta=0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of the table."""

    name: str
    second: studies.Surface = BETTER
    design: studies.Scenario = BASE
    correlation: float = 0.0  # of the noise of the two runs of a pair
    paired: bool = False  # whether they are given as pairs


@dataclasses.dataclass(frozen=True)
class Truth:
    """What `fit.compare` estimates."""

    exponent: float  # difference of the exponents of N_opt
    slope: float  # difference of the mean slopes of ln L_opt
    n_ratio: float  # N_opt of the second over that of the first, in the middle
    loss_ratio: float  # the same of L_opt
    crossing: float  # the budget of equal losses; nan: there is none
    compute: float  # the second's over the middle budget, for the first's loss there
    slopes: tuple[float, float]


def draw(pair: Pair, seed: int) -> tuple[list[dict], list[dict], Truth]:
    """The points of both sides, and the truth."""
    design = dataclasses.replace(pair.design, noise=0.0, shared=0.0)
    sides, moved = [], []
    for i, surface in enumerate((design.surface, pair.second)):
        one = dataclasses.replace(design, surface=surface)
        points, truth = studies.draw(one, 2 * seed + i)
        sides.append(points)
        moved.append(truth)
    rng = np.random.default_rng([seed, 23])
    common, *own = (_noise(pair.design, rng) for _ in range(3))
    share = pair.correlation
    for points, noise in zip(sides, own, strict=True):
        both = math.sqrt(share) * common + math.sqrt(1 - share) * noise
        for point, relative in zip(points, both.ravel(), strict=True):
            point["loss"] *= 1 + relative
    return *sides, truth_of(pair)


def _noise(design: studies.Scenario, rng: np.random.Generator) -> np.ndarray:
    """Relative noise of each run: [budgets, sizes]."""
    own = rng.standard_normal((design.budgets, design.sizes))
    of_size = rng.standard_normal(design.sizes)
    ratio = np.geomspace(1, design.ratio, design.budgets) / math.sqrt(design.ratio)
    share = design.shared
    noise = math.sqrt(1 - share) * own + math.sqrt(share) * of_size
    return design.noise * ratio[:, None] * noise


def truth_of(pair: Pair) -> Truth:
    design, a, b = pair.design, pair.design.surface, pair.second
    half = design.decades / 2
    c = a.C0 * np.logspace(-half, half, design.budgets)
    u = np.log(c / a.C0)
    of_a, of_b = (np.log(s.least(c)) for s in (a, b))
    slopes = np.polyfit(u, of_a, 1)[0], np.polyfit(u, of_b, 1)[0]
    of_n = np.log(b.n_opt(c) / a.n_opt(c))
    fine = a.C0 * np.logspace(-4, 4, 80001)
    gap = a.least(fine) - b.least(fine)
    at = np.flatnonzero(np.diff(np.sign(gap)))
    reached = np.interp(-a.least(a.C0), -b.least(fine), fine)
    return Truth(
        exponent=b.exponent - a.exponent,
        slope=float(slopes[1] - slopes[0]),
        n_ratio=float(np.exp(of_n.mean())),
        loss_ratio=float(np.exp(np.mean(of_b - of_a))),
        crossing=float(fine[at[0]]) if len(at) else math.nan,
        compute=float(reached / a.C0),
        slopes=(float(slopes[0]), float(slopes[1])),
    )


def _with(**changes) -> studies.Scenario:
    return dataclasses.replace(BASE, **changes)


PAIRED: dict[str, Any] = {"paired": True, "correlation": 0.9}
PAIRS = (
    Pair(name="equal laws", second=studies.EQUAL),
    Pair(
        name="equal laws, pairs share 90% of their noise",
        second=studies.EQUAL,
        **PAIRED,
    ),
    Pair(name="the second is better"),
    Pair(name="pairs share 90% of their noise", **PAIRED),
    Pair(name="pairs share half of their noise", paired=True, correlation=0.5),
    Pair(name="pairs share no noise", paired=True),
    Pair(name="3 budgets over 1 decade", design=_with(budgets=3, decades=1.0)),
    Pair(
        name="3 budgets, pairs share 90%",
        design=_with(budgets=3, decades=1.0),
        **PAIRED,
    ),
    Pair(name="6 budgets over 2.5 decades", design=_with(budgets=6, decades=2.5)),
    Pair(name="they cross", second=CROSSES, design=_with(noise=0.001)),
    Pair(name="they cross, noise 0.5%", second=CROSSES),
    Pair(name="they cross, 0.5%, pairs share 90%", second=CROSSES, **PAIRED),
    Pair(name="they do not cross", second=LATE, design=_with(noise=0.001)),
    Pair(name="minima scatter by 10%", design=_with(scatter=0.1)),
    Pair(
        name="one seed: sizes share 80%, pairs 50%",
        design=_with(ladder=True, shared=0.8),
        paired=True,
        correlation=0.5,
    ),
    Pair(
        name="other E: 0.33 against 0.35",
        second=dataclasses.replace(studies.EQUAL, E=0.33, near=0.17),
    ),
)
