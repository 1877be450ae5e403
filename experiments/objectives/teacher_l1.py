"""An objective of one's own: an absolute error of x0, and a teacher to agree with.

The network predicts the picture. Its error is absolute, and what it says of a picture
with much noise should be what a slow average of it says of the same picture with half
of the noise. It is a simple form of consistency training (Song et al. 2023, arXiv
2303.01469).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from scaling_ldm.diffusion import prediction
from scaling_ldm.diffusion.losses.denoise import batch_sharding, drop_captions
from scaling_ldm.models import from_config
from scaling_ldm.records.errors import ConfigError
from scaling_ldm.training import objective

AGREEMENT = 0.5  # weight of the agreement; the recipe holds this file's text
DECAY = 0.95  # of the teacher


def build(config, width, depth, unroll):
    """The objective of an experiment for the network of one size."""
    if config.objective.prediction != "x0":
        raise ConfigError("config.objective.prediction: teacher_l1 predicts x0")
    denoiser = from_config.denoiser(config, width, depth, unroll)
    settings = objective.diffusion_objective(config.objective)
    schedule = settings.schedule

    def predict(params, x0, eps, t, cond):
        x_t = prediction.corrupt(x0, eps, schedule.alpha(t), schedule.sigma(t))
        return denoiser.apply(params, x_t, schedule.unit_time(t), cond)

    def init_aux(key, params):
        return {"teacher": params}

    def loss(params, averages, aux, batch, uncond, step, key):
        x0 = batch["x"].astype(jnp.float32)
        cond = {name: batch[name] for name in denoiser.conditioning}
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        each = batch_sharding(x0, ndim=1)
        eps = jax.random.normal(noise_key, x0.shape, out_sharding=batch_sharding(x0))
        normal = jax.random.normal(time_key, x0.shape[:1], out_sharding=each)
        dropped = jax.random.uniform(drop_key, x0.shape[:1], out_sharding=each)
        cond = drop_captions(cond, uncond, dropped < settings.caption_dropout)
        t = settings.times(normal)
        predicted = predict(params, x0, eps, t, cond)
        teacher = predict(aux["teacher"], x0, eps, t / 2, cond)
        error = jnp.mean(jnp.abs(predicted - x0))
        agreement = jnp.mean(jnp.abs(predicted - jax.lax.stop_gradient(teacher)))
        aux = {
            "teacher": jax.tree.map(
                lambda a, p: DECAY * a + (1 - DECAY) * p, aux["teacher"], params
            )
        }
        metrics = {"error": error, "agreement": agreement}
        return error + AGREEMENT * agreement, aux, metrics

    # The rest is as in denoising: the network, what it reads, the held-out loss.
    denoising = objective.OBJECTIVES["denoising"](config, width, depth, unroll)
    return dataclasses.replace(
        denoising, init_aux=init_aux, loss=loss, metrics=("error", "agreement")
    )
