"""What a lock does with its file, on a disk or in an object store.

A store has no exclusive open and no time that can be set. There, of several writers the
store lets one create the object; a heartbeat writes the object again; and the time is
that at which the store received it.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

from scaling_ldm import records
from scaling_ldm.records.objects import ObjectPath


def create(path: pathlib.Path, text: str) -> None:
    """Creates a file that is not there yet; only one of several processes can.

    Raises:
      FileExistsError: it is there.
      OSError: it cannot be written; nothing is left of it.
    """
    if isinstance(path, ObjectPath):
        path.create(text.encode())
        return
    made = False
    try:
        with records.writing(path), open(path, "x", encoding="utf-8") as file:
            made = True
            file.write(text)
    except OSError:
        if made:  # the disk is full
            path.unlink(missing_ok=True)
        raise


def read(path: pathlib.Path) -> tuple[str, float]:
    """What is in it, and when it was renewed, by the clock of the store.

    Raises:
      FileNotFoundError: there is none.
    """
    if isinstance(path, ObjectPath):
        beat = path.written_at()
        return path.read_text(errors="replace"), beat
    # Opening it makes a network file system ask the server.
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime


def renew(path: pathlib.Path, text: str) -> None:
    """Sets the time of a file that holds this text to now."""
    if isinstance(path, ObjectPath):
        path.write_text(text)
    else:
        os.utime(path)


def written_at(path: pathlib.Path) -> float:
    """When it was written or renewed; FileNotFoundError: there is none."""
    if isinstance(path, ObjectPath):
        return path.written_at()
    return path.stat().st_mtime


def now(path: pathlib.Path) -> float:
    """The time by the clock of the store in which the file is."""
    prefix = f".{path.name}."
    if isinstance(path, ObjectPath):
        asked = path.with_name(f"{prefix}{os.getpid()}.{os.urandom(4).hex()}")
        asked.write_text("")
        try:
            return asked.written_at()
        finally:
            asked.unlink(missing_ok=True)
    with tempfile.TemporaryFile(dir=path.parent, prefix=prefix) as file:
        return os.fstat(file.fileno()).st_mtime
