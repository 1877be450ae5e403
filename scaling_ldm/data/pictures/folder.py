"""Pictures in a folder. Captions are in a table, in text files, or in folder names.

    photos/                     photos/                  photos/
      captions.csv                cat.jpg                  red_fox/1.jpg
      a/1.jpg                     cat.txt                  red_fox/2.jpg
      a/2.png                     dog.png                  grey_wolf/1.jpg
                                  dog.txt

Left: captions.csv or metadata.csv (a header line with commas), or .jsonl (an object a
line), with a column for the file, relative to the folder, and one for the caption.
Middle: a text file of the same name. Right: the caption is the name of the first
folder, "red fox", and the label its place among the sorted names.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")


class ImageFolder:
    """A folder of pictures; records are sorted by file name.

    Args:
      path: folder or URL; all files under it count, but not names that begin with a
        dot.
      captions: "auto", "folders", "txt", or the name of a table in the folder. "auto"
        takes the one of TABLES that is there; else "txt" if any picture has such a
        file; else "folders" if every picture lies in a folder.
      file, caption, label: columns of the table; "" for the usual names, or for no
        label.

    A picture without a row of the table is a bad record, and so is a row without a
    picture.

    Raises:
      ConfigError: no pictures or no captions; a table that lacks the columns, has
        several captions for a picture, or cannot be read.
    """

    def __init__(
        self,
        path: str,
        captions: str = "auto",
        file: str = "",
        caption: str = "",
        label: str = "",
    ) -> None:
        self._folder = storage.find(path)
        files = self._folder.files
        self._names = [n for n in files if n.lower().endswith(record.SUFFIXES)]
        if not self._names:
            raise config.ConfigError(
                f"{path}: none of its {len(files)} files is a picture; "
                f"known endings: {', '.join(record.SUFFIXES)}"
            )
        how = self._choose(captions)
        if how in ("folders", "txt") and label:
            raise config.ConfigError(
                f"{path}: label={label} is a column, but its captions are {how}"
            )
        listing = [(n, files[n].size) for n in self._names]
        if how == "txt":
            self._describe: Callable = self._by_text_file
            listing += [
                (t, files[t].size) for n in self._names if (t := _txt(n)) in files
            ]
            told = ("txt",)
        elif how == "folders":
            self._describe = self._by_folder
            classes = sorted({name.split("/")[0] for name in self._names})
            self._classes = {name: i for i, name in enumerate(classes)}
            told = ("folders",)
        else:
            self._table = how
            data = self._folder.read(how)
            self._rows = _table(data, how, file, caption, label)
            self._names = sorted({*self._names, *self._rows})
            self._describe = self._by_table
            told = ("table", data, file, caption, label)
        self.identity = record.listing_digest("image_folder", listing, *told)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> record.Picture:
        name = self._names[index]
        caption, label = self._describe(name)
        if name not in self._folder.files:
            raise record.BadRecord(name, f"{self._table} names it, but it is not there")
        return record.Picture(
            image=record.decode(self._folder.read(name), name),
            caption=record.clean_caption(caption, name),
            name=name,
            label=None if label is None else columns.whole(label, name),
        )

    def _choose(self, captions: str) -> str:
        files, root = self._folder.files, self._folder.root
        tables = [name for name in TABLES if name in files]
        in_folders = all("/" in name for name in self._names)
        if captions == "auto":
            if len(tables) > 1:
                raise config.ConfigError(
                    f"{root}: {' and '.join(tables)} could each hold the captions; "
                    "name one with captions="
                )
            if tables:
                return tables[0]
            if any(_txt(name) in files for name in self._names):
                return "txt"
            if in_folders:
                return "folders"
            raise config.ConfigError(
                f"{root}: no captions: neither {', '.join(TABLES)}, nor text files "
                "beside the pictures, nor a folder for each class; name a table with "
                "captions="
            )
        if captions == "folders" and not in_folders:
            outside = next(name for name in self._names if "/" not in name)
            raise config.ConfigError(
                f"{root}: captions=folders, but {outside} lies in no folder of its own"
            )
        if captions in ("folders", "txt"):
            return captions
        if captions not in files:
            there = [n for n in files if n.endswith((".csv", ".jsonl"))][:10]
            raise config.ConfigError(
                f"{root}: captions={captions}, which is not in it; tables there: "
                f"{', '.join(there) or 'none'}; else captions=txt, folders or auto"
            )
        return captions

    def _by_text_file(self, name: str) -> tuple[object, object]:
        text = _txt(name)
        if text not in self._folder.files:
            raise record.BadRecord(name, f"it has no caption: no {text}")
        return self._folder.read(text), None

    def _by_folder(self, name: str) -> tuple[object, object]:
        folder = name.split("/")[0]
        return folder.replace("_", " ").replace("-", " "), self._classes[folder]

    def _by_table(self, name: str) -> tuple[object, object]:
        if name not in self._rows:
            raise record.BadRecord(name, f"it has no caption: not in {self._table}")
        return self._rows[name]


def _txt(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"


def _table(
    data: bytes, where: str, file: str, caption: str, label: str
) -> dict[str, tuple[object, object]]:
    """{file: (caption, label or None)} of a table of captions."""
    # Bytes that are not UTF-8 make only their own line bad: `clean_caption` refuses it.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    numbered = _jsonl(text, where) if where.endswith(".jsonl") else _csv(text, where)
    names = {key: None for _, row in numbered for key in row}
    file = columns.choose(names, file, columns.FILE, "file", where)
    names.pop(file)
    caption = columns.choose(names, caption, columns.CAPTION, "caption", where)
    label = columns.optional(names, label, "label", where)
    rows: dict[str, tuple[object, object]] = {}
    for number, row in numbered:
        if not isinstance(row.get(file), str) or not row[file]:
            raise config.ConfigError(f"{where}, line {number}: no {file}")
        name = posixpath.normpath(row[file])
        if name in rows:
            raise config.ConfigError(
                f"{where}, line {number}: {name} is there a second time; keep one "
                "caption for each picture, or training and validation may share it"
            )
        rows[name] = row.get(caption), row.get(label) if label else None
    return rows


def _csv(text: str, where: str) -> list[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise config.ConfigError(f"{where}, line {reader.line_num}: {e}") from e
    if not rows:
        raise config.ConfigError(f"{where}: no rows below its header line")
    for number, row in rows:
        if None in row:
            raise config.ConfigError(
                f"{where}, line {number}: more fields than the header line; put a "
                'caption with commas in quotes, "like, this"'
            )
    return rows


def _jsonl(text: str, where: str) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise config.ConfigError(f"{where}, line {number}: no JSON: {e}") from e
        if not isinstance(row, dict):
            raise config.ConfigError(f"{where}, line {number}: not an object")
        rows.append((number, row))
    if not rows:
        raise config.ConfigError(f"{where}: no rows")
    return rows
