"""Where a token is: sinusoids, tables of image positions, and rotary positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from scaling_ldm.models.shapes import Array


def sinusoid(
    position: Any, width: int, longest: float, ends: int = 0
) -> Float[Array, "... width"]:
    """Cosines and sines of a position, at wavelengths from 2 pi to 2 pi `longest`.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5. The wavelengths are geometric.
    The cosines come first. An odd width leaves one column of zeros.

    Args:
      position: an array of numbers of any shape.
      ends: 1 reaches the longest wavelength itself, as in Ho et al. 2020; 0 stops one
        step before it.
    """
    half = width // 2
    steps = jnp.arange(half, dtype=jnp.float32)
    frequency = jnp.exp(-math.log(longest) * steps / (half - ends))
    angle = jnp.multiply.outer(jnp.asarray(position, jnp.float32), frequency)
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    if width % 2:
        padding = [(0, 0)] * (features.ndim - 1) + [(0, 1)]
        features = jnp.pad(features, padding)
    return features


def image_positions(
    height: int, width: int, features: int
) -> Float[Array, "N features"]:
    """A fixed table of 2-D positions, patches row by row.

    The first half of the features tells the row, the second half the column.
    """
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    half = features // 2
    return jnp.concatenate(
        [
            sinusoid(row.reshape(-1), half, 10_000.0),
            sinusoid(column.reshape(-1), features - half, 10_000.0),
        ],
        axis=-1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionGrid:
    """How a fixed table of image positions is laid out.

    Attributes:
      columns_first: DiT, PixArt and SD3 have True: the first half of the features tells
        the column, and sines precede cosines. With False the first half tells the row,
        and cosines precede sines.
      step: distance of neighbouring patches.
      table: SD3 uses the middle of a larger square table, whose side this is; 0: none.
    """

    columns_first: bool = False
    step: float = 1.0
    table: int = 0


def grid_positions(
    grid: PositionGrid, height: int, width: int, features: int
) -> Float[Array, "N features"]:
    """A fixed table of 2-D positions in float32, patches row by row.

    Raises:
      ValueError: a picture larger than the table, or features that 4 does not divide.
    """
    if grid == PositionGrid():
        return image_positions(height, width, features)
    if grid.table and max(height, width) > grid.table:
        raise ValueError(
            f"{height} x {width} patches exceed a table of {grid.table} x {grid.table}"
        )
    if features % 4:
        raise ValueError(f"width {features} is not divisible by 4, for sines of 2 axes")
    start = [(grid.table - side) // 2 if grid.table else 0 for side in (height, width)]
    row, column = np.meshgrid(
        (start[0] + np.arange(height)) * grid.step,
        (start[1] + np.arange(width)) * grid.step,
        indexing="ij",
    )
    quarter = features // 4
    frequency = 10_000.0 ** -(np.arange(quarter) / quarter)
    halves = []
    for axis in (column, row) if grid.columns_first else (row, column):
        angle = np.multiply.outer(axis.reshape(-1), frequency)
        pair = [np.sin(angle), np.cos(angle)]
        halves += pair if grid.columns_first else pair[::-1]
    return jnp.asarray(np.concatenate(halves, axis=-1), jnp.float32)


def rope_axes(head_width: int, axes: int) -> tuple[int, ...]:
    """How many features of a head each axis of a position rotates; all are even.

    Two axes (row, column) share the features equally. Three axes (index, row, column)
    get FLUX's proportions: 16, 56, 56 of 128.

    Raises:
      ValueError: a head too narrow for a pair of features per image axis.
    """
    if axes == 2:
        side, rest = head_width // 2, 0
    else:
        side = 2 * (7 * head_width // 32)
        rest = head_width - 2 * side
    if side < 2 or side % 2 or rest % 2:
        need = "a multiple of 4" if axes == 2 else "even and at least 6"
        raise ValueError(f"rotary positions need heads {need} wide, got {head_width}")
    return (rest, side, side) if axes == 3 else (side, side)


def rope_table(
    position_TA: Num[np.ndarray, "T A"], axes: Sequence[int]
) -> Float[np.ndarray, "2 T half"]:
    """Cosines and sines of the angles by which each token is rotated.

    Su et al. 2021, arXiv 2104.09864, section 3.4.2, one block of features per axis.

    Args:
      position_TA: of every token on every axis; 0 does not rotate.
      axes: features per axis, from `rope_axes`.
    """
    angles = [
        np.multiply.outer(
            position_TA[:, i].astype(np.float64),
            10_000.0 ** -(np.arange(0, size, 2) / max(size, 1)),
        )
        for i, size in enumerate(axes)
    ]
    angle = np.concatenate(angles, axis=-1)
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def image_rope(
    height: int, width: int, axes: Sequence[int], before: int
) -> Float[np.ndarray, "2 T half"]:
    """The `rope_table` of `before` tokens that do not rotate, then patches by row."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    position = np.zeros((before + height * width, len(axes)))
    position[before:, -2] = row.reshape(-1)
    position[before:, -1] = column.reshape(-1)
    return rope_table(position, axes)


def rotate(
    x_BTKH: Float[Array, "B T K H"],
    table_2TH: Float[np.ndarray, "2 T half"] | None,
) -> Float[Array, "B T K H"]:
    """Rotates each pair of neighbouring features by `rope_table`, in float32.

    Without a table, x is returned as it is.
    """
    if table_2TH is None:
        return x_BTKH
    cos, sin = (table[None, :, None, :] for table in table_2TH)
    x = x_BTKH.astype(jnp.float32).reshape(*x_BTKH.shape[:-1], -1, 2)
    real, imaginary = x[..., 0], x[..., 1]
    rotated = jnp.stack(
        [real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1
    )
    return rotated.reshape(x_BTKH.shape).astype(x_BTKH.dtype)
