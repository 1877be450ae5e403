"""The export stage: the weights of a finished run in a folder, for other programs.

Their card (exports.CARD) is written last, whatever the layout of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config, data, records
from scaling_ldm.data import vocabulary
from scaling_ldm.models import encoders, from_config, pretrained
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import native
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import mesh, progress
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, runs

PICTURES = 2048  # pictures that are encoded to find the scale of the latents
BATCH = 64

Params = dict[str, Any]


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> None:
    """Writes the first average of config.generate.run, or of the best finished run.

    Raises:
      ConfigError: no run is finished, or not the one that is named.
    """
    spec = runs.run_to_sample(experiment, workdir, specs)
    if spec is None:
        raise config.ConfigError(f"no run in {workdir} is finished: nothing to export")
    model = runs.trained_model(experiment, workdir, spec)
    experiment = config.with_overrides(experiment, spec.overrides)
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        sharded = model.load(device_mesh)
        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        params = jax.device_get(
            jax.jit(lambda tree: tree, out_shardings=whole)(sharded)
        )
    if not mesh.is_primary():
        return
    record = runs.read_record(workdir, spec.run_id)
    if record is None:
        raise config.ConfigError(f"the record of {spec.run_id} was removed meanwhile")
    loss, more = runs.last_loss(workdir, spec, model.weights or ""), {}
    if experiment.model.architecture == "autoencoder_kl":
        more = _held_out(experiment, loss)
    words = _words(experiment, workdir, spec, model)
    write = _WRITERS.get(experiment.model.architecture, _native)
    with _folder(workdir) as folder:
        written = write(experiment, workdir, folder, model, params)
        if more:
            written += f", {more['held_out_psnr_db']} dB on held-out pictures"
        _copy_networks(experiment, folder)
        exports.write_card(folder, experiment, model, record, loss, words, more)
    progress.say(f"exported {spec.run_id}: {workdir / 'export'} ({written})")


@contextlib.contextmanager
def _folder(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local folder for the files of an export; in a store, they are then uploaded.

    The card is uploaded last. An older one is removed before, because it is of other
    weights.
    """
    folder = workdir / "export"
    if not isinstance(folder, ObjectPath):
        folder.mkdir(exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        local = pathlib.Path(name)
        yield local
        card, folder_of_card = local / exports.CARD, folder / exports.CARD
        folder_of_card.unlink(missing_ok=True)
        written = [path for path in local.rglob("*") if path.is_file()]
        places = {path.relative_to(local).as_posix(): path for path in written}
        for old in folder.below():
            if old not in places:
                (folder / old).unlink(missing_ok=True)
        for where, path in places.items():
            if path != card:
                (folder / where).upload(path)
        folder_of_card.upload(card)


def _words(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    model: TrainedModel,
) -> vocabulary.Vocabulary | None:
    """The words of the run; those of its pictures if an older version kept none."""
    if model.words is not None:
        return vocabulary.Vocabulary(model.words)
    if experiment.model.architecture == "autoencoder_kl" or not experiment.reads_words:
        return None
    network = from_config.denoiser(experiment, spec.width, spec.depth, unroll=False)
    return vocabulary.read_by(
        network.conditioning, data.sources(experiment, workdir)[0]
    )


def _copy_networks(experiment: config.Experiment, folder: pathlib.Path) -> None:
    """Copies the networks around the denoiser that were given as folders."""
    for name in exports.NETWORKS:
        shutil.rmtree(folder / name, ignore_errors=True)
        given = getattr(experiment.encode, name)
        if experiment.model.architecture != "autoencoder_kl":
            pretrained.copy_folder(given, folder / name)


def _held_out(experiment: config.Experiment, error: float) -> dict[str, Any]:
    """An autoencoder's validation loss as a mean squared error and in decibels."""
    return {
        "held_out_pictures": experiment.validation.samples,
        "held_out_mean_squared_error": error,
        "held_out_psnr_db": round(10 * math.log10(4 / error), 2),
    }


def _autoencoder(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    model: TrainedModel,
    params: Params,
) -> str:
    """diffusers' AutoencoderKL; its latents are scaled to unit variance."""
    cfg = from_config.autoencoder_config(experiment, model.width, model.depth)
    source, _ = data.sources(experiment, workdir)
    mean, deviation = _latents(encoders.autoencoder(cfg), params, source)
    cfg = dataclasses.replace(cfg, scale=1 / deviation, shift=mean)
    autoencoder_weights.save(params, folder, cfg, experiment.data.shape[0])
    return "diffusers' AutoencoderKL"


def _latents(
    network: encoders.Autoencoder, params: Params, source: data.Source
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
    folder: pathlib.Path,
    model: TrainedModel,
    params: Params,
) -> str:
    """diffusers' UNet2DConditionModel if captions are features of an encoder."""
    if experiment.reads_words:
        return _native(experiment, workdir, folder, model, params)
    cfg = from_config.unet_config(experiment, model.width, model.depth)
    unet_weights.save(params, folder / "diffusion_pytorch_model.safetensors", cfg)
    text = json.dumps(unet_weights.to_config(cfg), indent=2) + "\n"
    records.write_text(folder / "config.json", text)
    return "diffusers' UNet2DConditionModel"


def _native(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    folder: pathlib.Path,
    model: TrainedModel,
    params: Params,
) -> str:
    """This library's own layout, for a network that has no published one."""
    native.save(
        params,
        folder,
        {
            "experiment": {
                name: value
                for name, value in records.to_json(experiment).items()
                if name != "record"
            },
            "width": model.width,
            "depth": model.depth,
        },
    )
    return "this library's own layout"


_WRITERS: dict[str, Callable[..., str]] = {
    "autoencoder_kl": _autoencoder,
    "unet": _unet,
}
