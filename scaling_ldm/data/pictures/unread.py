"""What lies among pictures and is not read: it is named, with what to do instead."""

from __future__ import annotations

import posixpath

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import caption_table, record

ARCHIVES = (".tar", ".tgz", ".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
PICKLES = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".joblib")
_ARRAYS = (".npy", ".npz", ".h5", ".hdf5", ".mat", "-ubyte", "-ubyte.gz", ".mdb")
_TABLES = (".csv", ".jsonl", ".tsv", ".txt")
_REMEDIES = dict.fromkeys(
    (".tsv", ".txt"), "it is not read: write it as metadata.csv, with commas"
)
_LOOKED_AT = 20  # files of text or without an ending whose first bytes are looked at


def instead(folder: storage.Folder) -> str:
    """What to do with a folder that has none of the files of a source; or ""."""
    names = list(folder.files)

    def some(*endings: str) -> str:
        return next((n for n in names if n.lower().endswith(endings)), "")

    plain = [n for n in names if "." not in posixpath.basename(n)][:_LOOKED_AT]
    pickles = [n for n in plain if _is_pickle(folder.read(n, 0, 2))]
    if pickle := some(*PICKLES) or next(iter(pickles), ""):
        return (
            f"; {pickle} is a Python pickle, which is never read because it can run "
            "any program: write its pictures as PNG files, a folder for each class"
        )
    if arrays := some(*_ARRAYS):
        return (
            f"; {arrays} holds arrays, which are not read: write its pictures as PNG "
            "files, or give them to data.source=memory in a notebook"
        )
    for endings, source in (
        (record.SUFFIXES, "image_folder"),
        ((".tar",), "webdataset"),
        ((".parquet", ".arrow"), "huggingface"),
        ((".array_record",), "array_record"),
    ):
        if one := some(*endings):
            return f"; files as {one} are read with config.data.source={source}"
    archive = some(*ARCHIVES)
    return f"; {archive} is an archive: unpack it" if archive else ""


def archives_among(folder: storage.Folder) -> str:
    """Words that name the archives beside pictures; "" if there are none."""
    found = [n for n in folder.files if n.lower().endswith(ARCHIVES)]
    more = f" and {len(found) - 1:,} more archives" if len(found) > 1 else ""
    return f" (not read: the archive {found[0]}{more})" if found else ""


def refuse_better(folder: storage.Folder) -> None:
    """Refuses folder names as captions where a file seems to have better ones.

    Raises:
      ConfigError: it names the file, and says what to do.
    """
    texts = [n for n in folder.files if n.lower().endswith(".txt")]
    not_looked_at = {*texts[_LOOKED_AT:]}  # as those of a detector's boxes
    for name in folder.files:
        ending = posixpath.splitext(name.lower())[1]
        if ending in _TABLES and name not in not_looked_at:
            kind = caption_table.kind(folder.read(name, 0, caption_table.HEAD), name)
            remedy = _REMEDIES.get(ending, "name it with captions=")
            if kind == "labels":
                remedy = (
                    "folder names would be labels instead: write it as metadata.csv "
                    "with a column text"
                )
        elif ending == ".json" and _says_captions(folder, name):
            kind = "captions"
            remedy = (
                "it is not read: write its captions as metadata.csv, or as .txt files "
                "beside the pictures"
            )
        else:
            continue
        if kind:
            raise config.ConfigError(
                f"{folder.root}: {name} looks like a table of {kind}; {remedy}, or say "
                "captions=folders (config.data.captions) for the names of the folders"
            )


def _says_captions(folder: storage.Folder, name: str) -> bool:
    """Whether a JSON file names files or captions, as COCO's and kohya's do."""
    head = folder.read(name, 0, caption_table.HEAD)
    return b'"file_name"' in head or b'"caption"' in head


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")
