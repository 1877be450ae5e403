"""A number about a model: as a record, and as a line for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from scaling_ldm import records
from scaling_ldm.evaluation import protocol
from scaling_ldm.metrics import Estimate
from scaling_ldm.training.trained_model import TrainedModel


def record(
    model: TrainedModel,
    metric: str,
    value: Estimate,
    parts: dict[str, Any],
    images: int,
    nfe: int = 0,
    flops: float = 0.0,
) -> records.Evaluation:
    """A number about a model; nfe and flops are 0 where no picture of it was drawn."""
    return records.Evaluation(
        run_id=model.run_id,
        checksum=model.checksum,
        step=model.step,
        train_flops=model.train_flops,
        metric=metric,
        **dataclasses.asdict(value),
        images=images,
        nfe=nfe,
        flops=flops,
        protocol=parts,
        protocol_hash=protocol.digest(parts),
    )


def line(r: records.Evaluation) -> str:
    """A record as a line for people."""
    interval = "(no interval)"
    if r.low < r.high:
        interval = f"({r.low:.4g} to {r.high:.4g} at {100 * r.level:g}%)"
    doubt = f"\n    in doubt: {r.doubt}" if r.doubt else ""
    return (
        f"{r.run_id}  step {r.step:,}  {r.metric} {r.value:.4g} {interval}  "
        f"{r.images:,} pictures  protocol {r.protocol_hash}{doubt}"
    )
