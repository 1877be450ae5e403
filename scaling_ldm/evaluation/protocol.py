"""What a measured number depends on, and the refusal to compare what differs in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from scaling_ldm import config, records
from scaling_ldm.records.errors import ProtocolError

if TYPE_CHECKING:
    from scaling_ldm.evaluation.extractors import Extractor
    from scaling_ldm.evaluation.reference import Real

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


def measuring(
    experiment: config.Experiment, extract: Extractor, real: Real
) -> dict[str, Any]:
    """The parts of a protocol that do not depend on a metric or a sampler."""
    cfg = experiment.evaluate
    return {
        **extract.identity,
        "resampling": (
            f"seed {cfg.seed}, {cfg.bootstrap} resamples, {100 * cfg.confidence:g}%"
        ),
        "reference": real.digest,
        "reference_images": real.images,
        "captions": f"held out, {experiment.data.source} {experiment.data.seed}",
        "ema": True,
    }


def sampled(how: config.GenerateConfig) -> dict[str, Any]:
    """The parts of a protocol that a sampler decides."""
    named = {name: getattr(how, name) for name in SAMPLING}
    return {**named, "seed": how.seed, "images": how.images}
