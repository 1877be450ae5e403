"""Samplers: from noise to pictures with any network; see `sample`.

import jax, jax.numpy as jnp
from scaling_ldm import noise, samplers
schedule = noise.scaled_linear()                      # Stable Diffusion
network = lambda x, t, cond: 0.1 * x + cond           # (x, t_B, cond) -> prediction
denoise = samplers.denoiser(network, schedule, prediction="epsilon")
x = samplers.sample(denoise, jax.random.key(0), shape=(4, 32, 32, 4),
                    cond=jnp.ones(()), uncond=jnp.zeros(()),
                    sampler="dpm++2m", steps=20, guidance=7.5)
"""

from scaling_ldm.diffusion.samplers.denoise import Denoise, denoiser
from scaling_ldm.diffusion.samplers.grids import (
    SPACINGS,
    GridPoint,
    TimeGrid,
    from_times,
    grid,
)
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.plans import SAMPLERS, SamplingPlan, plan
from scaling_ldm.diffusion.samplers.sample import (
    SamplingProgress,
    Trajectory,
    clip,
    cost,
    dynamic_threshold,
    sample,
)
from scaling_ldm.diffusion.samplers.table import SolverTable

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Denoise",
    "TimeGrid",
    "Guidance",
    "SamplingPlan",
    "GridPoint",
    "SamplingProgress",
    "SolverTable",
    "Trajectory",
    "clip",
    "cost",
    "denoiser",
    "dynamic_threshold",
    "from_times",
    "grid",
    "plan",
    "sample",
]
