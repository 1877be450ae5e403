"""The optimizer, its learning rates, and the moving average of weights; uses optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from scaling_ldm import config


def adamw(cfg: config.OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay; the rate is applied apart.

    The update is a direction: `descend` scales it, so that a learning rate is data and
    runs of one shape share a compiled step.
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


def learning_rate(step: jax.Array, peak: jax.Array, warmup: jax.Array) -> jax.Array:
    """Linear warm-up over `warmup` steps, then constant; `step` counts from 0."""
    return peak * jnp.minimum(1.0, (step + 1.0) / jnp.maximum(warmup, 1.0))


global_norm = optax.tree.norm


def descend(params: Any, direction: Any, rate: jax.Array) -> Any:
    """params - rate * direction."""
    return jax.tree.map(lambda p, d: p - rate * d, params, direction)


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The moving average after `step` updates (from 1), ramped as in its early steps.

    decay_s = min(decay, (1 + s) / (10 + s)): a short run averages its last tenth.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
