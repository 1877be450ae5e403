"""Paths in an object store: files on gs://bucket/folder and s3://bucket/folder.

An `ObjectPath` is a `pathlib.Path` whose reads and writes are requests to a store. An
object is written in one request, so a reader sees the old one or the new one, whole.
There are no folders: one is there while an object is below it. Nothing is cached, so a
process sees what another one has written.

What a store cannot do, or this library does not do there, is refused: it never becomes
a local file. May import: `backends`, which asks the stores.
"""

from __future__ import annotations

import fnmatch
import io
import os
import pathlib
from collections.abc import Callable, Generator
from typing import Any, Self

from scaling_ldm.records import backends
from scaling_ldm.records.errors import ConfigError, LocalOnly
from scaling_ldm.records.store_errors import asking

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
        backends.backend(scheme.lower(), url)
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
    def versions_are_contents(self) -> bool:
        """Whether two writes of the same bytes have the same version."""
        return self.scheme == "s3"

    @property
    def _key(self) -> str:
        """What fsspec calls it: bucket/folder/name."""
        return "/".join(self.parts[4:])

    @property
    def _fs(self) -> Any:
        return backends.backend(self.scheme, str(self))

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
            return backends.version_of(self._fs.info(self._key, **_within(seconds)))

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
        with asking(self, "write"):
            backends.write_over(
                self.scheme, self._fs, self._key, version, data, seconds
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
        with asking(self, "remove"):
            backends.unlink_version(self.scheme, self._fs, self._key, version, seconds)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object; s3:// does not say whether there was one."""
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
