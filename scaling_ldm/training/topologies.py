"""Devices that are not here, as their compilers describe them.

The compiler for TPUs, libtpu, describes every slice on any machine; the compiler in
jax's CUDA plugin describes hosts of GPUs from a table of the GPU's properties. Nothing
runs on these devices, and their link speeds are not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental import topologies

from scaling_ldm import config

# Name in a topology -> a device of flops.peaks.PEAKS.
TPUS = {
    "v4": "tpu-v4",
    "v5e": "tpu-v5e",
    "v5p": "tpu-v5p",
    "v6e": "tpu-v6e",
    "tpu7x": "tpu-v7x",
}
GPUS = {"h100": "h100-sxm", "h200": "h200-sxm"}
# What libtpu would ask the machine about itself.
_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # others may compile at the same time
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# NVIDIA's H100 and H200 data sheets and the tuning guide for Hopper; the two differ in
# memory alone. In the words of XLA's GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
_GPU_TABLES = {
    "h100": _HOPPER.format(
        bandwidth=3_350_000_000_000,
        memory=84_978_434_048,
        kind="NVIDIA H100 80GB HBM3",
    ),
    "h200": _HOPPER.format(
        bandwidth=4_800_000_000_000, memory=150_000_000_000, kind="NVIDIA H200"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of one job.

    Attributes:
      name: as it was asked for, with the number of slices if there are several.
      platform: that of jax, "tpu" or "cuda".
      accelerator: a key of `flops.peaks.PEAKS`.
      devices: as `jax.experimental.topologies` describes them.
    """

    name: str
    platform: str
    accelerator: str
    devices: Sequence[Any]


def describe(name: str, slices: int = 1) -> Topology:
    """The devices of a topology.

    Args:
      name: of TPUs the kind and the chips along each axis, such as "v5p:4x8x8". Of GPUs
        the kind, the hosts and the GPUs of a host, such as "h100:8x8".
      slices: how often a slice of TPUs is there.

    Raises:
      ConfigError: an unknown kind, a shape that does not exist, or a compiler that is
        not installed.
    """
    kind, _, shape = name.partition(":")
    numbers = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
    if kind not in (*TPUS, *GPUS) or not numbers:
        raise config.ConfigError(
            f"config.compile.topology = {name!r}: give a kind of {', '.join(TPUS)} "
            f"with its chips along each axis, such as v5p:4x8x8, or one of "
            f"{', '.join(GPUS)} with hosts x GPUs of a host, such as h100:8x8"
        )
    if kind in GPUS:
        if slices > 1:
            raise config.ConfigError(
                f"config.compile.slices = {slices}: slices are of TPUs; give more hosts"
            )
        return _gpus(name, kind, shape)
    _need("libtpu", "the compiler for TPUs", 'the extra "tpu"')
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        more["chip_config_name"] = "megacore"
    with _refused_by_name(name), _environment(_NO_TPU_HERE):
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    return Topology(
        name=name if slices == 1 else f"{slices} x {name}",
        platform="tpu",
        accelerator=TPUS[kind],
        devices=found.devices,
    )


def _gpus(name: str, kind: str, shape: str) -> Topology:
    _need("jax_cuda13_plugin", "the compiler for GPUs", "jax-cuda13-plugin")
    if shape.count("x") != 1:
        raise config.ConfigError(
            f"config.compile.topology = {name!r}: give hosts x GPUs of a host, such as "
            f"{kind}:8x8"
        )
    with _refused_by_name(name):
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="gpu",
            topology=f"1x{shape}",
            target_config=_GPU_TABLES[kind],
        )
    return Topology(
        name=name, platform="cuda", accelerator=GPUS[kind], devices=found.devices
    )


@contextlib.contextmanager
def _refused_by_name(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise config.ConfigError(
            f"config.compile.topology = {name!r}: {' '.join(str(e).split())[:300]}"
        ) from e


def _need(module: str, what: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise config.ConfigError(
            f"{what} ({module}) is not installed; it runs on any machine: install "
            f"{package}"
        )


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while; those that are set already stay."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
