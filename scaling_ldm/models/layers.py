"""Parts that networks share: initial values, patches, norms, stacks of blocks.

An explicit mesh refuses a reshape that splits and merges axes at once. Therefore
patches are cut and joined one axis at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float, Int

from scaling_ldm.config import names
from scaling_ldm.models import remat as rematerialise
from scaling_ldm.models.positions import sinusoid
from scaling_ldm.models.shapes import Array, LatentBHWC, Params, TimeB, TokensBTD

# Keys are those of config.names.ACTIVATIONS.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def init_module(module: nn.Module, key: jax.Array, *inputs: Any) -> Params:
    """The parameters that a flax module draws; it has no other variables."""
    variables: Any = module.init(key, *inputs)
    return variables["params"]


def apply_module(module: nn.Module, params: Params, *inputs: Any) -> Any:
    """What a flax module returns; it changes no variables."""
    return module.apply({"params": params}, *inputs)


@dataclasses.dataclass(frozen=True)
class Initial:
    """init(key) -> parameters, of which the shapes are known without drawing them.

    draw(key) -> parameters.
    shapes() -> the same tree of `jax.ShapeDtypeStruct`s.
    """

    draw: Callable[[jax.Array], Params]
    shapes: Callable[[], Params]

    def __call__(self, key: jax.Array) -> Params:
        return self.draw(key)


def initial_shapes(init: Callable[[jax.Array], Any]) -> Any:
    """Shapes and types of what `init(key)` returns; traced if it is no `Initial`."""
    if isinstance(init, Initial):
        return init.shapes()
    return jax.eval_shape(lambda: init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=1)
def _normals(keys: jax.Array, size: int) -> jax.Array:
    """Rows of normal draws, truncated at two standard deviations, of variance 1."""

    def row(key: jax.Array) -> jax.Array:
        draw = jax.random.truncated_normal(key, -2.0, 2.0, (size,), jnp.float32)
        return draw / 0.8796256610342398  # deviation after truncation

    return jax.vmap(row)(keys)


def all_but_last(path: str, shape: tuple[int, ...]) -> int:
    """How many inputs an output of a dense or convolutional kernel sums over."""
    return math.prod(shape[:-1])


def initialise(
    shapes: Any,
    key: jax.Array,
    inputs: Callable[[str, tuple[int, ...]], int] = all_but_last,
) -> Any:
    """Initial float32 values of a tree of shapes, distributed as flax's defaults.

    LeCun et al. 1998: kernels are normal with variance 1 / inputs; biases are 0, scales
    are 1. This compiles once per distinct size, not once per network. The values of a
    leaf depend only on the key, its path and its shape.

    Args:
      shapes: nested dicts, as `jax.eval_shape` of a module's `init` gives them. Leaves
        are named kernel, scale or bias.
      inputs: (path, shape of a kernel) -> how many inputs an output sums over; 0 makes
        the kernel start at zero.

    Raises:
      ValueError: a leaf of another name.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    values: list[Any] = [None] * len(leaves)
    drawn: dict[int, list[tuple[int, str, int]]] = {}  # size -> index, path, inputs
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
                raise ValueError(f"{path}: no initial value for leaves of this name")
    for size, group in drawn.items():
        names = np.array([zlib.crc32(path.encode()) for _, path, _ in group], np.uint32)
        rows = _normals(
            jax.vmap(lambda name: jax.random.fold_in(key, name))(names), size
        )
        for row, (i, _, fan_in) in zip(rows, group, strict=True):
            values[i] = row.reshape(leaves[i][1].shape) * fan_in**-0.5
    return jax.tree.unflatten(tree, values)


def embed(
    table_VE: Float[Array, "V E"], ids: Int[Array, "*ids"]
) -> Float[Array, "*ids E"]:
    """Looks up rows of a replicated table; the result is sharded as the ids are."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return table_VE[ids]
    spec = jax.typeof(ids).sharding.spec
    return jnp.asarray(table_VE).at[ids].get(out_sharding=PartitionSpec(*spec, None))


def patchify(x_BHWC: LatentBHWC, patch: int) -> Float[Array, "B N ppC"]:
    """Cuts pictures into patches, row by row: [B, H/p * W/p, p * p * C]."""
    B, H, W, C = x_BHWC.shape
    h, w = H // patch, W // patch
    x = x_BHWC.reshape(B, h, patch, W, C).reshape(B, h, patch, w, patch, C)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * w, patch, patch, C).reshape(B, h * w, patch * patch * C)


def unpatchify(
    x_BND: Float[Array, "B N ppC"], patch: int, shape: tuple[int, int, int]
) -> LatentBHWC:
    """The inverse of `patchify`, for pictures of `shape` = (H, W, C)."""
    H, W, C = shape
    h, w = H // patch, W // patch
    B = x_BND.shape[0]
    x = x_BND.reshape(B, h, w, patch * patch * C).reshape(B, h, w, patch, patch * C)
    x = x.reshape(B, h, w, patch, patch, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H, w, patch, C).reshape(B, H, W, C)


def double(x_BHWC: LatentBHWC) -> Float[Array, "B 2*H 2*W C"]:
    """Doubles height and width: each pixel becomes four equal ones."""
    return jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018, arXiv 1803.08494); its statistics are float32."""

    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x_BHWC: LatentBHWC) -> LatentBHWC:
        C = x_BHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        return _group_norm(x_BHWC, scale, bias, self.groups, self.epsilon, self.dtype)


# Norms of one shape share a trace. It is copied inline, so the program is the same.
@functools.partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _group_norm(
    x_BHWC: Array,
    scale_C: Array,
    bias_C: Array,
    groups: int,
    epsilon: float,
    dtype: Any,
) -> Array:
    B, C, G = x_BHWC.shape[0], x_BHWC.shape[-1], groups
    x = x_BHWC.astype(jnp.float32)

    def group_mean(of_BHWC: Array) -> jax.Array:
        """The mean over pixels and over a group's channels, [B, 1, 1, C]."""
        of_BGF = jnp.mean(of_BHWC, axis=(1, 2)).reshape(B, G, C // G)
        mean_BG1 = jnp.mean(of_BGF, axis=-1, keepdims=True)
        return jnp.broadcast_to(mean_BG1, of_BGF.shape).reshape(B, C)[:, None, None]

    mean = group_mean(x)
    # The mean square minus the squared mean would lose digits far from zero.
    variance = group_mean((x - mean) ** 2)
    gain = jax.lax.rsqrt(variance + epsilon) * scale_C[None, None, None]
    y = (x - mean) * gain + bias_C[None, None, None]
    return y.astype(dtype)


def norm(
    kind: str, dtype: Any, name: str, affine: bool, epsilon: float = 1e-6
) -> nn.Module:
    """A LayerNorm, or for "rms" an RMSNorm, which has no bias; float32 statistics."""
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, use_scale=affine, name=name)
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, use_scale=affine, use_bias=affine, name=name
    )


def head_norm(
    kind: str, x_BTKH: Float[Array, "B T K H"], dtype: Any, name: str
) -> Float[Array, "B T K H"]:
    """Normalises queries or keys per head, which bounds the scores; "none": as is."""
    return x_BTKH if kind == "none" else norm(kind, dtype, name, True)(x_BTKH)


def check_switches(norm: str, qk_norm: str, positions: str) -> None:
    """Checks three fields of a transformer's config.

    Raises:
      ValueError: a value that config.names does not list.
    """
    for name, value, known in (
        ("norm", norm, names.NORMS),
        ("qk_norm", qk_norm, names.QK_NORMS),
        ("positions", positions, names.POSITIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r}; known: {', '.join(known)}")


def project(
    x: Float[Array, "B T D"],
    parts: int,
    features: tuple[int, ...],
    dtype: Any,
    name: str,
    use_bias: bool = True,
) -> list[Float[Array, "B T ..."]]:
    """Several projections of x in one product, such as queries, keys and values.

    The kernel is [D, parts, *features]; each result is [B, T, *features].
    """
    dense = nn.DenseGeneral(
        (parts, *features), use_bias=use_bias, dtype=dtype, name=name
    )
    return [jnp.squeeze(a, 2) for a in jnp.split(dense(x), parts, axis=2)]


def join_heads(
    x_BTKH: Float[Array, "B T K H"],
    width: int,
    dtype: Any,
    name: str,
    use_bias: bool = True,
    kernel_init: Any = nn.linear.default_kernel_init,
) -> Float[Array, "B T D"]:
    """The output projection of an attention: all heads to `width` features."""
    dense = nn.DenseGeneral(
        width,
        axis=(-2, -1),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )
    return dense(x_BTKH)


def perceptron(
    x_BTD: TokensBTD,
    hidden: int,
    activation: Callable[[Array], Array],
    dtype: Any,
    prefix: str,
) -> TokensBTD:
    """Two dense layers, called `prefix` up and down, around an activation."""
    h = nn.Dense(hidden, dtype=dtype, name=f"{prefix}up")(x_BTD)
    return nn.Dense(x_BTD.shape[-1], dtype=dtype, name=f"{prefix}down")(activation(h))


def unstack(blocks: Any) -> Iterator[Any]:
    """The blocks of a stack, one by one: leaves lose their leading axis of layers."""
    leaves, tree = jax.tree.flatten(blocks)
    rows = [jax.lax.split(leaf, [1] * leaf.shape[0]) for leaf in leaves]
    for row in zip(*rows, strict=True):
        yield jax.tree.unflatten(tree, [jnp.squeeze(part, 0) for part in row])


def scan_blocks(
    layer: Callable[..., Any],
    x: Any,
    blocks: Any,
    side: Any,
    *,
    remat: str,
    unroll: bool,
    dtype: Any,
) -> Any:
    """Passes x through a stack of blocks: x = layer(x, block, side) for each.

    Args:
      blocks: parameters with a leading axis of layers; each block is gathered where it
        is used.
      side: what every block reads beside x.
      remat: what the backward pass computes again: "none", or one of
        `remat.POLICIES`.
      unroll: a Python loop over slices instead of `lax.scan`, which is slow on CPUs.
      dtype: the type of the blocks' arithmetic, in which their kernels are gathered.
    """
    step = rematerialise.block(layer, remat, dtype, prevent_cse=unroll)
    if not unroll:
        return jax.lax.scan(lambda x, block: (step(x, block, side), None), x, blocks)[0]
    for block in unstack(blocks):
        x = step(x, block, side)
    return x


class TimeEmbedding(nn.Module):
    """Times in [0, 1] to vectors: sinusoids of 1000 t, then a two-layer perceptron.

    The sinusoids are float32 in every network, because bfloat16 rounds 750 to 752.
    """

    width: int
    features: int
    dtype: Any
    ends: int = 0

    @nn.compact
    def __call__(self, t_B: TimeB) -> Float[Array, "B D"]:
        t_B = 1000.0 * t_B.astype(jnp.float32)
        h = sinusoid(t_B, self.features, 10_000.0, self.ends)
        h = nn.Dense(self.width, dtype=self.dtype, name="up")(h)
        return nn.Dense(self.width, dtype=self.dtype, name="out")(jax.nn.silu(h))
