"""Checkpoints on disk: which files they are, and their tensors, read one at a time.

A checkpoint is a .safetensors file, or a directory with one, or with its parts, as
Hugging Face's libraries write them: under a usual name or another one, in full or half
precision. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  it adds bfloat16 to numpy
import numpy as np
import safetensors

from scaling_ldm import records
from scaling_ldm.records.errors import WeightsError

CONFIG = "config.json"
_WEIGHTS = ("model", "diffusion_pytorch_model")
_SUFFIX = ".safetensors"
_INDEX = re.compile(r"(.+)\.safetensors\.index(\.[\w-]+)?\.json")
_PART = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Types of safetensors that numpy has. The floats are types of parameters.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
_OTHERS = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64"}
FLOATS = tuple(_FLOATS.values())


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in its file; its shape is known, and np.asarray reads its values.

    dtype: its type as numpy calls it, or as safetensors does where numpy has none.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.dtype not in (*FLOATS, *_OTHERS.values()):
            raise WeightsError(f"{self.file}: {self.name} is {self.dtype}; {READABLE}")
        with safetensors.safe_open(self.file, "numpy") as opened:
            values = opened.get_tensor(self.name)
        return values if dtype is None else values.astype(dtype, copy=False)


# What to do about tensors of another type. Those of 8 bits are rounded, and their
# scales are elsewhere or nowhere.
READABLE = (
    f"parameters are read from {', '.join(FLOATS[1:])} or {FLOATS[0]}: take the "
    "publisher's file in one of these types, or convert this one"
)


def stored(path: str | pathlib.Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name; their values are read later.

    Args:
      path: a .safetensors file, the index of several, or a directory. In a directory,
        a usual name goes before others, and full precision before its variants.

    Raises:
      WeightsError: there is nothing to read, it is not safetensors, or a directory
        holds several checkpoints of which none has a usual name.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file{_near(path)}")
    if _INDEX.fullmatch(path.name):
        return _sharded(path)
    if path.suffix != _SUFFIX:
        raise WeightsError(f"{path} is not safetensors; {_pickled([path.name])}")
    types = _FLOATS | _OTHERS
    try:
        with safetensors.safe_open(path, "numpy") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118  not a mapping
                part = opened.get_slice(name)
                kind = part.get_dtype()
                shape = tuple(part.get_shape())
                found[name] = Stored(path, name, shape, types.get(kind, kind))
            return found
    except Exception as e:  # its errors have no common class
        raise WeightsError(f"{path} cannot be read as safetensors: {e}") from e


def _near(path: pathlib.Path) -> str:
    """What lies where a file was looked for, for the message of an error."""
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    there = sorted(file.name for file in path.parent.iterdir())
    weights = [name for name in there if name.endswith(_SUFFIX)]
    return (
        f"; {path.parent} holds {', '.join(weights or there) or 'nothing'}: name one "
        "of these, or the folder"
    )


def _pickled(names: list[str]) -> str:
    """What to do about weights that are stored in another way."""
    found = [name for name in names if name.endswith(_PICKLED)]
    if not found:
        return "weights are read from .safetensors files"
    return (
        f"{', '.join(found)} is pickled. Pickled checkpoints (.bin, .pt, .ckpt) may "
        "run code and are not read from a folder: save them once more with "
        "save_pretrained(..., safe_serialization=True), or name one file"
    )


def _directory(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of the one checkpoint of a directory, or of that of a usual name."""
    names = sorted(file.name for file in path.iterdir())
    found = _checkpoints(path, names)
    usual = [f"{stem}{_SUFFIX}" for stem in _WEIGHTS]
    chosen = [name for name in usual if name in found][:1] or sorted(found)
    if not chosen:
        raise WeightsError(
            f"{path} holds no weights to read: {_pickled(names)}. It holds "
            f"{', '.join(names) or 'nothing'}"
        )
    if len(chosen) > 1:
        raise WeightsError(
            f"{path} holds several checkpoints, {', '.join(chosen)}, and none is "
            f"called {' or '.join(usual)}: name one of its files"
        )
    files = found[chosen[0]]
    return _parts(files) if _PART.fullmatch(files[0].name) else stored(files[0])


def _checkpoints(path: pathlib.Path, names: list[str]) -> dict[str, list[pathlib.Path]]:
    """The checkpoints of a directory by the name that each would have as one file.

    Args:
      names: the names of its files, in order.

    Returns:
      For each its file, its index or, without an index, its parts.
    """
    found: dict[str, list[pathlib.Path]] = {}
    listed: set[Any] = set()
    for name in names:
        if match := _INDEX.fullmatch(name):
            found[f"{match[1]}{match[2] or ''}{_SUFFIX}"] = [path / name]
            places = read_json(path / name).get("weight_map")
            listed |= set(places.values() if isinstance(places, Mapping) else ())
    indexed = frozenset(found)
    for name in names:
        match = _PART.fullmatch(name)
        whole = f"{match[1]}{_SUFFIX}" if match else name
        if match and whole not in indexed and name not in listed:
            found.setdefault(whole, []).append(path / name)
        elif name.endswith(_SUFFIX) and not match and name not in listed:
            found[name] = [path / name]  # goes before an index of the same name
    return found


def _parts(files: list[pathlib.Path]) -> dict[str, Stored]:
    """The tensors of parts without an index, as `_checkpoints` gives them."""
    numbers = [_PART.fullmatch(file.name) for file in files]
    have = {int(match[2]) for match in numbers if match}
    wanted = {int(match[3]) for match in numbers if match}
    if len(wanted) != 1 or have != set(range(1, max(wanted) + 1)):
        raise WeightsError(
            f"{files[0].parent} holds {', '.join(file.name for file in files)}, which "
            "are not all the parts of a checkpoint"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        part = stored(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise WeightsError(f"{file}: {twice} are in an earlier part, too")
        tensors |= part
    return tensors


def _sharded(index: pathlib.Path) -> dict[str, Stored]:
    """The tensors of the files that an index lists."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index} has no weight_map")
    files = sorted(set(places.values()))
    missing = [
        name
        for name in files
        if pathlib.Path(name).name != name or not (index.parent / name).is_file()
    ]
    if missing:
        raise WeightsError(f"{index} lists files that are missing: {missing}")
    tensors: dict[str, Stored] = {}
    for name in files:
        tensors |= stored(index.parent / name)
    if differing := sorted(set(places) ^ set(tensors)):
        raise WeightsError(f"{index} and its files differ in {differing}")
    return tensors


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      WeightsError: there is no such file, or it holds no object.
    """
    path = pathlib.Path(path)
    try:
        return records.parse_object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise WeightsError(
            f"{path.parent} is not a folder with a {path.name} beside its weights"
        ) from e
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path} cannot be read as JSON: it is {e}") from e


def config(directory: str | pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a checkpoint's directory."""
    return read_json(pathlib.Path(directory) / CONFIG)


def beside(path: str | pathlib.Path) -> dict[str, Any]:
    """The config.json of a checkpoint's directory or beside its file; {}: none."""
    path = pathlib.Path(path)
    found = (path if path.is_dir() else path.parent) / CONFIG
    return read_json(found) if found.is_file() else {}


def sha256(path: str | pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str | pathlib.Path) -> str:
    """The SHA-256 of a checkpoint's weights, in hexadecimal.

    For several files it is that of a text with their names and checksums.

    Raises:
      WeightsError: there is nothing to read, or it is not safetensors.
    """
    found = sorted({tensor.file for tensor in stored(path).values()})
    if len(found) == 1:
        return sha256(found[0])
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in found)
    return hashlib.sha256(lines.encode()).hexdigest()
