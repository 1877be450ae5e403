"""Where files are: a local folder, or a URL, which is never taken for a folder's name.

May import: the standard library alone.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from scaling_ldm.records.errors import ConfigError
from scaling_ldm.records.objects import ObjectPath

STORES = ("gs", "s3")  # where a working directory may be, besides local folders

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# What pathlib makes of a URL: "gs:/bucket". No folder is called so by intent.
_CUT = re.compile(r"(gs|gcs|s3|s3a|az|abfs|hf|http|https|memory):/(?!/)")


def scheme(text: str) -> str:
    """The scheme of a URL in lower case ("gs"); "" for a local path.

    Raises:
      ConfigError: a URL that has lost a slash, as `pathlib.Path` makes of one.
    """
    if cut := _CUT.match(text):
        raise ConfigError(
            f"{text}: a URL has two slashes, as in {cut[1]}://{text[cut.end() :]}; "
            "give it as text, because pathlib.Path removes one"
        )
    found = _URL.match(text)
    return found[1].lower() if found else ""


def place(
    name: str | os.PathLike[str], what: str = "a working directory"
) -> pathlib.Path:
    """A local path, or an `ObjectPath` of a URL in a supported store.

    Args:
      what: what it is the place of, for a message.

    Raises:
      ConfigError: a URL of a store that is not supported, or that needs a package which
        is not installed.
    """
    if isinstance(name, pathlib.Path):
        scheme(str(name))
        return name
    text = os.fspath(name)
    kind = scheme(text)
    if kind in STORES:
        return ObjectPath.of(text)
    if kind not in ("", "file"):
        raise ConfigError(
            f"{text}: {what} may be local, on gs:// or on s3://; {kind}:// is not "
            "supported"
        )
    return _of_file_url(text) if kind else pathlib.Path(text)


def local(name: str | os.PathLike[str], what: str) -> pathlib.Path:
    """A local path; "file:///folder" is one, and "~" is the user's folder.

    Args:
      what: what it is the place of, for a message.

    Raises:
      ConfigError: another URL.
    """
    text = str(name)
    kind = scheme(text)
    if kind == "file":
        return _of_file_url(text)
    if kind:
        raise ConfigError(
            f"{text}: {what} is a local folder, and {kind}:// is not supported; give "
            "a folder, such as one where a bucket is mounted"
        )
    return pathlib.Path(text).expanduser()


def _of_file_url(text: str) -> pathlib.Path:
    path = text[len("file://") :]
    if not path.startswith("/"):
        raise ConfigError(f"{text}: a local URL has three slashes, as in file:///x")
    return pathlib.Path(path)


def check_fields(workdir: pathlib.Path, train: Any) -> None:
    """Refuses, in a store, what other libraries write into local folders alone.

    Args:
      train: the experiment's config.train.

    Raises:
      ConfigError: config.train.tensorboard or profile_steps with a store.
    """
    for name in ("tensorboard", "profile_steps"):
        value = getattr(train, name)
        if value and isinstance(workdir, ObjectPath):
            raise ConfigError(
                f"config.train.{name} = {value!r}: it is written to a local folder, "
                f"and the working directory is {workdir}; turn it off, or use a "
                "local --workdir"
            )
