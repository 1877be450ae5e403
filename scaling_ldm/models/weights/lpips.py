"""LPIPS: torchvision's backbones and the heads of the package lpips; no torch.

The heads (a few thousand values) are in the wheel of lpips 0.1.4, a backbone is a file
of torchvision's: vgg16-397923af.pth or alexnet-owt-7be5be79.pth. Both are read from a
path. The package asks for torch and torchvision, which its files do not need:
`pip install --no-deps lpips==0.1.4`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from scaling_ldm.models.encoders import lpips as network
from scaling_ldm.models.weights import hub, layout, torch_file

PACKAGE = "lpips"
FILE = "weights/v0.1/{}.pth"


def find_heads(config: network.LpipsConfig) -> pathlib.Path | None:
    """The heads' file in the installed package, None without it; imports nothing."""
    place = hub.package(PACKAGE)
    if place is None or not (place / FILE.format(config.name)).is_file():
        return None
    return place / FILE.format(config.name)


def pairs(config: network.LpipsConfig) -> list[layout.Pair]:
    """Every leaf and its tensor."""
    tree, found = network.shapes(config), []
    for index, layer in tree["backbone"].items():
        path, name = ("backbone", index), f"features.{index}"
        kernel, bias = ((*path, part) for part in ("kernel", "bias"))
        size = layer["kernel"].shape
        found.append(layout.convolution(kernel, f"{name}.weight", size))
        found.append(layout.vector(bias, f"{name}.bias", size[-1:]))
    for i, head in tree["heads"].items():
        path, name = ("heads", i, "kernel"), f"lin{i}.model.1.weight"
        size = head["kernel"].shape
        found.append(layout.dense(path, name, size, as_convolution=True))
    return found


def load(
    backbone: str | pathlib.Path, heads: str | pathlib.Path, config: network.LpipsConfig
) -> dict[str, Any]:
    """Parameters; both may be one file, as `save` writes it.

    Args:
      backbone: torchvision's state dict, whose classifier is left out.
      heads: those of the package.

    Raises:
      layout.WeightsError: no such files, or of another network; all differences.
    """
    given = {**torch_file.tensors(backbone), **torch_file.tensors(heads)}
    given = {
        name: value
        for name, value in given.items()
        if not name.startswith("classifier.")
    }
    what = f"those of LPIPS ({config.name})"
    return layout.read(pairs(config), given, what, np.float32)


def save(
    params: dict[str, Any], path: str | pathlib.Path, config: network.LpipsConfig
) -> None:
    """Writes backbone and heads to one .safetensors file, under the names above."""
    layout.save(layout.write(pairs(config), params), path)
