"""Trained weights, how to load them, and how they are identified; needs no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Weights of one network and what identifies them.

    run_id: of the run, or a name made of the folder and the checksum.
    width, depth: the network's size.
    step: optimizer steps done; 0 if unknown.
    train_flops: spent on these steps; None if unknown.
    load(device_mesh) -> the parameters, sharded as in training.
    checksum: SHA-256 of the weights file; "" for a checkpoint of a run.
    weights: which of a run's weights these are: "raw", the name of an average in
      `optimizer.averages`, or the text of `runs.reconstructed`; None if unknown.
    overrides: fields in which the run's experiment differs from the study's.
    words: every word by its id, as the network learnt them; None: it reads no words, or
      an older version did not keep them.
    label_names: of the labels that the network learnt; (): it reads none, or they have
      no names.
    """

    run_id: str
    width: int
    depth: int
    step: int
    train_flops: float | None
    load: Callable[[Any], Any]
    checksum: str = ""
    weights: str | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] | None = None
    label_names: tuple[str, ...] = ()
