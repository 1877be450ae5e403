"""Parameters that devices share: whole where they are used, and nowhere else.

Under an explicit mesh, `on_rows` lets each device apply a network to its own rows.
`gather` there makes the weights of one block whole, in the type of its arithmetic. Its
derivative adds up the gradient in float32 and gives each device its own part (fully
sharded data parallelism; Rajbhandari et al. 2020, arXiv 1910.02054, stage 3). Left to
itself, the partitioner of XLA adds up whole gradients on every device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from scaling_ldm.models.shapes import Params

# The gradient of a smaller leaf is added up once for all blocks.
_LARGE = 2**16  # values
# The axis of a mesh along which each device has another run; see `training.mesh`.
RUNS = "runs"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParameterPart:
    """This device's part of a parameter.

    value: the part; a loop over stacked blocks removes leading axes.
    axis: which axis is split, counted from the end; None: none, the leaf is whole.
    over: the axes of the mesh that it is split over.
    copied: the other axes of the mesh.
    """

    value: Any  # an array; while jax takes trees apart, also a placeholder
    axis: int | None = dataclasses.field(metadata={"static": True})
    over: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    copied: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def gather(tree: Any, dtype: Any = None) -> Any:
    """Whole parameters at the place where they are used.

    Inside of `on_rows` a part is made whole. Elsewhere under an explicit mesh each leaf
    is replicated by `jax.reshard`. Without a mesh this changes nothing.

    Args:
      dtype: the type in which parts travel, that of the arithmetic on them; None: their
        own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    if is_manual():
        return jax.tree.map(
            lambda leaf: (
                _whole(leaf, dtype) if isinstance(leaf, ParameterPart) else leaf
            ),
            tree,
            is_leaf=lambda leaf: isinstance(leaf, ParameterPart),
        )
    return jax.tree.map(lambda leaf: jax.reshard(leaf, PartitionSpec()), tree)


def is_manual() -> bool:
    """Whether this is traced inside of `on_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        kind == AxisType.Manual and name != RUNS
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )


def devices() -> int:
    """The devices of the mesh that share one run; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(size for name, size in sizes.items() if name != RUNS)


def _whole(part: ParameterPart, dtype: Any) -> jax.Array:
    value = jax.lax.pcast(part.value, part.copied, to="varying")
    if part.axis is None:  # nothing travels; a module may use it in float32
        return value
    dtype = value.dtype if dtype is None else dtype
    axis = value.ndim + part.axis
    return _all_gather(value, axis, part.over, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(
    value: jax.Array, axis: int, over: tuple[str, ...], dtype: Any
) -> jax.Array:
    """The whole array in `dtype`; its derivative is added up in the value's type."""
    return jax.lax.all_gather(value.astype(dtype), over, axis=axis, tiled=True)


def _all_gather_forward(value: Any, axis: Any, over: Any, dtype: Any) -> Any:
    return _all_gather(value, axis, over, dtype), jnp.zeros((), value.dtype)


def _all_gather_backward(axis: Any, over: Any, _: Any, like: Any, g: Any) -> Any:
    g = g.astype(like.dtype)
    return (jax.lax.psum_scatter(g, over, scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def on_rows(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A network of which each device computes its own rows of the batch.

    Args:
      apply: (params, x, *rest) -> an array, where every array but the parameters has a
        leading axis of rows. It uses parameters through `gather` alone.

    Returns:
      The same function. It is `apply` itself without a mesh, on one device, and where
      the rows of x are not split over all devices. It raises ValueError for an array of
      another number of rows than x has; one row stands for all.
    """

    @functools.wraps(apply)
    def applied(params: Params, x: jax.Array, *rest: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or devices() == 1 or is_manual():
            return apply(params, x, *rest)
        rows = jax.typeof(x).sharding.spec[0]
        names = rows if isinstance(rows, tuple) else (rows,)
        split = {name for name, size in mesh.shape.items() if size > 1 and name != RUNS}
        if not split <= set(names):
            return apply(params, x, *rest)
        spec = PartitionSpec(rows)
        own = tuple(name for name in mesh.axis_names if name != RUNS)
        inputs = jax.tree.map(
            lambda a: _of_rows(jnp.asarray(a), x.shape[0], rows), (x, *rest)
        )
        leaves, tree = jax.tree.flatten(params)
        specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]

        def of_device(leaves: list[jax.Array], inputs: Any) -> jax.Array:
            parts = [
                _part(leaf, spec, own) for leaf, spec in zip(leaves, specs, strict=True)
            ]
            return apply(tree.unflatten(parts), *inputs)

        return jax.shard_map(
            of_device,
            in_specs=(specs, spec),
            out_specs=spec,
            mesh=mesh,
            axis_names={*own},
        )(leaves, inputs)

    return applied


def _of_rows(a: jax.Array, count: int, rows: Any) -> jax.Array:
    """An array with a leading axis of `count` rows, split as `rows` says."""
    if a.ndim == 0 or a.shape[0] not in (1, count):
        raise ValueError(f"an array of shape {a.shape} beside {count} rows of x")
    if a.shape[0] != count:
        a = jnp.broadcast_to(a, (count, *a.shape[1:]))
    return jax.reshard(a, PartitionSpec(rows, *(None,) * (a.ndim - 1)))


def _part(
    leaf: jax.Array, spec: Any, names: tuple[str, ...]
) -> ParameterPart | jax.Array:
    """A leaf inside of `on_rows`; a small one that is whole needs no gathering."""
    split = [i for i, over in enumerate(spec) if over is not None]
    if not split:
        if math.prod(leaf.shape) < _LARGE:
            return jax.lax.pcast(leaf, names, to="varying")
        return ParameterPart(leaf, None, (), names)
    (i,) = split
    over = spec[i] if isinstance(spec[i], tuple) else (spec[i],)
    copied = tuple(name for name in names if name not in over)
    return ParameterPart(leaf, i - leaf.ndim, over, copied)
