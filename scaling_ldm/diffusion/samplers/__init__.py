"""Samplers: from noise to samples with any network; see `sample`.

May import: flops, and noise, prediction and shapes of diffusion.

Any function can be the network; this library need not have trained it. You must say
which time it takes as t. A denoiser of this library says so itself.

    import jax, jax.numpy as jnp
    from scaling_ldm import noise, samplers
    schedule = noise.scaled_linear()                      # Stable Diffusion
    network = lambda x, t, cond: 0.1 * x + cond           # (x, t_B, cond) -> prediction
    denoise = samplers.denoiser(network, schedule, prediction="epsilon",
                                time="schedule")          # t is 0 to 999
    x = samplers.sample(denoise, jax.random.key(0), shape=(4, 32, 32, 4),
                        cond=jnp.ones(()), uncond=jnp.zeros(()),
                        sampler="dpm++2m", steps=20, guidance=7.5)
"""

from scaling_ldm.diffusion.samplers.diffusion_model import (
    DiffusionModel,
    TimedNetwork,
    denoiser,
)
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.planning import (
    SamplingPlan,
    SourceImage,
    cost,
    plan,
)
from scaling_ldm.diffusion.samplers.sampling import (
    Output,
    SamplingProgress,
    Trajectory,
    sample,
)
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.samplers.solvers import SAMPLERS
from scaling_ldm.diffusion.samplers.start import GivenNoise
from scaling_ldm.diffusion.samplers.time_grid import (
    SPACINGS,
    GridPoint,
    TimeGrid,
    from_times,
    grid,
)
from scaling_ldm.diffusion.samplers.x0_transforms import clip, dynamic_threshold

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "DiffusionModel",
    "GivenNoise",
    "GridPoint",
    "Guidance",
    "Output",
    "SamplingPlan",
    "SamplingProgress",
    "SolverTable",
    "SourceImage",
    "TimeGrid",
    "TimedNetwork",
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
