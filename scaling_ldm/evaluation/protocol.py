"""The protocol of a number; numbers of different protocols are not compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import mix
from scaling_ldm.records.errors import ProtocolError

# How the pictures were made. The other parts say how they were measured.
SAMPLING = ("sampler", "spacing", "steps", "guidance")
PARTS = (
    "metric",
    "network",  # its name
    "weights",  # SHA-256 of its file
    "resize",  # how pictures became the network's input
    "backend",  # the library that computed the distance
    "resampling",  # seed, resamples and level of the interval
    "reference",  # digest of the real pictures' statistics
    "reference_images",
    "images",
    "captions",  # which the pictures were asked to show
    "seed",  # seed of the noise
    "ema",  # which average the weights are: see weights_part
    *SAMPLING,
)


def digest(protocol: Mapping[str, Any], without: Collection[str] = ()) -> str:
    """The digest of a protocol.

    Args:
      without: names of parts that are left out.

    Raises:
      ValueError: a part is missing, or there is a part that is not in PARTS.
    """
    if set(protocol) != set(PARTS):
        raise ValueError(
            f"a protocol has the parts {', '.join(PARTS)}; got {', '.join(protocol)}"
        )
    return records.digest({k: v for k, v in protocol.items() if k not in without})


def same_protocol(
    a: records.EvalRecord, b: records.EvalRecord, differing: Collection[str] = ()
) -> None:
    """Does nothing if two numbers may be compared; raises otherwise.

    Args:
      differing: names of parts that may differ: SAMPLING to compare samplers.

    Raises:
      ProtocolError: another part differs; it says which and how.
      ValueError: a name in `differing` is not a part.
    """
    differing = {differing} if isinstance(differing, str) else set(differing)
    if unknown := sorted(differing - set(PARTS)):
        raise ValueError(f"not parts of a protocol: {', '.join(unknown)}; {PARTS}")
    lines = [
        f"\n  {part}: {a.protocol.get(part)!r} and {b.protocol.get(part)!r}"
        for part in PARTS
        if part not in differing and a.protocol.get(part) != b.protocol.get(part)
    ]
    if lines:
        raise ProtocolError(
            f"{a.metric} of {a.run_id} and {b.metric} of {b.run_id} were not measured "
            f"the same way ({a.protocol_hash}, {b.protocol_hash}); to compare them "
            f"anyway, name the parts that may differ:{''.join(lines)}"
        )


def difference(
    a: records.Evaluation, b: records.Evaluation, differing: Collection[str] = ()
) -> float:
    """The value of a less that of b, if `same_protocol` lets them be compared."""
    same_protocol(a, b, differing)
    return a.value - b.value


def measurement_parts(
    experiment: config.Experiment,
    network: Mapping[str, str],
    reference: str,
    reference_images: int,
) -> dict[str, Any]:
    """The parts of a protocol that do not depend on a metric or a sampler.

    Args:
      network: name, weights and resize: see `extractors.identity`.
      reference: digest of the real pictures' statistics.
      reference_images: number of real pictures.
    """
    cfg = experiment.evaluate
    return {
        **network,
        "resampling": (
            f"seed {cfg.seed}, {cfg.bootstrap} resamples, {100 * cfg.confidence:g}%"
        ),
        "reference": reference,
        "reference_images": reference_images,
        "captions": f"held out, {mix.described(experiment)}",
        "ema": weights_part(experiment.optimizer.averages[0]),
    }


def weights_part(weights: str | None) -> bool | str | None:
    """The part of a protocol that names the weights.

    True for the average "ema", as in 0.1.0, so that numbers stay comparable; None if
    the weights are unknown; else their name.
    """
    return True if weights == config.EMA else weights


def sampling_parts(how: config.GenerateConfig) -> dict[str, Any]:
    """The parts of a protocol that say how pictures are drawn."""
    named = {name: getattr(how, name) for name in SAMPLING}
    return {**named, "seed": how.seed, "images": how.images}
