"""A finished run -> weights in the layout that others read, in the folder export/."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, encoders, finished, mesh, meters, networks, records
from scaling_ldm import data as data_lib
from scaling_ldm.encoders import autoencoder_kl
from scaling_ldm.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.weights import native
from scaling_ldm.weights import unet as unet_weights

PICTURES = 2048  # whose latents say how an autoencoder's are scaled
BATCH = 64

Params = dict[str, Any]


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> None:
    """Writes the averaged weights of the best finished run.

    Raises:
      ConfigError: no run is finished.
    """
    spec = finished.best(workdir, specs)
    if spec is None:
        raise config.ConfigError(f"no run in {workdir} is finished: nothing to export")
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        sharded = finished.averaged(experiment, workdir, spec, device_mesh)
        whole = mesh.named(device_mesh, mesh.WHOLE)
        params = jax.device_get(
            jax.jit(lambda tree: tree, out_shardings=whole)(sharded)
        )
    if not mesh.is_primary():
        return
    folder = workdir / "export"
    folder.mkdir(exist_ok=True)
    write = _WRITERS.get(experiment.model.architecture, _native)
    meters.say(f"exported {spec.run_id}: {write(experiment, workdir, spec, params)}")


def _autoencoder(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    params: Params,
) -> str:
    """diffusers' AutoencoderKL, its latents scaled to unit variance, and a card."""
    shape = networks.autoencoder_shape(experiment, spec.width, spec.depth)
    source, _ = data_lib.sources(experiment, workdir)
    mean, deviation = _latents(encoders.autoencoder(shape), params, source)
    shape = dataclasses.replace(shape, scale=1 / deviation, shift=mean)
    folder = workdir / "export"
    autoencoder_weights.save(params, folder, shape, experiment.data.shape[0])
    record = records.loads(
        (workdir / "runs" / spec.run_id / "record.json").read_text(encoding="utf-8")
    )
    error = record.validation_loss_ema
    card = {
        "experiment": experiment.name,
        "recipe_hash": experiment.recipe_hash,
        "steps": record.steps,
        "pictures": record.images,
        "training_flops": record.flops,
        "parameters": record.params,
        "held_out_pictures": experiment.validation.samples,
        "held_out_mean_squared_error": error,
        "held_out_psnr_db": round(10 * math.log10(4 / error), 2),
    }
    text = json.dumps(card, indent=2) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
    return (
        f"{folder} (diffusers' AutoencoderKL; {card['held_out_psnr_db']} dB on "
        f"{card['held_out_pictures']} held-out pictures)"
    )


def _latents(
    network: encoders.Autoencoder, params: Params, source: data_lib.Source
) -> tuple[float, float]:
    """Mean and standard deviation of the latents of the first training pictures."""

    @jax.jit
    def draw(x: jax.Array, key: jax.Array) -> jax.Array:
        moments = network.encode(params, x)
        noise = jax.random.normal(key, (*moments.shape[:-1], network.latent_channels))
        z = autoencoder_kl.sample(moments, noise)
        return jnp.stack([jnp.mean(z), jnp.mean(z**2)])

    sums = np.zeros(2)
    for start in range(0, PICTURES, BATCH):
        rows = source.rows(np.arange(start, start + BATCH))
        sums += np.asarray(draw(rows["x"], jax.random.key(start)), np.float64)
    mean, square = sums / (PICTURES // BATCH)
    return float(mean), float(math.sqrt(square - mean**2))


def _unet(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    params: Params,
) -> str:
    """diffusers' UNet2DConditionModel, where captions are features of an encoder."""
    if experiment.reads_words:
        return _native(experiment, workdir, spec, params)
    folder = workdir / "export"
    shape = networks.unet_shape(experiment, spec.width, spec.depth)
    unet_weights.save(params, folder / "diffusion_pytorch_model.safetensors", shape)
    text = json.dumps(unet_weights.to_config(shape), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return f"{folder} (diffusers' UNet2DConditionModel)"


def _native(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    params: Params,
) -> str:
    """This library's own names: no one else has published a layout of the network."""
    folder = workdir / "export"
    native.save(
        params,
        folder,
        {
            "experiment": {
                name: value
                for name, value in records.to_json(experiment).items()
                if name != "record"
            },
            "width": spec.width,
            "depth": spec.depth,
        },
    )
    return f"{folder} (this library's own layout)"


_WRITERS: dict[str, Callable[..., str]] = {
    "autoencoder_kl": _autoencoder,
    "unet": _unet,
}
