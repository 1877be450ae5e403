"""Bits per dim of held-out data under a trained model: the bound of `losses.vlb`.

It is the bound of infinitely many steps (`vlb.continuous`) for every schedule. In the
bound of a table's own steps, one step has most of the variance, and a few random draws
rarely hit it. Pixels of 256 levels have a probability, and the number is a code length.
Latents, and pictures that are painted while they are read, have a density: see
`losses.likelihood`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, data
from scaling_ldm.diffusion.losses import vlb
from scaling_ldm.models import from_config
from scaling_ldm.training import held_out, mesh
from scaling_ldm.training.objective import diffusion_objective, widened
from scaling_ldm.training.trained_model import TrainedModel

LEVELS = 256  # of pixels in records


def bits_per_dim(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    model: TrainedModel,
    device_mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """The bound of each picture of the validation set, in their order.

    Args:
      experiment: with the overrides of the model's run.
      device_mesh: it must be the current one.

    Returns:
      float64 [validation.samples], each an unbiased estimate from
      evaluate.held_out_draws times.
    """
    _, source = data.sources(experiment, workdir)
    names = from_config.denoiser(
        experiment, model.width, model.depth, unroll=False
    ).conditioning
    batches = held_out.held_out_batches(experiment, device_mesh, source, ("x", *names))
    measure = _compiled(_deciding(experiment), model.width, model.depth, device_mesh)
    params = model.load(device_mesh)
    found = [
        np.asarray(measure(params, b.batch, b.indices, b.key), np.float64)[: b.samples]
        for b in batches
    ]
    return np.concatenate(found)


def _deciding(experiment: config.Experiment) -> config.Experiment:
    """The experiment with only the fields that the compiled function depends on."""
    kept = ("data", "encode", "model", "objective", "evaluate")
    return dataclasses.replace(
        config.Experiment(), **{name: getattr(experiment, name) for name in kept}
    )


@functools.lru_cache(maxsize=64)
def _compiled(
    experiment: config.Experiment, width: int, depth: int, device_mesh: Any
) -> Any:
    """(params, batch, index_B, key) -> bits per dim [B]; runs of a size share it."""
    denoiser = from_config.denoiser(experiment, width, depth, unroll=False)
    objective = diffusion_objective(experiment.objective)
    schedule = objective.schedule
    stored_pixels = experiment.encoded and experiment.encode.autoencoder == "none"
    how = {
        "prediction": objective.prediction,
        "levels": LEVELS if stored_pixels else None,
        "draws": experiment.evaluate.held_out_draws,
    }

    def measure(params: Any, batch: Any, index_B: Any, key: jax.Array) -> jax.Array:
        def network(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            return denoiser.apply(params, x, schedule.unit_time(t), cond)

        wide = widened(batch)
        cond = {name: wide[name] for name in denoiser.conditioning}
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(index_B)
        given = {"cond": cond, **how}
        return vlb.continuous(network, schedule, batch["x"], keys, **given).total

    replicated = mesh.named_sharding(device_mesh, mesh.REPLICATED)
    return jax.jit(measure, out_shardings=replicated)
