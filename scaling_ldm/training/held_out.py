"""The validation set on the devices, the same for every run, and the loss on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config
from scaling_ldm import data as data_lib
from scaling_ldm.diffusion.objectives import validation
from scaling_ldm.training import mesh
from scaling_ldm.training import objective as objective_lib
from scaling_ldm.training.train_step import CompiledFunctions


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """One batch of the validation set on the devices; the same for every run."""

    batch: Any
    times: jax.Array
    indices: jax.Array
    key: jax.Array
    samples: int  # rows that count; the rest fill the last batch


def held_out_batches(
    experiment: config.Experiment,
    device_mesh: jax.sharding.Mesh,
    source: data_lib.Source,
    names: Sequence[str],
) -> list[HeldOutBatch]:
    """The whole validation set, with each sample's time and noise index."""
    cfg = experiment.validation
    times = validation.stratified_times(
        cfg.samples,
        objective_lib.diffusion_objective(experiment.objective),
        seed=cfg.seed,
    )
    rows = mesh.rows_of_process(device_mesh, cfg.batch_size)
    key = jax.device_put(
        jax.random.key(cfg.seed), mesh.named_sharding(device_mesh, mesh.REPLICATED)
    )
    batches = []
    for start in range(0, cfg.samples, cfg.batch_size):
        index = np.arange(start, start + cfg.batch_size, dtype=np.int32) % cfg.samples
        mine = index[rows]
        given = source.rows(mine.astype(np.int64))
        batches.append(
            HeldOutBatch(
                batch=mesh.put(device_mesh, {name: given[name] for name in names}),
                times=mesh.put(device_mesh, times[mine]),
                indices=mesh.put(device_mesh, mine),
                key=key,
                samples=min(cfg.batch_size, cfg.samples - start),
            )
        )
    return batches


def validation_loss(
    program: CompiledFunctions, params: Any, held_out: Sequence[HeldOutBatch]
) -> float:
    """The mean error over the validation samples, in float64."""
    losses = [
        np.asarray(
            program.per_example_loss(params, b.batch, b.times, b.indices, b.key),
            np.float64,
        )[: b.samples]
        for b in held_out
    ]
    return float(np.mean(np.concatenate(losses)))
