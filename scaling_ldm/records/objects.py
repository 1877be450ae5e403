"""Paths in an object store: what the library does with files, on gs://bucket/folder.

An `ObjectPath` is a `pathlib.Path` whose reads and writes are requests to a store. An
object is written in one request, so a reader sees the old one or the new one, whole.
There are no folders: one is there while an object is below it. Nothing is cached, so a
process sees what another one has written.

What a store cannot do, or this library does not do there, is refused: it never becomes
a local file. May import: fsspec, when a path is first used.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Generator
from typing import Any, Self

from scaling_ldm.records.errors import ConfigError, LocalOnly
from scaling_ldm.records.store_errors import asking

# What pip installs for a scheme, if fsspec finds no backend.
PACKAGES = {
    "gs": "'scaling_ldm[gcs]'",
    "gcs": "'scaling_ldm[gcs]'",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "hf": "huggingface_hub",
}
# Seconds to connect, and without a byte. gcsfs asks six times, about 35 s apart in all.
CONNECT, SILENT = 10.0, 60.0
COMMITTED = "commit_success.txt"  # orbax writes it last into a folder of a store
# The inner form of a path. Below /dev/null there is no file: what takes an ObjectPath
# for a local path fails, whoever runs it.
_ROOT = "/dev/null"


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

    def read_bytes(self, seconds: float | None = None) -> bytes:
        """All bytes; gives up after so many seconds, all attempts together."""
        with asking(self):
            return self._fs.cat_file(self._key, **_within(seconds))

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

    def version(self, seconds: float | None = None) -> str | None:
        """Which one of all that were written under this name; None: no such number.

        Raises:
          FileNotFoundError: there is none.
        """
        with asking(self):
            return self._fs.info(self._key, **_within(seconds)).get("generation")

    def write_over(self, version: str | None, data: bytes, seconds: float) -> None:
        """Writes the object if it still is this version, however late this arrives.

        Args:
          seconds: after which it gives up; the store may yet receive what was sent.

        Raises:
          FileExistsError: it is another version.
        """
        if version is None:  # as in memory://
            self.write_bytes(data)
            return
        bucket, _, name = self._key.partition("/")
        mark = os.urandom(16).hex()
        head = (
            f"--{mark}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            f"{json.dumps({'name': name})}\r\n--{mark}\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        with asking(self, "write"):
            self._fs.call(
                "POST",
                f"{self._fs.base.replace('/storage/', '/upload/storage/')}b/{{}}/o",
                bucket,
                uploadType="multipart",
                ifGenerationMatch=version,
                headers={"Content-Type": f"multipart/related; boundary={mark}"},
                data=head.encode() + data + f"\r\n--{mark}--".encode(),
                timeout=seconds,
            )

    def unlink_version(self, version: str | None, seconds: float) -> None:
        """Removes the object if it still is this version; see `write_over`.

        Raises:
          FileExistsError: it is another version.
          FileNotFoundError: there is none.
        """
        if version is None:
            self.unlink()
            return
        bucket, _, name = self._key.partition("/")
        condition = {"ifGenerationMatch": version, "timeout": seconds}
        with asking(self, "remove"):
            self._fs.call("DELETE", "b/{}/o/{}", bucket, name, **condition)

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


def _within(seconds: float | None) -> dict[str, float]:
    """The option of a request that ends all its attempts after so many seconds."""
    return {} if seconds is None else {"timeout": seconds}


def _backend(scheme: str, url: str) -> Any:
    """The fsspec file system of a scheme.

    Raises:
      ConfigError: its package is not installed.
    """
    try:
        return _file_system(scheme)
    except ImportError as e:
        raise not_installed(url, e) from e


def not_installed(url: str, error: ImportError) -> ConfigError:
    """The refusal of a URL whose backend cannot be imported."""
    scheme = url.partition("://")[0].lower()
    package = PACKAGES.get(scheme, "its fsspec backend")
    return ConfigError(
        f"{url}: {scheme}:// needs {package} ({error}): pip install {package}"
    )


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
