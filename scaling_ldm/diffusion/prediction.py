"""What a network may predict, and how one prediction becomes another; jax only.

At x = alpha x0 + sigma eps, every kind of prediction is a combination a x0 + b eps.
These are two equations in two unknowns: they give x0 and eps, each as a combination of
x and the prediction. PREDICTIONS holds all three combinations of each kind.

| kind | a x0 + b eps | source |
|---|---|---|
| epsilon | eps | Ho et al. 2020, eq. 12 |
| x0 | x0 | Ho et al. 2020, section 3.2 |
| v | alpha eps - sigma x0 | Salimans & Ho 2022, appendix D |
| flow | eps - x0 | Liu et al. 2022, eq. 1 (time grows towards noise) |
| score | -eps / sigma | Song et al. 2021, eq. 7 |

Some kinds lack information at the ends. epsilon and score do not determine x0 where
alpha = 0 (zero terminal SNR). x0 does not determine eps where sigma = 0. There the
divisor is kept away from zero, so the results are finite but wrong. v and flow are
exact everywhere. Samplers refuse the combinations that need the missing information.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scaling_ldm.diffusion.shapes import SamplesB
from scaling_ldm.diffusion.spelling import did_you_mean

SMALLEST = 1e-18  # replaces zero in a divisor; its square is a normal float32
# The variance of the noise of a step from t to t - 1 (Ho et al. 2020, section 3.2):
# that of the posterior; beta; or a value between them that the network predicts.
VARIANCES = ("fixed_small", "fixed_large", "learned")

Level = float | int | np.floating | np.ndarray  # one number
Pair = tuple[Any, Any]
Rule = Callable[[Any, Any], Pair]


def _inverse(value: Any) -> Any:
    xp = jnp if isinstance(value, jax.Array) else np
    # where and not maximum: the derivative is zero even beside an infinite one.
    return 1.0 / xp.where(value > SMALLEST, value, SMALLEST)


@dataclasses.dataclass(frozen=True)
class PredictionKind:
    """Three functions of (alpha, sigma); each gives a pair of factors."""

    target: Rule  # (a, b): prediction = a x0 + b eps
    x0: Rule  # (c, d): x0 = c x + d prediction
    epsilon: Rule  # (e, f): eps = e x + f prediction


# The kinds named in config.PREDICTIONS.
PREDICTIONS: dict[str, PredictionKind] = {
    "epsilon": PredictionKind(
        target=lambda a, s: (0.0, 1.0),
        x0=lambda a, s: (_inverse(a), -s * _inverse(a)),
        epsilon=lambda a, s: (0.0, 1.0),
    ),
    "x0": PredictionKind(
        target=lambda a, s: (1.0, 0.0),
        x0=lambda a, s: (0.0, 1.0),
        epsilon=lambda a, s: (_inverse(s), -a * _inverse(s)),
    ),
    "v": PredictionKind(
        target=lambda a, s: (-s, a),
        x0=lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2)),
        epsilon=lambda a, s: (s / (a**2 + s**2), a / (a**2 + s**2)),
    ),
    "flow": PredictionKind(
        target=lambda a, s: (-1.0, 1.0),
        x0=lambda a, s: (1 / (a + s), -s / (a + s)),
        epsilon=lambda a, s: (1 / (a + s), a / (a + s)),
    ),
    "score": PredictionKind(
        target=lambda a, s: (0.0, -_inverse(s)),
        x0=lambda a, s: (_inverse(a), s**2 * _inverse(a)),
        epsilon=lambda a, s: (0.0, -s),
    ),
}


def kind(name: str) -> PredictionKind:
    """The entry of PREDICTIONS.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    try:
        return PREDICTIONS[name]
    except KeyError:
        known = ", ".join(PREDICTIONS)
        close = did_you_mean(name, PREDICTIONS)
        raise ValueError(f"prediction {name!r} is none of {known}{close}") from None


def is_defined(name: str, wanted: str, alpha: Level, sigma: Level) -> bool:
    """Whether a prediction `name` determines x0 or epsilon at (alpha, sigma)."""
    if name in ("epsilon", "score") and wanted == "x0":
        return bool(alpha > 0)
    if name == "x0" and wanted == "epsilon":
        return bool(sigma > 0)
    return True


def factors(source: str, to: str, alpha: Any, sigma: Any) -> Pair:
    """(c, d) such that the prediction `to` is c x + d (the prediction `source`).

    Args:
      source, to: names of PREDICTIONS.
      alpha, sigma: numbers or arrays of one shape, numpy or jax.

    Raises:
      ValueError: an unknown name.
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
    prediction: SamplesB,
    x: SamplesB,
    alpha: ArrayLike,
    sigma: ArrayLike,
    *,
    source: str,
    to: str,
) -> SamplesB:
    """One kind of prediction as another.

    Args:
      prediction: the network's output at x.
      x: alpha x0 + sigma eps.
      alpha, sigma: scalars, or [B].
      source, to: names of PREDICTIONS.

    Raises:
      ValueError: an unknown name.
    """
    c, d = factors(source, to, batched(alpha, x), batched(sigma, x))
    return c * x + d * prediction


def target(
    name: str,
    x0: SamplesB,
    eps: SamplesB,
    alpha: ArrayLike,
    sigma: ArrayLike,
) -> SamplesB:
    """What a network of this kind should predict; alpha and sigma scalars or [B].

    Raises:
      ValueError: an unknown name.
    """
    a, b = kind(name).target(batched(alpha, x0), batched(sigma, x0))
    return a * x0 + b * eps


def corrupt(
    x0: SamplesB,
    eps: SamplesB,
    alpha: ArrayLike,
    sigma: ArrayLike,
) -> SamplesB:
    """alpha x0 + sigma eps; alpha and sigma scalars or [B]."""
    return batched(alpha, x0) * x0 + batched(sigma, x0) * eps


def batched(value: ArrayLike, like: jax.Array) -> jax.Array:
    """[B] with axes of size 1 appended, as many as `like` [B, ...] has; scalars stay.

    The result is broadcast against `like` without a promotion of ranks.
    """
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value
