"""The InceptionV3 of 2015 on which FID is defined.

Szegedy et al. 2015 (arXiv 1512.00567) as in TensorFlow's inception-2015-12-05 graph,
which Heusel et al. 2017 (arXiv 1706.08500) and Salimans et al. 2016 (arXiv 1606.03498)
measured with. It is not torchvision's: average pools leave padding out of the mean, the
last block takes a maximum where the one before it takes a mean, and there are 1008
classes. Its batch norms are fixed, so they are part of the convolutions here.

Two programs read the same weights but show the network different pictures. The choice
is a part of the protocol: see PROTOCOLS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import convolutions
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.shapes import Array, LatentBHWC, Params, PictureBHWC

SIZE = 299
FEATURES, CLASSES = 2048, 1008
EPSILON = 1e-3  # of the batch norms


@dataclasses.dataclass(frozen=True)
class Convolution:
    """With batch norm and relu; `same` keeps the size, otherwise nothing is padded."""

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True


@dataclasses.dataclass(frozen=True)
class Pool:
    """Of 3 x 3 pixels; with stride 1 it keeps the size, otherwise nothing is padded."""

    mean: bool
    stride: int


@dataclasses.dataclass(frozen=True)
class Fork:
    """Branches that read the same input and whose channels are concatenated."""

    branches: tuple[tuple[Convolution | Pool | Fork, ...], ...]


Step = Convolution | Pool | Fork

_MEAN, _MAX, _HALVE = Pool(True, 1), Pool(False, 1), Pool(False, 2)


def _chain(name: str, *sizes: tuple[Any, ...]) -> tuple[Convolution, ...]:
    """Convolutions name_1, name_2, ..., each (outputs, kernel, stride, same)."""
    return tuple(
        Convolution(f"{name}_{i}", *size) for i, size in enumerate(sizes, start=1)
    )


_ROW, _COLUMN, _DOWN = (1, 7), (7, 1), ((3, 3), 2, False)


def _a(pooled: int) -> Fork:
    return Fork(
        (
            (Convolution("branch1x1", 64),),
            _chain("branch5x5", (48,), (64, (5, 5))),
            _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
            (_MEAN, Convolution("branch_pool", pooled)),
        )
    )


def _b() -> Fork:
    return Fork(
        (
            (Convolution("branch3x3", 384, *_DOWN),),
            _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, *_DOWN)),
            (_HALVE,),
        )
    )


def _c(width: int) -> Fork:
    row, column, last = (width, _ROW), (width, _COLUMN), (192, _ROW)
    return Fork(
        (
            (Convolution("branch1x1", 192),),
            _chain("branch7x7", (width,), row, (192, _COLUMN)),
            _chain("branch7x7dbl", (width,), column, row, column, last),
            (_MEAN, Convolution("branch_pool", 192)),
        )
    )


def _d() -> Fork:
    seven = ((192,), (192, _ROW), (192, _COLUMN), (192, *_DOWN))
    return Fork(
        (
            _chain("branch3x3", (192,), (320, *_DOWN)),
            _chain("branch7x7x3", *seven),
            (_HALVE,),
        )
    )


def _e(pool: Pool) -> Fork:
    def fork(name: str) -> Fork:
        row = Convolution(f"{name}a", 384, (1, 3))
        return Fork(((row,), (Convolution(f"{name}b", 384, (3, 1)),)))

    return Fork(
        (
            (Convolution("branch1x1", 320),),
            (*_chain("branch3x3", (384,)), fork("branch3x3_2")),
            (
                *_chain("branch3x3dbl", (448,), (384, (3, 3))),
                fork("branch3x3dbl_3"),
            ),
            (pool, Convolution("branch_pool", 192)),
        )
    )


# In order, by the names that TensorFlow gave them; the stem is a chain of its own.
STEM: tuple[Step, ...] = (
    Convolution("Conv2d_1a_3x3", 32, *_DOWN),
    Convolution("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Convolution("Conv2d_2b_3x3", 64, (3, 3)),
    _HALVE,
    Convolution("Conv2d_3b_1x1", 80),
    Convolution("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    _HALVE,
)
BLOCKS: dict[str, Fork] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(_MEAN),
    "Mixed_7c": _e(_MAX),
}


def shapes() -> Params:
    """The parameters' tree of float32 shapes, named as in the published files."""

    def walk(step: Step, inputs: int, tree: Params) -> int:
        """Adds the layers of a step; returns how many channels come out of it."""
        if isinstance(step, Pool):
            return inputs
        if isinstance(step, Fork):
            return sum(through(branch, inputs, tree) for branch in step.branches)
        kernel = () if step.kernel == (1, 1) else step.kernel
        tree[step.name] = convolutions.layer_shapes(*kernel, inputs, step.outputs)
        return step.outputs

    def through(steps: tuple[Step, ...], width: int, tree: Params) -> int:
        for step in steps:
            width = walk(step, width, tree)
        return width

    tree: Params = {}
    width = through(STEM, 3, tree)
    for name, block in BLOCKS.items():
        tree[name] = {}
        width = walk(block, width, tree[name])
    return {**tree, "fc": convolutions.layer_shapes(width, CLASSES)}


def init(key: jax.Array) -> Params:
    """Random float32 parameters; weights/inception.py reads trained ones."""
    return layers.initialise(shapes(), key, convolutions.rectified)


def apply(
    params: Params,
    x_BHWC: PictureBHWC,
    protocol: str = "torch_fidelity",
    bias: bool = False,
) -> Features:
    """The features of the last pool [B, 2048], and logits [B, 1008].

    Args:
      x_BHWC: RGB from 0 to 255 of SIZE x SIZE pixels, by the protocol's `resize`.
      protocol: one of PROTOCOLS; it decides how pictures are normalised.
      bias: whether the logits have the classifier's bias. Inception Scores are measured
        without it, as the first one was.

    Raises:
      ValueError: pictures of another size, or an unknown protocol.
    """
    if x_BHWC.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"pictures of {x_BHWC.shape[1:]}; Inception reads {(SIZE, SIZE, 3)}"
        )
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    middle = PROTOCOLS[protocol].middle
    x = (x_BHWC.astype(jnp.float32) - middle) / middle
    with jax.named_scope("stem"):
        x = _through(STEM, params, x)
    for name, block in BLOCKS.items():
        with jax.named_scope(name):
            x = _step(block, params[name], x)
    with jax.named_scope("fc"):
        features = jnp.mean(x, axis=(1, 2))
        last = sharded.gather(params["fc"])
        last = last if bias else {**last, "bias": jnp.zeros_like(last["bias"])}
        return Features(features, convolutions.dense(last, features))


def _through(
    steps: tuple[Step, ...], params: Params, x: LatentBHWC
) -> Float[Array, "B h w outputs"]:
    for step in steps:
        x = _step(step, params, x)
    return x


def _step(
    step: Step, params: Params, x_BHWC: LatentBHWC
) -> Float[Array, "B h w outputs"]:
    x = x_BHWC
    if isinstance(step, Fork):
        parts = [_through(branch, params, x) for branch in step.branches]
        return jnp.concatenate(parts, axis=-1)
    if isinstance(step, Pool):
        pool = convolutions.mean_pool if step.mean else convolutions.max_pool
        return pool(x, 3, step.stride, 1 if step.stride == 1 else 0)
    layer = sharded.gather(params[step.name])
    if step.kernel == (1, 1):
        return jax.nn.relu(convolutions.dense(layer, x))
    sides = [(size - 1) // 2 if step.same else 0 for size in step.kernel]
    padding = [(side, side) for side in sides]
    return jax.nn.relu(convolutions.convolution(layer, x, step.stride, padding))


def resize_tf1(x_BHWC: PictureBHWC, size: int = SIZE) -> Float[Array, "B size size C"]:
    """Resizes to size x size pixels, bilinear without half-pixel offset: TensorFlow 1.

    Output i lies on input i * inputs / outputs. The picture therefore moves by up to
    half a pixel. It is not smoothed when it is made smaller.
    """
    return _resize(x_BHWC, size, 0.0)


def resize_torch(
    x_BHWC: PictureBHWC, size: int = SIZE
) -> Float[Array, "B size size C"]:
    """Resizes to size x size pixels, bilinear as torch's `interpolate`.

    This is `align_corners=False`: the centres of pixels coincide. A picture is not
    smoothed when it is made smaller.
    """
    return _resize(x_BHWC, size, 0.5)


def _resize(
    x_BHWC: PictureBHWC, size: int, centre: float
) -> Float[Array, "B size size C"]:
    x, (rows, columns) = x_BHWC.astype(jnp.float32), x_BHWC.shape[1:3]
    if rows != size:
        matrix = _bilinear(rows, size, centre)
        x = jnp.einsum("Hh,BhWC->BHWC", matrix, x, precision="highest")
    if columns != size:
        matrix = _bilinear(columns, size, centre)
        x = jnp.einsum("Ww,BHwC->BHWC", matrix, x, precision="highest")
    return x


def _bilinear(inputs: int, outputs: int, centre: float) -> np.ndarray:
    """A float32 matrix [outputs, inputs]: the weight of each input in each output."""
    step, centre_ = np.float32(inputs / outputs), np.float32(centre)
    place = (np.arange(outputs, dtype=np.float32) + centre_) * step - centre_
    place = np.maximum(place, np.float32(0))
    below = place.astype(np.int64)
    above = np.minimum(below + 1, inputs - 1)
    share, every = place - below.astype(np.float32), np.arange(outputs)
    matrix = np.zeros((outputs, inputs), np.float32)
    np.add.at(matrix, (every, below), 1 - share)
    np.add.at(matrix, (every, above), share)
    return matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a program shows pictures to the network.

    Attributes:
      resize: from any size to SIZE.
      middle: the network reads (x - middle) / middle.
    """

    resize: Callable[..., Array]
    middle: float


PROTOCOLS = {
    # torch-fidelity, which agrees with TensorFlow's graph and so with published FIDs.
    "torch_fidelity": Protocol(resize=resize_tf1, middle=128.0),
    # pytorch-fid: 2 x / 255 - 1.
    "pytorch_fid": Protocol(resize=resize_torch, middle=127.5),
}
