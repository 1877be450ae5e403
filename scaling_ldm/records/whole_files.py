"""Files that are written whole or not at all, and what a full disk or a kill leaves.

A file is first written under a temporary name in the same folder, and then renamed. The
temporary file is locked while its process lives. So the files that a killed process
left can be told from those that are being written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from scaling_ldm.records import places
from scaling_ldm.records.objects import ObjectPath

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Libraries raise errors of their own, with the system's text in them.
_FULL_TEXTS = re.compile("No space left on device|Disk quota exceeded")
# `write_file` names files so; version 0.1.0 did without the last part.
_LEFT = re.compile(
    r"\..+\.(json|jsonl|tar|npy|npz|png|webp|csv|html|txt|pdf|parquet|safetensors)"
    r"\.\d+(\.[0-9a-f]{8})?"
)
_OF_OTHERS = ("checkpoints", "tensorboard", "profile")  # folders that others write


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk or a quota is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if _FULL_TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def in_one_line(error: OSError) -> str:
    """What went wrong with which file, and what to do."""
    said = f"{error.strerror}: {error.filename}" if error.filename else f"{error}"
    remedy = "make room" if is_full(error) else "mend that"
    return f"{said}; {remedy}, then run the same command to continue"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A context for writing a file: an OSError inside it names the file.

    Raises:
      OSError: with the path, where writing raised one without, or an error of a library
        that says that the disk is full.
    """
    try:
        yield
    except OSError as e:
        if e.filename is not None or e.errno is None:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    except Exception as e:
        if not is_full(e):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from e


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file of UTF-8; see `write_file`."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: str | os.PathLike, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a whole file or none: a temporary one is filled, fsynced, renamed.

    An object of a store is filled in a local temporary file, and then written whole.

    Raises:
      OSError: it cannot be written; it names the path.
    """
    path = places.place(path)
    if isinstance(path, ObjectPath):
        with tempfile.NamedTemporaryFile() as file:
            fill(file)  # pyrefly: ignore[bad-argument-type]
            file.flush()
            path.upload(pathlib.Path(file.name))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on two machines may have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with writing(path), unfinished(temporary), _locked(temporary) as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)


_unfinished: set[pathlib.Path] = set()


@contextlib.contextmanager
def unfinished(temporary: pathlib.Path) -> Iterator[None]:
    """Around what fills a temporary file; in the end it is gone, if not renamed."""
    _unfinished.add(temporary)
    try:
        yield
    finally:
        temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Removes temporary files, in a process that is about to end."""
    for path in list(_unfinished):
        path.unlink(missing_ok=True)


def _locked(path: pathlib.Path) -> BinaryIO:
    """A new file, locked until it is closed if the file system has locks."""
    while True:
        file = open(path, "wb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # `remove_leftovers` removed it before it was locked


def remove_leftovers(folder: pathlib.Path) -> list[pathlib.Path]:
    """Removes temporary files of killed processes under a folder; returns their paths.

    Files that a process is writing now stay.
    """
    removed = []
    if isinstance(folder, ObjectPath):  # an object that is not whole is not there
        return removed
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _OF_OTHERS]
        for name in filter(_LEFT.fullmatch, names):
            path = pathlib.Path(place) / name
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path)
    return removed
