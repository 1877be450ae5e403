"""Pairs the leaves of our parameter trees with the tensors of published checkpoints.

A pair holds a leaf, or a part of it, and the name and shape of its tensor, and how axes
move. Reading and writing use the same pairs in opposite directions. So a checkpoint
that is read and written again is the same, bit for bit. Nothing is ever unpickled.
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
from scaling_ldm.records.errors import WeightsError

Path = tuple[str, ...]
Tensors = Mapping[str, Any]  # name -> an array, or what np.asarray makes one of
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One leaf, or a part of it, and its tensor.

    Attributes:
      path: keys of our tree.
      name: of the tensor.
      ours, theirs: shapes.
      merged: ours is first reshaped to these sizes.
      order: then its axes are put in this order, and it is reshaped to theirs. A dense
        kernel [in, out] is [out, in] there, so its order is (1, 0).
      at, whole: the leaf has the shape `whole` and this pair is leaf[at], such as one
        layer of a stack or one of several fused projections. Parts must cover the leaf.
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
        """From theirs to ours."""
        grouped = tuple(self.merged[axis] for axis in self.order)
        back = tuple(int(i) for i in np.argsort(self.order))
        return np.ascontiguousarray(
            tensor.reshape(grouped).transpose(back).reshape(self.ours)
        )

    def write(self, leaf: np.ndarray) -> np.ndarray:
        """From ours to theirs."""
        moved = np.asarray(leaf).reshape(self.merged).transpose(self.order)
        return np.ascontiguousarray(moved.reshape(self.theirs))


@dataclasses.dataclass(frozen=True)
class FixedTensor:
    """A tensor that is a constant here; checked where given, and always written."""

    name: str
    value: np.ndarray
    tolerance: float = 5e-3  # it may have been stored in bfloat16


def vector(path: Path, name: str, shape: tuple[int, ...]) -> Pair:
    """A bias, a scale or a table, which is the same on both sides."""
    return Pair(path, name, shape, shape, shape, tuple(range(len(shape))))


def convolution(path: Path, name: str, shape: tuple[int, ...]) -> Pair:
    """[kh, kw, in, out] here, [out, in, kh, kw] there."""
    theirs = (shape[3], shape[2], shape[0], shape[1])
    return Pair(path, name, shape, theirs, shape, (3, 2, 0, 1))


def dense(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    inputs: int = 1,
    as_convolution: bool = False,
) -> Pair:
    """[in ..., out ...] here, [out, in] or [out, in, 1, 1] there.

    Args:
      inputs: how many axes of ours are inputs; 2 where heads are joined.
    """
    merged = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    theirs = merged[::-1] + ((1, 1) if as_convolution else ())
    return Pair(path, name, shape, theirs, merged, (1, 0))


def leaves(
    tree: Any, name: Callable[[Path], str], pointwise: Callable[[Path], bool]
) -> list[Pair]:
    """Every leaf of a network that has no stacks, and its tensor.

    Args:
      tree: of shapes, as `jax.eval_shape` gives it for our `init`.
      name: path of a module -> its name there.
      pointwise: path of a module whose kernel is a matrix here -> whether it is a
        convolution of one pixel there.
    """
    found: list[Pair] = []

    def walk(node: Mapping[str, Any], path: Path) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))
                continue
            place, shape = (*path, key), tuple(value.shape)
            theirs = f"{name(path)}.{_LEAVES[key]}"
            if key != "kernel":
                found.append(vector(place, theirs, shape))
            elif len(shape) == 4:
                found.append(convolution(place, theirs, shape))
            else:
                inputs = len(shape) - 1 if path[-1] == "out" else 1  # joined heads
                pair = dense(place, theirs, shape, inputs, pointwise(path))
                found.append(pair)

    walk(tree, ())
    return found


def named(
    tensors: Tensors, rename: Callable[[str], str | None], what: str
) -> dict[str, Any]:
    """The tensors of a checkpoint under the names that a layout knows.

    Args:
      rename: name there -> name in the layout; None leaves the tensor out.

    Raises:
      WeightsError: two different tensors get one name.
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
    """Our tree, from the tensors of a checkpoint.

    Args:
      pairs: where several name the same part of a leaf, their tensors must be equal.
      what: whose tensors they should be, for the message of an error.
      dtype: of every leaf; None: as stored.
      fixed: constants that may be there.

    Raises:
      WeightsError: tensors that are missing, unknown, of another shape or not of
        floats, constants of another value, or copies that differ. The message lists all
        of them.
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
    given = [name for name in (*wanted, *(c.name for c in fixed)) if name in tensors]
    problems += _other_types({name: tensors[name] for name in given})
    for constant in () if problems else fixed:
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


def _other_types(tensors: Tensors) -> list[str]:
    """A line for each type that parameters are not read from."""
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in files.FLOATS:
            names.setdefault(str(tensor.dtype), []).append(name)
    return [
        f"type {kind} of {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}"
        f": {files.READABLE}"
        for kind, found in names.items()
    ]


def _differences(constant: FixedTensor, tensor: Any) -> list[str]:
    tensor = np.asarray(tensor, np.float32)
    if tensor.shape != constant.value.shape:
        wanted = constant.value.shape
        return [f"shape of {constant.name}: {tensor.shape}, wanted {wanted}"]
    with np.errstate(invalid="ignore", over="ignore"):  # the values may be anything
        error = np.abs(tensor - constant.value).max()
    if not error <= constant.tolerance:
        return [f"{constant.name} differs from the expected constant by {error:.3g}"]
    return []


def write(
    pairs: Sequence[Pair], tree: Mapping[str, Any], fixed: Sequence[FixedTensor] = ()
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, from our tree.

    Raises:
      WeightsError: leaves that are missing or of another shape; all are listed.
    """
    tensors = {constant.name: constant.value for constant in fixed}
    problems = []
    for pair in pairs:
        node: Any = tree
        for key in pair.path:
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None or tuple(node.shape) != pair.leaf:
            have = "missing" if node is None else f"of shape {tuple(node.shape)}"
            problems.append(f"{'/'.join(pair.path)}: {have}, wanted {pair.leaf}")
        else:
            tensors[pair.name] = pair.write(np.asarray(node)[pair.at])
    if problems:
        raise WeightsError(
            "this tree is not the network's:\n"
            + "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        )
    return tensors


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a .safetensors file or of a checkpoint's directory.

    Raises:
      WeightsError: there is nothing to read, it is not safetensors, or it holds types
        that numpy does not have.
    """
    return {name: np.asarray(tensor) for name, tensor in files.stored(path).items()}


def save(tensors: Tensors, path: str | pathlib.Path) -> None:
    """Writes a .safetensors file, completely or not at all."""
    # safetensors takes the memory behind an array, in whatever order a view reads it.
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    records.write_file(path, lambda file: file.write(safetensors.save(whole)))
