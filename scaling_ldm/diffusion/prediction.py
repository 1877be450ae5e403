"""What a network may predict, and how one prediction becomes another; jax only.

At x = alpha x0 + sigma eps every kind of prediction is a combination a x0 + b eps. Two
equations in two unknowns give x0 and eps back, each as a combination of x and the
prediction; TABLE holds all three.

| kind | a x0 + b eps | source |
|---|---|---|
| epsilon | eps | Ho et al. 2020, eq. 12 |
| x0 | x0 | Ho et al. 2020, section 3.2 |
| v | alpha eps - sigma x0 | Salimans & Ho 2022, appendix D |
| flow | eps - x0 | Liu et al. 2022, eq. 1 (time grows towards noise) |
| score | -eps / sigma | Song et al. 2021, eq. 7 |

Where information is missing no formula can bring it back: epsilon and score say nothing
of x0 where alpha = 0 (zero terminal SNR), x0 says nothing of eps where sigma = 0. There
the divisor is kept from zero, so results are finite and wrong. v and flow are exact
everywhere; samplers refuse the combinations that would need the missing ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-18  # stands for zero in a divisor; its square is a normal float32

Pair = tuple[Any, Any]
Rule = Callable[[Any, Any], Pair]


def _inverse(value: Any) -> Any:
    xp = jnp if isinstance(value, jax.Array) else np
    # where, not maximum: its derivative is zero even beside an infinite one.
    return 1.0 / xp.where(value > SMALLEST, value, SMALLEST)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Functions of (alpha, sigma), each giving a pair of factors."""

    target: Rule  # (a, b): prediction = a x0 + b eps
    x0: Rule  # (c, d): x0 = c x + d prediction
    epsilon: Rule  # (e, f): eps = e x + f prediction


TABLE: dict[str, Kind] = {
    "epsilon": Kind(
        target=lambda a, s: (0.0, 1.0),
        x0=lambda a, s: (_inverse(a), -s * _inverse(a)),
        epsilon=lambda a, s: (0.0, 1.0),
    ),
    "x0": Kind(
        target=lambda a, s: (1.0, 0.0),
        x0=lambda a, s: (0.0, 1.0),
        epsilon=lambda a, s: (_inverse(s), -a * _inverse(s)),
    ),
    "v": Kind(
        target=lambda a, s: (-s, a),
        x0=lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2)),
        epsilon=lambda a, s: (s / (a**2 + s**2), a / (a**2 + s**2)),
    ),
    "flow": Kind(
        target=lambda a, s: (-1.0, 1.0),
        x0=lambda a, s: (1 / (a + s), -s / (a + s)),
        epsilon=lambda a, s: (1 / (a + s), a / (a + s)),
    ),
    "score": Kind(
        target=lambda a, s: (0.0, -_inverse(s)),
        x0=lambda a, s: (_inverse(a), s**2 * _inverse(a)),
        epsilon=lambda a, s: (0.0, -s),
    ),
}


def kind(name: str) -> Kind:
    """The row of TABLE.

    Raises:
      ValueError: no such kind; the message lists the known ones.
    """
    try:
        return TABLE[name]
    except KeyError:
        raise ValueError(f"prediction {name!r} is none of {', '.join(TABLE)}") from None


def is_defined(name: str, wanted: str, alpha: float, sigma: float) -> bool:
    """Whether a prediction `name` determines x0 or epsilon at (alpha, sigma)."""
    if name in ("epsilon", "score") and wanted == "x0":
        return alpha > 0
    if name == "x0" and wanted == "epsilon":
        return sigma > 0
    return True


def factors(source: str, to: str, alpha: Any, sigma: Any) -> Pair:
    """(c, d) such that the prediction `to` is c x + d (the prediction `source`).

    Args:
      source, to: names of TABLE.
      alpha, sigma: numbers or arrays of one shape, numpy or jax.
    """
    given, wanted = kind(source), kind(to)
    if source == to:
        return 0.0, 1.0
    if to == "x0":
        return given.x0(alpha, sigma)
    if to == "epsilon":
        return given.epsilon(alpha, sigma)
    a, b = wanted.target(alpha, sigma)
    (c, d), (e, f) = given.x0(alpha, sigma), given.epsilon(alpha, sigma)
    return a * c + b * e, a * d + b * f


def convert(
    prediction: jax.Array,
    x: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
    *,
    source: str,
    to: str,
) -> jax.Array:
    """One kind of prediction as another.

    Args:
      prediction: what the network said at x; the shape of x.
      x: [B, ...], alpha x0 + sigma eps.
      alpha, sigma: scalars, or [B].
      source, to: names of TABLE.
    """
    c, d = factors(source, to, batched(alpha, x), batched(sigma, x))
    return c * x + d * prediction


def target(
    name: str,
    x0: jax.Array,
    eps: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
) -> jax.Array:
    """What a network of this kind should predict; alpha and sigma scalars or [B]."""
    a, b = kind(name).target(batched(alpha, x0), batched(sigma, x0))
    return a * x0 + b * eps


def corrupt(
    x0: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """alpha x0 + sigma eps; alpha and sigma scalars or [B]."""
    return batched(alpha, x0) * x0 + batched(sigma, x0) * eps


def batched(value: jax.Array, like: jax.Array) -> jax.Array:
    """A value per sample, [B], with unit axes to meet [B, ...]; scalars as they are."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value
