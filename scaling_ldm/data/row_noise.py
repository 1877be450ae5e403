"""Normal numbers for each row of a batch, from a generator of the row's own.

The generator is Philox4x64-10 with the key (key, position), and the numbers are those
that `np.random.Generator(np.random.Philox(key=...))` draws first. A new generator asks
the system for entropy, which takes longer than a small row. So each thread keeps one,
and only its state is set anew.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

_local = threading.local()


def normals(key: int, positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [n, *shape]; row i is a pure function of key and positions[i].

    Args:
      key: 64 bits.
      positions: int64 [n].
    """
    found = np.empty((len(positions), *shape), np.float32)
    bits, start, drawn = _generator()
    key_of_row = start["state"]["key"]
    key_of_row[0] = key
    for row, position in zip(found, positions, strict=True):
        key_of_row[1] = position
        bits.state = start
        drawn.standard_normal(dtype=np.float32, out=row)
    return found


def _generator() -> tuple[Any, dict[str, Any], Any]:
    """This thread's Philox, its state before the first number, and its Generator."""
    if not hasattr(_local, "held"):
        bits = np.random.Philox(key=0)
        _local.held = bits, bits.state, np.random.Generator(bits)
    return _local.held
