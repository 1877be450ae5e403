"""An autoencoder's objective: pictures through a Gaussian bottleneck; pure functions.

Kingma and Welling 2013 (arXiv 1312.6114) with the weak bottleneck of latent diffusion
(Rombach et al. 2022, arXiv 2112.10752, appendix G): an error of the picture and a small
KL divergence of the latents from a standard normal, both a mean over the picture's
values, so that the weight means the same at every size. Not here, though there: a
perceptual loss and a discriminator, which need networks of their own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion.objectives.denoise import Batch, batch_sharding
from scaling_ldm.models import encoders
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.shapes import LatentBHWC

DISTANCES = {"l1": jnp.abs, "l2": jnp.square}


def divergence(moments_BHWC: LatentBHWC) -> jax.Array:
    """KL of N(mean, variance) from N(0, 1), summed over each picture's latents, [B]."""
    mean, log_variance = jnp.split(moments_BHWC, 2, axis=-1)
    kl = mean**2 + jnp.exp(log_variance) - 1 - log_variance
    return 0.5 * jnp.sum(kl, axis=(1, 2, 3))


def loss(
    network: encoders.Autoencoder,
    params: Any,
    batch: Batch,
    uncond: Batch,
    key: jax.Array,
    *,
    reconstruction: str,
    kl_weight: float,
) -> jax.Array:
    """The training loss of one batch, a float32 scalar.

    Args:
      batch: "x" [B, H, W, C] in [-1, 1].
      uncond: not read; every objective has the same arguments.
      key: of this step; the bottleneck's noise comes from it alone.
      reconstruction: of DISTANCES.
    """
    x = batch["x"].astype(jnp.float32)
    moments = network.encode(params, x)
    mean, _ = jnp.split(moments, 2, axis=-1)
    noise = jax.random.normal(key, mean.shape, out_sharding=batch_sharding(mean))
    decoded = network.decode(params, autoencoder_kl.sample(moments, noise))
    values = x.size // x.shape[0]
    return jnp.mean(DISTANCES[reconstruction](decoded - x)) + kl_weight * (
        jnp.mean(divergence(moments)) / values
    )


def per_example_loss(
    network: encoders.Autoencoder, params: Any, x_BHWC: LatentBHWC
) -> jax.Array:
    """Mean squared error of each picture decoded from its mean latents, [B].

    The peak signal-to-noise ratio of pictures in [-1, 1] is 10 log10(4 / error) dB.
    """
    x = x_BHWC.astype(jnp.float32)
    mean, _ = jnp.split(network.encode(params, x), 2, axis=-1)
    return jnp.mean((network.decode(params, mean) - x) ** 2, axis=(1, 2, 3))
