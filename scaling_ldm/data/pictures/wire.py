"""Reads and writes tf.train.Example without TensorFlow, with a part of protobuf.

    Example  { features: 1 }
    Features { map: 1 { key: 1, value: 2 } }
    Feature  { bytes: 1 { values: 1 } | floats: 2 | ints: 3 { values: 1, packed } }

References: https://protobuf.dev/programming-guides/encoding (the wire format) and
tensorflow/core/example/feature.proto (the messages).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Features = dict[str, list[bytes] | list[int] | None]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def parse_example(data: bytes) -> Features:
    """{name: its bytes or whole numbers; None for floats, which are not read}.

    Raises:
      ValueError: the bytes are no Example.
    """
    found: Features = {}
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            key = b"".join(_messages(entry, 1)).decode()
            found[key] = None
            for feature in _messages(entry, 2):
                for number, value in _fields(feature):
                    if number == 1:
                        found[key] = [bytes(item) for item in _messages(value, 1)]
                    elif number == 3:
                        found[key] = list(_whole_numbers(value))
    return found


def encode_example(features: Mapping[str, bytes | str | int]) -> bytes:
    """An Example with one value for each name."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, int):
            feature = _message(3, _message(1, _varint(value % 2**64)))
        else:
            data = value.encode() if isinstance(value, str) else value
            feature = _message(1, _message(1, data))
        entries += _message(1, _message(1, name.encode()) + _message(2, feature))
    return _message(1, entries)


def _fields(data: bytes | memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
    """(number, value) of a message: a view of its bytes, or an integer."""
    if isinstance(data, int):
        raise ValueError("a number where a message should be")
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _read_varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at)
            yield number, value
            continue
        if kind == _LENGTH:
            size, at = _read_varint(view, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(view):
            raise ValueError("it is cut off")
        yield number, view[at : at + size]
        at += size


def _messages(data: bytes | memoryview | int, number: int) -> Iterator[memoryview]:
    for found, value in _fields(data):
        if found == number:
            if isinstance(value, int):
                raise ValueError("a number where a message should be")
            yield value


def _whole_numbers(data: memoryview | int) -> Iterator[int]:
    for number, value in _fields(data):
        if number != 1:
            continue
        if isinstance(value, int):  # written one by one
            yield _signed(value)
            continue
        at = 0
        while at < len(value):
            item, at = _read_varint(value, at)
            yield _signed(item)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off or too long")


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(data)) + data
