"""Tensors of a torch .pt or .pth file, without torch and without running its pickle.

A .pt file is a pickle beside raw storages: in a zip (torch 1.6 and later), or one after
the other in a plain file (before). A pickle may name functions, and naming them is how
such a file runs code. Here it may only name those that rebuild tensors, and argparse's
Namespace, with which training programs note their arguments. They are replaced by
functions that note what to read from which storage, and by an empty class. Everything
else is refused by name: optimizer states with their own classes, os.system.

Memory is bounded by the size of the file: nothing in it may be compressed, no tensor
may be larger than its storage, and distinct tensors together not larger than
LARGEST_FACTOR times the file. One that is named several times is read once.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from scaling_ldm.models.weights import files, layout
from scaling_ldm.records.errors import WeightsError

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What training programs save beside their weights.
_NO_STATE_DICTS = ("opt", "optimizer", "args", "scaler", "scheduler", "lr_scheduler")
LARGEST_FACTOR = 4
_MAGIC = 0x1950A86A20F9469CFC6C  # of the plain format, and its version
_VERSION = 1001


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: str  # one of _STORAGES
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What to read from a storage: first element, sizes and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unalterable(type):
    """The metaclass of classes that a pickle may name: they cannot be changed."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise WeightsError(f"it sets {name} of a class")


class _Namespace(metaclass=_Unalterable):
    """Arguments of a program, in place of argparse's class."""


class _Unpickler(pickle._Unpickler):  # pyrefly: ignore[missing-attribute]
    """Builds dicts, lists, numbers, strings and `_Tensor`s; refuses everything else.

    A pickle can also set fields of what it has built, so `_cut` checks them at the end.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("argparse", "Namespace"):
            return _Namespace
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            )
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        raise WeightsError(
            f"it names {module}.{name}; only tensors in dicts and lists are read. "
            "If you trust it, save the tensors alone: torch.save(torch.load(FILE, "
            "weights_only=False)['ema'], NEW_FILE)"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, _, count, *view = pid
        if word != "storage" or kind not in _STORAGES or (view and view[0] is not None):
            raise WeightsError(f"it refers to {pid!r}, which is no storage")
        return _Storage(kind, str(key), count)


def _load(file: Any) -> Any:
    """The next pickle of a file.

    In Python, not in C: there, a number of four bytes for the memo takes memory for all
    numbers below it, up to 69 GB.
    """
    return _Unpickler(file).load()


def _cut(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    """Reads the tensor, after a check that it lies within its storage.

    numpy itself would read past the end.
    """
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    sizes = (*shape, *strides, offset)
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise WeightsError(f"{sizes} are not a tensor's sizes")
    reach = offset + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    if not math.prod(shape):
        return np.zeros(shape, values.dtype)
    if reach >= values.size:
        raise WeightsError(
            f"a tensor {shape} with strides {strides} at {offset} exceeds its storage "
            f"of {values.size}"
        )
    if math.prod(shape) > values.size:
        raise WeightsError(
            f"a tensor {shape} with strides {strides} repeats the {values.size} values "
            "of its storage; save it with .contiguous()"
        )
    view = np.lib.stride_tricks.as_strided(
        values[offset:],
        shape,
        [stride * values.itemsize for stride in strides],
        writeable=False,
    )
    return np.array(view, order="C")


class _Resolver:
    """Replaces `_Tensor`s by arrays; OrderedDicts and a program's arguments by dicts.

    Args:
      values: reads a storage; called once for each.
      size: of the file, in bytes.
    """

    def __init__(self, values: Callable[[_Storage], np.ndarray], size: int) -> None:
        self._values, self._size, self._bytes = values, size, 0
        self._storages: dict[_Storage, np.ndarray] = {}
        self._tensors: dict[_Tensor, np.ndarray] = {}
        self._done: dict[int, tuple[Any, Any]] = {}  # by id; what has it is kept alive

    def resolve(self, tree: Any) -> Any:
        """The tree with arrays; parts that are there twice are one object again."""
        if not isinstance(tree, _Tensor | _Namespace | Mapping | list | tuple):
            return tree
        if id(tree) not in self._done:
            self._done[id(tree)] = tree, self._build(tree)
        return self._done[id(tree)][1]

    def _build(self, tree: Any) -> Any:
        if isinstance(tree, _Tensor):
            return self._tensor(tree)
        if isinstance(tree, _Namespace):
            tree = vars(tree)
        if isinstance(tree, Mapping):
            return {key: self.resolve(value) for key, value in tree.items()}
        return type(tree)(self.resolve(value) for value in tree)

    def _tensor(self, tensor: _Tensor) -> np.ndarray:
        if tensor not in self._tensors:
            if tensor.storage not in self._storages:
                self._storages[tensor.storage] = self._values(tensor.storage)
            found = _cut(tensor, self._storages[tensor.storage])
            self._bytes += found.nbytes
            if self._bytes > LARGEST_FACTOR * self._size:
                raise WeightsError(
                    f"its tensors are more than {LARGEST_FACTOR} times as large as the "
                    f"file of {self._size:,} bytes"
                )
            self._tensors[tensor] = found
        return self._tensors[tensor]


def _values(data: bytes, storage: _Storage) -> np.ndarray:
    dtype = np.dtype(_STORAGES[storage.kind])
    if len(data) != storage.count * dtype.itemsize:
        raise WeightsError(
            f"storage {storage.key} has {len(data)} bytes, not {storage.count} x "
            f"{dtype.itemsize}"
        )
    return np.frombuffer(data, dtype)


def _stored(file: zipfile.ZipFile, name: str, what: str) -> bytes:
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise WeightsError(f"{what} is compressed; torch.save stores it as it is")
    return file.read(name)


def _read_zip(file: zipfile.ZipFile, size: int) -> Any:
    names = set(file.namelist())
    found = [name for name in names if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise WeightsError("a zip that is not torch's: it has no data.pkl")
    root = found[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in names and _stored(file, order, "its byteorder") != b"little":
        raise WeightsError("its byte order is not little-endian")
    read = 0

    def values(storage: _Storage) -> np.ndarray:
        nonlocal read
        member = f"{root}data/{storage.key}"
        if member not in names:
            raise WeightsError(f"storage {storage.key} is missing")
        read += file.getinfo(member).file_size
        if read > size:
            raise WeightsError("its storages overlap: together they exceed the file")
        return _values(_stored(file, member, f"storage {storage.key}"), storage)

    pickled = _stored(file, found[0], "its data.pkl")
    return _Resolver(values, size).resolve(_load(io.BytesIO(pickled)))


def _read_plain(file: Any, total: int) -> Any:
    if _load(file) != _MAGIC or _load(file) != _VERSION:
        raise WeightsError("neither torch's zip nor its older format")
    if not _load(file).get("little_endian", False):
        raise WeightsError("its byte order is not little-endian")
    tree = _load(file)
    storages: dict[str, _Storage] = {}
    _collect(tree, storages, set())
    found = {}
    for key in _load(file):
        if key not in storages:
            raise WeightsError(f"storage {key} belongs to no tensor")
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise WeightsError(f"storage {key} is not of {storage.count}")
        size = storage.count * np.dtype(_STORAGES[storage.kind]).itemsize
        if not 0 <= size <= total:
            raise WeightsError(f"storage {key} of {size} bytes exceeds the file")
        found[key] = _values(file.read(size), storage)
    missing = storages.keys() - found.keys()
    if missing:
        raise WeightsError(f"storages {sorted(missing)} are missing")
    return _Resolver(lambda storage: found[storage.key], total).resolve(tree)


def _collect(tree: Any, storages: dict[str, _Storage], seen: set[int]) -> None:
    if isinstance(tree, _Namespace):
        tree = vars(tree)
    if isinstance(tree, _Tensor):
        storages[tree.storage.key] = tree.storage
    if isinstance(tree, Mapping | list | tuple) and id(tree) not in seen:
        seen.add(id(tree))
        for child in tree.values() if isinstance(tree, Mapping) else tree:
            _collect(child, storages, seen)


def read(path: str | pathlib.Path) -> Any:
    """Reads what was saved: dicts, lists and values, with numpy arrays for tensors.

    Raises:
      WeightsError: the file is missing or damaged, or it names something other than
        tensors. None of its code has run.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                return _read_zip(file, size)
        with path.open("rb") as file:
            return _read_plain(file, size)
    except WeightsError as e:
        raise WeightsError(f"{path} is refused: {e}") from e
    except Exception as e:  # a damaged pickle raises anything
        raise WeightsError(f"{path} cannot be read as a torch file: {e}") from e


def load(path: str | pathlib.Path, key: str = "") -> dict[str, np.ndarray]:
    """The tensors of a state dict by name.

    Args:
      key: as in `state_dict`.

    Raises:
      WeightsError: as in `state_dict`.
    """
    return state_dict(path, key).tensors


class StateDict(NamedTuple):
    """Tensors by name, and what the file calls them.

    key: of the state dict in its file; "": the file holds nothing else.
    others: the keys of the other state dicts.
    """

    tensors: dict[str, np.ndarray]
    key: str
    others: tuple[str, ...]


def state_dict(path: str | pathlib.Path, key: str = "") -> StateDict:
    """A state dict of a file, and which one it is.

    Args:
      key: of the state dict, in a checkpoint that holds several. "" means "ema", the
        averaged weights, as DiT's own loader has it or, without one, the only one.
        Arguments of a program and the state of an optimizer are not state dicts.

    Raises:
      WeightsError: as `read`, or there is no such state dict.
    """
    tree = read(path)
    if not isinstance(tree, dict):
        raise WeightsError(f"{path} holds a {type(tree).__name__}, not tensors")
    nested = {name: value for name, value in tree.items() if isinstance(value, dict)}
    named = [name for name in nested if name not in _NO_STATE_DICTS]
    if not key and nested:
        key = "ema" if "ema" in nested else ""
        key = named[0] if len(named) == 1 else key
    if key not in nested and (key or nested):
        raise WeightsError(f"{path} has no state dict {key!r}; it has {sorted(nested)}")
    tree = nested[key] if key else tree
    other = [name for name, value in tree.items() if not isinstance(value, np.ndarray)]
    if other:
        raise WeightsError(f"{path}: {other} are not tensors")
    return StateDict(tree, key, tuple(name for name in named if name != key))


def tensors(path: str | pathlib.Path) -> layout.Tensors:
    """The tensors of a checkpoint of either kind, by name.

    Args:
      path: a directory or .safetensors file, as in `files.stored`, or a file of torch.

    Raises:
      WeightsError: as in the reader of that kind.
    """
    path = pathlib.Path(path)
    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        return files.stored(path)
    return load(path)
