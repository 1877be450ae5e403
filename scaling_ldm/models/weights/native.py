"""Parameters under this library's own names, for networks that nobody else publishes.

A folder holds model.safetensors, whose tensors are named by their paths, such as
"entry/patch/kernel", and config.json, which says what to build.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.models.weights import files, layout
from scaling_ldm.models.weights.files import CONFIG

WEIGHTS = "model.safetensors"


def pairs(tree: Mapping[str, Any]) -> list[layout.Pair]:
    """Every leaf, named by its own path.

    Args:
      tree: nested dicts of arrays, or of shapes (`jax.eval_shape`).
    """
    found: list[layout.Pair] = []

    def walk(node: Mapping[str, Any], path: layout.Path) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))
            else:
                name = "/".join((*path, key))
                found.append(layout.vector((*path, key), name, tuple(value.shape)))

    walk(tree, ())
    return found


def save(
    params: Mapping[str, Any], folder: str | pathlib.Path, config: Mapping[str, Any]
) -> None:
    """Writes the folder; `config` says what the network is built from."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = layout.write(pairs(params), params)
    layout.save({k: np.asarray(v) for k, v in tensors.items()}, folder / WEIGHTS)
    text = json.dumps(records.stamped(config), indent=2)
    records.write_text(folder / CONFIG, text + "\n")


def load(folder: str | pathlib.Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the parameters of a tree of shapes.

    Raises:
      WeightsError: there is no such file, or it belongs to another network.
    """
    tensors = files.stored(folder)
    return layout.read(pairs(tree), tensors, "this network's")
