"""Objectives: the loss that a network is trained on, and its held-out error.

The plan, the step and the loop treat every objective alike. So one loop trains a
diffusion model and an autoencoder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from scaling_ldm import config
from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.objectives import denoise, reconstruct, validation
from scaling_ldm.models import from_config
from scaling_ldm.models.shapes import IndexB, TimeB

Batch = denoise.Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A network and what it learns, as pure functions.

    init(key) -> params
    loss(params, batch, uncond, key) -> float32 scalar.
    per_example_loss(params, batch, t_B, index_B, key) -> [B] held-out losses.
    conditioning: the names that a batch holds beside "x".
    image_tokens, other_tokens: how many the network processes for each picture.
    embeddings: paths of parameters that only look words or labels up.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., jax.Array]
    per_example_loss: Callable[..., jax.Array]
    conditioning: tuple[str, ...]
    image_tokens: int
    other_tokens: int
    embeddings: tuple[str, ...]


def build(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Objective:
    """The objective of an experiment for the network of one size.

    Args:
      width, depth: one pair of `config.plan.sizes`.
      unroll: whether the blocks are compiled one by one instead of in a loop.
    """
    if experiment.model.architecture == "autoencoder_kl":
        return _reconstruction(experiment, width, depth)
    return _denoising(experiment, width, depth, unroll)


def _denoising(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Objective:
    denoiser = from_config.denoiser(experiment, width, depth, unroll)
    settings = diffusion_objective(experiment.objective)

    def per_example_loss(
        params: Any, batch: Batch, t_B: TimeB, index_B: IndexB, key: jax.Array
    ) -> jax.Array:
        cond = {name: batch[name] for name in denoiser.conditioning}
        return validation.per_example_loss(
            denoiser.apply,
            params,
            batch["x"],
            cond,
            t_B,
            index_B,
            key,
            objective=settings,
        )

    return Objective(
        init=denoiser.init,
        loss=functools.partial(denoise.loss, denoiser.apply, objective=settings),
        per_example_loss=per_example_loss,
        conditioning=denoiser.conditioning,
        image_tokens=denoiser.image_tokens,
        other_tokens=denoiser.other_tokens,
        embeddings=denoiser.embeddings,
    )


def _reconstruction(experiment: config.Experiment, width: int, depth: int) -> Objective:
    network = from_config.autoencoder(experiment, width, depth)
    cfg, (H, W, _) = experiment.objective, experiment.data.shape

    def per_example_loss(
        params: Any, batch: Batch, t_B: TimeB, index_B: IndexB, key: jax.Array
    ) -> jax.Array:
        del t_B, index_B, key
        return reconstruct.per_example_loss(network, params, batch["x"])

    return Objective(
        init=network.init,
        loss=functools.partial(
            reconstruct.loss,
            network,
            reconstruction=cfg.reconstruction,
            kl_weight=cfg.kl_weight,
        ),
        per_example_loss=per_example_loss,
        conditioning=(),
        image_tokens=H * W // network.factor**2,
        other_tokens=0,
        embeddings=(),
    )


@functools.lru_cache(maxsize=64)
def diffusion_objective(cfg: config.ObjectiveConfig) -> denoise.DiffusionObjective:
    """The settings of the diffusion loss; samplers read schedule and prediction here.

    Args:
      cfg: a section that `config.resolve` has checked.
    """
    if cfg.schedule in config.DISCRETE_SCHEDULES:
        schedule = noise.SCHEDULES[cfg.schedule](steps=cfg.schedule_steps)
        if cfg.zero_terminal_snr:
            schedule = noise.zero_terminal_snr(schedule)
    else:
        schedule = noise.SCHEDULES[cfg.schedule]()

    def with_fields(make: Any, fields: tuple[str, ...], prefix: str) -> Any:
        return make(**{f.removeprefix(prefix): getattr(cfg, f) for f in fields})

    weighting, sampling = cfg.weighting, cfg.timestep_sampling
    return denoise.DiffusionObjective(
        schedule=schedule,
        prediction=cfg.prediction,
        weighting=with_fields(
            denoise.WEIGHTINGS[weighting],
            config.WEIGHTINGS[weighting],
            prefix=f"{weighting}_",
        ),
        timestep_sampling=with_fields(
            denoise.TIMESTEP_SAMPLING[sampling],
            config.TIMESTEP_SAMPLING[sampling],
            prefix="time_",
        ),
        time_shift=cfg.time_shift,
        caption_dropout=cfg.caption_dropout,
    )
