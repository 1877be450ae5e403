"""Points of studies whose laws are known."""

import math

import numpy as np

BUDGETS = tuple(np.geomspace(1e12, 3e13, 5))
CHINCHILLA = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
LOPSIDED = {"E": 1.0, "A": 1e5, "B": 300.0, "alpha": 0.7, "beta": 0.25}
SYMMETRIC = {"E": 1.69, "A": 400.0, "B": 400.0, "alpha": 0.31, "beta": 0.31}


def study(
    rng=None,
    noise=0.0,
    budgets=BUDGETS,
    sizes=6,
    span=4.0,
    law=(0.4, 0.5, 10.0, -0.04),
    curvature=0.1,
    off=0.0,
):
    """Points whose minima lie exactly on power laws, C = 6 N D."""
    coef, exponent, loss_coef, loss_exponent = law
    points = []
    for c in budgets:
        for z in np.linspace(-math.log(span), math.log(span), sizes) + off:
            n = coef * c**exponent * math.exp(z)
            loss = loss_coef * c**loss_exponent + curvature * z * z
            if rng is not None:
                loss += noise * rng.standard_normal()
            points.append((c, n, c / (6 * n), loss))
    return points


def optimum(c, E, A, B, alpha, beta):
    """Hoffmann et al. 2022, Eq. 4, from the constants alone."""
    g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    return g * (c / 6) ** (beta / (alpha + beta))


def surface_study(constants, span=4.0, sizes=7, noise=0.0, rng=None):
    k = constants
    points = []
    for c in np.geomspace(1e18, 1e21, 6):
        for n in optimum(c, **k) * np.geomspace(1 / span, span, sizes):
            d = c / (6 * n)
            loss = k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]
            if rng is not None:
                loss += noise * rng.standard_normal()
            points.append((c, n, d, loss))
    return points


def inside(interval, value):
    return interval.low <= value <= interval.high
