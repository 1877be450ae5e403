"""An autoencoder's objective: pictures through a Gaussian bottleneck; pure functions.

Kingma and Welling 2013 (arXiv 1312.6114) with the weak bottleneck of latent diffusion
(Rombach et al. 2022, arXiv 2112.10752, appendix G). The loss is an error of the picture
and a small KL divergence of the latents from a standard normal. Both are means over the
picture's values, so that the weight means the same at every size. The perceptual loss
and the discriminator of that paper are left out, because they need further networks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion.losses.denoise import Batch, batch_sharding
from scaling_ldm.diffusion.shapes import ValueB
from scaling_ldm.models import encoders
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.shapes import LatentBHWC

# The functions of the names in config.RECONSTRUCTION.
DISTANCES = {"l1": jnp.abs, "l2": jnp.square}


def kl_divergence(moments_BHWC: LatentBHWC) -> ValueB:
    """KL of N(mean, variance) from N(0, 1), summed over each picture's latents, [B].

    moments_BHWC: mean and log variance, each half of the channels.
    """
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
      key: of this step; the bottleneck's noise depends on it alone.
      reconstruction: a name of DISTANCES.
      kl_weight: factor of the KL divergence.
    """
    return loss_of_rows(
        network,
        params,
        batch,
        uncond,
        draw(network, batch, key),
        reconstruction=reconstruction,
        kl_weight=kl_weight,
    )


def draw(network: encoders.Autoencoder, batch: Batch, key: jax.Array) -> jax.Array:
    """The bottleneck's noise, standard normal, of the shape of the latents.

    A row's values depend on the key, the row's place and the size of the batch.
    """
    x = jnp.asarray(batch["x"])
    B, H, W, _ = x.shape
    shape = (B, H // network.factor, W // network.factor, network.latent_channels)
    return jax.random.normal(key, shape, out_sharding=batch_sharding(x))


def loss_of_rows(
    network: encoders.Autoencoder,
    params: Any,
    batch: Batch,
    uncond: Batch,
    noise: jax.Array,
    *,
    reconstruction: str,
    kl_weight: float,
) -> jax.Array:
    """The mean loss of some rows of a batch, a float32 scalar; see `loss`.

    Args:
      noise: the same rows of what `draw` gave.
    """
    x = batch["x"].astype(jnp.float32)
    moments = network.encode(params, x)
    decoded = network.decode(params, autoencoder_kl.sample(moments, noise))
    values = x.size // x.shape[0]
    return jnp.mean(DISTANCES[reconstruction](decoded - x)) + kl_weight * (
        jnp.mean(kl_divergence(moments)) / values
    )


def per_example_loss(
    network: encoders.Autoencoder, params: Any, x_BHWC: LatentBHWC
) -> ValueB:
    """Mean squared error of each picture decoded from its mean latents, float32 [B].

    The peak signal-to-noise ratio of pictures in [-1, 1] is 10 log10(4 / error) dB.

    Args:
      x_BHWC: pictures in [-1, 1].
    """
    x = jnp.asarray(x_BHWC, jnp.float32)
    mean, _ = jnp.split(network.encode(params, x), 2, axis=-1)
    return jnp.mean((network.decode(params, mean) - x) ** 2, axis=(1, 2, 3))
