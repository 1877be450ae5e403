"""Denoisers behind one interface, `Denoiser(init, apply)`, and their builders.

dit, mmdit and unet hold the networks, transformer_parts what the first two share, and
presets the published sizes. May import: records, config, models above this folder.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm.models import layers, positions, sharded
from scaling_ldm.models.denoisers import dit, mmdit, unet
from scaling_ldm.models.shapes import Params

TIME_RANGE = (0.0, 1.0)  # t at the data and at the noise, for every network here


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A network as two pure functions.

    init(key) -> params: float32, nested dicts of arrays.
    apply(params, x_BHWC, t_B, cond) -> prediction_BHWC, float32. `cond` is a dict of
      the arrays named in `conditioning`: "text" (int ids [B, S], or float features
      [B, S, E]), "mask" (bool [B, S], true where there is text), "label" (int [B]),
      "pooled" (float [B, P]), "guidance" (float [B]), "image" (float [B, H, W, C]).
    image_tokens, other_tokens: positions that the trunk processes; the others are those
      of text and time.
    embeddings: paths of the parameters that are tables of words or labels.
    time_range: t of apply at the data and at the noise. It is not the schedule's own
      t, such as 0 to 999: `schedule.unit_time` converts that, and samplers use this
      field.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    conditioning: tuple[str, ...]
    image_tokens: int
    other_tokens: int
    embeddings: tuple[str, ...]
    time_range: tuple[float, float] = TIME_RANGE


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What every network of an architecture reads. Some networks read more; all that one
# network reads is in its `Denoiser.conditioning`.
CONDITIONING: dict[str, tuple[str, ...]] = {
    "in_context": ("text", "mask"),
    "cross_attention": ("text", "mask"),
    "adaln_zero": ("label",),
    "mmdit": ("text", "mask"),
    "flux": ("text", "mask"),
    "unet": ("text", "mask"),
}

# Text is part of the trunk's sequence in context, and of both streams of an MMDiT or
# FLUX. A cross-attention network only reads its text tokens, but they are data too, so
# they count.
_OTHER_TOKENS: dict[str, Callable[[int], int]] = {
    "in_context": lambda text_tokens: text_tokens + 1,
    "cross_attention": lambda text_tokens: text_tokens,
    "adaln_zero": lambda text_tokens: 0,
}


def transformer(config: dit.DiTConfig) -> Denoiser:
    """The diffusion transformer of a config.

    Raises:
      ValueError: an unknown architecture, norm or kind of positions; a width that the
        heads do not divide, or divide into heads too narrow for rotary positions.
    """
    if config.architecture not in _OTHER_TOKENS:
        raise ValueError(
            f"architecture {config.architecture!r}; known: {', '.join(_OTHER_TOKENS)}"
        )
    _check_heads(config)
    if config.positions == "rope":
        positions.rope_axes(config.width // config.heads, 2)
    return Denoiser(
        init=functools.partial(dit.init, config),
        apply=sharded.on_rows(functools.partial(dit.apply, config)),
        conditioning=CONDITIONING[config.architecture],
        image_tokens=math.prod(config.image_shape[:2]) // config.patch_size**2,
        other_tokens=_OTHER_TOKENS[config.architecture](config.text_tokens),
        embeddings=("entry/word_embedding", "entry/label_embedding"),
    )


def mm_dit(config: mmdit.MMDiTConfig) -> Denoiser:
    """The MMDiT of a config or, with single-stream blocks, its FLUX.

    For a study's (width, depth), "mmdit" has `depth` blocks. "flux" has
    `mmdit.split(depth)` = (depth, single_depth), rotary positions, and an RMSNorm of
    queries and keys.

    Raises:
      ValueError: an unknown norm or kind of positions; heads that do not divide the
        width or do not fit the rotary axes; an MMDiT of fewer than two blocks.
    """
    _check_heads(config)
    if config.positions == "rope":
        head = config.width // config.heads
        axes = config.rope_axes or positions.rope_axes(head, 3)
        if len(axes) != 3 or sum(axes) != head or any(size % 2 for size in axes):
            raise ValueError(
                f"rope_axes {axes} must be 3 even sizes that sum to a head's {head}"
            )
    if not config.single_depth and config.depth < 2:
        raise ValueError(f"an MMDiT needs at least 2 blocks, got {config.depth}")
    pooled = ("pooled",) if config.pooled_width else ()
    guidance = ("guidance",) if config.guidance else ()
    return Denoiser(
        init=functools.partial(mmdit.init, config),
        apply=sharded.on_rows(functools.partial(mmdit.apply, config)),
        conditioning=("text", "mask", *pooled, *guidance),
        image_tokens=math.prod(config.patches),
        other_tokens=config.text_tokens,
        embeddings=("entry/word_embedding",),
    )


def _check_heads(config: dit.DiTConfig | mmdit.MMDiTConfig) -> None:
    layers.check_switches(config.norm, config.qk_norm, config.positions)
    if config.width % config.heads:
        raise ValueError(
            f"width {config.width} is not divisible by {config.heads} heads"
        )


def u_net(config: unet.UNetConfig) -> Denoiser:
    """Paper A's U-Net of a config.

    A U-Net has no tokens. To count data in the same way for every network, its image
    tokens are those of a transformer with patches of 2.

    Raises:
      ValueError: a width that 32 groups or its heads do not divide, other numbers of
        heads than resolutions, or latents that cannot be halved often enough.
    """
    H, W, _ = config.image_shape
    heads = config.level_heads
    if len(heads) != len(config.multiples):
        raise ValueError(
            f"heads {heads} for {len(config.multiples)} resolutions: one number, or "
            "one for each"
        )
    for width, count in zip(config.widths, heads, strict=True):
        if width % unet.GROUPS or count < 1 or width % count:
            raise ValueError(
                f"width {width} must be divisible by {unet.GROUPS} groups and {count} "
                "heads"
            )
    halvings = len(config.multiples) - 1
    if H % 2**halvings or W % 2**halvings:
        raise ValueError(f"a {H} x {W} input cannot be halved {halvings} times")
    extra = ("image",) if config.extra_channels else ()
    return Denoiser(
        init=layers.Initial(
            draw=functools.partial(unet.init, config),
            shapes=functools.partial(unet.shapes, config),
        ),
        apply=sharded.on_rows(functools.partial(unet.apply, config)),
        conditioning=("text", "mask", *extra),
        image_tokens=H * W // 4,
        other_tokens=config.text_tokens,
        embeddings=("entry/word_embedding",),
    )


def count_params(denoiser: Any) -> tuple[int, int]:
    """(all parameters, parameters without embedding tables); allocates nothing.

    Args:
      denoiser: anything with `init` and `embeddings`.
    """
    return count_shapes(layers.initial_shapes(denoiser.init), denoiser.embeddings)


def count_shapes(params: Any, embeddings: Collection[str]) -> tuple[int, int]:
    """As `count_params`, of parameters or their shapes that are there already."""
    total = lookup = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = math.prod(leaf.shape)
        total += size
        if "/".join(str(k.key) for k in path) in embeddings:
            lookup += size
    return total, total - lookup
