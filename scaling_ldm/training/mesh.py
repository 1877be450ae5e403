"""Devices: the explicit mesh, and where each array lives.

The axes are ("replica", "fsdp"). Parameters are copied over the first and sharded over
the second; the batch is split over both. A mesh of packed runs has the axis "runs"
before them: each group of devices along it trains another run on the same batches.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

from scaling_ldm import config, records
from scaling_ldm.models import sharded

RowNumbers = Int64[np.ndarray, "n"]

AXES = ("replica", "fsdp")
BATCH = PartitionSpec(AXES)  # rows over all devices
STACKED_BATCHES = PartitionSpec(None, AXES)  # several batches, stacked
REPLICATED = PartitionSpec()  # a copy on every device
RUNS = sharded.RUNS  # the axis of packed runs
PACKED = PartitionSpec(RUNS)  # a leading axis of runs, one for each group of devices

# Path pattern -> the axis to shard over "fsdp", counted after the layer axis of stacked
# blocks. The first match wins. Smaller leaves are copied to every device.
SHARDING_RULES: tuple[tuple[str, int | None], ...] = (
    (r"(word|label)_embedding$", 0),
    (r"kernel$", 0),
    (r".*", None),
)
MIN_SHARDED_SIZE = 2**12  # values in a leaf


def start_devices(cfg: config.MeshConfig) -> None:
    """Sets up this process's devices; call it before anything uses a device.

    On a CPU host each simulated device has its own thread, so that elementwise
    operations run on every core. With more devices than cores, XLA gets more threads: a
    device that waits for others occupies one, and if all threads wait, XLA ends the
    process.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        count = cfg.cpu_devices or len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", count)
        if count > len(os.sched_getaffinity(0)):
            os.environ.setdefault("PJRT_NPROC", str(4 * count))


def keep_compiled(cfg: config.MeshConfig, workdir: str | os.PathLike) -> str:
    """Keeps compiled programs for the next process; returns where, "": nowhere.

    A place that the user gave to jax itself (JAX_COMPILATION_CACHE_DIR) stays with
    "auto". The folder of a working directory is made when a program is compiled, so
    call this when the directory is this experiment's.
    """
    global _kept
    name, place = "jax_compilation_cache_dir", cfg.compilation_cache
    before = jax.config.values[name]
    if place == "auto" and before and before != _kept:
        return before
    if place == "auto":
        whole = workdir if "://" in str(workdir) else os.path.abspath(workdir)
        place = "" if jax.default_backend() == "cpu" else f"{whole}/compiled"
    if place != (before or ""):
        jax.config.update(name, place or None)
        compilation_cache.reset_cache()  # jax opens its place only once
    _kept = place
    return place


_kept = ""  # the place that `keep_compiled` set


def build(
    cfg: config.MeshConfig,
    batch_sizes: dict[str, int],
    use: Sequence[jax.Device] | None = None,
    runs: int = 1,
) -> Mesh:
    """The mesh over all devices of the job.

    Args:
      batch_sizes: config key -> a batch size that must be a multiple of the devices
        that share a run.
      use: the devices; by default all of them.
      runs: how many runs train at once. The mesh has the axis RUNS if there are two or
        more, and `cfg` says how the devices of one of them are used.

    Raises:
      ConfigError: the mesh or a batch size does not fit the number of devices.
    """
    devices = jax.device_count() if use is None else len(use)
    if devices % runs:
        raise config.ConfigError(
            f"config.mesh.runs = {runs} does not divide the {devices} devices; it may "
            f"be one of {_divisors(devices)}"
        )
    devices //= runs
    if cfg.replica == -1 and devices % cfg.fsdp:
        raise config.ConfigError(
            f"config.mesh.fsdp = {cfg.fsdp} does not divide the {devices} devices; "
            f"it may be one of {_divisors(devices)}"
        )
    replica = devices // cfg.fsdp if cfg.replica == -1 else cfg.replica
    if replica * cfg.fsdp != devices:
        each = " for each run" if runs > 1 else ""
        raise config.ConfigError(
            f"config.mesh asks for {replica} x {cfg.fsdp} devices, this job has "
            f"{devices}{each}; set mesh.replica = -1 to use all that are left"
        )
    for key, size in batch_sizes.items():
        if size % devices:
            below, above = size // devices * devices, -(-size // devices) * devices
            raise config.ConfigError(
                f"{key} = {size} is not divisible by the {devices} devices; nearest: "
                f"{' or '.join(str(n) for n in (below, above) if n)}"
            )
    used = jax.devices() if use is None else list(use)
    grid = device_grid((runs * replica, cfg.fsdp), used)
    if runs == 1:
        return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 2)
    return Mesh(
        grid.reshape(runs, replica, cfg.fsdp),
        (RUNS, *AXES),
        axis_types=(AxisType.Explicit,) * 3,
    )


def runs_of(mesh: Mesh) -> int:
    """How many runs train on the mesh at once."""
    return mesh.shape.get(RUNS, 1)


def devices_of_run(mesh: Mesh) -> int:
    """How many devices share a run."""
    return mesh.size // runs_of(mesh)


def device_grid(shape: tuple[int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices by their coordinates on AXES, neighbours near one another.

    Within a slice, every pair is joined by fast links, and the topology decides. Slices
    are joined by a slower network: those of TPUs of several slices, and every host of
    GPUs. So "replica", which only adds up gradients, goes over slices first, and "fsdp"
    only if there are more slices than replicas.

    Args:
      shape: replica x fsdp, as many as there are devices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    replica, fsdp = shape
    over = math.gcd(replica, slices)
    between = over, slices // over  # the second number divides fsdp
    return mesh_utils.create_hybrid_device_mesh(
        (replica // between[0], fsdp // between[1]),
        between,
        devices,
        allow_split_physical_axes=True,
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def partition_specs(tree: Any, fsdp: int) -> Any:
    """A PartitionSpec for each leaf of a tree of shapes, by SHARDING_RULES.

    Also for the optimizer's and the EMA's trees: the rules match the end of a path. If
    `fsdp` does not divide the axis of the rule, the largest axis that it divides is
    sharded. If there is none, the leaf is copied to every device.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = next(
            axis for pattern, axis in SHARDING_RULES if re.search(pattern, name)
        )
        if fsdp == 1 or axis is None or math.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return PartitionSpec()
        first = 1 if "blocks/" in name else 0
        order = [first + axis]
        order += sorted(range(first, len(leaf.shape)), key=lambda i: -leaf.shape[i])
        for i in order:
            if leaf.shape[i] % fsdp == 0:
                return PartitionSpec(
                    *("fsdp" if j == i else None for j in range(i + 1))
                )
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for each leaf of a tree of shapes, by SHARDING_RULES."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition_specs(tree, mesh.shape["fsdp"]),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def rows_of_process(mesh: Mesh, rows: int, process: int | None = None) -> RowNumbers:
    """The rows of a global batch that a process feeds to its devices, ascending.

    They need not be neighbours: the places of a host's devices in the mesh follow the
    links between devices, not the hosts.

    Args:
      rows: of the global batch, a multiple of the devices of a run.
      process: None for this one.
    """
    process = jax.process_index() if process is None else process
    each = rows // devices_of_run(mesh)
    owners = np.array([device.process_index for device in mesh.devices.flat])
    # Every run of a pack has the same rows.
    own = (owners == process).reshape(runs_of(mesh), -1).any(axis=0)
    (places,) = np.nonzero(own)
    return (places[:, None] * each + np.arange(each)).reshape(-1)


def put(mesh: Mesh, tree: Any, spec: PartitionSpec = BATCH) -> Any:
    """Global arrays from this process's rows (numpy arrays), sharded by `spec`.

    Args:
      tree: the rows of `rows_of_process`, in that order, along the axis that `spec`
        splits; whole arrays if it splits none.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:  # it has all rows: one call for the whole tree
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda rows: _from_rows_of_process(mesh, np.asarray(rows), sharding), tree
    )


def _from_rows_of_process(
    mesh: Mesh, own: np.ndarray, sharding: NamedSharding
) -> jax.Array:
    if AXES not in sharding.spec:
        return jax.make_array_from_process_local_data(sharding, own)
    axis = sharding.spec.index(AXES)
    each = own.shape[axis] // len(mesh.local_devices)
    shape = (*own.shape[:axis], each * mesh.size, *own.shape[axis + 1 :])
    held = rows_of_process(mesh, shape[axis])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start = (index[axis].start if index else None) or 0
        first = int(np.searchsorted(held, start))
        return own[(slice(None),) * axis + (slice(first, first + each),)]

    return jax.make_array_from_callback(shape, sharding, part)


def named_sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """The sharding of one array."""
    return NamedSharding(mesh, spec)


def request_flags(mesh: Mesh, request: int) -> jax.Array:
    """One request per device, int32 [devices]; a step takes the largest of the job.

    Args:
      request: this process's, one of GO_ON, SAVE, SAVE_AND_SAY and STOP of `signals`.
    """
    mine = np.full(1, request, np.int32)
    return jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, flags_spec(mesh)), lambda _: mine
    )


def flags_spec(mesh: Mesh) -> PartitionSpec:
    """One value on each device."""
    return PartitionSpec(mesh.axis_names)


def is_primary() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def any_process(condition: bool) -> bool:
    """Whether the condition holds on any process; every process must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.int32(condition)).any())


def failing_together(action: Callable[[], Any]) -> Any:
    """The action's result; if it fails on one process, this raises on all of them."""
    result, refusal = None, None
    try:
        result = action()
    except (config.ConfigError, records.Damaged, OSError) as e:
        refusal = e
    if any_process(refusal is not None) and refusal is None:
        refusal = config.ConfigError("another process refused; its message says why")
    if refusal is not None:
        raise refusal
    return result


def barrier(name: str) -> None:
    """Waits until every process has called this; a single process does not wait."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def place_params(mesh: Mesh, params: Any) -> Any:
    """Parameters that every process has, as arrays on a mesh, by SHARDING_RULES."""
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: leaf[index]
        ),
        params,
        shardings(mesh, params),
    )
