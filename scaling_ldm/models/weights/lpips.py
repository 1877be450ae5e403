"""LPIPS: torchvision's backbones and the heads of the package lpips, without torch.

The heads (a few thousand values) are in the wheel of lpips 0.1.4. A backbone is a file
of torchvision: vgg16-397923af.pth or alexnet-owt-7be5be79.pth. Both are read from a
path. The package depends on torch and torchvision, which its files do not need:
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
    """The file of the heads in the installed package, or None; nothing is imported."""
    place = hub.package(PACKAGE)
    if place is None or not (place / FILE.format(config.name)).is_file():
        return None
    return place / FILE.format(config.name)


def pairs(config: network.LpipsConfig) -> list[layout.Pair]:
    """Every leaf and its tensor."""
    tree = network.shapes(config)

    def name(path: layout.Path) -> str:
        part, index = path
        return f"features.{index}" if part == "backbone" else f"lin{index}.model.1"

    return layout.leaves(tree, name, lambda path: True)


def load(
    backbone: str | pathlib.Path, heads: str | pathlib.Path, config: network.LpipsConfig
) -> dict[str, Any]:
    """Reads parameters; both may be one file, as `save` writes it.

    Args:
      backbone: torchvision's state dict, whose classifier is left out.
      heads: those of the package.

    Raises:
      WeightsError: there is no such file, or the tensors belong to another network; all
        differences are listed.
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
    """Writes backbone and heads to one .safetensors file, which `load` reads."""
    layout.save(layout.write(pairs(config), params), path)
