"""Weights to sample from, and what they are known by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Weights, and what they are known by.

    checksum: SHA-256 of the file that they are read from; "" of a run's checkpoint.
    step, train_flops: how far they were trained; 0 and None where nobody says.
    ema: whether they are averages; None where nobody says.
    load(device_mesh) -> the parameters, sharded as in training.
    """

    run_id: str
    width: int
    depth: int
    step: int
    train_flops: float | None
    load: Callable[[jax.sharding.Mesh], Any]
    checksum: str = ""
    ema: bool | None = True
