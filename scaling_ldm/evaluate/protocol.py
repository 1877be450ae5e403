"""What a measured number depends on, and the refusal to compare what differs in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from scaling_ldm import records

# Of how the pictures were made; the other parts say how they were measured.
SAMPLING = ("sampler", "spacing", "steps", "guidance")
PARTS = (
    "metric",
    "network",  # its name
    "weights",  # SHA-256 of its file
    "resize",  # how pictures became the network's input
    "backend",  # of the distance
    "resampling",  # seed, resamples and level of its interval
    "reference",  # digest of the real pictures' statistics
    "reference_images",
    "images",
    "captions",  # which the pictures were asked to show
    "seed",  # of their noise
    "ema",  # whether the weights were averaged
    *SAMPLING,
)


class ProtocolError(ValueError):
    """Two numbers that were not measured the same way."""


def digest(protocol: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """Of all parts, or of those that are not left out.

    Raises:
      ValueError: a part is missing, or is none.
    """
    if set(protocol) != set(PARTS):
        raise ValueError(
            f"a protocol has the parts {', '.join(PARTS)}; got {', '.join(protocol)}"
        )
    return records.digest({k: v for k, v in protocol.items() if k not in without})


def same_protocol(
    a: records.EvalRecord, b: records.EvalRecord, differing: Collection[str] = ()
) -> None:
    """Returns if two numbers may be compared.

    Args:
      differing: parts that may differ, by name: SAMPLING to compare samplers.

    Raises:
      ProtocolError: another part differs; it says which and how.
      ValueError: `differing` names no part.
    """
    differing = {differing} if isinstance(differing, str) else set(differing)
    if unknown := sorted(differing - set(PARTS)):
        raise ValueError(f"no parts of a protocol: {', '.join(unknown)}; {PARTS}")
    lines = [
        f"\n  {part}: {a.protocol.get(part)!r} and {b.protocol.get(part)!r}"
        for part in PARTS
        if part not in differing and a.protocol.get(part) != b.protocol.get(part)
    ]
    if lines:
        raise ProtocolError(
            f"{a.metric} of {a.run_id} and {b.metric} of {b.run_id} were not measured "
            f"the same way ({a.protocol_hash}, {b.protocol_hash}); to compare them all "
            f"the same, name what may differ:{''.join(lines)}"
        )


def difference(
    a: records.EvalRecord, b: records.EvalRecord, differing: Collection[str] = ()
) -> float:
    """a's value less b's; see `same_protocol`."""
    same_protocol(a, b, differing)
    return a.value - b.value
