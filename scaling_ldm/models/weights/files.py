"""Checkpoints on disk: which files they are, and their tensors, read one at a time.

A checkpoint is a .safetensors file, or a directory with one, or with several and their
index, as Hugging Face's libraries write them. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any

import ml_dtypes  # noqa: F401  it adds bfloat16 to numpy
import numpy as np
import safetensors

from scaling_ldm import records
from scaling_ldm.records.errors import WeightsError

CONFIG = "config.json"
_INDEX = ".safetensors.index.json"
_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in its file; its shape is known, and np.asarray reads its values."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with safetensors.safe_open(self.file, "numpy") as opened:
            values = opened.get_tensor(self.name)
        return values if dtype is None else values.astype(dtype, copy=False)


def stored(path: str | pathlib.Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name; their values are read later.

    Args:
      path: a .safetensors file, the index of several, or a directory.

    Raises:
      WeightsError: there is nothing to read, or it is not safetensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return _directory(path)
    if path.name.endswith(_INDEX) and path.is_file():
        return _sharded(path)
    if path.suffix != ".safetensors" or not path.is_file():
        raise WeightsError(f"{path}: no .safetensors file there")
    try:
        with safetensors.safe_open(path, "numpy") as opened:
            return {
                name: Stored(path, name, tuple(opened.get_slice(name).get_shape()))
                for name in opened.keys()  # noqa: SIM118  not a mapping
            }
    except Exception as e:  # its errors have no common class
        raise WeightsError(f"{path} cannot be read as safetensors: {e}") from e


def _directory(path: pathlib.Path) -> dict[str, Stored]:
    for name in _WEIGHTS:
        if (path / name).is_file():
            return stored(path / name)
        if (path / f"{name}.index.json").is_file():
            return _sharded(path / f"{name}.index.json")
    found = sorted(file.name for file in path.iterdir())
    weights = [name for name in found if name.endswith(".safetensors")]
    if len(weights) == 1:
        return stored(path / weights[0])
    raise WeightsError(
        f"{path} holds {len(weights) or 'no'} .safetensors files and none is called "
        f"{' or '.join(_WEIGHTS)}; it holds {', '.join(found) or 'nothing'}. Pickled "
        "checkpoints (.bin, .pt, .ckpt) are never read: save them once more with "
        "save_pretrained(..., safe_serialization=True), or name one file."
    )


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
        raise WeightsError(f"{index} lists files that are not there: {missing}")
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
            f"{path.parent} is no folder with a {path.name} beside its weights"
        ) from e
    except (OSError, ValueError) as e:
        raise WeightsError(f"{path} cannot be read as JSON: it is {e}") from e


def config(directory: str | pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a checkpoint's directory."""
    return read_json(pathlib.Path(directory) / CONFIG)


def sha256(path: str | pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: str | pathlib.Path) -> str:
    """The SHA-256 of a checkpoint's weights, in hexadecimal.

    With several files it is that of a text with their names and sums.

    Raises:
      WeightsError: there is nothing to read, or it is not safetensors.
    """
    found = sorted({tensor.file for tensor in stored(path).values()})
    if len(found) == 1:
        return sha256(found[0])
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in found)
    return hashlib.sha256(lines.encode()).hexdigest()
