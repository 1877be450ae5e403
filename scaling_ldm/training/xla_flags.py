"""Compiler flags that let collectives run at the same time as arithmetic.

MaxText, AXLearn and JAX-Toolbox set these for training with sharded parameters. All are
switches that are turned on, and `config.mesh.overlap_collectives=False` sets none of
them. A flag that XLA_FLAGS or LIBTPU_INIT_ARGS already sets keeps its value.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re

import jax

from scaling_ldm import config

# Platform -> its flags -> what each does.
FLAGS: dict[str, dict[str, str]] = {
    "tpu": {
        "xla_tpu_enable_latency_hiding_scheduler": (
            "orders a program so that collectives start early and end late"
        ),
        "xla_enable_async_all_gather": (
            "splits all-gathers into a start and an end (on v4; later kinds always do)"
        ),
        "xla_tpu_enable_async_collective_fusion": (
            "runs a collective inside of the arithmetic beside it"
        ),
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": (
            "runs all-gathers inside of the arithmetic beside them"
        ),
        "xla_tpu_enable_async_collective_fusion_multiple_steps": (
            "spreads one collective over several operations"
        ),
        "xla_tpu_overlap_compute_collective_tc": (
            "lets a core compute while its collective is under way"
        ),
        "xla_tpu_enable_data_parallel_all_reduce_opt": (
            "overlaps sums of gradients between slices with the backward pass"
        ),
        "xla_tpu_data_parallel_opt_different_sized_ops": (
            "overlaps sums of gradients of different sizes with the backward pass"
        ),
    },
    "cuda": {
        "xla_gpu_enable_latency_hiding_scheduler": (
            "orders a program so that collectives start early and end late"
        ),
        "xla_gpu_enable_pipelined_all_gather": (
            "gathers the weights of the next block in a loop over blocks"
        ),
        "xla_gpu_enable_pipelined_reduce_scatter": (
            "scatters the gradients of a block during the next one"
        ),
        "xla_gpu_enable_pipelined_all_reduce": (
            "adds up the gradients of a block during the next one"
        ),
    },
}
# Environment variable of each platform's flags. Only libtpu reads LIBTPU_INIT_ARGS.
_VARIABLES = {"tpu": "LIBTPU_INIT_ARGS", "cuda": "XLA_FLAGS"}
# Names of a platform in jax_platforms.
_ALIASES = {"tpu": ("tpu",), "cuda": ("cuda", "gpu")}
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_NVIDIA = ("/dev/nvidiactl", "/dev/dxg")  # one is there where a GPU can be used


def options(cfg: config.MeshConfig, platform: str) -> dict[str, bool]:
    """The flags as compiler options, without those that the environment names.

    Args:
      platform: of the devices that are compiled for; a platform not in FLAGS has no
        options.
    """
    if not cfg.overlap_collectives:
        return {}
    return {name: True for name in FLAGS.get(platform, ()) if name not in _named()}


def set_for_devices(cfg: config.MeshConfig) -> None:
    """Adds the flags to the environment of this process, for the devices it will use.

    Call it before anything uses a device: the compilers read their variables once. It
    does nothing without a TPU or GPU, or if the variable names a file of flags.
    """
    for platform, variable in _VARIABLES.items():
        given = os.environ.get(variable, "").strip()
        if not _is_used(platform) or given[:1] not in ("", "-"):
            continue
        new = [f"--{name}=true" for name in options(cfg, platform)]
        if new:
            os.environ[variable] = " ".join([given, *new]).strip()


def _named() -> set[str]:
    """The flags that the environment names, with any value."""
    given = " ".join(os.environ.get(name, "") for name in _VARIABLES.values())
    return set(re.findall(r"--(\w+)", given))


def _is_used(platform: str) -> bool:
    """Whether jax will start this platform.

    For TPUs: whether it would start one if one were there.

    It is decided before jax looks for devices, so by what is installed.
    """
    asked = _asked()
    if asked and not set(asked.split(",")) & set(_ALIASES[platform]):
        return False
    if platform == "tpu":
        return _find("libtpu")
    installed = any(map(_find, _CUDA_PLUGINS))
    return installed and any(pathlib.Path(path).exists() for path in _NVIDIA)


def _asked() -> str:
    """The platforms that jax is told to use, with commas between; "": any."""
    return jax.config.values["jax_platforms"] or ""


def _find(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
