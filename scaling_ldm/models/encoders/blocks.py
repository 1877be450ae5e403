"""What the pretrained transformers share.

Blocks are stacked along a leading axis of layers. They run by `lax.scan` or, with
`unroll`, by a Python loop over slices, which copies every weight in every call. For a
frozen network it is faster to call `unstacked` once and pass its tuple of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Bool

from scaling_ldm.models import attention, layers
from scaling_ldm.models.shapes import Array, MaskBS, Params, TokensBTD

# Keys are the names that a published config.json gives.
PUBLISHED_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class EncoderAttention(nn.Module):
    """Multi-head self-attention with biases; query, key and value in one product."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BTD: TokensBTD, mask: Bool[Array, "_ 1 _ T"] | None
    ) -> TokensBTD:
        width = x_BTD.shape[-1]
        head = (self.heads, width // self.heads)
        q, k, v = layers.project(x_BTD, 3, head, self.dtype, "qkv")
        out_BTKH = attention.attend(q, k, v, mask)
        return layers.join_heads(out_BTKH, width, self.dtype, "out")


def norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """A LayerNorm that subtracts the mean first, since the features have outliers."""
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name
    )


def key_mask(mask_BS: MaskBS | None) -> Bool[Array, "B 1 1 S"] | None:
    """The mask that attention reads, from one that is true where there is text."""
    return None if mask_BS is None else mask_BS[:, None, None, :]


def init(block: nn.Module, depth: int, key: jax.Array, *inputs: Any) -> Params:
    """Parameters of `depth` blocks, stacked."""
    return jax.vmap(lambda key: layers.init_module(block, key, *inputs))(
        jax.random.split(key, depth)
    )


def run(
    layer: Callable[[TokensBTD, Params], TokensBTD],
    x_BTD: TokensBTD,
    blocks: Params | tuple[Params, ...],
    unroll: bool,
) -> TokensBTD:
    """Passes x through all blocks in order."""
    if not isinstance(blocks, tuple) and not unroll:
        return jax.lax.scan(lambda x, block: (layer(x, block), None), x_BTD, blocks)[0]
    for block in unstacked(blocks):
        x_BTD = layer(x_BTD, block)
    return x_BTD


def unstacked(blocks: Params | tuple[Params, ...]) -> tuple[Params, ...]:
    """The blocks one by one; a tuple of blocks is returned as it is."""
    return blocks if isinstance(blocks, tuple) else tuple(layers.unstack(blocks))


def first(
    blocks: Params | tuple[Params, ...], count: int
) -> Params | tuple[Params, ...]:
    """The first `count` blocks."""
    if isinstance(blocks, tuple):
        return blocks[:count]
    return jax.tree.map(lambda leaf: leaf[:count], blocks)


def check_length(tokens: int, most: int) -> None:
    """Checks the length of a text.

    Raises:
      ValueError: more tokens than the network has positions for.
    """
    if tokens > most:
        raise ValueError(f"{tokens} text tokens, but this encoder reads at most {most}")


def check(config: Any) -> None:
    """Checks the config of a pretrained transformer.

    Raises:
      ValueError: an unknown activation, heads that do not divide the width, or as
        many blocks left out as there are.
    """
    if config.activation not in PUBLISHED_ACTIVATIONS:
        raise ValueError(
            f"activation {config.activation!r}; "
            f"known: {', '.join(PUBLISHED_ACTIVATIONS)}"
        )
    if not hasattr(config, "head_width") and config.width % config.heads:
        raise ValueError(
            f"width {config.width} is not divisible by {config.heads} heads"
        )
    if not 0 <= getattr(config, "skip", 0) < config.depth:
        raise ValueError(f"skip {config.skip} of {config.depth} blocks")
