"""Runs that train side by side in one compiled program, each on its own devices.

The state of a pack has a leading axis of runs, which is split over the axis RUNS of the
mesh. Each group of devices along it has one run, the slot's, and computes what it would
compute alone. No collective of a step crosses the groups: they read the same batches,
which lie on each of them. Each slot says how many steps of a dispatch it takes, so runs
may begin and end at different steps.

A run alone has a mesh without that axis and a state without it. Every function here
then gives back what it got.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from scaling_ldm.training import mesh


def on_every_run(
    device_mesh: Mesh,
    function: Callable[..., Any],
    specs: Sequence[PartitionSpec],
    out: PartitionSpec = mesh.PACKED,
) -> Callable[..., Any]:
    """A function of one run, for all slots at once.

    Args:
      function: of the arrays of one run.
      specs: of each argument on the mesh. PACKED ones have a leading axis of runs, and
        the function gets them without it. The others are the same for all runs, but
        for flags of single devices.
      out: PACKED, or REPLICATED for results that are the same in all slots.

    Returns:
      Of a mesh without runs, the function. Otherwise one whose PACKED results have a
      leading axis of runs.
    """
    if mesh.RUNS not in device_mesh.axis_names:
        return function
    # On one device there is nothing to divide, and kernels for one device may be used.
    alone = mesh.devices_of_run(device_mesh) == 1
    axes = {*device_mesh.axis_names} if alone else {mesh.RUNS}
    given = [spec if alone else _over_runs(spec) for spec in specs]

    def of_slot(*arguments: Any) -> Any:
        own = [
            jax.tree.map(lambda a: a.reshape(a.shape[1:]), argument)
            if spec == mesh.PACKED
            else argument
            for argument, spec in zip(arguments, specs, strict=True)
        ]
        found = function(*own)
        return jax.tree.map(lambda a: a[None], found) if out == mesh.PACKED else found

    return jax.shard_map(
        of_slot,
        mesh=device_mesh,
        in_specs=tuple(given),
        out_specs=out,
        axis_names=axes,
        check_vma=False,
    )


def _over_runs(spec: PartitionSpec) -> PartitionSpec:
    """What a spec says of the axis of runs."""
    names = [over if isinstance(over, tuple) else (over,) for over in spec]
    return PartitionSpec(*(mesh.RUNS if mesh.RUNS in n else None for n in names))


class Slots(NamedTuple):
    """How states of single runs get into the state of a pack, and out of it.

    The state of a single run lies on every group of devices, so that all processes of a
    job read and write its checkpoints together.

    spread(state) -> the state of a pack with this run in every slot.
    insert(packed, slot, state) -> the same with this run in a slot, int32.
    pick(packed, slot) -> the state of the slot's run, bit for bit.
    """

    spread: Callable[[Any], Any]
    insert: Callable[[Any, Any, Any], Any]
    pick: Callable[[Any, Any], Any]


_ALONE = Slots(
    spread=lambda state: state,
    insert=lambda packed, slot, state: state,
    pick=lambda packed, slot: packed,
)


def slots(device_mesh: Mesh, compiler_options: Any) -> Slots:
    """The functions of a mesh, compiled at their first call."""
    if mesh.RUNS not in device_mesh.axis_names:
        return _ALONE
    each = functools.partial(on_every_run, device_mesh)
    jit = functools.partial(jax.jit, compiler_options=compiler_options)

    def chosen(packed: Any, slot: jax.Array, state: Any) -> Any:
        here = jax.lax.axis_index(mesh.RUNS) == slot
        return jax.tree.map(lambda a, b: jnp.where(here, b, a), packed, state)

    def own_bits(packed: Any, slot: jax.Array) -> Any:
        """The bits of the slot's run on every group of devices."""
        here = jax.lax.axis_index(mesh.RUNS) == slot

        def spread(a: jax.Array) -> jax.Array:
            bits = jax.lax.bitcast_convert_type(a, _WORDS[a.dtype.itemsize])
            wide = jnp.where(here, bits, 0).astype(jnp.uint32)
            there = jax.lax.psum(wide, mesh.RUNS).astype(bits.dtype)
            return jax.lax.bitcast_convert_type(there, a.dtype)

        return jax.tree.map(spread, packed)

    return Slots(
        spread=jit(each(lambda state: state, (mesh.REPLICATED,))),
        insert=jit(
            each(chosen, (mesh.PACKED, mesh.REPLICATED, mesh.REPLICATED)),
            donate_argnums=0,
        ),
        pick=jit(each(own_bits, (mesh.PACKED, mesh.REPLICATED), mesh.REPLICATED)),
    )


_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
