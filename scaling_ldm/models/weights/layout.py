"""One table of names and shapes, read in both directions; numpy and safetensors only.

A layout pairs each leaf of one of our parameter trees, or a part of it, with a tensor
of a published checkpoint: its name there, its shape there, and how axes move. Reading
and writing are the two directions of the same pairs, so what is read and written again
is bit for bit what it was. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from scaling_ldm import records
from scaling_ldm.models.weights import files

Path = tuple[str, ...]
Tensors = Mapping[str, Any]  # name -> what has a shape and becomes an array
WeightsError = files.WeightsError


@dataclasses.dataclass(frozen=True)
class Pair:
    """One leaf, or a part of it, and its tensor.

    Attributes:
      path: keys of our tree.
      name: of the tensor.
      ours, theirs: shapes.
      order: axes of ours, merged to len(order) groups, in their order: a dense kernel
        [in, out] is theirs [out, in], order (1, 0).
      merged: how ours is grouped into axes before they are reordered, as sizes.
      at, whole: the leaf has the shape `whole` and this pair is leaf[at]: one layer
        of stacked ones, one of fused projections. Parts must cover the leaf.
    """

    path: Path
    name: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]
    merged: tuple[int, ...]
    order: tuple[int, ...]
    at: tuple[int | slice, ...] = ()
    whole: tuple[int, ...] = ()

    @property
    def leaf(self) -> tuple[int, ...]:
        """Shape of the whole leaf."""
        return self.whole if self.at else self.ours

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


@dataclasses.dataclass(frozen=True)
class FixedTensor:
    """A tensor of theirs that is a constant here: checked if given, always written."""

    name: str
    value: np.ndarray
    tolerance: float = 5e-3  # it may have been stored in bfloat16


def vector(path: Path, name: str, shape: tuple[int, ...], **part: Any) -> Pair:
    """A bias, a scale, a table: the same on both sides."""
    return Pair(path, name, shape, shape, shape, tuple(range(len(shape))), **part)


def joined(path: Path, name: str, shape: tuple[int, ...], **part: Any) -> Pair:
    """[heads, head width] <-> [heads * head width]."""
    size = (math.prod(shape),)
    return Pair(path, name, shape, size, size, (0,), **part)


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
    **part: Any,
) -> Pair:
    """[in ..., out ...] <-> [out, in], or [out, in, 1, 1].

    Args:
      inputs: how many axes of ours are inputs: 2 for heads joined at the end.
      part: `at` and `whole`, where it is a part of a leaf.
    """
    merged = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    theirs = merged[::-1] + ((1, 1) if as_convolution else ())
    return Pair(path, name, shape, theirs, merged, (1, 0), **part)


def patches(path: Path, name: str, shape: tuple[int, ...], patch: int) -> Pair:
    """[patch * patch * in, out] of a dense layer on cut patches <-> a convolution."""
    merged = (patch, patch, shape[0] // patch**2, shape[1])
    theirs = (merged[3], merged[2], patch, patch)
    return Pair(path, name, shape, theirs, merged, (3, 2, 0, 1))


def named(
    tensors: Tensors, rename: Callable[[str], str | None], what: str
) -> dict[str, Any]:
    """The tensors under the names that a layout knows.

    Args:
      rename: None leaves a tensor out, by its name.

    Raises:
      WeightsError: two different tensors become one.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        new = rename(name)
        if new in renamed and not np.array_equal(tensor, renamed[new]):
            raise WeightsError(f"{what}: two different tensors are called {new}")
        if new is not None:
            renamed[new] = tensor
    return renamed


def read(
    pairs: Sequence[Pair],
    tensors: Tensors,
    what: str,
    dtype: Any = None,
    fixed: Sequence[FixedTensor] = (),
) -> dict[str, Any]:
    """Our tree, from a checkpoint's tensors.

    Args:
      pairs: where several name the same part of a leaf, their tensors must be equal.
      dtype: of every leaf; None: as stored.
      fixed: constants that may be there.

    Raises:
      WeightsError: tensors missing, left over, of another shape, constants of another
        value, or copies that differ: all of them.
    """
    wanted = {pair.name: pair for pair in pairs}
    known = wanted.keys() | {constant.name for constant in fixed}
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"unknown: {name}" for name in tensors if name not in known]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)}, wanted {pair.theirs}"
        for name, pair in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != pair.theirs
    ]
    for constant in fixed:
        if constant.name in tensors:
            problems += _differences(constant, tensors[constant.name])
    leaves: dict[Path, np.ndarray] = {}
    first: dict[tuple[Path, str], str] = {}  # the tensor that each part came from
    for pair in () if problems else pairs:
        part = pair.read(np.asarray(tensors[pair.name], dtype))
        if pair.path not in leaves:
            leaves[pair.path] = np.empty(pair.leaf, part.dtype)
        leaf, place = leaves[pair.path], (pair.path, repr(pair.at))
        if leaf.dtype != part.dtype:
            problems.append(
                f"{pair.name} is {part.dtype}, another part of "
                f"{'/'.join(pair.path)} {leaf.dtype}; read them as one dtype"
            )
        elif place not in first:
            first[place] = pair.name
            leaf[pair.at] = part
        elif not np.array_equal(leaf[pair.at], part):
            problems.append(f"{pair.name} is not equal to {first[place]}")
    if problems:
        raise WeightsError(
            f"these tensors are not {what} ({len(problems)} differ):\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _differences(constant: FixedTensor, tensor: Any) -> list[str]:
    tensor = np.asarray(tensor, np.float32)
    if tensor.shape != constant.value.shape:
        wanted = constant.value.shape
        return [f"shape of {constant.name}: {tensor.shape}, wanted {wanted}"]
    error = np.abs(tensor - constant.value).max()
    if not error <= constant.tolerance:
        return [f"{constant.name} is another constant: off by {error:.3g}"]
    return []


def write(
    pairs: Sequence[Pair], tree: Mapping[str, Any], fixed: Sequence[FixedTensor] = ()
) -> dict[str, np.ndarray]:
    """A checkpoint's tensors, from our tree.

    Raises:
      WeightsError: leaves missing or of another shape.
    """
    leaves = {constant.name: constant.value for constant in fixed}
    problems = []
    for pair in pairs:
        node: Any = tree
        for key in pair.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None or tuple(node.shape) != pair.leaf:
            have = "missing" if node is None else f"of shape {tuple(node.shape)}"
            problems.append(f"{'/'.join(pair.path)}: {have}, wanted {pair.leaf}")
        else:
            leaves[pair.name] = pair.write(np.asarray(node)[pair.at])
    if problems:
        raise WeightsError(
            "this tree is not the network's:\n"
            + "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        )
    return leaves


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a .safetensors file, or of a checkpoint's directory.

    Raises:
      WeightsError: nothing to read, or what is there is not safetensors.
    """
    return {name: np.asarray(tensor) for name, tensor in files.stored(path).items()}


def save(tensors: Tensors, path: str | pathlib.Path) -> None:
    """Writes a .safetensors file, as readable as other new files; whole or not."""
    records.write_file(path, lambda file: file.write(safetensors.save(dict(tensors))))
