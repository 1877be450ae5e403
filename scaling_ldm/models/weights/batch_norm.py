"""Convolutions and the fixed batch norms after them, as one layer.

A checkpoint holds a kernel and the norm's scale, bias, mean and variance. Here they are
a kernel and a bias: y = (k * x - mean) scale / sqrt(variance + epsilon) + bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling_ldm.models.weights import layout
from scaling_ldm.records.errors import WeightsError

_NORM = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}
_COUNTER = ".num_batches_tracked"


def kernel(path: layout.Path, name: str, shape: tuple[int, ...]) -> layout.Pair:
    """A kernel [kh, kw, in, out], [k, k, C] if depthwise, or [in, out] of one pixel."""
    path, name = (*path, "kernel"), f"{name}.weight"
    if len(shape) == 4:
        return layout.convolution(path, name, shape)
    if len(shape) == 2:
        return layout.dense(path, name, shape, as_convolution=True)
    theirs = (shape[2], 1, *shape[:2])
    return layout.Pair(path, name, shape, theirs, shape, (2, 0, 1))


def pairs(
    path: layout.Path, convolution: str, norm: str, shape: tuple[int, ...]
) -> list[layout.Pair]:
    """A convolution without bias, and its norm under the key "norm"."""
    found = [kernel(path, convolution, shape)]
    for ours, theirs in _NORM.items():
        place = (*path, "norm", ours)
        found.append(layout.vector(place, f"{norm}.{theirs}", shape[-1:]))
    return found


def known(tensors: layout.Tensors) -> dict[str, Any]:
    """Leaves out the norms' counters of training steps."""
    return {name: t for name, t in tensors.items() if not name.endswith(_COUNTER)}


def fold(tree: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """The tree with every norm folded into its layer, {"kernel", "bias"} in float32.

    Raises:
      WeightsError: variances below zero.
    """
    if "norm" not in tree:
        return {
            key: fold(value, epsilon) if isinstance(value, Mapping) else value
            for key, value in tree.items()
        }
    norm = {key: np.asarray(value, np.float64) for key, value in tree["norm"].items()}
    if not np.all(norm["variance"] + epsilon > 0):
        raise WeightsError("a batch norm's variance is below zero")
    gain = norm["scale"] / np.sqrt(norm["variance"] + epsilon)
    folded = {
        "kernel": np.asarray(tree["kernel"], np.float64) * gain,
        "bias": norm["bias"] - norm["mean"] * gain,
    }
    return {key: value.astype(np.float32) for key, value in folded.items()}
