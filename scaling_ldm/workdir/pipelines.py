"""Opens a folder of diffusers: a network with its scheduler, encoder and autoencoder.

model_index.json              which pipeline it is, and its parts
unet/ or transformer/         the network
scheduler/                    scheduler_config.json: noise schedule and prediction
text_encoder/, tokenizer/     what reads captions, unless the network reads labels
vae/                          the autoencoder
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax

from scaling_ldm import config
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.models import denoisers, pretrained
from scaling_ldm.models.denoisers import dit, mmdit, unet
from scaling_ldm.models.weights import files, published
from scaling_ldm.training import captions
from scaling_ldm.training.loaded_model import LoadedModel

INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True)
class _Captions:
    """How a pipeline reads captions.

    reads_padding: features of padding are read like those of text.
    """

    tokens: int
    reads_padding: bool


# Name of a pipeline -> how it reads captions; None: it reads labels.
PIPELINES: dict[str, _Captions | None] = {
    "StableDiffusionPipeline": _Captions(77, reads_padding=True),
    "PixArtAlphaPipeline": _Captions(120, reads_padding=False),
    "DiTPipeline": None,
}
_BUILDERS = {
    unet.UNetConfig: denoisers.u_net,
    dit.DiTConfig: denoisers.transformer,
    mmdit.MMDiTConfig: denoisers.mm_dit,
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_TIME_SCALE = 1000  # our networks read t times this, published ones t itself


def load(
    where: str,
    folder: pathlib.Path,
    elsewhere: Mapping[str, str | os.PathLike | None],
) -> LoadedModel:
    """Opens the folder of a pipeline.

    Args:
      where: the beginning of messages.
      elsewhere: folders of "autoencoder" and "text_encoder" in place of its own.

    Raises:
      ConfigError: a pipeline, a schedule or a part that is not known here.
      WeightsError: a network that cannot be built, or tensors that do not fit.
    """
    name = files.read_json(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        raise config.ConfigError(
            f"{where}: a {name}; known: {', '.join(PIPELINES)}. The network alone can "
            "be read with scaling_ldm.weights"
        )
    reads = PIPELINES[name]
    schedule, prediction = schedule_of(where, folder / "scheduler")
    place = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
    like = types.SimpleNamespace(text_tokens=reads.tokens if reads else 0)
    found = published.find(place, like)
    network = _network(found.network, schedule)
    reader: captions.CaptionReader | None = None
    if reads is not None:
        given = elsewhere.get("text_encoder")
        own = given is None
        opened = functools.partial(
            pretrained.text_encoder,
            os.fspath(folder / "text_encoder" if own else given),
            tokenizer=folder / "tokenizer" if own else None,
        )
        reader = captions.FeatureReader(
            opened, reads.tokens, "float32", reads.reads_padding
        )
    autoencoder = elsewhere.get("autoencoder") or folder / "vae"
    H, W, C = found.network.image_shape
    return LoadedModel(
        name=folder.resolve().name,
        denoise=samplers.denoiser(
            network,
            schedule,
            prediction=prediction,
            params=jax.device_put(found.load(), jax.local_devices()[0]),
        ),
        shape=(H, W, C),
        conditioning=network.conditioning,
        classes=getattr(found.network, "classes", 0),
        about={"pipeline": name},
        _captions=reader,
        _autoencoder=functools.partial(pretrained.autoencoder, os.fspath(autoencoder)),
    )


def _network(cfg: Any, schedule: noise.Schedule) -> denoisers.Denoiser:
    """The network; its t is that of the table / 1000, at any length of the table.

    A second half of the channels, a learned variance, is left out.
    """
    network = _BUILDERS[type(cfg)](cfg)
    if isinstance(schedule, noise.Discrete):
        network = dataclasses.replace(
            network, time_range=(0.0, schedule.steps / _TIME_SCALE)
        )
    channels, whole = cfg.image_shape[-1], network.apply
    if getattr(cfg, "out_channels", 0) == 2 * channels:

        def apply(*given: Any) -> jax.Array:
            return whole(*given)[..., :channels]

        network = dataclasses.replace(network, apply=apply)
    return network


def schedule_of(where: str, folder: pathlib.Path) -> tuple[noise.Schedule, str]:
    """(noise schedule, prediction) of a scheduler_config.json of diffusers.

    Raises:
      ConfigError: its schedule is unknown here, or missing.
    """
    path = folder / "scheduler_config.json"
    if not path.exists():
        raise config.ConfigError(f"{where}: no {path}, which says schedule and t")
    cfg = files.read_json(path)
    steps = cfg.get("num_train_timesteps")
    if cfg.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        if steps != _TIME_SCALE:
            raise config.ConfigError(
                f"{path}: num_train_timesteps is {steps}, not 1000"
            )
        return noise.rectified_flow(), "flow"
    # Early configurations lack it; epsilon was the only type then.
    said = cfg.get("prediction_type", "epsilon")
    if said not in _PREDICTIONS:
        raise config.ConfigError(
            f"{path}: prediction_type {said!r}; known: {', '.join(_PREDICTIONS)}"
        )
    kind, ends = cfg.get("beta_schedule"), (cfg.get("beta_start"), cfg.get("beta_end"))
    if cfg.get("trained_betas") is not None:
        schedule = noise.from_betas(cfg["trained_betas"])
    elif kind == "squaredcos_cap_v2" and steps:
        schedule = noise.cosine(steps)
    elif kind in ("linear", "scaled_linear") and steps and None not in ends:
        schedule = noise.SCHEDULES[kind](steps, *ends)
    else:
        raise config.ConfigError(
            f"{path}: beta_schedule {kind!r}, beta_start and beta_end {ends}, "
            f"num_train_timesteps {steps}; known: linear, scaled_linear with all of "
            "these, squaredcos_cap_v2, trained_betas, FlowMatchEulerDiscreteScheduler"
        )
    if cfg.get("rescale_betas_zero_snr"):
        schedule = noise.zero_terminal_snr(schedule)
    return schedule, _PREDICTIONS[said]
