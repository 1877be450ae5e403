"""Classifier-free guidance: two predictions become one; jax only.

Ho & Salimans 2022, eq. 6, in the form that libraries use: u + g (c - u), so that g = 1
is no guidance. Every kind of prediction combines in this way, because each is linear in
x0 and epsilon at the same x.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from scaling_ldm.diffusion import prediction
from scaling_ldm.diffusion.shapes import SamplesB

EVALUATIONS = ("auto", "batched", "sequential")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Guidance:
    """How conditional and unconditional predictions are combined.

    Attributes:
      scale: g, a number or one per sample [B]. Another scale needs no compilation.
      interval: (low, high) times of the schedule. Guidance acts where low < t <= high;
        elsewhere only the condition is evaluated (Kynkaanniemi et al. 2024). None: it
        acts always.
      rescale: 0 ... 1, how far each sample's standard deviation is brought back to that
        of the conditional prediction (Lin et al. 2023, eq. 14-16; they use 0.7). None:
        not at all.
      evaluation: "batched", both in one call on 2B samples; "sequential", one after the
        other, in half the memory; "auto", batched if every array of the condition has a
        batch axis.
      channels: guidance acts on this many channels, the first ones; the others keep the
        conditional prediction. The published DiT code uses 3 of its four channels
        (facebookresearch/DiT#12). None: it acts on all.

    Raises:
      ValueError: an unknown evaluation; a value outside its range.
    """

    scale: ArrayLike
    interval: tuple[float, float] | None = None
    rescale: ArrayLike | None = None
    evaluation: str = "auto"
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.evaluation not in EVALUATIONS:
            raise ValueError(
                f"evaluation {self.evaluation!r} is none of {', '.join(EVALUATIONS)}"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")
        if isinstance(self.scale, float | int) and not math.isfinite(self.scale):
            raise ValueError(f"the guidance scale must be finite, got {self.scale}")
        if isinstance(self.rescale, float | int) and not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}")
        if self.interval and not self.interval[0] < self.interval[1]:
            raise ValueError(f"interval must be (low, high), got {self.interval}")

    def covers(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        return self.interval is None or self.interval[0] < t <= self.interval[1]

    def evaluated(self, cond: Any, batch: int) -> str:
        """ "batched" or "sequential", decided for a condition of `batch` samples.

        Raises:
          ValueError: "batched" was asked for, but an array has no batch axis.
        """
        can_batch = all(
            leaf.ndim and leaf.shape[0] == batch
            for leaf in jax.tree.leaves(jax.tree.map(jnp.asarray, cond))
        )
        if self.evaluation == "batched" and not can_batch:
            raise ValueError(
                "evaluation 'batched' needs conditions whose arrays all have a first "
                f"axis of {batch}; 'sequential' takes any"
            )
        if self.evaluation != "auto":
            return self.evaluation
        return "batched" if can_batch else "sequential"


def combine(
    conditional: SamplesB,
    unconditional: SamplesB,
    scale: ArrayLike,
    *,
    rescale: ArrayLike | None = None,
    channels: int | None = None,
) -> SamplesB:
    """u + g (c - u) of two predictions [B, ..., C].

    Args:
      scale: g, a scalar or [B].
      rescale, channels: as in Guidance.
    """
    scale = prediction.batched(scale, conditional)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale is not None:
        axes = tuple(range(1, conditional.ndim))
        ratio = jnp.std(conditional, axes, keepdims=True) / jnp.maximum(
            jnp.std(guided, axes, keepdims=True), prediction.SMALLEST
        )
        guided = guided * (1 + rescale * (ratio - 1))
    if channels is not None:
        first = jnp.arange(guided.shape[-1]) < channels
        first = first.reshape((1,) * (guided.ndim - 1) + (-1,))
        guided = jnp.where(first, guided, conditional)
    return guided
