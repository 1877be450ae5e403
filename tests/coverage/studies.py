"""Studies whose truth is known, for the coverage of what `fit.isoflop` says.

A scenario is a loss surface, a grid of runs and what disturbs them. `draw` makes the
points of one study of it, with the truth about its laws.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

TOP = 4.0  # the loss is also predicted at this factor of the largest budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surface:
    """L = E + near (p (N / N0)^-alpha + (1 - p) (D / D0)^-beta) at C = 6 N D.

    `near` is the distance to E at the budget C0 and the size N0, which is the best of
    that budget, because p = beta / (alpha + beta).
    """

    E: float = 0.35
    near: float = 0.15
    alpha: float = 0.3
    beta: float = 0.3
    C0: float = 1e18
    N0: float = 1e8

    @property
    def exponent(self) -> float:
        """Of N_opt on C (Hoffmann et al. 2022, Eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def decay(self) -> float:
        """b of the least loss of a budget, E + A C^-b."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def n_opt(self, c):
        return self.N0 * (c / self.C0) ** self.exponent

    def least(self, c):
        """The least loss of a budget."""
        return self.E + self.near * (c / self.C0) ** -self.decay

    def loss(self, c, n):
        share = self.beta / (self.alpha + self.beta)
        d = (c / self.C0) / (n / self.N0)  # over D0
        terms = share * (n / self.N0) ** -self.alpha + (1 - share) * d**-self.beta
        return self.E + self.near * terms


EQUAL = Surface()
LOPSIDED = Surface(alpha=0.45, beta=0.22)
# The refit of Hoffmann et al.'s runs (Besiroglu et al. 2024, arXiv 2404.10102), at
# 1e20 FLOPs: E = 1.8172, A = 482.01, B = 2085.43.
CHINCHILLA = Surface(
    E=1.8172, near=0.7362, alpha=0.3478, beta=0.3658, C0=1e20, N0=8.5348e8
)


def published(E, A, B, alpha, beta, C0=1e20) -> Surface:
    """L = E + A / N^alpha + B / D^beta around the best size of a budget."""
    scale = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    n = scale * (C0 / 6) ** (beta / (alpha + beta))
    near = A / n**alpha + B / (C0 / 6 / n) ** beta
    return Surface(E=E, near=near, alpha=alpha, beta=beta, C0=C0, N0=n)


# Of arXiv 2603.22339.
SODA = published(3.169, 215886.0, 4750.0, 0.684, 0.439)
REVERSED = Surface(alpha=0.22, beta=0.45)
PURE = Surface(E=0.0, near=0.5, alpha=0.15, beta=0.15)  # a pure power law


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of the table: a design, and what differs from independent equal noise."""

    name: str
    surface: Surface = EQUAL
    budgets: int = 4
    decades: float = 1.5  # largest over smallest budget, log10
    sizes: int = 7
    width: float = 16.0  # largest over smallest size
    off: float = 1.0  # the grid's centre over the best size
    fixed: bool = False  # one grid for all budgets, around the middle one
    ladder: bool = False  # sizes of all budgets are of one list, as a shared seed needs
    noise: float = 0.005  # of a run, relative to its loss
    ratio: float = 1.0  # noise of the largest budget over that of the smallest
    shared: float = 0.0  # part of the variance that runs of one size have in common
    named: bool = False  # points say their run: those of one place are one trajectory
    scatter: float = 0.0  # of the vertices about the law, in ln N
    outlier: float = 0.0  # one random run is so much too high, relative to its loss


@dataclasses.dataclass(frozen=True)
class Truth:
    n_opt: np.ndarray  # [budgets], the minima with their scatter
    exponent: float  # of N_opt
    decay: float
    E: float
    beyond: tuple[float, float]  # (FLOPs, least loss) beyond the largest budget
    budgets: np.ndarray


def draw(scenario: Scenario, seed: int) -> tuple[list[dict], Truth]:
    """The points of one study, as `fit.isoflop` reads them, and its truth."""
    s, rng = scenario, np.random.default_rng([seed, 17])
    c = s.surface.C0 * np.logspace(-s.decades / 2, s.decades / 2, s.budgets)
    best = s.surface.n_opt(c)
    moved = np.exp(s.scatter * rng.standard_normal(s.budgets))
    places = np.geomspace(s.width**-0.5, s.width**0.5, s.sizes) * s.off
    centre = np.full_like(best, s.surface.n_opt(s.surface.C0)) if s.fixed else best
    if s.ladder:  # the centres are of the list, too
        step = s.width ** (1 / (s.sizes - 1))
        rungs = np.round(np.log(centre / s.surface.N0) / math.log(step)).astype(int)
        centre = s.surface.N0 * step**rungs
    n = centre[:, None] * places  # [budgets, sizes]
    loss = s.surface.loss(c[:, None], n / moved[:, None])
    level = s.noise * np.geomspace(1, s.ratio, s.budgets) / math.sqrt(s.ratio)
    own, common = rng.standard_normal(n.shape), rng.standard_normal(s.sizes)
    if s.ladder:
        rung = rungs[:, None] + np.arange(s.sizes)
        common = rng.standard_normal(np.ptp(rung) + 1)[rung - rung.min()]
    noise = math.sqrt(1 - s.shared) * own + math.sqrt(s.shared) * common
    loss = loss * (1 + level[:, None] * noise)
    if s.outlier:
        loss[rng.integers(s.budgets), rng.integers(s.sizes)] *= 1 + s.outlier
    points = [
        {
            "budget_flops": c[i],
            "params": n[i, j],
            "tokens": c[i] / (6 * n[i, j]),
            "loss": loss[i, j],
        }
        | ({"run_id": f"size {n[i, j]:.6g}"} if s.named else {})
        for i in range(s.budgets)
        for j in range(s.sizes)
    ]
    far = TOP * c[-1]
    truth = Truth(
        best * moved,
        s.surface.exponent,
        s.surface.decay,
        s.surface.E,
        (far, float(s.surface.least(far))),
        c,
    )
    return points, truth


SCENARIOS = (
    Scenario(name="base"),
    Scenario(name="3 budgets over 1 decade", budgets=3, decades=1.0),
    Scenario(name="5 budgets over 2 decades", budgets=5, decades=2.0),
    Scenario(name="6 budgets over 2.5 decades", budgets=6, decades=2.5),
    Scenario(name="5 sizes", sizes=5),
    Scenario(name="9 sizes", sizes=9),
    Scenario(name="unequal exponents of N and D", surface=LOPSIDED),
    Scenario(name="Chinchilla's constants", surface=CHINCHILLA),
    Scenario(name="E = 0", surface=PURE),
    Scenario(name="grid off its centre by 2 x", off=2.0),
    Scenario(name="off by 4 x, 64 x wide", off=4.0, width=64.0),
    Scenario(
        name="unequal, off by 2 x, 64 x wide, noise 0.1%",
        surface=LOPSIDED,
        off=2.0,
        width=64.0,
        noise=0.001,
    ),
    Scenario(
        name="unequal, 64 x wide, noise 0.2%",
        surface=LOPSIDED,
        width=64.0,
        noise=0.002,
    ),
    Scenario(
        name="unequal the other way, 64 x wide, noise 0.2%",
        surface=REVERSED,
        width=64.0,
        noise=0.002,
    ),
    Scenario(
        name="SODA's constants, 64 x wide, noise 0.2%",
        surface=SODA,
        width=64.0,
        noise=0.002,
    ),
    Scenario(
        name="one 32 x grid for 6 budgets over 2.5 decades, noise 2%",
        budgets=6,
        decades=2.5,
        width=32.0,
        fixed=True,
        noise=0.02,
    ),
    Scenario(name="noise grows 10 x with the budget", ratio=10.0),
    Scenario(name="noise falls 4 x with the budget", ratio=0.25),
    Scenario(name="half of the noise is of the size", ladder=True, shared=0.5),
    Scenario(name="90% of the noise is of the size", ladder=True, shared=0.9),
    Scenario(
        name="90%, 6 trajectories and budgets over 2.5 decades",
        ladder=True,
        shared=0.9,
        named=True,
        budgets=6,
        decades=2.5,
    ),
    Scenario(name="minima scatter by 10%, 3 budgets", scatter=0.1, budgets=3),
    Scenario(name="minima scatter by 10%", scatter=0.1),
    Scenario(name="minima scatter by 10%, 6 budgets", scatter=0.1, budgets=6),
    Scenario(name="minima scatter by 30%, 3 budgets", scatter=0.3, budgets=3),
    Scenario(name="minima scatter by 30%", scatter=0.3),
    Scenario(name="minima scatter by 30%, 6 budgets", scatter=0.3, budgets=6),
    Scenario(name="one run 3% too high", outlier=0.03),
    Scenario(name="one run twice its loss", outlier=1.0),
)
