"""Options of the compiler."""

from __future__ import annotations

import jax


def platform_of(device_mesh: jax.sharding.Mesh) -> str:
    """Where functions will run; a compiler may be for devices that are not here."""
    return device_mesh.devices.flat[0].platform


def quick_to_compile(platform: str) -> dict[str, int | bool] | None:
    """Compiler options for functions that run seldom; None for the usual ones.

    On a CPU, LLVM's optimisations would take longer than the function itself runs.
    """
    if platform != "cpu":
        return None
    return {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    }
