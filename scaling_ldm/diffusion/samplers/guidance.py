"""Classifier-free guidance: two predictions into one; jax only.

Ho & Salimans 2022, eq. 6, in the form every library uses: u + g (c - u), over all
channels, so that g = 1 is no guidance. Predictions of all kinds combine alike, because
each is linear in x0 and epsilon at the same x.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion import prediction

EVALUATIONS = ("auto", "batched", "sequential")
QUIRKS = ("", "dit_three_channels")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """How conditional and unconditional predictions are combined.

    Attributes:
      scale: g, a number or one per sample [B]. Changing it compiles nothing.
      interval: (low, high) times of the schedule: guide where low < t <= high, else
        evaluate the condition alone (Kynkaanniemi et al. 2024). None: always.
      rescale: 0 ... 1, how far each sample's standard deviation is brought back to the
        conditional prediction's (Lin et al. 2023, eq. 14-16; they use 0.7). None: off.
      evaluation: "batched", both in one call on 2B samples; "sequential", one after the
        other, in half the memory; "auto", batched if every array of the condition has a
        batch axis.
      quirk: "dit_three_channels" guides the first three channels alone, as the
        published DiT code does with its four (facebookresearch/DiT#12).
    """

    scale: float | jax.Array
    interval: tuple[float, float] | None = None
    rescale: float | None = None
    evaluation: str = "auto"
    quirk: str = ""

    def __post_init__(self) -> None:
        if self.evaluation not in EVALUATIONS:
            raise ValueError(
                f"evaluation {self.evaluation!r} is none of {', '.join(EVALUATIONS)}"
            )
        if self.quirk not in QUIRKS:
            raise ValueError(f"quirk {self.quirk!r} is none of {QUIRKS}")
        if isinstance(self.rescale, float | int) and not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}")
        if self.interval and not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must be (low, high), got {self.interval}")

    def covers(self, t: float) -> bool:
        """Whether time t is guided."""
        return self.interval is None or self.interval[0] < t <= self.interval[1]


def combine(
    conditional: jax.Array,
    unconditional: jax.Array,
    scale: jax.Array,
    *,
    rescale: jax.Array | None = None,
    quirk: str = "",
) -> jax.Array:
    """u + g (c - u) of two predictions [B, ..., C].

    Args:
      scale: g, a scalar or [B].
      rescale: a scalar, see Guidance.
      quirk: see Guidance.
    """
    scale = prediction.batched(scale, conditional)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale is not None:
        axes = tuple(range(1, conditional.ndim))
        ratio = jnp.std(conditional, axes, keepdims=True) / jnp.maximum(
            jnp.std(guided, axes, keepdims=True), prediction.SMALLEST
        )
        guided = guided * (1 + rescale * (ratio - 1))
    if quirk == "dit_three_channels":
        first = jnp.arange(guided.shape[-1]) < 3
        first = first.reshape((1,) * (guided.ndim - 1) + (-1,))
        guided = jnp.where(first, guided, conditional)
    return guided


def can_batch(cond: Any, batch: int) -> bool:
    """Whether every array of a condition has one row per sample."""
    return all(
        leaf.ndim and leaf.shape[0] == batch
        for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, cond))
    )
