"""Antialiased resizing, equal to Pillow's to the last bit, on batches.

Most differences between reported FIDs come from the resize before the network (Parmar
et al. 2022, arXiv 2104.11222). Pillow widens its filters by the scale when it shrinks.
It makes two passes, one of each axis. 8-bit pictures are weighted with 22 binary places
and rounded to 8 bits after each pass. Float pictures (Pillow's mode "F", which
clean-fid uses) are weighted in float64 and rounded to float32 after each pass.

From version 13 on, Pillow shrinks heights first where that is less work, which changes
some pixels by one. All versions agree on squares made from squares.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from scaling_ldm.metrics.checks import check_finite

PRECISION_BITS = 32 - 8 - 2  # bits of a weight on 8-bit pictures; sums fit int32
BLOCK = 2**22  # values that a pass handles at a time


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    """Keys 1981 with a = -1/2."""
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _sinc(x: float) -> float:
    x *= math.pi
    return math.sin(x) / x if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


# Name -> (the filter, half the width of where it is not zero).
FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (_box, 0.5),
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}

ORDERS = ("horizontal", "pillow13")  # which pass comes first


def resize(
    x_BHWC: np.ndarray,
    size: tuple[int, int],
    method: str,
    *,
    order: str = "horizontal",
) -> np.ndarray:
    """Pictures of another size, as `PIL.Image.resize` makes them.

    Args:
      x_BHWC: uint8 (as modes "L" and "RGB"), or float32 (each channel as mode "F").
        Bicubic and lanczos results leave the range of a float32 input; clip them.
      size: (height, width).
      method: a name of FILTERS.
      order: "horizontal": the horizontal pass comes first, as in Pillow up to version
        12, with which published numbers were made; "pillow13": as in later versions.

    Returns:
      [B, height, width, C] of the same dtype.

    Raises:
      ValueError: an unknown method or order, another dtype or shape, an empty size, or
        values that are not finite. Two or four channels are refused, because Pillow
        multiplies them by alpha first.
    """
    if method not in FILTERS:
        raise ValueError(f"resize {method!r}; known: {', '.join(FILTERS)}")
    if order not in ORDERS:
        raise ValueError(f"order {order!r}; known: {', '.join(ORDERS)}")
    x = np.asarray(x_BHWC)
    if x.dtype not in (np.uint8, np.float32):
        raise ValueError(f"pictures of {x.dtype}, wanted uint8 or float32")
    if x.ndim != 4 or x.shape[3] not in (1, 3) or not all(x.shape[1:]):
        raise ValueError(f"pictures of {x.shape}, wanted [B, H, W, 1 or 3]")
    if min(size) < 1:
        raise ValueError(f"the sides of size must be at least 1, got {size}")
    if x.dtype == np.float32:
        check_finite(x, "pixel values")
    less_h, less_w = x.shape[1] - size[0], x.shape[2] - size[1]
    passes = [(2, size[1]), (1, size[0])]
    if order == "pillow13" and less_h > max(0, 2 * less_w):
        passes.reverse()
    for axis, length in passes:
        if x.shape[axis] != length:
            x = _resize_axis(x, axis, length, method)
    return x.copy() if x is x_BHWC else x


@functools.lru_cache(maxsize=64)
def weights(length: int, new: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """The first input and the weights of each output along one axis.

    Args:
      length: inputs along the axis, in pixels.
      new: outputs along the axis.
      method: a name of FILTERS.

    Returns:
      int [new] and float64 [new, K]. K is the largest number of inputs of an output;
      shorter rows are padded with zeros.
    """
    function, support = FILTERS[method]
    scale = length / new
    stretch = max(scale, 1.0)
    first, rows = [], []
    for i in range(new):
        centre = (i + 0.5) * scale
        start = max(int(centre - support * stretch + 0.5), 0)
        stop = min(int(centre + support * stretch + 0.5), length)
        row = [
            function((j - centre + 0.5) * (1.0 / stretch)) for j in range(start, stop)
        ]
        total = 0.0
        for w in row:  # in Pillow's order: a float sum depends on it
            total += w
        first.append(start)
        rows.append([w / total for w in row] if total else row)
    table = np.zeros((new, max(map(len, rows))))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    table.setflags(write=False)  # it is cached
    return np.array(first), table


def _resize_axis(x: np.ndarray, axis: int, new: int, method: str) -> np.ndarray:
    """One pass along an axis; it handles blocks of pictures, tap by tap."""
    first, table = weights(x.shape[axis], new, method)
    whole = x.dtype == np.uint8
    if whole:  # rounded to nearest, halves away from zero
        table = np.trunc(table * 2**PRECISION_BITS + np.copysign(0.5, table))
        table = table.astype(np.int32)
    taps = np.minimum(first[:, None] + np.arange(table.shape[1]), x.shape[axis] - 1)
    shape = list(x.shape)
    shape[axis] = new
    out = np.empty(shape, x.dtype)
    wide = np.int32 if whole else np.float64
    step = max(1, BLOCK // max(math.prod(x.shape[1:]), math.prod(shape[1:])))
    for start in range(0, len(x), step):
        part = np.moveaxis(x[start : start + step], axis, 0)
        part = np.ascontiguousarray(part).astype(wide)
        total = np.full((new, *part.shape[1:]), 1 << (PRECISION_BITS - 1), wide)
        if not whole:
            total[:] = 0
        for tap, weight in zip(taps.T, table.T, strict=True):
            total += part[tap] * weight[:, None, None, None]
        if whole:
            total = np.clip(total >> PRECISION_BITS, 0, 255)
        out[start : start + step] = np.moveaxis(total.astype(x.dtype), 0, axis)
    return out
