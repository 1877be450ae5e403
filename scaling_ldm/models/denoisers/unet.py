"""The latent U-Net of paper A, one family from 39M to 5B parameters.

Paper A ("Bigger is not Always Better", Mei et al. 2024, arXiv 2404.01367, table 1)
scales Stable Diffusion's network (Rombach et al. 2022, arXiv 2112.10752) by its base
width c alone. There are four resolutions of widths c, 2c, 4c, 4c. Each has two residual
blocks on the way down and three on the way up. A transformer follows every block of the
first three resolutions, and there is one in the middle. It has eight heads at every
width and reads text, 1024 wide, by cross-attention. This layout has exactly the
parameter counts of the table. Stable Diffusion 2 has the same parameters and 5, 10, 20
and 20 heads, each 64 wide: shapes do not tell the two apart.

The paper does not state these, which are taken from Stable Diffusion: 32 groups in
every GroupNorm, SiLU, GEGLU perceptrons four times as wide, query, key and value
without bias, a time embedding 4c wide. weights/unet.py reads and writes its published
weights.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from scaling_ldm.models import attention_backends, layers, remat, sharded
from scaling_ldm.models.shapes import (
    Array,
    LatentBHWC,
    Params,
    TextBSE,
    TimeB,
    TokensBTD,
)

MULTIPLES = (1, 2, 4, 4)  # widths of the resolutions, in c
BLOCKS = 2  # residual blocks at each on the way down; one more on the way up
GROUPS = 32

# Modules begin at zero, and `init` draws the values: flax traces the initial value of a
# module at each use, to compare its shape.
_ZEROS = nn.initializers.zeros
_Dense = functools.partial(nn.Dense, kernel_init=_ZEROS)
_Heads = functools.partial(nn.DenseGeneral, use_bias=False, kernel_init=_ZEROS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """What decides a U-Net's parameters and arithmetic.

    Attributes:
      base: c, a multiple of 32.
      heads: at every resolution, or one number for each; the middle has the last.
      image_shape: H, W, C of the latents; H and W are halved at every resolution but
        the last.
      text_tokens, text_width: of the caption.
      extra_channels: of an input concatenated to x, as for super-resolution.
      vocab_size: 0: text arrives as features, not as ids.
      remat: what the backward pass computes again: "none", or one of `remat.POLICIES`.
      attention: a name of ATTENTION in config.names; see `attention_backends`.
      multiples, blocks: the defaults are paper A's; fewer make a network for tests.
    """

    base: int
    heads: int | tuple[int, ...]
    image_shape: tuple[int, int, int]
    text_tokens: int
    text_width: int
    extra_channels: int = 0
    vocab_size: int = 0
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    multiples: tuple[int, ...] = MULTIPLES
    blocks: int = BLOCKS

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution."""
        return tuple(self.base * multiple for multiple in self.multiples)

    @property
    def level_heads(self) -> tuple[int, ...]:
        """Attention heads of each resolution."""
        if isinstance(self.heads, int):
            return (self.heads,) * len(self.multiples)
        return self.heads


def one_or_each(heads: Sequence[int]) -> int | tuple[int, ...]:
    """Heads of each resolution as `UNetConfig` has them: one number if all agree."""
    return heads[0] if len(set(heads)) == 1 else tuple(heads)


def _conv(features: int, dtype: Any, name: str, *, stride: int = 1) -> nn.Conv:
    """3 x 3 with a border of zeros on all sides, for every stride."""
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),
        dtype=dtype,
        kernel_init=_ZEROS,
        name=name,
    )


def _norm(dtype: Any, name: str, epsilon: float = 1e-5) -> nn.Module:
    return layers.GroupNorm(GROUPS, epsilon, dtype, name=name)


class UNetResidual(nn.Module):
    """Two convolutions around a residual; time is added between them."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, time_BD: Float[Array, "B D"]
    ) -> Float[Array, "B H W width"]:
        h = nn.silu(_norm(self.dtype, "norm1")(x_BHWC))
        h = _conv(self.width, self.dtype, "conv1")(h)
        time = _Dense(self.width, dtype=self.dtype, name="time")(nn.silu(time_BD))
        h = h + time[:, None, None, :]
        h = nn.silu(_norm(self.dtype, "norm2")(h))
        h = _conv(self.width, self.dtype, "conv2")(h)
        if x_BHWC.shape[-1] != self.width:
            x_BHWC = _Dense(self.width, dtype=self.dtype, name="shortcut")(x_BHWC)
        return x_BHWC + h


class UNetAttention(nn.Module):
    """Multi-head attention of x over `source`; only the output has a bias."""

    heads: int
    dtype: Any
    kernel: str = "auto"  # as UNetConfig.attention

    @nn.compact
    def __call__(
        self,
        x_BTD: TokensBTD,
        source: TextBSE,
        mask: Bool[Array, "B 1 1 S"] | None,
    ) -> TokensBTD:
        width = x_BTD.shape[-1]
        head = (self.heads, width // self.heads)

        def project(name: str, tokens: Float[Array, "B _ _"]) -> jax.Array:
            return _Heads(head, dtype=self.dtype, name=name)(tokens)

        q, k, v = project("q", x_BTD), project("k", source), project("v", source)
        out_BTKH = attention_backends.attend(q, k, v, mask, self.kernel)
        return layers.join_heads(out_BTKH, width, self.dtype, "out", kernel_init=_ZEROS)


class UNetTransformer(nn.Module):
    """Self-attention, attention to the text and a gated perceptron, over all pixels."""

    heads: int
    dtype: Any
    kernel: str = "auto"  # as UNetConfig.attention

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC, text_BSE: TextBSE, mask: Any) -> LatentBHWC:
        B, H, W, C = x_BHWC.shape
        h = _norm(self.dtype, "norm", 1e-6)(x_BHWC).reshape(B, H * W, C)
        h = _Dense(C, dtype=self.dtype, name="enter")(h)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        n = norm("norm1")(h)
        how = self.heads, self.dtype, self.kernel
        h = h + UNetAttention(*how, name="self_attention")(n, n, None)
        n = norm("norm2")(h)
        h = h + UNetAttention(*how, name="cross_attention")(n, text_BSE, mask)
        n = _Dense(8 * C, dtype=self.dtype, name="up")(norm("norm3")(h))
        value, gate = jnp.split(n, 2, axis=-1)
        h = h + _Dense(C, dtype=self.dtype, name="down")(
            value * nn.gelu(gate, approximate=False)
        )
        h = _Dense(C, dtype=self.dtype, name="leave")(h)
        return x_BHWC + h.reshape(B, H, W, C)


@functools.lru_cache(maxsize=256)
def _block(
    kind: type[nn.Module], how: tuple[Any, ...], policy: str, manual: bool
) -> Callable[..., jax.Array]:
    """(x, params, *rest) -> output of a block, whose parameters are gathered in it.

    It is one function for all blocks of one kind and size. So jax traces, and
    differentiates, one of them instead of each: a U-Net has 38 blocks, 16 of which are
    transformers of 3 sizes.

    Args:
      how: fields of the module.
      manual: whether this is inside of `sharded.on_rows`.
    """
    module, dtype = kind(*how, parent=None), how[1]

    def apply(x: jax.Array, params: Params, *rest: Any) -> jax.Array:
        if manual:
            x, params = remat.joined(x, params)
        return layers.apply_module(module, params, x, *rest)

    return remat.block(apply, policy, dtype)


@functools.lru_cache(maxsize=1024)
def _block_shapes(
    kind: type[nn.Module], how: tuple[Any, ...], tree: Any, inputs: tuple[Any, ...]
) -> Any:
    """Shapes of a block's output and variables; `inputs` are the leaves of `tree`."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    module = kind(*how, parent=None)
    return jax.eval_shape(module.init_with_output, key, *tree.unflatten(inputs))


class UNetBlock(nn.Module):
    """A `UNetResidual` or `UNetTransformer` that shares its trace with its like.

    Its initial values are zeros, which stand for shapes: `init` draws the values.
    """

    kind: type[nn.Module]
    how: tuple[Any, ...]  # width or heads, type, and a transformer's attention
    remat: str

    @nn.compact
    def __call__(self, *inputs: Any) -> jax.Array:
        if not self.is_initializing():
            manual = sharded.is_manual()
            block = _block(self.kind, self.how, self.remat, manual)
            x, *rest = inputs
            return block(x, self.variables["params"], *rest)
        leaves, tree = jax.tree.flatten(inputs)
        B, H, W, C = inputs[0].shape
        # No parameter depends on height and width, so resolutions share a trace.
        shapes = [(B, 1, 1, C), *(x.shape for x in leaves[1:])]
        types = (x.dtype for x in leaves)
        pixel = tuple(map(jax.ShapeDtypeStruct, shapes, types))
        output, variables = _block_shapes(self.kind, self.how, tree, pixel)
        for name, params in variables["params"].items():
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
            self.put_variable("params", name, zeros)
        return jnp.zeros((B, H, W, output.shape[-1]), output.dtype)


class UNet(nn.Module):
    """Latents, time and text features to a prediction; words are embedded outside."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self, x_BHWC: LatentBHWC, t_B: TimeB, text_BSE: TextBSE, mask: Any
    ) -> Float[Array, "B H W out"]:
        cfg = self.config
        widths, heads = cfg.widths, cfg.level_heads

        def residual(width: int, name: str) -> UNetBlock:
            how = width, cfg.dtype
            return UNetBlock(UNetResidual, how, remat=cfg.remat, name=name)

        def transformer(heads: int, name: str) -> UNetBlock:
            how = heads, cfg.dtype, cfg.attention
            return UNetBlock(UNetTransformer, how, remat=cfg.remat, name=name)

        time = layers.TimeEmbedding(4 * cfg.base, cfg.base, cfg.dtype, name="time")(t_B)
        text = text_BSE.astype(cfg.dtype)

        def stage(x: jax.Array, level: int, name: str) -> jax.Array:
            x = residual(widths[level], name=f"{name}_residual")(x, time)
            if level < len(widths) - 1:
                block = transformer(heads[level], name=f"{name}_transformer")
                x = block(x, text, mask)
            return x

        x = _conv(cfg.base, cfg.dtype, "enter")(x_BHWC.astype(cfg.dtype))
        skips = [x]
        for level in range(len(widths)):
            for i in range(cfg.blocks):
                x = stage(x, level, f"down{level}_{i}")
                skips.append(x)
            if level < len(widths) - 1:
                x = _conv(widths[level], cfg.dtype, f"down{level}_halve", stride=2)(x)
                skips.append(x)
        middle = widths[-1]
        x = residual(middle, name="middle_residual0")(x, time)
        x = transformer(heads[-1], name="middle_transformer")(x, text, mask)
        x = residual(middle, name="middle_residual1")(x, time)
        for level in reversed(range(len(widths))):
            for i in range(cfg.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = stage(x, level, f"up{level}_{i}")
            if level:
                x = layers.double(x)
                x = _conv(widths[level], cfg.dtype, f"up{level}_double")(x)
        x = nn.silu(_norm(cfg.dtype, "exit_norm")(x))
        return _conv(cfg.image_shape[-1], cfg.dtype, "exit")(x).astype(jnp.float32)


def _by_itself(name: str) -> bool:
    """Whether a module gathers its own parameters; remat then repeats the gathering."""
    return "_residual" in name or "_transformer" in name


def _inputs(path: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output of a kernel; 0 where it begins at zero.

    The last convolution and the last one of every residual block begin at zero. An
    untrained network therefore predicts zero, and its blocks return their inputs.
    """
    name = path.split("/")[-2]
    if name in ("exit", "conv2"):
        return 0
    return shape[0] if name in ("q", "k", "v") else math.prod(shape[:-1])


@functools.lru_cache(maxsize=64)
def _shapes(config: UNetConfig) -> Params:
    """Shapes of the modules' parameters; the same with and without `remat`.

    Tracing all modules takes seconds, and a plan asks for each size more than once.
    """
    H, W, C = config.image_shape

    def modules(key: jax.Array) -> Params:
        return layers.init_module(
            UNet(config),
            key,
            jnp.zeros((1, H, W, C + config.extra_channels)),
            jnp.zeros((1,)),
            jnp.zeros((1, config.text_tokens, config.text_width)),
            None,
        )

    found = jax.eval_shape(modules, jax.eval_shape(lambda: jax.random.key(0)))
    # Without a mesh, which is not part of the key of this cache.
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), found)


def shapes(config: UNetConfig) -> Params:
    """Shapes and types of what `init` returns."""
    found = dict(_shapes(dataclasses.replace(config, remat="none", vocab_size=0)))
    if config.vocab_size:
        table = (config.vocab_size, config.text_width)
        found["entry"] = {"word_embedding": jax.ShapeDtypeStruct(table, jnp.float32)}
    return found


def init(config: UNetConfig, key: jax.Array) -> Params:
    """Float32 parameters named as the modules of `UNet`.

    With a vocabulary, its table is "entry"/"word_embedding".
    """
    word_key, key = jax.random.split(key)
    modules = shapes(dataclasses.replace(config, vocab_size=0))
    params = layers.initialise(modules, key, _inputs)
    if config.vocab_size:
        table = jax.random.normal(word_key, (config.vocab_size, config.text_width))
        params["entry"] = {"word_embedding": table}
    return params


def apply(
    config: UNetConfig,
    params: Params,
    x_BHWC: LatentBHWC,
    t_B: TimeB,
    cond: dict[str, Any],
) -> Float[jax.Array, "B H W _"]:
    """The prediction in float32 for x at times t in [0, 1].

    Args:
      cond: "text" (features [B, S, E], or ids [B, S] with a vocabulary); "mask" [B, S],
        true where there is text, which may be left out; with extra channels "image"
        [B, H, W, extra_channels].
    """
    params = {
        name: leaves if _by_itself(name) else sharded.gather(leaves)
        for name, leaves in params.items()
    }
    text = cond["text"]
    if config.vocab_size:
        text = layers.embed(params["entry"]["word_embedding"], text)
        params = {name: leaf for name, leaf in params.items() if name != "entry"}
    if config.extra_channels:
        x_BHWC = jnp.concatenate([x_BHWC, cond["image"]], axis=-1)
    mask = cond["mask"][:, None, None, :] if "mask" in cond else None
    return layers.apply_module(UNet(config), params, x_BHWC, t_B, text, mask)
