"""Floating-point operations and memory of JAX functions, and the peak rates of devices.

One multiply-add is 2 FLOPs.

Counted in a jaxpr:

- counter: FLOPs of any function (`count`).
- operations: costs of single equations, and the trip counts around them.
- memory: peak memory of a function.
- lifetimes: which arrays of a flat program are stored, and until when.

Devices and their programs:

- peaks: peak arithmetic rates as data, and MFU.
- collectives: collectives of a compiled program, read from optimised HLO.

`peaks` is read without jax, so the names of the counter are imported when they are
asked for. May import: records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_ldm.flops.counter import FlopCount as FlopCount
    from scaling_ldm.flops.counter import FlopRow as FlopRow
    from scaling_ldm.flops.counter import UncountedPrimitive as UncountedPrimitive
    from scaling_ldm.flops.counter import UnknownTripCount as UnknownTripCount
    from scaling_ldm.flops.counter import count as count
    from scaling_ldm.flops.counter import to_macs as to_macs

__all__ = [
    "FlopRow",
    "FlopCount",
    "UncountedPrimitive",
    "UnknownTripCount",
    "count",
    "to_macs",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'scaling_ldm.flops' has no attribute {name!r}")
    from scaling_ldm.flops import counter

    return getattr(counter, name)
