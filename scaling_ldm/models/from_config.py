"""From an experiment and a size to its network.

Only this module reads `config.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from scaling_ldm import config
from scaling_ldm.models import denoisers, encoders
from scaling_ldm.models.denoisers import dit, mmdit, unet
from scaling_ldm.models.encoders import autoencoder_kl

# Widths of the resolutions of an autoencoder, in units of its base width.
AUTOENCODER_MULTIPLES = (1, 2, 2, 4)


def denoiser(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> denoisers.Denoiser:
    """The network of an experiment with one pair of numbers of `config.plan.sizes`.

    Raises:
      ConfigError: no network can be made of them.
    """
    name = experiment.model.architecture
    try:
        return _BUILDERS[name](network_config(experiment, width, depth, unroll))
    except ValueError as e:
        raise config.ConfigError(
            f"config.plan.sizes: {width} x {depth} is no {name} that config.model "
            f"allows: {e}"
        ) from e


def network_config(
    experiment: config.Experiment, width: int, depth: int, unroll: bool = False
) -> Any:
    """What decides the parameters and the arithmetic of the network of one size."""
    return _CONFIGS[experiment.model.architecture](experiment, width, depth, unroll)


def parameter_shapes(network: Any) -> Any:
    """The parameters of a `network_config`, as a tree of shapes; allocates nothing."""
    with jax.set_mesh(None):
        return jax.eval_shape(lambda: _INITS[type(network)](network, jax.random.key(0)))


def _text(experiment: config.Experiment) -> dict[str, Any]:
    """The fields about captions, which are words to look up or frozen features."""
    words = experiment.reads_words
    return {
        "text_tokens": experiment.data.text_tokens,
        "text_width": experiment.model.text_width,
        "vocab_size": experiment.data.vocab_size if words else 0,
    }


def _transformer(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> dit.DiTConfig:
    model = experiment.model
    return dit.DiTConfig(
        architecture=model.architecture,
        depth=depth,
        classes=model.classes,
        **_tokens(experiment, width, unroll),
    )


def _two_streams(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> mmdit.MMDiTConfig:
    double, single = depth, 0
    if experiment.model.architecture == "flux":
        double, single = mmdit.split(depth)
    return mmdit.MMDiTConfig(
        depth=double, single_depth=single, **_tokens(experiment, width, unroll)
    )


def _tokens(experiment: config.Experiment, width: int, unroll: bool) -> dict[str, Any]:
    """The fields that every transformer has."""
    model = experiment.model
    return _text(experiment) | {
        "width": width,
        "heads": model.heads_at(width),
        "image_shape": experiment.data.shape,
        "patch_size": model.patch_size,
        "mlp_ratio": model.mlp_ratio,
        "activation": model.activation,
        "norm": model.norm,
        "qk_norm": model.qk_norm,
        "positions": model.positions,
        "time_width": model.time_width,
        "dtype": denoisers.DTYPES[model.compute_dtype],
        "remat": model.remat_policy if model.remat else "none",
        "attention": model.attention,
        "unroll": unroll,
    }


def unet_config(
    experiment: config.Experiment, width: int, depth: int
) -> unet.UNetConfig:
    """The U-Net of `depth` resolutions that an experiment trains."""
    model = experiment.model
    H, W, C = experiment.data.shape
    multiples = unet.MULTIPLES[:depth]
    return unet.UNetConfig(
        base=width,
        heads=unet.one_or_each([model.heads_at(width * m) for m in multiples]),
        image_shape=(H, W, C),
        extra_channels=C if experiment.data.coarse else 0,
        dtype=denoisers.DTYPES[model.compute_dtype],
        remat=model.remat_policy if model.remat else "none",
        attention=model.attention,
        multiples=multiples,
        **_text(experiment),
    )


def autoencoder_config(
    experiment: config.Experiment, width: int, depth: int
) -> autoencoder_kl.AutoencoderConfig:
    """The autoencoder of `depth` resolutions that an experiment trains."""
    model = experiment.model
    return autoencoder_kl.AutoencoderConfig(
        channels=tuple(width * multiple for multiple in AUTOENCODER_MULTIPLES[:depth]),
        blocks=1,
        latent_channels=model.latent_channels,
        image_channels=experiment.data.shape[-1],
        groups=model.groups,
        middle_attention=False,
        dtype=denoisers.DTYPES[model.compute_dtype],
    )


def autoencoder(
    experiment: config.Experiment, width: int, depth: int
) -> encoders.Autoencoder:
    """The network that an autoencoder's experiment trains."""
    return encoders.autoencoder(autoencoder_config(experiment, width, depth))


def _unstacked(make: Callable[..., Any]) -> Callable[..., Any]:
    """Of a network whose blocks differ, so that there is no stack to unroll."""
    return lambda experiment, width, depth, unroll: make(experiment, width, depth)


_CONFIGS: dict[str, Callable[..., Any]] = {
    "in_context": _transformer,
    "cross_attention": _transformer,
    "adaln_zero": _transformer,
    "mmdit": _two_streams,
    "flux": _two_streams,
    "unet": _unstacked(unet_config),
    "autoencoder_kl": _unstacked(autoencoder_config),
}
_BUILDERS: dict[str, Callable[[Any], denoisers.Denoiser]] = {
    "in_context": denoisers.transformer,
    "cross_attention": denoisers.transformer,
    "adaln_zero": denoisers.transformer,
    "mmdit": denoisers.mm_dit,
    "flux": denoisers.mm_dit,
    "unet": denoisers.u_net,
}
_INITS: dict[type, Callable[..., Any]] = {
    dit.DiTConfig: dit.init,
    mmdit.MMDiTConfig: mmdit.init,
    unet.UNetConfig: unet.init,
    autoencoder_kl.AutoencoderConfig: autoencoder_kl.init,
}
