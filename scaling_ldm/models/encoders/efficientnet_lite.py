"""EfficientNet-Lite0, a small classifier of ImageNet-1k.

Tan and Le 2019 (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6, as in
TensorFlow's EfficientNet-Lite. An inverted residual is a 1 x 1 convolution that widens,
a depthwise one, and a 1 x 1 one that narrows. Its batch norms are fixed, so they are
part of the convolutions here. A distance between its features is not an FID.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from scaling_ldm.models import layers, sharded
from scaling_ldm.models.encoders import convolutions
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.shapes import Array, LatentBHWC, Params, PictureBHWC

SIZE = 224  # of the pictures it was trained on; it reads any other size too
FEATURES, CLASSES = 1280, 1000
EPSILON = 1e-3  # of the batch norms
MEAN, SCALE = 127.0, 128.0  # it reads (x - MEAN) / SCALE
STEM = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertedResidual:
    """One inverted residual; its middle has `expansion` times as many channels."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int

    @property
    def middle(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expansion

    @property
    def residual(self) -> bool:
        """Whether its input is added to its output."""
        return self.stride == 1 and self.inputs == self.outputs


# Table 1 of the paper: blocks, kernel, stride of the first, expansion, outputs.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _blocks() -> tuple[InvertedResidual, ...]:
    found, inputs = [], STEM
    for count, kernel, stride, expansion, outputs in _STAGES:
        for i in range(count):
            block = InvertedResidual(
                inputs=inputs,
                outputs=outputs,
                kernel=kernel,
                stride=stride if i == 0 else 1,
                expansion=expansion,
            )
            found.append(block)
            inputs = outputs
    return tuple(found)


BLOCKS = _blocks()


def shapes() -> Params:
    """The parameters' tree of float32 shapes; "blocks" has keys "0", "1", ..."""

    layer = convolutions.layer_shapes
    tree: Params = {"stem": layer(3, 3, 3, STEM), "blocks": {}}
    for i, block in enumerate(BLOCKS):
        parts = tree["blocks"][str(i)] = {
            "depthwise": layer(block.kernel, block.kernel, block.middle),
            "project": layer(block.middle, block.outputs),
        }
        if block.expansion > 1:
            parts["expand"] = layer(block.inputs, block.middle)
    tree["head"] = layer(BLOCKS[-1].outputs, FEATURES)
    tree["logits"] = layer(FEATURES, CLASSES)
    return tree


def init(key: jax.Array) -> Params:
    """Random float32 parameters; weights/efficientnet_lite.py reads trained ones."""
    return layers.initialise(shapes(), key, convolutions.rectified)


def apply(params: Params, x_BHWC: PictureBHWC) -> Features:
    """Features [B, 1280] before the classifier, and its logits [B, 1000].

    Args:
      x_BHWC: RGB from 0 to 255, of any size, which distances depend on.
    """
    x = (x_BHWC.astype(jnp.float32) - MEAN) / SCALE
    with jax.named_scope("stem"):
        padding = convolutions.same(x.shape[1:3], 3, 2)
        stem = sharded.gather(params["stem"])
        x = jax.nn.relu6(convolutions.convolution(stem, x, 2, padding))
    for i, block in enumerate(BLOCKS):
        with jax.named_scope(f"block_{i}"):
            x = _inverted_residual(block, sharded.gather(params["blocks"][str(i)]), x)
    with jax.named_scope("head"):
        x = jax.nn.relu6(convolutions.dense(sharded.gather(params["head"]), x))
        features = jnp.mean(x, axis=(1, 2))
        logits = convolutions.dense(sharded.gather(params["logits"]), features)
    return Features(features, logits)


def _inverted_residual(
    block: InvertedResidual, params: Params, x_BHWC: LatentBHWC
) -> Float[Array, "B h w outputs"]:
    x = x_BHWC
    if block.expansion > 1:
        x = jax.nn.relu6(convolutions.dense(params["expand"], x))
    padding = convolutions.same(x.shape[1:3], block.kernel, block.stride)
    x = convolutions.depthwise(params["depthwise"], x, block.stride, padding)
    x = convolutions.dense(params["project"], jax.nn.relu6(x))
    return x_BHWC + x if block.residual else x
