"""One table of names and shapes, read in both directions; numpy and safetensors only.

A layout pairs each leaf of one of our parameter trees with a tensor of a published
checkpoint: its name there, its shape there, and how axes move. Reading and writing are
the two directions of the same pairs, so what is read and written again is bit for bit
what it was. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

Path = tuple[str, ...]
Tensors = Mapping[str, np.ndarray]


class WeightsError(ValueError):
    """Tensors that do not fit a network; the message lists all of them."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One leaf and its tensor.

    Attributes:
      path: keys of our tree.
      name: of the tensor.
      ours, theirs: shapes.
      order: axes of ours, merged to len(order) groups, in their order: a dense kernel
        [in, out] is theirs [out, in], order (1, 0).
      merged: how ours is grouped into axes before they are reordered, as sizes.
    """

    path: Path
    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    merged: tuple[int, ...]
    order: tuple[int, ...]

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Theirs -> ours."""
        grouped = tuple(self.merged[axis] for axis in self.order)
        back = tuple(int(i) for i in np.argsort(self.order))
        return np.ascontiguousarray(
            tensor.reshape(grouped).transpose(back).reshape(self.ours)
        )

    def write(self, leaf: np.ndarray) -> np.ndarray:
        """Ours -> theirs."""
        moved = np.asarray(leaf).reshape(self.merged).transpose(self.order)
        return np.ascontiguousarray(moved.reshape(self.theirs))


def vector(path: Path, name: str, shape: tuple[int, ...]) -> Pair:
    """A bias, a scale: the same on both sides."""
    return Pair(path, name, shape, shape, shape, tuple(range(len(shape))))


def convolution(path: Path, name: str, shape: tuple[int, ...]) -> Pair:
    """[kh, kw, in, out] <-> [out, in, kh, kw]."""
    theirs = (shape[3], shape[2], shape[0], shape[1])
    return Pair(path, name, shape, theirs, shape, (3, 2, 0, 1))


def dense(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    inputs: int = 1,
    as_convolution: bool = False,
) -> Pair:
    """[in ..., out ...] <-> [out, in], or [out, in, 1, 1].

    Args:
      inputs: how many axes of ours are inputs: 2 for heads joined at the end.
    """
    merged = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    theirs = merged[::-1] + ((1, 1) if as_convolution else ())
    return Pair(path, name, shape, theirs, merged, (1, 0))


def read(pairs: Sequence[Pair], tensors: Tensors, what: str) -> dict[str, Any]:
    """Our tree, from a checkpoint's tensors.

    Raises:
      WeightsError: tensors missing, left over, or of another shape: all of them.
    """
    wanted = {pair.name: pair for pair in pairs}
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"unknown: {name}" for name in tensors if name not in wanted]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)}, wanted {pair.theirs}"
        for name, pair in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != pair.theirs
    ]
    if problems:
        raise WeightsError(
            f"these tensors are not {what} ({len(problems)} differ):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    tree: dict[str, Any] = {}
    for pair in pairs:
        node = tree
        for key in pair.path[:-1]:
            node = node.setdefault(key, {})
        node[pair.path[-1]] = pair.read(np.asarray(tensors[pair.name]))
    return tree


def write(pairs: Sequence[Pair], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, from our tree.

    Raises:
      WeightsError: leaves missing or of another shape.
    """
    leaves, problems = {}, []
    for pair in pairs:
        node: Any = tree
        for key in pair.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None or tuple(node.shape) != pair.ours:
            have = "missing" if node is None else f"of shape {tuple(node.shape)}"
            problems.append(f"{'/'.join(pair.path)}: {have}, wanted {pair.ours}")
        else:
            leaves[pair.name] = pair.write(np.asarray(node))
    if problems:
        raise WeightsError(
            "this tree is not the network's:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    return leaves


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file.

    Raises:
      WeightsError: no such file, or one that is not safetensors.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        raise WeightsError(f"{path}: no .safetensors file there")
    try:
        return safetensors.load_file(path)
    except Exception as e:  # its errors have no common class
        raise WeightsError(f"{path} cannot be read as safetensors: {e}") from e


def save(tensors: Tensors, path: str | pathlib.Path) -> None:
    """Writes a .safetensors file."""
    safetensors.save_file(dict(tensors), pathlib.Path(path))
