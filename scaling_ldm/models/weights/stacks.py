"""Stacked and fused leaves of transformer blocks, each part beside its tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from scaling_ldm.models.weights import layout

_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def pairs(
    blocks: Any, names: Mapping[str, tuple[str, ...]], block: str
) -> list[layout.Pair]:
    """Every part of stacked blocks and its tensor.

    Args:
      blocks: shapes of our leaves, [layers, ...].
      names: a module's path in a block -> its name in theirs; several for one that
        fuses several of theirs along an axis, the second of a kernel, first of a bias.
      block: theirs, with {} for the layer's number.
    """
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        *module, kind = (key.key for key in keys)
        path = ("blocks", *module, kind)
        fused = names["/".join(module)]
        axis = 1 if kind == "kernel" else 0
        for layer in range(leaf.shape[0]):
            for i, name in enumerate(fused):
                shape, at = leaf.shape[1:], (layer,)
                if len(fused) > 1:
                    at = (layer, *[slice(None)] * axis, i)
                    shape = shape[:axis] + shape[axis + 1 :]
                theirs = f"{block.format(layer)}.{name}.{_KINDS[kind]}"
                found.append(_pair(path, theirs, shape, at, leaf.shape))
    return found


def _pair(
    path: layout.Path,
    name: str,
    shape: tuple[int, ...],
    at: tuple[int | slice, ...],
    whole: tuple[int, ...],
) -> layout.Pair:
    if path[-1] == "kernel":
        inputs = len(shape) - 1 if path[-2] == "out" else 1  # heads joined at the end
        return layout.dense(path, name, shape, inputs, at=at, whole=whole)
    if len(shape) > 1:  # a bias of heads
        return layout.joined(path, name, shape, at=at, whole=whole)
    return layout.vector(path, name, shape, at=at, whole=whole)
