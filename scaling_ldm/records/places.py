"""Where files are: a local folder, or a URL, which is never taken for a folder's name.

May import: the standard library alone.
"""

from __future__ import annotations

import os
import pathlib
import re

from scaling_ldm.records.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
# What pathlib makes of a URL: "gs:/bucket". No folder is called so by intent.
_CUT = re.compile(r"(gs|gcs|s3|s3a|az|abfs|hf|http|https|memory):/(?!/)")


def scheme(name: str | os.PathLike[str]) -> str:
    """The scheme of a URL in lower case ("gs"); "" for a local path.

    Raises:
      ConfigError: a URL that has lost a slash, as `pathlib.Path` makes of one.
    """
    text = os.fspath(name)
    if cut := _CUT.match(text):
        raise ConfigError(
            f"{text}: a URL has two slashes, as in {cut[1]}://{text[cut.end() :]}; "
            "give it as text, because pathlib.Path removes one"
        )
    found = _URL.match(text)
    return found[1].lower() if found else ""


def local(name: str | os.PathLike[str], what: str) -> pathlib.Path:
    """A local path; "file:///folder" is one, and "~" is the user's folder.

    Args:
      what: what it is the place of, for a message.

    Raises:
      ConfigError: another URL.
    """
    text = os.fspath(name)
    kind = scheme(text)
    if kind == "file":
        text = text[len("file://") :]
        if not text.startswith("/"):
            raise ConfigError(f"{name}: a local URL has three slashes, as in file:///x")
    elif kind:
        raise ConfigError(
            f"{text}: {what} is a local folder, and {kind}:// is not supported; give "
            "a folder, such as one where a bucket is mounted"
        )
    return pathlib.Path(text).expanduser()
