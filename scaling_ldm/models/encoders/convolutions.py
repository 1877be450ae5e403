"""Convolutions of frozen networks, with batch norms folded in.

A layer is {"kernel", "bias"}. Products are in full float32 on every device, because
distances between features are compared across machines.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from scaling_ldm.models import layers
from scaling_ldm.models.shapes import Array, LatentBHWC

Layer = dict[str, Array]
Padding = Sequence[tuple[int, int]]  # rows and columns, before and after

_PRECISION = lax.Precision.HIGHEST
_NUMBERS = ("NHWC", "HWIO", "NHWC")


def layer_shapes(*kernel: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The float32 shapes of a layer with this kernel."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in (("kernel", kernel), ("bias", kernel[-1:]))
    }


def rectified(path: str, shape: tuple[int, ...]) -> int:
    """Inputs of a kernel for `layers.initialise`, where a relu follows.

    The relu lets half of them through (He et al. 2015, arXiv 1502.01852).
    """
    return max(layers.all_but_last(path, shape) // 2, 1)


def same(size: Sequence[int], kernel: int, stride: int) -> list[tuple[int, int]]:
    """TensorFlow's SAME padding: ceil(size / stride) outputs; an odd pixel is last."""
    missing = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size]
    return [(total // 2, total - total // 2) for total in missing]


def dense(
    layer: Layer, x: Float[Array, "*batch inputs"]
) -> Float[Array, "*batch outputs"]:
    """A product along the last axis; it is also a convolution of one pixel."""
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    y = lax.dot_general(x, layer["kernel"], numbers, precision=_PRECISION)
    return y + jnp.expand_dims(layer["bias"], range(x.ndim - 1))


def convolution(
    layer: Layer, x_BHWC: LatentBHWC, stride: int, padding: Padding
) -> Float[Array, "B h w outputs"]:
    """A convolution with a kernel [kh, kw, in, out].

    On a CPU, one without padding is given a row and a column of padding, and what they
    make is cut off. Without them XLA takes up to four times as long.
    """
    kernel = layer["kernel"]
    if stride == 1 and not np.any(padding):
        y = lax.platform_dependent(
            x_BHWC,
            kernel,
            cpu=lambda x, k: _convolve(x, k, 1, ((0, 1), (0, 1)))[:, :-1, :-1],
            default=lambda x, k: _convolve(x, k, 1, padding),
        )
    else:
        y = _convolve(x_BHWC, kernel, stride, padding)
    return y + layer["bias"][None, None, None]


def _convolve(
    x: Any, kernel_HWIO: Any, stride: int, padding: Padding, groups: int = 1
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel_HWIO,
        (stride, stride),
        padding,
        dimension_numbers=_NUMBERS,
        feature_group_count=groups,
        precision=_PRECISION,
    )


def depthwise(
    layer: Layer, x_BHWC: LatentBHWC, stride: int, padding: Padding
) -> Float[Array, "B h w C"]:
    """A convolution of each channel by itself, with a kernel [k, k, C].

    On a CPU it is a sum of shifted pictures, each times one tap, because XLA has no
    fast grouped convolution there.
    """
    y = lax.platform_dependent(
        x_BHWC,
        layer["kernel"],
        cpu=lambda x, kernel: _shifted(x, kernel, stride, padding),
        default=lambda x, kernel: _grouped(x, kernel, stride, padding),
    )
    return y + layer["bias"][None, None, None]


def _grouped(x: Any, kernel_HWC: Any, stride: int, padding: Padding) -> jax.Array:
    return _convolve(x, kernel_HWC[:, :, None], stride, padding, x.shape[-1])


def _shifted(x: Any, kernel_HWC: Any, stride: int, padding: Padding) -> jax.Array:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, *size, channels = x.shape
    taps = kernel_HWC.shape[:2]
    reach = [
        (n - k) // stride * stride + 1 for n, k in zip(size, taps, strict=True)
    ]  # from the first to the last place of one tap

    def term(row: int, column: int) -> jax.Array:
        shifted = lax.slice(
            x,
            (0, row, column, 0),
            (batch, row + reach[0], column + reach[1], channels),
            (1, stride, stride, 1),
        )
        return shifted * kernel_HWC[row, column][None, None, None]

    return functools.reduce(jnp.add, (term(*place) for place in np.ndindex(taps)))


def max_pool(
    x_BHWC: LatentBHWC, size: int, stride: int, padding: int
) -> Float[Array, "B h w C"]:
    """The largest of size x size pixels: first of rows, then of columns."""
    for axis in (1, 2):
        parts = _taps(x_BHWC, axis, size, stride, padding, -jnp.inf)
        x_BHWC = functools.reduce(jnp.maximum, parts)
    return x_BHWC


def mean_pool(
    x_BHWC: LatentBHWC, size: int, stride: int, padding: int
) -> Float[Array, "B h w C"]:
    """The mean of size x size pixels; pixels outside the picture do not count."""
    for axis in (1, 2):
        parts = _taps(x_BHWC, axis, size, stride, padding, 0.0)
        first = np.arange(parts[0].shape[axis]) * stride - padding
        end = np.minimum(first + size, x_BHWC.shape[axis])
        share = (1 / (end - np.maximum(first, 0))).astype(np.float32)
        others = [i for i in range(4) if i != axis]
        x_BHWC = functools.reduce(jnp.add, parts) * np.expand_dims(share, others)
    return x_BHWC


def _taps(
    x: Array, axis: int, size: int, stride: int, padding: int, fill: float
) -> list[jax.Array]:
    """The pixels under each place of a window along one axis."""
    sides = [(0, 0)] * x.ndim
    sides[axis] = (padding, padding)
    x = jnp.pad(x, sides, constant_values=fill)
    reach = (x.shape[axis] - size) // stride * stride + 1
    return [
        lax.slice_in_dim(x, place, place + reach, stride, axis) for place in range(size)
    ]
