"""What happens to a JSON file on a disk, and what a message about it must say."""

import re

import pytest

from scaling_ldm import records
from scaling_ldm.records.errors import ConfigError, Damaged

OTHER = records.dumps(records.Interval(low=0.0, high=1.0, level=0.9))


def unsealed(data):
    """JSON without its seals, as if it were made by hand: it may be edited."""
    return re.sub(rb',\s*"seal": "[0-9a-f]{16}"', b"", data)


# What a file becomes, from its bytes. None of it is the record that was there.
DAMAGES = {
    "empty": lambda data: b"",
    "an empty object": lambda data: b"{}\n",
    "an empty list": lambda data: b"[]\n",
    "null": lambda data: b"null\n",
    "a number": lambda data: b"17\n",
    "cut off": lambda data: data[: len(data) // 2 - 7],
    "text": lambda data: b"it works on my machine\n",
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: data.replace(b'"', b'"\xff', 3),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "nested": lambda data: b'{"a":' * 100_000,
    "another record": lambda data: OTHER.encode() + b"\n",
    "a line of garbage": lambda data: data + b"\x00garbage\n" + data,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def said_about(path, act):
    """The message of an error that `act` raises, or ""; it is one line and names path.

    Any other error than those that users get as a message is a failure.
    """
    try:
        act()
    except (ConfigError, Damaged) as e:
        (line,) = str(e).splitlines()
        assert path.name in line, line
        return line
    return ""
