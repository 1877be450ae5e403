"""Pictures in a folder. Captions are in tables, in text files, or in folder names.

    photos/                     photos/                  photos/
      captions.csv                cat.jpg                  red_fox/1.jpg
      a/1.jpg                     cat.txt                  red_fox/2.jpg
      a/2.png                     dog.png                  grey_wolf/1.jpg
                                  dog.caption

Left: captions.csv or metadata.csv (a header line with commas), .jsonl (an object a
line) or .parquet, with a column for the file and one for the caption. Tables may lie
anywhere below the folder. They name files from their own folder, or from the whole one.
Middle: a file of the same name, .txt or .caption, or .json with an entry "caption".
Right: the caption is the name of the first folder, "red fox", and the label its place
among the sorted names.

    photos/train/red_fox/1.jpg
    photos/val/red_fox/2.jpg

Folders with the name of a split (see SPLITS) are no captions. Where there is one to
train on and one that is not, the set has a split of its own: the others are held out.

    kohya/10_sks dog/1.jpg

Where all folders are called so, the number is kohya-ss/sd-scripts' count of repeats and
no part of the class, "sks dog". A picture counts once here, whatever the number.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import caption_table, columns, record, unread

TEXTS = (".txt", ".caption")  # of text files beside the pictures
_JSON = ".json"  # of files beside the pictures that say more than the caption
_TRAINED = ("train", "training")
SPLITS = (*_TRAINED, *"val valid validation dev eval test testing".split())
# kohya-ss/sd-scripts, docs/train_README-en.md: repetitions_identifier class.
_REPEATS = re.compile(r"(\d+)_(.*\S.*)")


class ImageFolder:
    """A folder of pictures; records are sorted by file name.

    Args:
      path: folder or URL; all files under it are used, except names that begin with a
        dot.
      captions: "auto", "folders", "txt", "caption", "json", or the name of a table.
        "auto" takes the files with a name of caption_table.NAMES, wherever they lie;
        else text files beside the pictures, if any picture has one; else .json files
        beside them that have a caption; else "folders" if every picture lies in a
        folder that is no split.
      file, caption, label: columns of the tables, or entries of .json files; "" for the
        usual names, or for no label.
      classes: names of folders in the order of their labels; (): those that are there.

    Attributes:
      captions_from: where the captions are, in words.
      label_names: the classes, in the order of their labels; () where captions are
        elsewhere.

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
        every = sorted([*files, *self._folder.dangling])
        self._names = [n for n in every if n.lower().endswith(record.SUFFIXES)]
        if not self._names:
            raise config.ConfigError(
                f"{path}: none of its {len(files)} files is a picture"
                f"{unread.instead(self._folder)}; "
                f"known endings: {', '.join(record.SUFFIXES)}"
            )
        self._above = _depth_of_splits(self._names)
        self._own_split = self._has_own_split()
        self._given = tuple(classes)
        self._repeats = self._folder_with_repeats()
        self.label_names: tuple[str, ...] = ()
        how = self._choose(captions)
        if not isinstance(how, list) and how != _JSON and label:
            raise config.ConfigError(
                f"{path}: label={label} is a column, but its captions are {how}"
            )
        listing = [(n, files[n].size) for n in self._names if n in files]
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
            self.label_names = self._classes_of(tuple(classes))
            self._labels = {name: i for i, name in enumerate(self.label_names)}
            self.captions_from = f"the names of {len(self._labels):,} folders"
            if any(self._within(name).count("/") > 1 for name in self._names):
                self.captions_from += ", not of those within them"
            told = ("folders", *([self._above] if self._above else []))
            told += ("repeats",) if self._repeats else ()
            told += (self.label_names,) if classes else ()
        else:
            self._text = how
            self._describe = self._by_text_file
            beside = [self._beside(name, how) for name in self._names]
            listing += [(t, files[t].size) for t in beside if t in files]
            self.captions_from = f"text files beside the pictures, {how}"
            self._entries = caption, label
            told = ("txt",) if how == ".txt" else (how,)
            told += self._entries if how == _JSON else ()
        if self._repeats:
            self.captions_from += (
                f"; folders such as {self._repeats!r} begin with a number, which is "
                "no part of a caption and repeats no picture: each counts once"
            )
        self.captions_from += unread.archives_among(self._folder)
        self.identity = record.listing_digest("image_folder", listing, *told)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> record.Picture:
        name = self._names[index]
        if name in self._folder.dangling:
            raise record.BadRecord(name, "it is a link that leads nowhere, or no file")
        try:
            name.encode()
        except UnicodeEncodeError as e:
            shown = name.encode("utf-8", "backslashreplace").decode()
            raise record.BadRecord(shown, "its name is not UTF-8; rename it") from e
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
        if captions in ("txt", "caption", "json"):
            return f".{captions}"
        if captions == "folders":
            outside = [n for n in self._names if "/" not in self._within(n)]
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
            there = [n for n in files if n.lower().endswith(caption_table.ENDINGS)][:10]
            raise config.ConfigError(
                f"{root}: captions={captions}, which is not in it; tables there: "
                f"{', '.join(there) or 'none'}; else captions=txt, caption, json, "
                "folders or auto"
            )
        names = caption_table.NAMES
        tables = [n for n in files if n.rpartition("/")[2].lower() in names]
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
        if self._json_has_captions():
            return _JSON
        unread.refuse_better(self._folder)
        if all("/" in self._within(name) for name in self._names):
            self._refuse_unclear_folders()
            return "folders"
        raise config.ConfigError(
            f"{root}: no captions for {self._names[0]} and others: neither "
            f"{', '.join(caption_table.NAMES)}, nor {', '.join(TEXTS)} or .json files "
            "beside the pictures, nor a folder for each class "
            "(train, val and test are none); name a table with captions="
        )

    def _json_has_captions(self) -> bool:
        """Whether the first .json beside a picture has a caption."""
        beside = (self._beside(name, _JSON) for name in self._names)
        first = next((name for name in beside if name in self._folder.files), "")
        if not first:
            return False
        data = self._folder.read(first)
        try:
            columns.caption_in(columns.json_object(data, first), "", first)
        except record.BadRecord:
            return False
        return True

    def _refuse_unclear_folders(self) -> None:
        """Refuses folder names as captions where something better may be there."""
        root = self._folder.root
        tops = {self._class(name) for name in self._names}
        if splits := sorted(top for top in tops if _split_named(top)):
            raise config.ConfigError(
                f"{root}: the folder {splits[0]} may be a split or a class beside "
                f"{min(tops - set(splits))}; say captions=folders "
                "(config.data.captions) if it is a class, or give data.path the folder "
                "whose folders are the classes"
            )
        if len(tops) == 1 and not self._given and not self._repeats:
            raise config.ConfigError(
                f"{root}: all pictures lie in one folder, {min(tops)}, whose name "
                "would be the caption of each; say captions=folders "
                "(config.data.captions) if it is the only class, or give data.path the "
                "folder whose folders are the classes"
            )

    def _read_tables(
        self, data: Sequence[bytes], file: str, caption: str, label: str
    ) -> dict[str, tuple[object, object]]:
        """{file: (caption, label or None)} of all tables."""
        rows: dict[str, tuple[object, object]] = {}
        self._places: list[str] = []
        for table, content in zip(self._tables, data, strict=True):
            found = caption_table.read(content, table, file, caption, label)
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
        return _split_named(name.split("/")[self._above - 1]) if self._above else ""

    def _within(self, name: str) -> str:
        """A name behind the folder of its split."""
        return "/".join(name.split("/")[self._above :])

    def _class(self, name: str) -> str:
        folder = name.split("/")[self._above]
        return _REPEATS.sub(r"\2", folder) if self._repeats else folder

    def _folder_with_repeats(self) -> str:
        """The first of the folders if all have kohya's number of repeats, else ""."""
        inside = [self._within(name) for name in self._names]
        tops = sorted({name.split("/")[0] for name in inside})
        every = all("/" in name for name in inside)
        return tops[0] if every and all(map(_REPEATS.fullmatch, tops)) else ""

    def _beside(self, name: str, ending: str) -> str:
        stem, files = posixpath.splitext(name)[0], self._folder.files
        both = [self._folder.spelled(stem + e) for e in (ending, ending.upper())]
        return both[1] if both[1] in files and both[0] not in files else both[0]

    def _by_text_file(self, name: str) -> tuple[object, object]:
        text = self._beside(name, self._text)
        if text not in self._folder.files:
            raise record.BadRecord(name, f"it has no caption: no {text}")
        data = self._folder.read(text)
        if self._text != _JSON:
            return data, None
        caption, label = self._entries
        entries = columns.json_object(data, name)
        found = columns.caption_in(entries, caption, name)
        return found, entries.get(label, "") if label else None

    def _by_folder(self, name: str) -> tuple[object, object]:
        folder = self._folders[unicodedata.normalize("NFC", self._class(name))]
        return columns.class_caption(folder), self._labels[folder]

    def _by_table(self, name: str) -> tuple[object, object]:
        if name not in self._rows:
            tables = ", ".join(self._tables)
            raise record.BadRecord(name, f"it has no caption: not in {tables}")
        return self._rows[name]


def _split_named(folder: str) -> str:
    """The name of SPLITS that a folder has, as "train" of "train2017"; or ""."""
    name = folder.lower().rstrip("0123456789").rstrip("-_ ")
    return name if name in SPLITS else ""


def _depth_of_splits(names: Sequence[str]) -> int:
    """The depth of the folders of SPLITS, counted from 1; 0 if there are none.

    Above that depth all names share their folders.
    """
    parts = [name.split("/")[:-1] for name in names]
    for depth in range(min(map(len, parts))):
        here = {folders[depth] for folders in parts}
        if all(map(_split_named, here)):
            return depth + 1
        if len(here) > 1:
            return 0
    return 0
