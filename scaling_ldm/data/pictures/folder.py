"""Pictures in a folder. Captions are in tables, in text files, or in folder names.

    photos/                     photos/                  photos/
      captions.csv                cat.jpg                  red_fox/1.jpg
      a/1.jpg                     cat.txt                  red_fox/2.jpg
      a/2.png                     dog.png                  grey_wolf/1.jpg
                                  dog.caption

Left: captions.csv or metadata.csv (a header line with commas), or .jsonl (an object a
line), with a column for the file and one for the caption. Tables may lie anywhere below
the folder. The names in them are relative to the table's folder or to the whole one.
Middle: a text file of the same name, .txt or .caption. Right: the caption is the name
of the first folder, "red fox", and the label its place among the sorted names.

    photos/train/red_fox/1.jpg
    photos/val/red_fox/2.jpg

The name of a split (see SPLITS) is not a caption. A set with a training folder and
another folder of SPLITS has its own split: the pictures outside training are held out.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Callable, Collection, Sequence

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
TEXTS = (".txt", ".caption")  # of text files beside the pictures
_TRAINED = ("train", "training")
SPLITS = (*_TRAINED, *"val valid validation dev eval test testing".split())
_HEAD = 1 << 16  # bytes of a table that are looked at to tell whether it is one


class ImageFolder:
    """A folder of pictures; records are sorted by file name.

    Args:
      path: folder or URL; all files under it are used, except names that begin with a
        dot.
      captions: "auto", "folders", "txt", "caption", or the name of a table. "auto"
        takes the files with a name of TABLES, wherever they lie; else text files beside
        the pictures, if any picture has one; else "folders" if every picture lies in a
        folder that is not a split.
      file, caption, label: columns of the tables; "" for the usual names, or for no
        label.
      classes: names of folders in the order of their labels; (): all folders, sorted.

    Attributes:
      captions_from: a text that says where the captions are.
      classes: the folders that are classes, in the order of their labels; () where
        captions are elsewhere.

    A picture without a row of a table is a bad record, and so is a row without a
    picture.

    Raises:
      ConfigError: no pictures or no captions; captions that could be in two places; a
        table that lacks the columns, has several captions for a picture, or cannot be
        read; a folder that is none of `classes`.
    """

    def __init__(
        self,
        path: str,
        captions: str = "auto",
        file: str = "",
        caption: str = "",
        label: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        self._folder = storage.find(path)
        files = self._folder.files
        self._names = [n for n in files if n.lower().endswith(record.SUFFIXES)]
        if not self._names:
            raise config.ConfigError(
                f"{path}: none of its {len(files)} files is a picture; "
                f"known endings: {', '.join(record.SUFFIXES)}"
            )
        self._above = _depth_of_splits(self._names)
        self._own_split = self._has_own_split()
        self.classes: tuple[str, ...] = ()
        how = self._choose(captions)
        if not isinstance(how, list) and label:
            raise config.ConfigError(
                f"{path}: label={label} is a column, but its captions are {how}"
            )
        listing = [(n, files[n].size) for n in self._names]
        told: tuple[object, ...]
        if isinstance(how, list):
            self._tables = how
            data = [self._folder.read(table) for table in how]
            self._rows = self._read_tables(data, file, caption, label)
            self._names = sorted({*self._names, *self._rows})
            self._describe: Callable = self._by_table
            self.captions_from = f"the table {', '.join(how)}"
            # With one table whose names are relative to the root, the identity is that
            # of older versions.
            placed = [place for place in self._places if place]
            each = [*zip(how, data, strict=True)] if placed or len(how) > 1 else data
            told = ("table", *each, file, caption, label)
        elif how == "folders":
            self._describe = self._by_folder
            self.classes = self._classes_of(tuple(classes))
            self._labels = {name: i for i, name in enumerate(self.classes)}
            self.captions_from = f"the names of {len(self._labels):,} folders"
            told = ("folders", *([self._above] if self._above else []))
            told += (self.classes,) if classes else ()
        else:
            self._text = how
            self._describe = self._by_text_file
            beside = [self._beside(name, how) for name in self._names]
            listing += [(t, files[t].size) for t in beside if t in files]
            self.captions_from = f"text files beside the pictures, {how}"
            told = ("txt",) if how == ".txt" else (how,)
        self.identity = record.listing_digest("image_folder", listing, *told)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> record.Picture:
        name = self._names[index]
        caption, label = self._describe(name)
        if name not in self._folder.files:
            tables = ", ".join(self._tables)
            raise record.BadRecord(name, f"{tables} names it, but it is not there")
        return record.Picture(
            image=record.decode(self._folder.read(name), name),
            caption=record.clean_caption(caption, name),
            name=name,
            label=None if label is None else columns.whole(label, name),
            held_out=self._split_of(name) not in _TRAINED if self._own_split else None,
        )

    def _choose(self, captions: str) -> str | list[str]:
        """The tables with the captions, the ending of text files, or "folders"."""
        files, root = self._folder.files, self._folder.root
        if captions in ("txt", "caption"):
            return f".{captions}"
        if captions == "folders":
            outside = [n for n in self._names if "/" not in n[self._start(n) :]]
            if outside:
                raise config.ConfigError(
                    f"{root}: captions=folders, but {outside[0]} lies in no folder of "
                    "its own"
                )
            return captions
        if captions != "auto":
            named = [n for n in files if n.rpartition("/")[2] == captions]
            if captions in files or named:
                return [captions] if captions in files else named
            there = [n for n in files if n.endswith((".csv", ".jsonl"))][:10]
            raise config.ConfigError(
                f"{root}: captions={captions}, which is not in it; tables there: "
                f"{', '.join(there) or 'none'}; else captions=txt, caption, folders or "
                "auto"
            )
        tables = [name for name in files if name.rpartition("/")[2] in TABLES]
        for table in tables:
            place = posixpath.dirname(table)
            both = [t for t in tables if posixpath.dirname(t) == place]
            if len(both) > 1:
                raise config.ConfigError(
                    f"{root}: {' and '.join(both)} could each hold the captions; "
                    "name one with captions="
                )
        if tables:
            return tables
        return self._choose_without_tables()

    def _choose_without_tables(self) -> str:
        """As `_choose`, for captions="auto" where no table has a usual name."""
        files, root = self._folder.files, self._folder.root
        texts = [
            ending
            for ending in TEXTS
            if any(self._beside(name, ending) in files for name in self._names)
        ]
        if len(texts) > 1:
            raise config.ConfigError(
                f"{root}: .txt and .caption files lie beside the pictures; say which "
                "are the captions with captions=txt or captions=caption"
            )
        if texts:
            return texts[0]
        if all("/" in name[self._start(name) :] for name in self._names):
            self._refuse_unclear_folders()
            return "folders"
        raise config.ConfigError(
            f"{root}: no captions for {self._names[0]} and others: neither "
            f"{', '.join(TABLES)}, nor text files ({', '.join(TEXTS)}) beside the "
            "pictures, nor a folder for each class "
            "(train, val and test are none); name a table with captions="
        )

    def _refuse_unclear_folders(self) -> None:
        """Refuses folder names as captions where something better may be there."""
        files, root = self._folder.files, self._folder.root
        tops = {name[self._start(name) :].split("/")[0] for name in self._names}
        if splits := sorted(top for top in tops if top.lower() in SPLITS):
            raise config.ConfigError(
                f"{root}: the folder {splits[0]} may be a split or a class beside "
                f"{min(tops - set(splits))}; say captions=folders if it is a class, or "
                "give data.path the folder whose folders are the classes"
            )
        for name in files:
            if name.endswith((".csv", ".jsonl")) and self._is_table(name):
                raise config.ConfigError(
                    f"{root}: {name} looks like a table of captions; name it with "
                    "captions=, or say captions=folders for the names of the folders"
                )

    def _is_table(self, name: str) -> bool:
        """Whether a file has columns for files and captions, by their usual names."""
        head = self._folder.read(name, 0, _HEAD).decode("utf-8-sig", "replace")
        first = head.split("\n", 1)[0]
        try:
            found = json.loads(first) if name.endswith(".jsonl") else None
            found = found or next(csv.reader([first]), [])
        except (ValueError, csv.Error):
            return False
        usual = {str(key).strip().lower() for key in found}
        return bool(usual & {*columns.FILE}) and bool(usual & {*columns.CAPTION})

    def _read_tables(
        self, data: Sequence[bytes], file: str, caption: str, label: str
    ) -> dict[str, tuple[object, object]]:
        """{file: (caption, label or None)} of all tables."""
        rows: dict[str, tuple[object, object]] = {}
        self._places: list[str] = []
        for table, content in zip(self._tables, data, strict=True):
            found = _table(content, table, file, caption, label)
            place = self._place_of(table, found)
            self._places.append(place)
            for name, row in found.items():
                name = posixpath.normpath(posixpath.join(place, name))
                name = self._folder.spelled(name)
                if name in rows:
                    raise config.ConfigError(
                        f"{self._folder.root}: {name} is in two tables, {table} is the "
                        "second; name one of them with captions="
                    )
                rows[name] = row
        return rows

    def _place_of(self, table: str, names: Collection[str]) -> str:
        """The folder that a table's names are relative to: its own, or the root, ""."""
        place, files = posixpath.dirname(table), self._folder.files

        def there(name: str) -> bool:
            return self._folder.spelled(name) in files

        own = any(there(posixpath.join(place, name)) for name in names)
        return place if own or not any(map(there, names)) else ""

    def _classes_of(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """The folders that are classes; ConfigError for one that is not `given`."""
        # é may be one character or e + accent. Both spellings are one class.
        self._folders = {unicodedata.normalize("NFC", name): name for name in given}
        for name in sorted({self._class(name) for name in self._names}):
            self._folders.setdefault(unicodedata.normalize("NFC", name), name)
        found = list(self._folders.values())
        if given and (unknown := sorted({*found} - {*given})):
            raise config.ConfigError(
                f"{self._folder.root}: its folder {unknown[0]} is not a class of the "
                f"training pictures, which are {', '.join(given[:10])}"
                + (", ..." if len(given) > 10 else "")
            )
        return given or tuple(found)

    def _has_own_split(self) -> bool:
        """Whether some folders are to train on and others are not."""
        found = {self._split_of(name) for name in self._names} - {""}
        return bool(found & {*_TRAINED}) and bool(found - {*_TRAINED})

    def _split_of(self, name: str) -> str:
        """The split that a picture's folder is named after; "" if there is none."""
        return name.split("/")[self._above - 1].lower() if self._above else ""

    def _start(self, name: str) -> int:
        """The position in a name after the folder of its split."""
        return (
            len("/".join([*name.split("/")[: self._above], ""])) if self._above else 0
        )

    def _class(self, name: str) -> str:
        return name.split("/")[self._above]

    def _beside(self, name: str, ending: str) -> str:
        return self._folder.spelled(posixpath.splitext(name)[0] + ending)

    def _by_text_file(self, name: str) -> tuple[object, object]:
        text = self._beside(name, self._text)
        if text not in self._folder.files:
            raise record.BadRecord(name, f"it has no caption: no {text}")
        return self._folder.read(text), None

    def _by_folder(self, name: str) -> tuple[object, object]:
        folder = self._folders[unicodedata.normalize("NFC", self._class(name))]
        return folder.replace("_", " ").replace("-", " "), self._labels[folder]

    def _by_table(self, name: str) -> tuple[object, object]:
        if name not in self._rows:
            tables = ", ".join(self._tables)
            raise record.BadRecord(name, f"it has no caption: not in {tables}")
        return self._rows[name]


def _depth_of_splits(names: Sequence[str]) -> int:
    """The depth of the folders of SPLITS, counted from 1; 0 if there are none.

    Above that depth all names share their folders.
    """
    parts = [name.split("/")[:-1] for name in names]
    for depth in range(min(map(len, parts))):
        here = {folders[depth] for folders in parts}
        if all(folder.lower() in SPLITS for folder in here):
            return depth + 1
        if len(here) > 1:
            return 0
    return 0


def _table(
    data: bytes, where: str, file: str, caption: str, label: str
) -> dict[str, tuple[object, object]]:
    """{file: (caption, label or None)} of a table of captions."""
    # Bytes that are not UTF-8 make only their own line bad: `clean_caption` refuses it.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    read = _jsonl if where.endswith(".jsonl") else _csv
    names, numbered = read(text, where)
    file = columns.choose(names, file, columns.FILE, "file", where)
    names.remove(file)
    caption = columns.choose(names, caption, columns.CAPTION, "caption", where)
    label = columns.optional(names, label, "label", where)
    rows: dict[str, tuple[object, object]] = {}
    for number, row in numbered:
        if not isinstance(row.get(file), str) or not row[file]:
            raise config.ConfigError(f"{where}, line {number}: no {file}")
        name = posixpath.normpath(row[file])
        if name in rows:
            raise config.ConfigError(
                f"{where}, line {number}: {name} occurs twice; keep one caption "
                "for each picture, or training and validation may share it"
            )
        rows[name] = row.get(caption), (row.get(label) or "") if label else None
    return rows


def _csv(text: str, where: str) -> tuple[list[str], list[tuple[int, dict]]]:
    """(names of the columns, repeated ones included; (line number, row) pairs)."""
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
    return list(reader.fieldnames or ()), rows


def _jsonl(text: str, where: str) -> tuple[list[str], list[tuple[int, dict]]]:
    """(names of all entries; (line number, object) pairs)."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # the latter where it is nested
            raise config.ConfigError(f"{where}, line {number}: no JSON: {e}") from e
        if not isinstance(row, dict):
            raise config.ConfigError(f"{where}, line {number}: not an object")
        rows.append((number, row))
    if not rows:
        raise config.ConfigError(f"{where}: no rows")
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows
