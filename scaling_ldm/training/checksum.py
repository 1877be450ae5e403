"""A hash of a tree of arrays that is the same on every mesh, and of each of its parts.

Each 32-bit word is mixed with the number of its leaf and its place there (by murmur3's
finaliser). The results are added modulo 2^32, so their order has no effect, and the
checksum of a tree is the sum of those of its parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Part(NamedTuple):
    """A child of a tree.

    tree: the child.
    first: the number of its first leaf among the leaves of the whole tree.
    """

    tree: Any
    first: int


def parts(tree: Any) -> dict[str, Part]:
    """The children of a tree, by name and in order."""
    found: dict[str, Part] = {}
    first = 0
    children, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    for path, child in children:
        name = jax.tree_util.keystr(path, simple=True)
        found[name] = Part(child, first)
        first += len(jax.tree.leaves(child))
    return found


def of(tree: Any, first: int = 0) -> int:
    """A 32-bit hash of all bits and their places.

    Args:
      first: the number of the first leaf, for a part of a larger tree.
    """
    sums = _sums(tree, first)
    return sum(int(s) for s in jax.device_get(sums)) % 2**32


def of_parts(tree: Any) -> dict[str, int]:
    """Name of a child -> its hash within the tree; their sum is that of the tree."""
    sums = {name: _sums(part.tree, part.first) for name, part in parts(tree).items()}
    return {
        name: sum(int(s) for s in found) % 2**32
        for name, found in jax.device_get(sums).items()
    }


def _sums(tree: Any, first: int) -> list[jax.Array]:
    return [
        _leaf_sum(leaf, np.uint32(i * 0x9E3779B1 % 2**32))
        for i, leaf in enumerate(jax.tree.leaves(tree), first)
    ]


@jax.jit
def _leaf_sum(leaf: jax.Array, salt: jax.Array) -> jax.Array:
    """The sum of one array; arrays of one shape share the compiled code."""
    width = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    sharding = jax.typeof(words).sharding
    sharding = None if sharding.mesh.empty else sharding
    words ^= salt
    for axis in range(words.ndim):
        words = words * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis, out_sharding=sharding
        )
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)
