"""Paths in an object store: what the library does with files, on gs://bucket/folder.

An `ObjectPath` is a `pathlib.Path` whose reads and writes are requests to a store. An
object is written in one request, so a reader sees the old one or the new one, whole.
There are no folders: one is there while an object is below it. Nothing is cached, so a
process sees what another one has written.

What a store cannot do, or this library does not do there, is refused: it never becomes
a local file. May import: fsspec, when a path is first used.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import logging
import os
import pathlib
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any, Self

from scaling_ldm.records.errors import ConfigError, LocalOnly

# scheme -> (package of the fsspec backend, extra of this library that installs it)
BACKENDS = {"gs": ("gcsfs", "gcs"), "memory": ("fsspec", "gcs")}
# Seconds to connect, and without a byte. gcsfs asks six times, about 35 s apart in all.
CONNECT, SILENT = 10.0, 60.0
COMMITTED = "commit_success.txt"  # orbax writes it last into a folder of a store
# The inner form of a path. Below /dev/null there is no file: what takes an ObjectPath
# for a local path fails, whoever runs it.
_ROOT = "/dev/null"
# What gcsfs and tensorstore say where the exception has no status of HTTP.
_DENIED = re.compile(r"^Forbidden\b|\b(PERMISSION_DENIED|UNAUTHENTICATED)\b")
_NO_CREDENTIALS = ("DefaultCredentialsError", "NoCredentialsError", "RefreshError")
# Statuses of HTTP that another attempt may change: timeout, too many requests.
_PASSING = (408, 429)
# Errors of this program, and of this machine: no store has said them.
_OURS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


class ObjectPath(pathlib.PosixPath):
    """A path in an object store; `of` makes one."""

    @classmethod
    def of(cls, url: str) -> ObjectPath:
        """The path of a URL.

        Raises:
          ConfigError: the URL names no bucket, or the store needs a package that is
            not installed.
        """
        scheme, _, rest = url.partition("://")
        parts = [part for part in rest.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            raise ConfigError(f"{url}: give a bucket and a folder, as in gs://bucket/x")
        _backend(scheme.lower(), url)
        return cls("/".join((_ROOT, scheme.lower(), *parts)))

    def __str__(self) -> str:
        inner = super().__str__()
        if not inner.startswith(f"{_ROOT}/"):
            return inner  # relative to another path
        scheme, _, rest = inner[len(_ROOT) + 1 :].partition("/")
        return f"{scheme}://{rest}"

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __fspath__(self) -> str:
        raise LocalOnly(
            f"{self}: a part of the library that was asked for works with local files "
            "alone; use a local --workdir for it"
        )

    def as_posix(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """Of its URL, such as "gs"."""
        return self.parts[3]

    @property
    def _key(self) -> str:
        """What fsspec calls it: bucket/folder/name."""
        return "/".join(self.parts[4:])

    @property
    def _fs(self) -> Any:
        return _backend(self.scheme, str(self))

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def expanduser(self) -> ObjectPath:
        return self

    def is_file(self) -> bool:
        with asking(self):
            try:  # fsspec's isfile is false if the store does not answer
                return self._fs.info(self._key)["type"] == "file"
            except FileNotFoundError:
                return False

    def is_dir(self) -> bool:
        return bool(self._names())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Generator[Self, None, None]:
        for name in self._names():
            yield self / name

    def _names(self) -> list[str]:
        """Names directly below."""
        with asking(self):
            try:
                found = self._fs.ls(self._key, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = {key.strip("/")[len(self._key) + 1 :] for key in found}
        return sorted(names - {""})

    def below(self) -> list[str]:
        """Names of all objects below, relative to it."""
        with asking(self):
            try:
                found = self._fs.find(self._key)
            except FileNotFoundError:
                return []
        start = self._key + "/"
        keys = [key.strip("/") for key in found]
        return sorted(k[len(start) :] for k in keys if k.startswith(start))

    # pyrefly: ignore[bad-override]  # the options of later Pythons are refused
    def glob(self, pattern: str, **given: Any) -> Generator[Self, None, None]:
        """Objects and folders below that match; "**" and options are refused."""
        wanted = pattern.split("/")
        if "**" in wanted or given:
            raise LocalOnly(f"{self}: no pattern {pattern!r} in a store")
        found = set()
        for name in self.below():
            parts = name.split("/")[: len(wanted)]
            if len(parts) == len(wanted) and all(
                fnmatch.fnmatchcase(part, rule)
                for part, rule in zip(parts, wanted, strict=True)
            ):
                found.add("/".join(parts))
        yield from (self / name for name in sorted(found))

    def read_bytes(self) -> bytes:
        with asking(self):
            return self._fs.cat_file(self._key)

    def read_text(
        self,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *given: Any, **named: Any) -> Any:
        """A file in memory with all bytes of the object; for reading alone."""
        if mode not in ("r", "rt", "rb"):
            raise LocalOnly(f"{self}: an object is written whole, not opened")
        data = io.BytesIO(self.read_bytes())
        if mode == "rb":
            return data
        return io.TextIOWrapper(data, encoding=named.get("encoding") or "utf-8")

    def write_bytes(self, data: Any) -> int:
        """Writes the object whole; a reader sees the old one or this one."""
        data = bytes(data)
        with asking(self, "write"):
            self._fs.pipe_file(self._key, data)
        return len(data)

    def write_text(self, data: str, *given: Any, **named: Any) -> int:
        return self.write_bytes(data.encode())

    def create(self, data: bytes) -> None:
        """Writes an object that is not there yet; of several writers one succeeds.

        The store decides: ifGenerationMatch=0 on gs://, If-None-Match: * on s3://.

        Raises:
          FileExistsError: it is there.
        """
        with asking(self, "write"):
            self._fs.pipe_file(self._key, data, mode="create")

    def upload(self, source: pathlib.Path) -> None:
        """Writes the object from a local file, whole."""
        source.stat()  # if it is not there, no bucket is missing
        with asking(self, "write"):
            self._fs.put_file(str(source), self._key)

    def written_at(self) -> float:
        """When the object was written, by the clock of the store.

        Raises:
          FileNotFoundError: there is none.
        """
        with asking(self):
            return self._fs.modified(self._key).timestamp()

    def unlink(self, missing_ok: bool = False) -> None:
        with asking(self, "remove"):
            try:
                self._fs.rm_file(self._key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def mkdir(self, *given: Any, **named: Any) -> None:
        """Does nothing: a folder is there while an object is below it."""

    def rmdir(self) -> None:
        """Does nothing, as `mkdir`."""

    def rmtree(self) -> None:
        """Removes every object below; what marks a folder as complete goes first."""
        names = self.below()
        for name in sorted(names, key=lambda n: not n.endswith(COMMITTED)):
            (self / name).unlink(missing_ok=True)

    def rename(self, target: str | os.PathLike[str]) -> ObjectPath:
        """Copies every object below to another folder of the store, then removes it.

        A process that is killed meanwhile leaves both, or an incomplete first one.
        """
        if not isinstance(target, ObjectPath):
            raise LocalOnly(f"{self}: it cannot be moved to {target}")
        for name in self.below():
            source = self / name
            with asking(source, "copy"):
                self._fs.cp_file(source._key, (target / name)._key)
        self.rmtree()
        return target


def _refused(name: str) -> Callable[..., Any]:
    def method(self: ObjectPath, *given: Any, **named: Any) -> Any:
        raise LocalOnly(f"{self}: {name} is for local files alone")

    return method


for _name in (
    *("chmod", "group", "hardlink_to", "lchmod", "link_to", "lstat", "owner"),
    *("readlink", "replace", "rglob", "samefile", "stat", "symlink_to", "touch"),
    *("walk", "copy", "copy_into", "move", "move_into", "is_mount"),
):
    setattr(ObjectPath, _name, _refused(_name))


def _backend(scheme: str, url: str) -> Any:
    """The fsspec file system of a scheme.

    Raises:
      ConfigError: its package is not installed.
    """
    try:
        return _file_system(scheme)
    except ImportError as e:
        package, extra = BACKENDS[scheme]
        raise ConfigError(
            f"{url}: {scheme}:// needs {package} ({e}): pip install "
            f"'scaling_ldm[{extra}]'"
        ) from e


@functools.cache
def _file_system(scheme: str) -> Any:
    given = options(scheme)
    import fsspec
    import fsspec.config

    if given:  # so that what orbax opens is told the same
        for name in ("gs", "gcs"):
            fsspec.config.conf.setdefault(name, {}).update(given)
    return fsspec.filesystem(scheme, **given)


def options(scheme: str) -> dict[str, Any]:
    """What fsspec is given for a scheme: limits of time, and no cache of listings.

    Raises:
      ImportError: the package of the scheme is not installed.
    """
    return _prepare_google() if scheme in ("gs", "gcs") else {}


def _prepare_google() -> dict[str, Any]:
    """Options for gcsfs; must run before it is imported."""
    # Orbax reaches gs:// through etils, which prefers TensorFlow where it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        # An emulator does not say of which kind a bucket is, and each question warns.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    # It prints a traceback before it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import aiohttp  # pyrefly: ignore[missing-import]  # of the extra gcs
    import gcsfs  # noqa: F401  # pyrefly: ignore[missing-import]

    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENT)
    return {"use_listings_cache": False, "session_kwargs": {"timeout": limits}}


@contextlib.contextmanager
def asking(url: object, doing: str = "read") -> Iterator[None]:
    """Around requests to a store: every failure of it is an OSError that names the URL.

    Args:
      url: an `ObjectPath`, or the text of a URL.
      doing: "read", "write", "remove" or "copy". Only a write needs no object that is
        there, so what it does not find is the bucket.

    Raises:
      FileNotFoundError: no such object; or no such bucket, in a write.
      FileExistsError: there is one, or it is another one than was expected.
      PermissionError: the store refuses it to this account.
      OSError: the store cannot be reached, has failed, or refuses the request. EINVAL
        if it refuses; no attempt will change that.
    """
    url = str(url)
    try:
        yield
    except FileNotFoundError as e:
        said = "No such bucket" if doing == "write" else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, said, url) from e
    except FileExistsError as e:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from e
    except (ConfigError, *_OURS):
        raise
    except Exception as e:  # each backend has exceptions of its own
        if isinstance(e, OSError) and e.errno in _HERE:
            raise
        said = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        status = _status(e)
        if _denied(e, status):
            raise PermissionError(
                errno.EACCES, f"No permission to {doing} there ({said})", url
            ) from e
        if status in range(400, 500) and status not in _PASSING:
            raise OSError(
                errno.EINVAL, f"The store refuses the request ({said})", url
            ) from e
        raise OSError(
            errno.EHOSTUNREACH, f"The store does not answer ({said})", url
        ) from e


def _status(error: BaseException | None) -> int | None:
    """The status of HTTP with which the store answered; None: it is not known."""
    while error is not None:
        for name in ("code", "status"):  # of gcsfs and google, of aiohttp
            with contextlib.suppress(TypeError, ValueError):
                return int(getattr(error, name, None))  # pyrefly: ignore
        # gcsfs makes this of status 400.
        if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
            return 400
        error = error.__cause__
    return None


def _denied(error: Exception, status: int | None) -> bool:
    """Whether this account may not do it, or there is none."""
    if status is not None:
        return status in (401, 403)
    if type(error).__name__ in _NO_CREDENTIALS:
        return not getattr(error, "retryable", False)
    return isinstance(error, PermissionError) or bool(_DENIED.search(str(error)))
