"""Local and remote files: lists them, says their sizes, and reads any part of one.

A path is local ("~/data", "file:///data") or a URL that fsspec knows ("gs://", "s3://",
"https://", "memory://"). The backend of a URL finds its credentials by its own
defaults.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import os
import pathlib
import posixpath
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec

from scaling_ldm import config, records
from scaling_ldm.data.listing import File, info, walk
from scaling_ldm.records import backends, store_errors

EDGE = 1 << 17  # two blocks of ArrayRecord
_THREADS = 16  # for many small requests to a remote store


class Folder:
    """Files under one root; their names are relative to it, with forward slashes.

    Attributes:
      root: the path as given, for messages.
      dangling: names that are no file: links that lead nowhere, pipes and the like.
      files: {name: File}, sorted by name.
    """

    def __init__(
        self,
        root: str,
        fs: Any,
        base: str,
        files: dict[str, File],
        dangling: Sequence[str] = (),
    ) -> None:
        self.root, self._fs, self._base = root, fs, base
        self.dangling = frozenset(dangling)
        self.files = dict(sorted(files.items()))

    @property
    def is_local(self) -> bool:
        return self._fs is None

    def spelled(self, name: str) -> str:
        """The file of this name, however its accents are encoded; else the name itself.

        macOS writes "é" as e and an accent (NFD), most tables as one character (NFC).
        """
        if name in self.files or name.isascii():
            return name
        alike = self._by_form.get(unicodedata.normalize("NFC", name), [])
        return alike[0] if len(alike) == 1 else name

    @functools.cached_property
    def _by_form(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.files:
            if not name.isascii():
                found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return found

    def location(self, name: str) -> str:
        """The path of a file as its store knows it."""
        return posixpath.join(self._base, name) if self._base else name

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes of a file from `start`, fewer at its end; None: up to the end.

        Raises:
          OSError: the disk fails, or the store, as `store_errors.asking` says it.
        """
        if size is not None and size <= 0:
            return b""
        if self._fs is None:
            with open(self.location(name), "rb", buffering=0) as file:
                file.seek(start)
                wanted = self.files[name].size - start if size is None else size
                return b"".join(_pieces(file, wanted))
        end = None if size is None else start + size
        with self._asking(name):
            return self._fs.cat_file(self.location(name), start=start, end=end)

    def open(self, name: str) -> Any:
        """A file opened for reading bytes, seekable; it fails as `read` does."""
        if self._fs is None:
            return open(self.location(name), "rb")
        with self._asking(name):
            file = self._fs.open(self.location(name), "rb")
        return _FarFile(file, functools.partial(self._asking, name))

    def _asking(self, name: str) -> Any:
        """Around what a store is asked about a file."""
        return store_errors.asking(self._fs.unstrip_protocol(self.location(name)))

    def sketches(self, names: Sequence[str]) -> list[tuple[str, int, str]]:
        """(name, bytes, digest of its first and last EDGE bytes) of each file.

        Sizes alone are not enough: container formats round them up, so different files
        may have the same size. The index of the records is at the end of a file.
        """

        def one(name: str) -> tuple[str, int, str]:
            size = self.files[name].size
            head = self.read(name, 0, min(EDGE, size))
            tail = self.read(name, max(size - EDGE, 0), min(EDGE, size))
            return name, size, hashlib.sha256(head + tail).hexdigest()

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(one, names))

    def fetch(self, names: Sequence[str], cache: str, why: str) -> list[pathlib.Path]:
        """Local paths of files: their own, or those of copies that are made once.

        Args:
          cache: local folder for the copies; needed if the files are remote.
          why: what cannot be read remotely, for the message.

        Raises:
          ConfigError: the files are remote and there is no cache.
        """
        if self._fs is None:
            return [pathlib.Path(self.location(name)) for name in names]
        if not cache:
            total = sum(self.files[name].size for name in names)
            raise config.ConfigError(
                f"{self.root}: {why} from local disks only; give the option "
                f"cache=FOLDER, where its {len(names)} files are copied "
                f"({total / 1e9:.1f} GB), or copy them and give their path"
            )
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda name: self._copy(name, cache), names))

    def _copy(self, name: str, cache: str) -> pathlib.Path:
        file = self.files[name]
        key = f"{self.location(name)} {file.size} {file.stamp}"
        folder = cache_folder(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]
        target = folder / posixpath.basename(name)
        if not target.exists():
            with atomic(target) as partial:
                with self._asking(name):
                    self._fs.get_file(self.location(name), str(partial))
        return target


class _FarFile(io.RawIOBase):
    """A file of a store, whose failures are OSErrors with its URL.

    Args:
      asking: makes the context around a request.
    """

    def __init__(self, file: Any, asking: Callable[[], Any]) -> None:
        self._file, self._asking = file, asking

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1, /) -> bytes:
        with self._asking():
            return self._file.read(size)

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def atomic(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary path beside `target`; it replaces `target` if no error is raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    os.close(handle)
    partial = pathlib.Path(name)
    with records.unfinished(partial), records.writing(target):
        yield partial
        partial.replace(target)


def cache_folder(cache: str = "") -> pathlib.Path:
    """The given folder, or the user's cache: $XDG_CACHE_HOME/scaling_ldm."""
    if cache:
        return pathlib.Path(cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "scaling_ldm"


def find(path: str, suffixes: Sequence[str] = ()) -> Folder:
    """The files that a path stands for.

    Args:
      path: a folder (all files under it), one file, or a pattern with "*", "?",
        "[...]", "{00000..00099}" or "{a,b}". Names that begin with a dot are left out.
      suffixes: of a folder, only files with these endings, in any case; () for all.

    Raises:
      ConfigError: no such file, a part of a pattern matches none, the store cannot be
        reached, or its backend is not installed.
    """
    if not path:
        raise config.ConfigError("no path is given: a folder, file, pattern or URL")
    fs, base = _filesystem(path)
    try:
        return _find(path, fs, base, tuple(s.lower() for s in suffixes))
    except (config.ConfigError, KeyboardInterrupt):
        raise
    except Exception as e:  # each backend has exceptions of its own
        raise config.ConfigError(
            f"{path}: the store cannot be listed: {type(e).__name__}: {e}"
        ) from e


def _find(path: str, fs: Any, base: str, suffixes: tuple[str, ...]) -> Folder:
    kind = _kind(fs, base)
    if kind == "file":
        base, name = posixpath.split(base)
        return Folder(path, fs, base, {name: info(fs, posixpath.join(base, name))})
    if kind == "folder":
        every = dict(walk(fs, base))
        wanted = [n for n in every if not suffixes or n.lower().endswith(suffixes)]
        if not wanted:
            only = f" that end in {', '.join(suffixes)}" if suffixes else ""
            others = f"; it has {', '.join(sorted(every)[:3])}, ..." if every else ""
            raise config.ConfigError(f"{path}: there are no files{only} in it{others}")
        files = {n: file for n in wanted if (file := every[n]) is not None}
        return Folder(path, fs, base, files, [n for n in wanted if n not in files])
    if not re.search(r"[*?\[{]", base):
        raise config.ConfigError(f"{path}: there is no such file or folder")
    return _pattern(path, fs, base)


def _pattern(path: str, fs: Any, pattern: str) -> Folder:
    # The root is the part before the first wildcard; names are the rest.
    base = posixpath.dirname(re.split(r"[*?\[{]", pattern)[0])
    names, missing = [], []
    exact = list(_braces(pattern))
    if not re.search(r"[*?\[]", pattern):
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            kinds = list(pool.map(lambda one: _kind(fs, one), exact))
        for one, kind in zip(exact, kinds, strict=True):
            (names if kind == "file" else missing).append(one)
    else:
        # Not deeper than the pattern goes: there may be many files below.
        levels = None if "**" in pattern else pattern[len(base) :].strip("/").count("/")
        depth = None if levels is None else levels + 1
        below = {posixpath.join(base, name) for name, _ in walk(fs, base, depth)}
        for one in exact:
            rule = re.compile(_glob(one))
            hits = [full for full in below if rule.fullmatch(full)]
            names += hits
            missing += [] if hits else [one]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise config.ConfigError(
            f"{path}: {len(missing)} of its {len(exact)} parts match no file: {shown}"
        )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        files = dict(
            pool.map(
                lambda full: (posixpath.relpath(full, base or "."), info(fs, full)),
                sorted(set(names)),
            )
        )
    return Folder(path, fs, base, files)


def _filesystem(path: str) -> tuple[Any, str]:
    """(None, local path) or (fsspec file system, path on it)."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" not in path:
        return None, os.path.abspath(os.path.expanduser(path))
    protocol = path.split("://")[0]
    try:
        given = backends.options(protocol)
        given.pop("use_listings_cache", None)  # what is listed is asked for again
        fs, base = fsspec.core.url_to_fs(path, **given)
    except ImportError as e:
        raise backends.not_installed(path, e) from e
    except Exception as e:  # an unknown protocol, or credentials that are wrong
        raise config.ConfigError(
            f"{path}: {protocol}:// cannot be opened: {type(e).__name__}: {e}"
        ) from e
    return fs, base.rstrip("/") if base != "/" else base


def _kind(fs: Any, base: str) -> str:
    if fs is None:
        return (
            "folder" if os.path.isdir(base) else "file" if os.path.isfile(base) else ""
        )
    try:
        return "folder" if fs.info(base)["type"] == "directory" else "file"
    except FileNotFoundError:
        return ""


def _pieces(file: Any, wanted: int) -> Iterator[bytes]:
    while wanted > 0 and (piece := file.read(wanted)):
        wanted -= len(piece)
        yield piece


def _braces(pattern: str) -> Iterator[str]:
    """ "s-{08..10}.{a,b}" -> "s-08.a", "s-08.b", "s-09.a", ..."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _choices(inside: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not span:
        return inside.split(",")
    first, last = span.groups()
    if int(last) < int(first):
        raise config.ConfigError(
            f"{{{inside}}}: it counts down; write the low end first"
        )
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]


def _glob(pattern: str) -> str:
    """A regular expression: "*" and "?" stay in one folder, "**/" is any folders."""
    rules = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern)
    return "".join(
        rules.get(part) or (part.replace("[!", "[^") if i % 2 else re.escape(part))
        for i, part in enumerate(parts)
    )
