"""Lists the files of a local or remote folder, with their sizes."""

from __future__ import annotations

import dataclasses
import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from typing import Any

from scaling_ldm import config

# Fields in which stores give the version of a file; the first that is there is taken.
_STAMPS = ("etag", "ETag", "md5Hash", "updated", "LastModified", "mtime", "created")
# Errors of links that lead nowhere, or back to themselves.
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """size: bytes. stamp: changes with the file, if the store tells; else empty."""

    size: int
    stamp: str


def info(fs: Any, full: str) -> File:
    """What is known of a file; fs: None for a local one."""
    if fs is None:
        found = os.stat(full)
        return File(size=found.st_size, stamp=str(found.st_mtime_ns))
    return _file(fs.info(full))


def _file(info: dict[str, Any]) -> File:
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    return File(size=int(info["size"] or 0), stamp=stamp)


def walk(
    fs: Any, base: str, depth: int | None = None
) -> Iterator[tuple[str, File | None]]:
    """(name, File) of what is under a folder down to `depth`, but for hidden names.

    None stands for what is no file: a link that leads nowhere, or a pipe.
    """
    if fs is not None:
        limit = {} if depth is None else {"maxdepth": depth}
        for full, info in fs.find(base, detail=True, **limit).items():
            name = posixpath.relpath(full, base)
            if info["type"] == "file" and not any(map(_hidden, name.split("/"))):
                yield name, _file(info)
        return
    yield from _walk_local(base, "", depth, (os.path.realpath(base),), {})


def _walk_local(
    base: str,
    within: str,
    depth: int | None,
    above: tuple[str, ...],
    seen: dict[str, str],
) -> Iterator[tuple[str, File | None]]:
    """What is in the folder `within` of `base`, a name with a slash at its end, or "".

    Args:
      above: the real paths of this folder and of those that it lies in.
      seen: {real path: name} of each folder so far.
    """
    folders = []
    with os.scandir(os.path.join(base, within)) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            try:
                found = entry.stat()
            except OSError as e:
                if e.errno not in _NOWHERE:
                    raise
                yield within + entry.name, None
                continue
            if stat.S_ISDIR(found.st_mode):
                folders.append(entry.name)
            elif stat.S_ISREG(found.st_mode):
                stamp = str(found.st_mtime_ns)
                yield within + entry.name, File(size=found.st_size, stamp=stamp)
            else:
                yield within + entry.name, None
    if depth is not None and depth <= 1:
        return
    for folder in sorted(folders):
        name = within + folder
        real = os.path.realpath(os.path.join(base, name))
        if real in above:  # a link that leads back
            continue
        if real in seen:
            raise config.ConfigError(
                f"{base}: its folders {seen[real]} and {name} are the same, by a link; "
                "leave one of them out, or copy it"
            )
        seen[real] = name
        deeper = None if depth is None else depth - 1
        yield from _walk_local(base, f"{name}/", deeper, (*above, real), seen)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")
