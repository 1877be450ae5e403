"""Euler's method on the rectified-flow ODE dx/dt = v(x, t), from t = 1 to 0; jax only.

Liu et al. 2022, arXiv 2209.03003: x_0 = x_1 - integral of v dt.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from scaling_ldm.shapes import LatentBHWC, TimeB


def euler(
    velocity: Callable[[LatentBHWC, TimeB], LatentBHWC],
    noise_BHWC: LatentBHWC,
    *,
    steps: int,
) -> LatentBHWC:
    """Integrates from noise at t = 1 to pictures at t = 0 in equal steps.

    Args:
      velocity: (x [B, H, W, C], t [B]) -> dx/dt, guidance included; called `steps`
        times.
      noise_BHWC: standard normal.
      steps: at least 1.

    Raises:
      ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    grid = 1.0 - jnp.arange(steps, dtype=jnp.float32) / steps

    def step(x: LatentBHWC, t: jax.Array) -> tuple[LatentBHWC, None]:
        t_B = jnp.full_like(x[:, 0, 0, 0], t)
        return x - velocity(x, t_B) / steps, None

    return jax.lax.scan(step, noise_BHWC, grid)[0]
