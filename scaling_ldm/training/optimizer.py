"""The optimizer, its learning rates, and the moving average of weights; uses optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from scaling_ldm import config
from scaling_ldm.models.shapes import Count, Scalar


def adamw(cfg: config.OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, decoupled weight decay; without the rate.

    Its update is a direction, which `descend` multiplies by the learning rate. So the
    rate is data, and runs of one size share a compiled step.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay),
    )


def peak_learning_rate(cfg: config.OptimizerConfig, width: int) -> float:
    """The rate of a network of this width, by the named policy.

    "fixed" is paper B's: one rate for all sizes. "by_width" is the hidden-matrix rule
    of muP for Adam (Yang et al. 2022, arXiv 2203.03466, table 3): rate ~ 1 / width.
    """
    if cfg.learning_rate_policy == "fixed":
        return cfg.learning_rate
    return cfg.learning_rate * cfg.policy_width / width


def learning_rate(
    step: Count, peak: Float[jax.Array, ""], warmup: Scalar
) -> Float[jax.Array, ""]:
    """Linear warm-up over `warmup` steps, then constant; `step` counts from 0."""
    return peak * jnp.minimum(1.0, (step + 1.0) / jnp.maximum(warmup, 1.0))


global_norm = optax.tree.norm


def descend(params: Any, direction: Any, rate: Scalar) -> Any:
    """params - rate * direction, leaf by leaf."""
    return jax.tree.map(lambda p, d: p - rate * d, params, direction)


def average(ema: Any, params: Any, step: Count, decay: float) -> Any:
    """The moving average after `step` updates (from 1), with a smaller decay at first.

    decay_s = min(decay, (1 + s) / (10 + s)). While the second term is the smaller one,
    the first s of S steps have together a weight of about (s / S)^9, the product of the
    decays after s. So a short run averages parameters whose mean age is S / 10.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
