"""What a lock does with its file, on a disk or in an object store.

A store has no exclusive open and no time that can be set. There, of several writers the
store lets one create the object; a heartbeat writes the object again; and the time is
that at which the store received it. A request may arrive late, when another process has
taken over. So the store writes or removes a lock only if it still is the version that
was read. On s3:// a version is the checksum of the content. There each write ends with
a line of random digits, which is no part of the text.
"""

from __future__ import annotations

import os
import pathlib
import re
import tempfile

from scaling_ldm import records
from scaling_ldm.records.objects import ObjectPath

SECONDS = 15.0  # for a request of a heartbeat, all its attempts together


_DIGITS = re.compile(r"# [0-9a-f]{16}\n\Z")


def _content(path: ObjectPath, text: str) -> bytes:
    """What is written for a text: every time something else, where that is needed."""
    digits = f"# {os.urandom(8).hex()}\n" if path.versions_are_contents else ""
    return (text + digits).encode()


def _text(content: bytes) -> str:
    return _DIGITS.sub("", content.decode(errors="replace"))


def create(path: pathlib.Path, text: str) -> None:
    """Creates a file that is not there yet; only one of several processes can.

    Raises:
      FileExistsError: it is there.
      OSError: it cannot be written; nothing is left of it.
    """
    if isinstance(path, ObjectPath):
        path.create(_content(path, text))
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
        return _text(path.read_bytes()), beat
    # Opening it makes a network file system ask the server.
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime


def version(path: pathlib.Path, seconds: float | None = None) -> str | None:
    """The version of an object, for `renew`, `replace` and `remove`; None: of a file.

    Args:
      seconds: after which it gives up; None: as any other request.

    Raises:
      FileNotFoundError: there is none.
    """
    return path.version(seconds) if isinstance(path, ObjectPath) else None


def text(path: pathlib.Path) -> str:
    """What is in it; asks no longer than SECONDS."""
    if isinstance(path, ObjectPath):
        return _text(path.read_bytes(SECONDS))
    return path.read_text(encoding="utf-8", errors="replace")


def renew(path: pathlib.Path, text: str, version: str | None) -> None:
    """Sets the time of a file that holds this text to now.

    Raises:
      FileExistsError: the object is not that version any more.
    """
    if isinstance(path, ObjectPath):
        path.write_over(version, _content(path, text), SECONDS)
    else:
        os.utime(path)


def replace(path: pathlib.Path, text: str, version: str | None) -> None:
    """Writes a file that is there; FileExistsError as in `renew`."""
    if isinstance(path, ObjectPath):
        path.write_over(version, _content(path, text), SECONDS)
    else:
        records.write_text(path, text)


def remove(path: pathlib.Path, version: str | None) -> None:
    """Removes it; FileExistsError as in `renew`."""
    if isinstance(path, ObjectPath):
        path.unlink_version(version, SECONDS)
    else:
        path.unlink()


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
