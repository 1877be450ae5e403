"""The optimizer, its learning rates, and the averages of weights; uses optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from scaling_ldm import config
from scaling_ldm.models.shapes import Count, Scalar
from scaling_ldm.training import averages, width_scaling


def adamw(
    cfg: config.OptimizerConfig, scaling: width_scaling.Scaling | None = None
) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, decoupled weight decay; without the rate.

    Its update is a direction, which `descend` multiplies by the learning rate. So the
    rate is data, and runs of one size share a compiled step. The first moment is stored
    in `cfg.first_moment_dtype`, the second in float32.

    Args:
      scaling: factors of single tensors; None: all are trained alike. The state is the
        same tree with it and without it.
    """
    clip = optax.clip_by_global_norm(cfg.clip_norm)
    eps = cfg.eps if scaling is None else cfg.eps * scaling.epsilon
    adam = optax.scale_by_adam(
        b1=cfg.b1, b2=cfg.b2, eps=eps, mu_dtype=cfg.first_moment_dtype
    )
    decay = optax.add_decayed_weights(cfg.weight_decay)
    if scaling is None:
        return optax.chain(clip, adam, decay)
    factors = scaling

    def clipped(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradient = width_scaling.multiply(updates, factors.gradient)
        return clip.update(gradient, state, params)

    def decayed(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        direction = width_scaling.multiply(updates, factors.update)
        if cfg.weight_decay:
            direction = jax.tree.map(
                lambda d, p, f: d + cfg.weight_decay * f * p,
                *(direction, params, factors.decay),
            )
        return direction, state

    return optax.chain(
        optax.GradientTransformation(clip.init, clipped),
        adam,
        optax.GradientTransformation(decay.init, decayed),
    )


def learning_rate(
    step: Count, peak: Float[jax.Array, ""], warmup: Scalar
) -> Float[jax.Array, ""]:
    """Linear warm-up over `warmup` steps, then constant; `step` counts from 0."""
    return peak * jnp.minimum(1.0, (step + 1.0) / jnp.maximum(warmup, 1.0))


# How the rate falls from 1 to 0 while its argument rises from 0 to 1. "1-sqrt" is by
# Haegele et al. 2024 (arXiv 2405.18392), equation 2.
FALLS: dict[str, Callable[[Any], Any]] = {
    "cosine": optax.schedules.cosine_decay_schedule(1.0, decay_steps=1),
    "linear": optax.schedules.linear_schedule(1.0, 0.0, transition_steps=1),
    "1-sqrt": lambda done: 1.0 - jnp.sqrt(done),
}


def scheduled_rate(
    cfg: config.OptimizerConfig, step: Count, numbers: Mapping[str, jax.Array]
) -> Float[jax.Array, ""]:
    """The rate of a step, which counts from 0, by `cfg.schedule`.

    "constant": after the warm-up, the peak. "cosine" falls from there to the end of the
    run (Loshchilov and Hutter 2017, arXiv 1608.03983). "wsd" falls in the last share
    `cfg.decay_fraction` of the run (Hu et al. 2024, arXiv 2404.06395). Both would come
    to 0 at the step after the last one.

    Args:
      numbers: those of `schedule_numbers`. They are data, so runs of one size share a
        compiled step whatever their length.
    """
    rate = learning_rate(step, numbers["peak"], numbers["warmup"])
    if cfg.schedule == "constant":
        return rate
    done = (step - numbers["decay_start"]) / jnp.maximum(numbers["decay_steps"], 1.0)
    fall = FALLS["cosine" if cfg.schedule == "cosine" else cfg.decay_shape]
    return rate * fall(jnp.clip(done, 0.0, 1.0))


def schedule_numbers(
    cfg: config.OptimizerConfig, peak: float, warmup: int, steps: int
) -> dict[str, np.float32]:
    """The numbers of a run that `scheduled_rate` reads.

    Args:
      warmup: its steps of warm-up.
      steps: all its steps.
    """
    numbers: dict[str, float] = {"peak": peak, "warmup": warmup}
    if cfg.schedule != "constant":
        fall = steps - warmup
        if cfg.schedule == "wsd":
            fall = _decay_steps(cfg, steps)
        numbers |= {"decay_start": steps - fall, "decay_steps": fall}
    return {name: np.float32(value) for name, value in numbers.items()}


def warmup_steps(cfg: config.OptimizerConfig, steps: int, batch_size: int) -> int:
    """The warm-up of a run of `steps` steps of `batch_size` pictures, in steps.

    Raises:
      ConfigError: it does not fit into the run, with the decay of "wsd".
    """
    decay = _decay_steps(cfg, steps) if cfg.schedule == "wsd" else 0
    if cfg.warmup_fraction:  # both shares may be rounded up
        return min(round(cfg.warmup_fraction * steps), steps - decay)
    warmup = cfg.warmup_steps or round(cfg.warmup_samples / batch_size)
    if warmup + decay > steps:
        raise config.ConfigError(
            f"config.optimizer: a warm-up of {warmup:,} steps"
            f"{f' and a decay of {decay:,}' if decay else ''} in a run of {steps:,} "
            "steps; lower warmup_steps or warmup_samples, or give warmup_fraction"
        )
    return warmup


def stable_steps(cfg: config.OptimizerConfig, steps: int) -> int:
    """The steps of a run of "wsd" before its rate falls, with those of its warm-up."""
    return steps - _decay_steps(cfg, steps)


def _decay_steps(cfg: config.OptimizerConfig, steps: int) -> int:
    return round(cfg.decay_fraction * steps)


global_norm = optax.tree.norm


def descend(params: Any, direction: Any, rate: Scalar) -> Any:
    """params - rate * direction, leaf by leaf."""
    return jax.tree.map(lambda p, d: p - rate * d, params, direction)


def average(
    cfg: config.OptimizerConfig, name: str, before: Any, params: Any, step: Count
) -> Any:
    """The average of this name after `step` updates (from 1), with the newest weights.

    Args:
      name: one of `cfg.averages`.
      before: the average one step before.
    """
    sigma_rel = config.sigma_rel_of(name)
    if sigma_rel is None:
        return ema(before, params, step, cfg.ema_decay)
    return averages.update(before, params, step, sigma_rel)


def ema(before: Any, params: Any, step: Count, decay: float) -> Any:
    """The moving average after `step` updates (from 1), with a smaller decay at first.

    decay_s = min(decay, (1 + s) / (10 + s)). While the second term is the smaller one,
    the first s of S steps have together a weight of about (s / S)^9, the product of the
    decays after s. So a short run averages parameters whose mean age is S / 10.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, before, params)
