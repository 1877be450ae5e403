"""LPIPS 0.1, a distance between two pictures that follows human judgement.

Zhang et al. 2018 (arXiv 1801.03924), eq. 1. The features of five layers of a classifier
are scaled to length 1 at each place, subtracted and squared. The channels are weighted
by heads that were fitted to judgements. The result is averaged over places and summed
over layers. Lower is nearer. Distances differ between backbones: always say which.

The config is VGG16 or ALEXNET. `weights.lpips.load` reads the parameters from
torchvision's file of the backbone and from the heads of the package lpips; `find_heads`
finds the heads after `pip install --no-deps lpips==0.1.4`. Pictures are RGB from 0 to
255.

Example:
  >>> from scaling_ldm.models.encoders import lpips
  >>> from scaling_ldm.models.weights import lpips as weights
  >>> config = lpips.ALEXNET
  >>> heads = weights.find_heads(config)
  >>> params = weights.load("alexnet-owt-7be5be79.pth", heads, config)
  >>> distances_B = lpips.distance(config, params, x_BHWC, y_BHWC)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Num

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import convolutions
from scaling_ldm.models.shapes import Array, LatentBHWC, Params, PictureBHWC

ScoreB = Float[Array, "B"]

# Of pictures in [-1, 1]. The backbones read (x - SHIFT) / SCALE.
SHIFT = np.asarray([-0.030, -0.088, -0.188], np.float32)
SCALE = np.asarray([0.458, 0.448, 0.450], np.float32)
_EPSILON = 1e-10  # added to lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution and its ReLU.

    Attributes:
      index: of the convolution among torchvision's `features`.
      pool: side of a maximum pool of stride 2 before it; 0: none.
      compared: whether the distance reads its output.
    """

    index: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LpipsConfig:
    """A backbone; its name, "vgg" or "alex", is that of the file of its heads."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def compared(self) -> tuple[Layer, ...]:
        """Layers that have a head."""
        return tuple(layer for layer in self.layers if layer.compared)

    @property
    def smallest(self) -> int:
        """The side in pixels that leaves one place in the last layer."""
        side = 1
        for layer in reversed(self.layers):
            side = (side - 1) * layer.stride + layer.kernel - 2 * layer.padding
            side = (side - 1) * 2 + layer.pool if layer.pool else side
        return side


def _vgg16() -> LpipsConfig:
    """Simonyan and Zisserman 2015 (arXiv 1409.1556), configuration D."""
    found, index = [], 0
    for stage, (outputs, count) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    ):
        for i in range(count):
            found.append(
                Layer(
                    index=index,
                    outputs=outputs,
                    pool=2 if stage and i == 0 else 0,
                    compared=i == count - 1,
                )
            )
            index += 2  # its ReLU
        index += 1  # the maximum after a stage
    return LpipsConfig(name="vgg", layers=tuple(found))


VGG16 = _vgg16()
ALEXNET = LpipsConfig(  # of Krizhevsky 2014, arXiv 1404.5997
    name="alex",
    layers=(
        Layer(index=0, outputs=64, kernel=11, stride=4, padding=2, compared=True),
        Layer(index=3, outputs=192, kernel=5, padding=2, pool=3, compared=True),
        Layer(index=6, outputs=384, pool=3, compared=True),
        Layer(index=8, outputs=256, compared=True),
        Layer(index=10, outputs=256, compared=True),
    ),
)
BACKBONES = {config.name: config for config in (VGG16, ALEXNET)}


def shapes(config: LpipsConfig) -> Params:
    """The parameters' tree of float32 shapes, with keys "0", "1", ... by index."""
    tree: Params = {"backbone": {}, "heads": {}}
    inputs = 3

    for layer in config.layers:
        kernel = (layer.kernel, layer.kernel, inputs, layer.outputs)
        tree["backbone"][str(layer.index)] = convolutions.layer_shapes(*kernel)
        inputs = layer.outputs
    for i, layer in enumerate(config.compared):
        tree["heads"][str(i)] = {
            "kernel": jax.ShapeDtypeStruct((layer.outputs, 1), jnp.float32)
        }
    return tree


def init(config: LpipsConfig, key: jax.Array) -> Params:
    """Random float32 parameters; the heads' are not negative, as fitted ones are."""
    params = layers.initialise(shapes(config), key, convolutions.rectified)
    return {**params, "heads": jax.tree.map(jnp.abs, params["heads"])}


def _compared(
    config: LpipsConfig, params: Params, x_BHWC: PictureBHWC
) -> list[Float[Array, "B _ _ _"]]:
    """Outputs of the layers that have a head, of length 1 at each place."""
    x = x_BHWC.astype(jnp.float32) / 127.5 - 1
    x = (x - SHIFT[None, None, None]) / SCALE[None, None, None]
    found = []
    for layer in config.layers:
        if layer.pool:
            x = _max_pool(x, layer.pool)
        padding = [(layer.padding, layer.padding)] * 2
        kernel = sharded.gather(params["backbone"][str(layer.index)])
        x = jax.nn.relu(convolutions.convolution(kernel, x, layer.stride, padding))
        if layer.compared:
            found.append(_unit(x))
    return found


def _max_pool(x_BHWC: LatentBHWC, side: int) -> Float[Array, "B h w C"]:
    window, stride = (1, side, side, 1), (1, 2, 2, 1)
    return lax.reduce_window(x_BHWC, -jnp.inf, lax.max, window, stride, "VALID")


def _unit(x_BHWC: LatentBHWC) -> LatentBHWC:
    """Scales to length 1 along channels; zeros stay zeros.

    The gradient of a length is not finite at zeros, but the ReLU before stops it.
    """
    length = jnp.sqrt(jnp.sum(x_BHWC**2, axis=-1, keepdims=True))
    return x_BHWC / (length + _EPSILON)


def distance(
    config: LpipsConfig,
    params: Params,
    x_BHWC: PictureBHWC,
    y_BHWC: Num[Array, "N h w c"],
) -> ScoreB:
    """LPIPS in float32 between each picture of x and that of y; equal ones have 0.

    Args:
      x_BHWC, y_BHWC: RGB from 0 to 255, of one size, which distances depend on.

    Raises:
      ValueError: pictures of two sizes, too small, or not of three channels.
    """
    if x_BHWC.shape != y_BHWC.shape:
        raise ValueError(f"pictures of {x_BHWC.shape} and of {y_BHWC.shape}")
    if x_BHWC.shape[-1] != 3 or min(x_BHWC.shape[1:3]) < config.smallest:
        raise ValueError(
            f"pictures of {x_BHWC.shape[1:]}; {config.name} compares those of 3 "
            f"channels and at least {config.smallest} x {config.smallest} pixels"
        )
    heads = (
        sharded.gather(params["heads"][str(i)]) for i in range(len(config.compared))
    )
    with jax.named_scope("lpips"):
        both = (_compared(config, params, pictures) for pictures in (x_BHWC, y_BHWC))
        parts = (_difference(*three) for three in zip(heads, *both, strict=True))
        return functools.reduce(jnp.add, parts)


def _difference(head: Params, x_BHWC: LatentBHWC, y_BHWC: LatentBHWC) -> ScoreB:
    mean_BC = jnp.mean((x_BHWC - y_BHWC) ** 2, axis=(1, 2))
    return jnp.sum(mean_BC * head["kernel"][None, :, 0], axis=-1)
