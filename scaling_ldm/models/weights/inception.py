"""The weights of the 2015 Inception, as torch-fidelity and pytorch-fid publish them.

The files are weights-inception-2015-12-05-6726825d.pth and
pt_inception-2015-12-05-6726825d.pth. Both name the layers alike. They are read as they
are, or from .safetensors.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from scaling_ldm.models.encoders import inception as network
from scaling_ldm.models.weights import batch_norm, layout, torch_file


def pairs() -> list[layout.Pair]:
    """Every leaf and its tensor, before the norms are folded."""
    found: list[layout.Pair] = []

    def walk(path: layout.Path, tree: dict[str, Any]) -> None:
        if "kernel" not in tree:
            for key, node in tree.items():
                walk((*path, key), node)
            return
        name, shape = ".".join(path), tree["kernel"].shape
        found.extend(batch_norm.pairs(path, f"{name}.conv", f"{name}.bn", shape))

    tree = network.shapes()
    last = tree.pop("fc")["kernel"].shape
    walk((), tree)
    found.append(layout.dense(("fc", "kernel"), "fc.weight", last))
    found.append(layout.vector(("fc", "bias"), "fc.bias", last[1:]))
    return found


def read(tensors: layout.Tensors) -> dict[str, Any]:
    """Parameters from the tensors of a state dict.

    Raises:
      WeightsError: tensors of another network; all differences are listed.
    """
    tree = layout.read(
        pairs(), batch_norm.known(tensors), "the 2015 Inception's", np.float32
    )
    return batch_norm.fold(tree, network.EPSILON)


def load(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads parameters from a torch file, a .safetensors file or its directory.

    Raises:
      WeightsError: there is no such file, or it belongs to another network, such as
        torchvision's Inception.
    """
    return read(torch_file.tensors(path))
