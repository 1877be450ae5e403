"""Parts that networks share: gathering, first values, norms, positions, the stack.

Explicit meshes refuse a reshape that splits and merges at once, so patches are cut and
joined one axis at a time. jax and flax only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from scaling_ldm.models.shapes import LatentBHWC, TextBS, TextBSE, TimeB, TokensBTD

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def gather(tree: Any) -> Any:
    """Whole copies of sharded parameters, at the place where they are used.

    Under an explicit mesh each leaf is resharded to full replication (its gradient is
    reduced and scattered back); without a mesh this is the identity.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), tree)


def gathered(module: Any) -> Any:
    """A flax module class whose parameters are made whole where it uses them."""
    return nn.map_variables(
        module, "params", trans_in_fn=gather, init=True, mutable=True
    )


@functools.partial(jax.jit, static_argnums=1)
def _normals(keys: jax.Array, size: int) -> jax.Array:
    """Rows of normal draws cut at two standard deviations and scaled back to one."""

    def row(key: jax.Array) -> jax.Array:
        draw = jax.random.truncated_normal(key, -2.0, 2.0, (size,), jnp.float32)
        return draw / 0.8796256610342398  # what is left of 1 once cut

    return jax.vmap(row)(keys)


def all_but_last(path: str, shape: tuple[int, ...]) -> int:
    """Inputs of one output of a dense or a convolutional kernel."""
    return math.prod(shape[:-1])


def initialise(
    shapes: Any,
    key: jax.Array,
    inputs: Callable[[str, tuple[int, ...]], int] = all_but_last,
) -> Any:
    """Float32 first values of a tree of named shapes: what flax's defaults are.

    Compiles once per distinct size instead of once per network. A leaf's values depend
    on the key, its path and its shape alone.

    Args:
      shapes: nested dicts, as `jax.eval_shape` of a module's `init` gives them; leaves
        are named kernel, scale or bias.
      inputs: (path, shape of a kernel) -> how many inputs an output sums over; 0 for a
        kernel that begins at zero.

    Raises:
      ValueError: a leaf of another name.
    """

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    values: list[Any] = [None] * len(leaves)
    drawn: dict[int, list[tuple[int, str, int]]] = {}  # by size: place, path, inputs
    for i, (keys, leaf) in enumerate(leaves):
        path = "/".join(str(part.key) for part in keys)
        match keys[-1].key:
            case "kernel" if fan_in := inputs(path, leaf.shape):
                drawn.setdefault(leaf.size, []).append((i, path, fan_in))
            case "kernel" | "bias":
                values[i] = jnp.zeros(leaf.shape, jnp.float32)
            case "scale":
                values[i] = jnp.ones(leaf.shape, jnp.float32)
            case _:
                raise ValueError(f"{path}: no first value for leaves of this name")
    for size, group in drawn.items():
        names = np.array([zlib.crc32(path.encode()) for _, path, _ in group], np.uint32)
        rows = _normals(
            jax.vmap(lambda name: jax.random.fold_in(key, name))(names), size
        )
        for row, (i, _, fan_in) in zip(rows, group, strict=True):
            values[i] = row.reshape(leaves[i][1].shape) * fan_in**-0.5  # LeCun 1998
    return jax.tree.unflatten(tree, values)


def embed(table_VE: jax.Array, ids_BS: TextBS) -> TextBSE:
    """Rows of a replicated table; the result is sharded as the ids are."""
    if jax.sharding.get_abstract_mesh().empty:
        return table_VE[ids_BS]
    spec = jax.typeof(ids_BS).sharding.spec
    return table_VE.at[ids_BS].get(out_sharding=PartitionSpec(*spec, None))


def patchify(x_BHWC: LatentBHWC, patch: int) -> TokensBTD:
    """Non-overlapping patches in raster order: [B, H/p * W/p, p * p * C]."""
    B, H, W, C = x_BHWC.shape
    h, w = H // patch, W // patch
    x = x_BHWC.reshape(B, h, patch, W, C).reshape(B, h, patch, w, patch, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * w, patch, patch, C).reshape(B, h * w, patch * patch * C)


def unpatchify(x_BND: TokensBTD, patch: int, shape: tuple[int, ...]) -> LatentBHWC:
    """The inverse of `patchify` for pictures of `shape` = (H, W, C)."""
    H, W, C = shape
    h, w = H // patch, W // patch
    B = x_BND.shape[0]
    x = x_BND.reshape(B, h, w, patch * patch * C).reshape(B, h, w, patch, patch * C)
    x = x.reshape(B, h, w, patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H, w, patch, C).reshape(B, H, W, C)


def sinusoid(
    position: np.ndarray | jax.Array, width: int, longest: float, ends: int = 0
) -> jax.Array:
    """cos and sin of a position at geometric wavelengths from 2 pi to `longest` 2 pi.

    Vaswani et al. 2017, section 3.5; an odd width leaves one zero column. `ends` = 1
    reaches the longest wavelength itself, as Ho et al. 2020 have it.
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


def image_positions(height: int, width: int, features: int) -> jax.Array:
    """Fixed 2-D positions [height * width, features]: half for the row, half column."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    half = features // 2
    return jnp.concatenate(
        [
            sinusoid(row.reshape(-1), half, 10_000.0),
            sinusoid(column.reshape(-1), features - half, 10_000.0),
        ],
        axis=-1,
    )


def double(x_BHWC: LatentBHWC) -> LatentBHWC:
    """Twice the height and width, each pixel four times."""
    return jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)


class GroupNorm(nn.Module):
    """Groups of neighbouring channels get mean 0 and variance 1; float32 statistics."""

    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> LatentBHWC:
        B, C, G = x_BHWC.shape[0], x_BHWC.shape[-1], self.groups
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        x = x_BHWC.astype(jnp.float32)

        def group_mean(of_BHWC: jax.Array) -> jax.Array:
            """Over pixels and a group's channels, for each of these: [B, 1, 1, C]."""
            of_BGF = jnp.mean(of_BHWC, axis=(1, 2)).reshape(B, G, C // G)
            mean_BG1 = jnp.mean(of_BGF, axis=-1, keepdims=True)
            return jnp.broadcast_to(mean_BG1, of_BGF.shape).reshape(B, C)[:, None, None]

        mean = group_mean(x)
        # Not the mean square less the squared mean: that loses digits far from zero.
        variance = group_mean((x - mean) ** 2)
        gain = jax.lax.rsqrt(variance + self.epsilon) * scale[None, None, None]
        y = (x - mean) * gain + bias[None, None, None]
        return y.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionGrid:
    """How a fixed table of image positions is laid out.

    Attributes:
      columns_first: the first half of the features tells the column and sines precede
        cosines, as in DiT, PixArt and SD3; else the row and cosines come first.
      step: distance of neighbouring patches.
      table: side of a square table of which the middle is used, as SD3 does; 0: none.
    """

    columns_first: bool = False
    step: float = 1.0
    table: int = 0


def grid_positions(
    grid: PositionGrid, height: int, width: int, features: int
) -> jax.Array:
    """Fixed 2-D positions [height * width, features] in float32.

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
    """How many features of a head each axis of a position turns; all even.

    Two axes (row, column) share them equally; three are FLUX's index, row and column
    in its proportions: 16, 56, 56 of 128.

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


def rope_table(position_TA: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """cos and sin [2, T, head_width / 2] of the angles by which each position turns.

    Su et al. 2021, arXiv 2104.09864, section 3.4.2, one block of features per axis.

    Args:
      position_TA: of every token on every axis; 0 does not turn.
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


def image_rope(height: int, width: int, axes: Sequence[int], before: int) -> np.ndarray:
    """`rope_table` of `before` tokens that do not turn and a raster of patches."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    position = np.zeros((before + height * width, len(axes)))
    position[before:, -2] = row.reshape(-1)
    position[before:, -1] = column.reshape(-1)
    return rope_table(position, axes)


def rotate(x_BTKH: jax.Array, table_2TH: np.ndarray | None) -> jax.Array:
    """Neighbouring features as planes, turned by `rope_table` in float32."""
    if table_2TH is None:
        return x_BTKH
    cos, sin = (table[None, :, None, :] for table in table_2TH)
    x = x_BTKH.astype(jnp.float32).reshape(*x_BTKH.shape[:-1], -1, 2)
    real, imaginary = x[..., 0], x[..., 1]
    turned = jnp.stack(
        [real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1
    )
    return turned.reshape(x_BTKH.shape).astype(x_BTKH.dtype)


NORMS = ("layer", "rms")
QK_NORMS = ("none", *NORMS)
POSITIONS = ("sinusoidal", "learned", "rope")


def norm(
    kind: str, dtype: Any, name: str, affine: bool, epsilon: float = 1e-6
) -> nn.Module:
    """LayerNorm, or RMSNorm, which has no bias; statistics in float32."""
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, use_scale=affine, name=name)
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_scale=affine, use_bias=affine, name=name
    )


def head_norm(kind: str, x_BTKH: jax.Array, dtype: Any, name: str) -> jax.Array:
    """Queries or keys normalised per head, which bounds the scores; "none": as is."""
    return x_BTKH if kind == "none" else norm(kind, dtype, name, True)(x_BTKH)


def check_switches(norm: str, qk_norm: str, positions: str) -> None:
    """Raises ValueError for a value that no network knows."""
    for name, value, known in (
        ("norm", norm, NORMS),
        ("qk_norm", qk_norm, QK_NORMS),
        ("positions", positions, POSITIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}; known: {', '.join(known)}")


def scan_blocks(
    layer: Callable[..., Any],
    x: Any,
    blocks: Any,
    side: Any,
    *,
    remat: bool,
    unroll: bool,
) -> Any:
    """x through a stack of blocks: `layer(x, block, side)` for each.

    Args:
      blocks: parameters with a leading axis of layers, each gathered where it is used.
      remat: recompute each layer in the backward pass.
      unroll: a Python loop over slices instead of a `lax.scan`.
    """

    def step(x: Any, block: Any, side: Any) -> Any:
        return layer(x, gather(block), side)

    if remat:
        step = jax.checkpoint(step, prevent_cse=unroll)
    if not unroll:
        return jax.lax.scan(lambda x, block: (step(x, block, side), None), x, blocks)[0]
    leaves, tree = jax.tree.flatten(blocks)
    rows = [jax.lax.split(leaf, [1] * leaf.shape[0]) for leaf in leaves]
    for row in zip(*rows, strict=True):
        block = jax.tree.unflatten(tree, [jnp.squeeze(r, 0) for r in row])
        x = step(x, block, side)
    return x


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> [B, width]: sinusoids of 1000 t, then a two-layer perceptron.

    The sinusoids are float32 whatever the compute type: bfloat16 rounds 750 to 752.
    """

    width: int
    features: int
    dtype: Any
    ends: int = 0

    @nn.compact
    def __call__(self, t_B: TimeB) -> jax.Array:
        t_B = 1000.0 * t_B.astype(jnp.float32)
        h = sinusoid(t_B, self.features, 10_000.0, self.ends)
        h = nn.Dense(self.width, dtype=self.dtype, name="up")(h)
        return nn.Dense(self.width, dtype=self.dtype, name="out")(jax.nn.silu(h))
