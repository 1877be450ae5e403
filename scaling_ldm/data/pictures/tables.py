"""Hugging Face data sets on disk: Parquet files, `save_to_disk` folders, Arrow files.

    pets/data/train-00000-of-00002.parquet     as on the Hub, downloaded
    pets/train/state.json, data-00000....arrow  as `DatasetDict.save_to_disk` writes

The picture is a column of struct<bytes, path> (the Image feature) or of bytes. The
caption is a column of text; of several captions the first is taken. Labels of a
ClassLabel column have its names. Without a column of text the names are the captions.
The extra `huggingface` (pyarrow) is needed; nothing is downloaded.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import posixpath
import re
import threading
from collections.abc import Callable
from typing import Any

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record, unread

_SPLITS = frozenset(
    ("train", "training", "validation", "valid", "val", "dev")
    + ("test", "testing", "eval", "evaluation")
)
_TRAIN = "train"  # what config.data.split is by default
_URLS = ("url", "image_url", "img_url")
_GROUPS = 4  # row groups of Parquet kept in memory


class Tables:
    """Pictures in the rows of Parquet or Arrow files, in the order of their names.

    Args:
      path: folder, file, pattern or URL.
      split: the name of one of several splits, as the files or folders are named; ""
        for the only one. "train" also takes files whose names have no split.
      image, caption, label: columns; "" for the usual names, or for no label. A caption
        may be a ClassLabel column, whose names are the captions. If there is no column
        of text, "" is the label, or the only ClassLabel column.
      cache: local folder where remote Arrow files are copied; Parquet files are read
        where they are.

    Raises:
      ConfigError: pyarrow is missing; there are no files, broken files, or no files of
        this split; a column is missing.
    """

    def __init__(
        self,
        path: str,
        split: str = "",
        image: str = "",
        caption: str = "",
        label: str = "",
        cache: str = "",
    ) -> None:
        _pyarrow()
        folder = storage.find(path)
        names = _data_files(folder, split)
        arrow = [name for name in names if name.endswith(".arrow")]
        local = iter(folder.fetch(arrow, cache, "Arrow files are read"))
        self._tables: list[_Arrow | _Parquet] = []
        for name in names:
            try:
                if name.endswith(".arrow"):
                    self._tables.append(_Arrow(str(next(local))))
                else:
                    self._tables.append(_Parquet(folder, name))
            except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
                if getattr(e, "errno", None):  # the storage, not the file
                    raise
                raise config.ConfigError(
                    f"{path}: {name} cannot be read: {e}; copy it again or leave it out"
                ) from e
        self._names = names
        self._choose(path, image, caption, label)
        self._starts = [0, *itertools.accumulate(len(t) for t in self._tables)]
        if not len(self):
            raise config.ConfigError(f"{path}: there are no rows in its files")
        _, caption, label = self._columns
        schema = self._tables[0].schema
        self.captions_from, self._words = f"column {caption!r}", ()
        if _kind(schema.field(caption).type) != "text":
            self.captions_from = f"the names of the classes in column {caption!r}"
            names_of = _class_names(schema, caption)
            self._words = tuple(map(columns.class_caption, names_of))
        self.label_names = _class_names(schema, label)
        self.identity = record.listing_digest(
            "huggingface", folder.sketches(names), self._columns
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> record.Picture:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        at = index - self._starts[number]
        name = f"{self._names[number]}:{at}"
        image, caption, label = self._columns
        try:
            row = self._tables[number].row(at, [c for c in self._columns if c])
        except UnicodeDecodeError as e:
            raise record.BadRecord(name, f"its text is not UTF-8 ({e})") from e
        encoded = row[image]
        if isinstance(encoded, dict):
            if encoded.get("bytes") is None and encoded.get("path"):
                raise record.BadRecord(
                    name,
                    f"its picture is not in the file, only its path "
                    f"{encoded['path']}; store the bytes (save_to_disk does)",
                )
            encoded = encoded.get("bytes")
        if encoded is None:
            raise record.BadRecord(name, "it has no picture")
        return record.Picture(
            image=record.decode(encoded, name),
            caption=record.clean_caption(self._caption(row[caption], name), name),
            name=name,
            label=columns.whole(row[label], name) if label else None,
        )

    def _caption(self, value: Any, name: str) -> object:
        """The caption in a row: text, or the name of its class."""
        if not self._words or value is None or value == -1:  # -1: not known
            return None if self._words else columns.first(value)
        number = columns.whole(value, name)
        if number >= len(self._words):
            known = f"its classes are 0 to {len(self._words) - 1}"
            raise record.BadRecord(name, f"its class is {number}; {known}")
        return self._words[number]

    def _choose(self, path: str, image: str, caption: str, label: str) -> None:
        where = f"{path}: {self._names[0]}"
        schema = self._tables[0].schema
        names = list(schema.names)
        kinds = {field.name: _kind(field.type) for field in schema}
        pictures = [name for name, kind in kinds.items() if kind == "image"]
        urls = [n for n in names if n.lower() in _URLS and kinds[n] == "text"]
        if not image and urls and "image" not in kinds.values():
            if not {n.lower() for n in names} & {*columns.IMAGE}:
                raise config.ConfigError(
                    f"{where}: it has no pictures, only their addresses, column "
                    f"{urls[0]!r}; download them (img2dataset does, as tars for "
                    "config.data.source=webdataset)"
                )
        if image or len(pictures) != 1 or names.count(pictures[0]) > 1:
            pictures = [columns.choose(names, image, columns.IMAGE, "image", where)]
        image = pictures[0]
        if kinds[image] not in ("image", "bytes"):
            raise config.ConfigError(
                f"{where}: column {image!r} holds {schema.field(image).type}; pictures "
                "are struct<bytes, path> or bytes"
            )
        texts = [name for name in names if kinds[name] == "text"]
        classes = [n for n in names if kinds[n] == "other" and _class_names(schema, n)]
        if caption in kinds and caption not in (*texts, *classes):
            raise config.ConfigError(
                f"{where}: column {caption!r} holds {schema.field(caption).type}; "
                "captions are text, or lists of it, or a ClassLabel with names"
            )
        if not texts and not caption and classes:
            caption = label if label in classes else _the_only(classes, where)
        self._columns = (
            image,
            columns.choose(
                texts + classes if caption in classes else texts,
                caption,
                columns.CAPTION,
                "caption",
                where,
            ),
            columns.optional(names, label, "label", where),
        )
        for table, name in zip(self._tables, self._names, strict=True):
            if lost := set(filter(None, self._columns)) - set(table.schema.names):
                raise config.ConfigError(
                    f"{path}: {name} has no column {', '.join(sorted(lost))}, unlike "
                    f"{self._names[0]}"
                )
            for column in self._columns[1:]:
                if _class_names(table.schema, column) != _class_names(schema, column):
                    raise config.ConfigError(
                        f"{path}: {name} has other classes in column {column!r} than "
                        f"{self._names[0]}"
                    )


class _Arrow:
    """A file of an Arrow stream (or the random access format), mapped into memory."""

    def __init__(self, path: str) -> None:
        pa = _pyarrow()
        source = pa.memory_map(path)
        try:
            self._table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            self._table = pa.ipc.open_file(source).read_all()
        self.schema = self._table.schema

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, at: int, names: list[str]) -> dict[str, Any]:
        return {name: self._table[name][at].as_py() for name in names}


class _Parquet:
    """A Parquet file, read a row group at a time."""

    def __init__(self, folder: storage.Folder, name: str) -> None:
        pa = _pyarrow()
        import pyarrow.parquet

        self._name, self._damage = name, (OSError, pa.ArrowInvalid)
        source = folder.location(name) if folder.is_local else folder.open(name)
        self._file = pyarrow.parquet.ParquetFile(source)
        self.schema = self._file.schema_arrow
        groups = [
            self._file.metadata.row_group(i).num_rows
            for i in range(self._file.num_row_groups)
        ]
        self._starts = [0, *itertools.accumulate(groups)]
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()  # the file has one position

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, at: int, names: list[str]) -> dict[str, Any]:
        number = bisect.bisect_right(self._starts, at) - 1
        try:
            table = self._group(number, names)
        except self._damage as e:
            # For damage pyarrow also raises an OSError, but without a number.
            if getattr(e, "errno", None):
                raise
            reason = f"its row group {number} is damaged: {e}"
            raise record.BadRecord(f"{self._name}:{at}", reason) from e
        return {n: table[n][at - self._starts[number]].as_py() for n in names}

    def _group(self, number: int, names: list[str]) -> Any:
        with self._lock:
            if number not in self._groups:
                self._groups[number] = self._file.read_row_group(number, columns=names)
                if len(self._groups) > _GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as e:
        raise config.ConfigError(
            "the huggingface source reads Parquet and Arrow files with pyarrow, which "
            "is not installed; pip install 'scaling_ldm[huggingface]'"
        ) from e
    return pyarrow


def _kind(kind: Any) -> str:
    """ "image", "bytes", "text" (also lists of it) or "other"."""
    types = _pyarrow().types
    if isinstance(kind, _pyarrow().BaseExtensionType):
        return _kind(kind.storage_type)
    if types.is_dictionary(kind):  # pandas' Categorical, R's factors
        return _kind(kind.value_type)
    if types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "image" if {"bytes", "path"} <= names else "other"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return "bytes"
    if any(is_list(kind) for is_list in _lists(types)):
        return "text" if _kind(kind.value_type) == "text" else "other"
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return "text" if any(is_text(kind) for is_text in texts) else "other"


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names of a ClassLabel column, which its file keeps beside the types."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()  # no label, or written by another program
    whole = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if whole else ()


def _the_only(classes: list[str], where: str) -> str:
    """The ClassLabel column whose names are captions; else ConfigError."""
    if len(classes) > 1:
        raise config.ConfigError(
            f"{where}: it has no text, and the names of several columns could be the "
            f"captions: {', '.join(map(repr, classes))}; name one with caption="
        )
    return classes[0]


def _lists(types: Any) -> tuple[Callable[[Any], bool], ...]:
    return (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )


def _data_files(folder: storage.Folder, split: str) -> list[str]:
    """The files of a split, in order."""
    root = folder.root
    # `save_to_disk` lists its files; what else is there (caches, indices) is not data.
    states = [n for n in folder.files if posixpath.basename(n) == "state.json"]
    names = [n for n in folder.files if n.endswith(".parquet")]
    for state in states:
        base = posixpath.dirname(state)
        try:
            listed = json.loads(folder.read(state)).get("_data_files", [])
            names += [posixpath.join(base, item["filename"]) for item in listed]
        except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as e:
            raise config.ConfigError(
                f"{root}: {state} is not what save_to_disk writes ({e!r}); write the "
                "data set again"
            ) from e
    if not states:
        names += [n for n in folder.files if n.endswith(".arrow")]
    if lost := [name for name in names if name not in folder.files]:
        raise config.ConfigError(
            f"{root}: its state.json names {lost}, which is missing"
        )
    if not names:
        raise config.ConfigError(
            f"{root}: none of its {len(folder.files)} files is .parquet or .arrow; "
            "give a data set downloaded from the Hub or written by save_to_disk"
            f"{unread.instead(folder)}"
        )
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name), []).append(name)
    if split:
        if split not in splits and split == _TRAIN and not any(splits):
            return names  # as on the Hub: files without a split's name are for training
        if split not in splits:
            known = ", ".join(filter(None, splits))
            found = f"it has: {known}" if known else "its files name none"
            raise config.ConfigError(
                f"{root}: no split {split!r}; {found}; choose one with split= "
                "(config.data.split), or all files with an empty one"
            )
        return splits[split]
    if len(splits) > 1:
        known = ", ".join(filter(None, splits))
        raise config.ConfigError(
            f"{root}: it has several splits ({known}); choose one with split= "
            "(config.data.split)"
        )
    return names


def _split_of(name: str) -> str:
    """ "train" of data/train-00000-of-00002.parquet, train/data-00000.arrow or
    pets_train_1.parquet; the file's own name comes before those of its folders."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLITS:
                return word
    return ""
