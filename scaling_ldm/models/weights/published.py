"""Finds which network the weights in a folder or file belong to, in any known layout.

A folder in a layout of diffusers states it in its config.json, under `_class_name`. In
the files of DiT's authors (.pt, or the same names in safetensors), the shapes of the
tensors show it. They do not show the heads: those of the published sizes are known, and
for other sizes the caller gives them.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from scaling_ldm.models.denoisers import dit as dit_network
from scaling_ldm.models.denoisers import presets
from scaling_ldm.models.weights import (
    autoencoder_kl,
    dit,
    files,
    mmdit,
    pixart,
    torch_file,
    unet,
)
from scaling_ldm.records.errors import WeightsError

UNET = "UNet2DConditionModel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """The weights in one place.

    network: config of their network, in float32.
    load() -> its parameters, float32 arrays on the host.
    unsaid: paths "network.NAME" of fields of the config that the file does not say;
      they are those of `like`.
    part: which of several state dicts of a file they are, in words; "": the only one.
    """

    network: Any
    load: Callable[[], dict[str, Any]]
    unsaid: tuple[str, ...] = ()
    part: str = ""


def find(path: str | pathlib.Path, like: Any) -> Published:
    """The weights in a folder or file; their tensors are not read yet.

    Args:
      like: config of a network of that architecture. It gives tokens of a caption,
        sides of a latent and heads, if the layout lacks them.

    Raises:
      WeightsError: another layout, or a network that cannot be built here.
    """
    path = pathlib.Path(path)
    if not path.is_dir() or not (path / files.CONFIG).exists():
        return _official_dit(path, like)
    layout = files.config(path)
    name = layout.get("_class_name", "no known layout")
    if name not in LAYOUTS:
        raise WeightsError(
            f"its config.json is of {name}; known: {', '.join(LAYOUTS)}, and what the "
            "export stage wrote"
        )
    return LAYOUTS[name](path, layout, like)


Layout = Mapping[str, Any]


def _tokens(like: Any) -> int:
    return getattr(like, "text_tokens", 0)


def _unet(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    network, linear = unet.from_config(layout, _tokens(like))
    return Published(network=network, load=lambda: unet.load(path, network, linear))


def _dit(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    del like
    network = dit.from_config(layout)
    return Published(network=network, load=lambda: dit.load(path, network, "diffusers"))


def _pixart(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    network = pixart.from_config(layout, _tokens(like))
    return Published(network=network, load=lambda: pixart.load(path, network))


def _sd3(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    network = mmdit.sd3_from_config(layout, _tokens(like))
    return Published(network=network, load=lambda: mmdit.load(path, network))


def _flux(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    H, W, *_ = getattr(like, "image_shape", (64, 64))
    network = mmdit.flux_from_config(layout, _tokens(like), (H, W))
    return Published(network=network, load=lambda: mmdit.load(path, network))


def _autoencoder(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    del like
    network = autoencoder_kl.from_config(layout)
    return Published(network=network, load=lambda: autoencoder_kl.load(path)[1])


def _older(path: pathlib.Path, layout: Layout, like: Any) -> Published:
    """What diffusers called DiT and PixArt before they had classes of their own."""
    of_norm = {"ada_norm_zero": _dit, "ada_norm_single": _pixart}
    norm = layout.get("norm_type")
    if norm not in of_norm:
        raise WeightsError(
            f"its config.json is of a Transformer2DModel with norm_type {norm!r}; "
            f"known: {', '.join(of_norm)}"
        )
    return of_norm[norm](path, layout, like)


LAYOUTS: dict[str, Callable[[pathlib.Path, Layout, Any], Published]] = {
    UNET: _unet,
    "Transformer2DModel": _older,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "AutoencoderKL": _autoencoder,
}


def _official_dit(path: pathlib.Path, like: Any) -> Published:
    """A DiT of its authors: everything but the heads is in the shapes."""
    tensors, part = _of_authors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
    last = "final_layer.linear.weight"
    if any(name not in shapes for name in (*wanted, last)):
        raise WeightsError(
            f"{path} has no config.json and not the tensors of DiT's authors: a folder "
            f"of another network has a config.json of {', '.join(LAYOUTS)}"
        )
    width, channels, patch, _ = shapes[wanted[0]]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    H, W, *_ = getattr(like, "image_shape", (32, 32))
    if "pos_embed" in shapes:  # of a square
        H = W = patch * math.isqrt(shapes["pos_embed"][1])
    heads = presets.DIT_HEADS.get((width, len(blocks)), 0)
    network = dit_network.DiTConfig(
        architecture="adaln_zero",
        width=width,
        depth=len(blocks),
        heads=heads or getattr(like, "heads", 1),
        image_shape=(H, W, channels),
        patch_size=patch,
        classes=shapes[wanted[1]][0] - 1,
        grid=dit.GRID,
        out_channels=shapes[last][0] // patch**2,
    )
    return Published(
        network=network,
        load=lambda: dit.load(path, network, "official"),
        unsaid=() if heads else ("network.heads",),
        part=part,
    )


def _of_authors(path: pathlib.Path) -> tuple[Mapping[str, Any], str]:
    """The tensors in a file of DiT's authors, and `Published.part`."""
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        return torch_file.tensors(path), ""
    found = torch_file.state_dict(path)
    if not found.key:
        return found.tensors, ""
    others = f", not {' or '.join(found.others)}" if found.others else ""
    return found.tensors, f"{found.key!r} of {path.name}{others}"
