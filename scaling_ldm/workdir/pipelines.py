"""Opens a folder of diffusers: a network with its scheduler, encoder and autoencoder.

model_index.json              which pipeline it is, and its parts
unet/ or transformer/         the network
scheduler/                    scheduler_config.json: noise schedule and prediction
text_encoder/, tokenizer/     what reads captions, unless the network reads labels;
                              several, with _2 and _3, of SD3 and FLUX
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
from scaling_ldm.workdir import scheduler_config

Elsewhere = Mapping[str, str | os.PathLike | None]

INDEX = "model_index.json"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a pipeline of diffusers reads captions and draws.

    tokens: of a caption, for its one encoder or its T5; 0: it reads labels.
    steps, guidance: that it draws with where nothing else is said.
    reads_padding: features of padding are read like those of text.
    encoders: folders of its CLIPs and its T5, if it has several.
    clip_tokens: of a caption, for the CLIPs.
    clip_features: whether features of the CLIPs are read; else their vectors alone.
    projected: whether these vectors are projected.
    side: of its latents, where the network does not say it.
    """

    tokens: int
    steps: int
    guidance: float
    reads_padding: bool = False
    encoders: tuple[str, ...] = ()
    clip_tokens: int = 0
    clip_features: bool = False
    projected: bool = False
    side: int = 64


PIPELINES: dict[str, Pipeline] = {
    "StableDiffusionPipeline": Pipeline(77, 50, 7.5, reads_padding=True),
    "PixArtAlphaPipeline": Pipeline(120, 20, 4.5),
    "DiTPipeline": Pipeline(0, 50, 4.0),
    "StableDiffusion3Pipeline": Pipeline(
        256,
        28,
        7.0,
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
        clip_tokens=77,
        clip_features=True,
        projected=True,
    ),
    "FluxPipeline": Pipeline(
        512,
        28,
        3.5,
        encoders=("text_encoder", "text_encoder_2"),
        clip_tokens=77,
        side=128,
    ),
}
# Pipelines of networks that are not here, and what their network has besides.
NOT_HERE = {
    "StableDiffusionXLPipeline": "its U-Net adds embeddings of the pooled text and of "
    "six numbers, the sizes of the picture and its cut (addition_embed_type "
    "'text_time', addition_time_embed_dim, projection_class_embeddings_input_dim), and "
    "has several transformers in a block (transformer_layers_per_block 1, 2 and 10)",
}
_BUILDERS = {
    unet.UNetConfig: denoisers.u_net,
    dit.DiTConfig: denoisers.transformer,
    mmdit.MMDiTConfig: denoisers.mm_dit,
}


def load(
    where: str,
    folder: pathlib.Path,
    elsewhere: Elsewhere,
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
    if name in NOT_HERE:
        raise config.ConfigError(f"{where}: a {name}: {NOT_HERE[name]}")
    if name not in PIPELINES:
        raise config.ConfigError(
            f"{where}: a {name}; known: {', '.join(PIPELINES)}. The network alone can "
            "be read with scaling_ldm.weights"
        )
    how = PIPELINES[name]
    scheduler = scheduler_config.read(where, folder / "scheduler")
    place = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
    tokens = how.tokens + how.clip_tokens * how.clip_features
    like = types.SimpleNamespace(text_tokens=tokens, image_shape=(how.side, how.side))
    found = published.find(place, like)
    network = _network(found.network, scheduler.schedule)
    if how.encoders:
        reader = _several(where, folder, how, found.network, elsewhere)
    else:
        reader = _one(folder, how, elsewhere)
    autoencoder = elsewhere.get("autoencoder") or folder / "vae"
    H, W, C = found.network.image_shape
    guided = how.guidance
    if name == "FluxPipeline" and not found.network.guidance:
        guided = None  # distilled to need none
    return LoadedModel(
        name=folder.resolve().name,
        denoise=samplers.denoiser(
            network,
            scheduler.schedule,
            prediction=scheduler.prediction,
            x0_transform=scheduler.x0_transform,
            params=jax.device_put(found.load(), jax.local_devices()[0]),
        ),
        shape=(H, W, C),
        conditioning=network.conditioning,
        classes=getattr(found.network, "classes", 0),
        about={"pipeline": name},
        drawing={
            **scheduler.sampler,
            "steps": how.steps,
            "guidance": guided,
            "grid": lambda steps: scheduler.grid(steps, network.image_tokens),
        },
        _captions=reader,
        _autoencoder=functools.partial(pretrained.autoencoder, os.fspath(autoencoder)),
    )


def _one(
    folder: pathlib.Path, how: Pipeline, elsewhere: Elsewhere
) -> captions.CaptionReader | None:
    """The reader of a pipeline with one text encoder, or with none."""
    if not how.tokens:
        return None
    given = elsewhere.get("text_encoder")
    own = given is None
    opened = functools.partial(
        pretrained.text_encoder,
        os.fspath(folder / "text_encoder" if own else given),
        tokenizer=folder / "tokenizer" if own else None,
    )
    return captions.FeatureReader(opened, how.tokens, "float32", how.reads_padding)


def _several(
    where: str,
    folder: pathlib.Path,
    how: Pipeline,
    network: mmdit.MMDiTConfig,
    elsewhere: Elsewhere,
) -> captions.CaptionReader:
    """The reader of CLIPs and a T5; a T5 that is not there is read as zeros."""
    if elsewhere.get("text_encoder") is not None:
        raise config.ConfigError(
            f"{where}: text_encoder names one encoder, and this pipeline has "
            f"{len(how.encoders)}, which are read from its folder"
        )
    last = {"skip": 1, "final_norm": False} if how.clip_features else {}
    if not how.projected:
        last["projection"] = 0  # the file of a whole CLIP may have one

    *clips, t5 = how.encoders

    def opened(name: str, **changes: Any) -> captions.Loader:
        def load() -> pretrained.PretrainedTextEncoder:
            found = pretrained.text_encoder(
                os.fspath(folder / name),
                tokenizer=folder / name.replace("text_encoder", "tokenizer"),
                **changes,
            )
            if name != t5 and how.projected and "pooled" not in found.params:
                raise config.ConfigError(
                    f"{folder / name}: no text_projection.weight, and the network "
                    "reads projected vectors"
                )
            return found

        return load

    return captions.SeveralReader(
        [opened(name, **last) for name in clips],
        opened(t5) if (folder / t5).is_dir() else None,
        (how.clip_tokens, how.tokens),
        network.text_width,
        how.clip_features,
    )


def _network(cfg: Any, schedule: noise.Schedule) -> denoisers.Denoiser:
    """The network; its t is that of the table / 1000, at any length of the table.

    A second half of the channels, a learned variance, is left out.
    """
    network = _BUILDERS[type(cfg)](cfg)
    if isinstance(schedule, noise.Discrete):
        network = dataclasses.replace(
            network, time_range=(0.0, schedule.steps / scheduler_config.TIME_SCALE)
        )
    channels, whole = cfg.image_shape[-1], network.apply
    if getattr(cfg, "out_channels", 0) == 2 * channels:

        def apply(*given: Any) -> jax.Array:
            return whole(*given)[..., :channels]

        network = dataclasses.replace(network, apply=apply)
    return network
