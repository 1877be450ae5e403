"""Averages of weights over training, whose length is a share of the training so far.

Karras et al. 2024 (arXiv 2312.02696), section 3.1 and appendix C. The average after t
steps weighs the weights of time tau by a power function (equation 121):

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),    0 <= tau <= t

Its standard deviation is sigma_rel * t (equation 123), the same share of every run:

    sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)

The weights of step k hold from k - 1 to k, so that step k has the weight

    w_k = (k / t)^(gamma + 1) - ((k - 1) / t)^(gamma + 1)

These sum to one, and one update a step keeps them exactly (equation 127):

    average_t = beta_t average_(t - 1) + (1 - beta_t) params_t
    beta_t = (1 - 1 / t)^(gamma + 1)

As beta_1 = 0, the weights before the first step do not count. Any other average is
made afterwards from stored ones (algorithm 3): their profiles p_i are combined to the
profile p_r that is wanted by least squares, A x = b with A_ij = p_i . p_j and
b_i = p_i . p_r. Here x also sums to one. In algorithm 3 it does so nearly, which is
enough for the paper's networks: they normalise their weights, ours do not. For a
profile a that ends at t_a <= t_b, where b ends,

    p_a . p_b = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)
                * (t_a / t_b)^gamma_b / t_b
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_ldm import config
from scaling_ldm.models.shapes import Count
from scaling_ldm.records.errors import AverageError


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile of this relative width (algorithm 2).

    The largest real root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Args:
      sigma_rel: above 0, at most 12^(-1/2), the width of gamma = 0.

    Raises:
      AverageError: no profile with gamma >= 0 has this width.
    """
    if not 0 < sigma_rel <= config.LARGEST_SIGMA_REL:
        raise AverageError(
            f"sigma_rel = {sigma_rel}: must be above 0 and at most "
            f"{config.LARGEST_SIGMA_REL:.4f}, which weighs all steps alike"
        )
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return max(float(roots.real.max()), 0.0)


def sigma_rel_of(gamma: float) -> float:
    """The width of a profile as a share of the training so far (equation 123)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How an average weighs the steps of a run.

    sigma_rel: its standard deviation / `step`.
    step: the last step that it has seen.
    """

    sigma_rel: float
    step: int

    def weights(self) -> Float[np.ndarray, " step"]:
        """The weight of each step from 1 to `step`; they sum to one."""
        ends = (np.arange(self.step + 1) / self.step) ** (gamma_of(self.sigma_rel) + 1)
        return np.diff(ends)


def new_share(step: Count, sigma_rel: float) -> Float[jax.Array, ""]:
    """1 - beta: the share of the newest weights in the average after `step` steps.

    Computed without the difference 1 - (1 - 1 / step)^(gamma + 1), in which float32
    would lose all digits of a long run.

    Args:
      step: updates done, from 1.
    """
    exponent = gamma_of(sigma_rel) + 1
    return -jnp.expm1(exponent * jnp.log1p(-1.0 / jnp.float32(step)))


def update(average: Any, params: Any, step: Count, sigma_rel: float) -> Any:
    """The average after one more update.

    Args:
      average: the average after `step` - 1 updates, a tree of arrays.
      params: the newest weights, a tree of the same shapes.
      step: updates done, from 1, the newest one counted.
      sigma_rel: width of the profile as a share of the training so far; see the module.
    """
    share = new_share(step, sigma_rel)
    return jax.tree.map(lambda a, p: a + share * (p - a), average, params)


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, in 1 / steps."""
    if a.step > b.step:
        a, b = b, a
    gamma_a, gamma_b = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (a.step / b.step) ** gamma_b / b.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """A sum of stored averages that stands for another one.

    coefficients: one for each stored average; they sum to one.
    error: of the summed profile, |sum - wanted| / |wanted|, root mean square.
    """

    coefficients: tuple[float, ...]
    error: float


def combination(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """The sum of stored profiles that is nearest to the wanted one (algorithm 3).

    Raises:
      AverageError: there are none, or one is given twice.
    """
    if not stored or len(set(stored)) < len(stored):
        raise AverageError(f"give one or more profiles, each once; got {stored}")
    square = inner_product(wanted, wanted)
    a = np.array([[inner_product(p, q) for q in stored] for p in stored]) / square
    b = np.array([inner_product(p, wanted) for p in stored]) / square
    # Each row and column is scaled to a diagonal of one. The last row is the sum.
    scale = 1 / np.sqrt(np.diag(a))
    system = np.block(
        [[a * scale * scale[:, None], scale[:, None]], [scale, np.zeros(1)]]
    )
    x = scale * np.linalg.lstsq(system, [*(b * scale), 1.0], rcond=1e-13)[0][:-1]
    left = 1 - 2 * b @ x + x @ a @ x
    return Combination(
        coefficients=tuple(float(c) for c in x), error=float(np.sqrt(max(left, 0.0)))
    )


def reconstruct(
    snapshots: Mapping[Profile, Any], wanted: Profile, largest_error: float = 0.1
) -> Any:
    """The average of any width at any step, from stored ones.

    Args:
      snapshots: stored averages, trees of arrays, by their profiles.
      wanted: its profile. One that is among the stored ones is returned as it is.
      largest_error: of the profile, as in `Combination`.

    Raises:
      AverageError: the error would be larger; the message says which it is.

    References: Karras et al. 2024 (arXiv 2312.02696), algorithm 3.
    """
    found = checked_combination(list(snapshots), wanted, largest_error)
    return weighted_sum(zip(found.coefficients, snapshots.values(), strict=True))


def checked_combination(
    stored: Sequence[Profile], wanted: Profile, largest_error: float
) -> Combination:
    """`combination`, if it is near enough to the wanted profile.

    Raises:
      AverageError: its error is larger than `largest_error`.
    """
    found = combination(stored, wanted)
    if found.error > largest_error:
        steps = ", ".join(f"{step:,}" for step in sorted({p.step for p in stored}))
        raise AverageError(
            f"sigma_rel = {wanted.sigma_rel:g} at step {wanted.step:,} from averages "
            f"at the steps {steps}: the profile would be off by "
            f"{100 * found.error:.2g}%, more than {100 * largest_error:g}%; "
            "keep more checkpoints (config.train.keep_checkpoints, "
            "config.train.checkpoint_flops)"
        )
    return found


def weighted_sum(terms: Iterable[tuple[float, Any]]) -> Any:
    """The sum of coefficient x tree; takes one tree at a time."""
    total: Any = None
    for c, tree in terms:
        if total is None:
            total = jax.tree.map(lambda leaf, c=c: c * leaf, tree)
        else:
            total = jax.tree.map(lambda s, leaf, c=c: s + c * leaf, total, tree)
    return total
