"""What the pretrained transformers share; jax and flax only.

Blocks are stacked along a leading layer axis. They run by `lax.scan`, or with `unroll`
by a Python loop over slices, which copies every weight in every call: for a frozen
network `unstacked` once, whose tuple of blocks is looped over without, is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_ldm.models import attention
from scaling_ldm.models.shapes import TokensBTD

Params = dict[str, Any]

# As config.json names them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
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
    def __call__(self, x_BTD: TokensBTD, mask_B1TS: jax.Array | None) -> TokensBTD:
        width = x_BTD.shape[-1]
        qkv = nn.DenseGeneral(
            (3, self.heads, width // self.heads), dtype=self.dtype, name="qkv"
        )(x_BTD)
        q, k, v = (jnp.squeeze(a, 2) for a in jnp.split(qkv, 3, axis=2))
        out_BTKH = attention.attend(q, k, v, mask_B1TS)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(
            out_BTKH
        )


def norm(epsilon: float, dtype: Any, name: str) -> nn.LayerNorm:
    """LayerNorm that subtracts the mean first: pretrained features have outliers."""
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name
    )


def key_mask(mask_BS: jax.Array | None) -> jax.Array | None:
    """[B, S], true where there is text -> [B, 1, 1, S]."""
    return None if mask_BS is None else mask_BS[:, None, None, :]


def init(block: nn.Module, depth: int, key: jax.Array, *inputs: Any) -> Params:
    """Parameters of `depth` blocks, stacked."""
    return jax.vmap(lambda key: block.init(key, *inputs)["params"])(
        jax.random.split(key, depth)
    )


def run(
    layer: Callable[[TokensBTD, Params], TokensBTD],
    x_BTD: TokensBTD,
    blocks: Params | tuple[Params, ...],
    unroll: bool,
) -> TokensBTD:
    """x after every block in turn."""
    if not isinstance(blocks, tuple) and not unroll:
        return jax.lax.scan(lambda x, block: (layer(x, block), None), x_BTD, blocks)[0]
    for block in unstacked(blocks):
        x_BTD = layer(x_BTD, block)
    return x_BTD


def unstacked(blocks: Params | tuple[Params, ...]) -> tuple[Params, ...]:
    """Stacked blocks one by one."""
    if isinstance(blocks, tuple):
        return blocks
    leaves, tree = jax.tree.flatten(blocks)
    depth = leaves[0].shape[0]
    rows = [jax.lax.split(leaf, [1] * depth) for leaf in leaves]
    return tuple(
        jax.tree.unflatten(tree, [jnp.squeeze(part, 0) for part in row])
        for row in zip(*rows, strict=True)
    )


def first(
    blocks: Params | tuple[Params, ...], count: int
) -> Params | tuple[Params, ...]:
    """Only the first blocks."""
    if isinstance(blocks, tuple):
        return blocks[:count]
    return jax.tree.map(lambda leaf: leaf[:count], blocks)


def check_length(tokens: int, most: int) -> None:
    """Refuses more tokens than a network has positions for.

    Raises:
      ValueError: too many.
    """
    if tokens > most:
        raise ValueError(f"{tokens} text tokens, but this encoder reads at most {most}")


def check(config: Any) -> None:
    """Refuses shapes of which no network can be made.

    Raises:
      ValueError: an unknown activation, heads that do not divide the width, or as
        many blocks left out as there are.
    """
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation {config.activation!r}; known: {', '.join(ACTIVATIONS)}"
        )
    if not hasattr(config, "head_width") and config.width % config.heads:
        raise ValueError(
            f"width {config.width} is not divisible by {config.heads} heads"
        )
    if not 0 <= getattr(config, "skip", 0) < config.depth:
        raise ValueError(f"skip {config.skip} of {config.depth} blocks")
