"""The validation set on the devices, the same for every run, and the loss on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config
from scaling_ldm.diffusion.losses import validation
from scaling_ldm.models.shapes import IndexB, TimeB
from scaling_ldm.training import goodput, mesh
from scaling_ldm.training.objective import diffusion_objective
from scaling_ldm.training.train_step import CompiledFunctions


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """One batch of the validation set on the devices.

    batch: "x" and what the network is conditioned on, [B, ...] each.
    times: the time at which each picture's loss is measured.
    indices: the number of each picture; its noise is drawn from `key` and this number.
    samples: how many rows count; the others fill the last batch.
    """

    batch: dict[str, jax.Array]
    times: TimeB
    indices: IndexB
    key: jax.Array
    samples: int


def held_out_batches(
    experiment: config.Experiment,
    device_mesh: jax.sharding.Mesh,
    source: Any,
    names: Sequence[str],
) -> list[HeldOutBatch]:
    """The whole validation set, with each picture's time and noise index.

    Args:
      source: a `data.Source`.
      names: the arrays that the network reads.
    """
    cfg = experiment.validation
    settings = diffusion_objective(experiment.objective)
    times = validation.stratified_times(cfg.samples, settings, seed=cfg.seed)
    rows = mesh.rows_of_process(device_mesh, cfg.batch_size)
    replicated = mesh.named_sharding(device_mesh, mesh.REPLICATED)
    key = jax.device_put(jax.random.key(cfg.seed), replicated)
    batches = []
    for start in range(0, cfg.samples, cfg.batch_size):
        index = np.arange(start, start + cfg.batch_size, dtype=np.int32) % cfg.samples
        mine = index[rows]
        arrays = source.rows(mine.astype(np.int64))
        if missing := sorted(set(names) - set(arrays)):
            raise config.ConfigError(
                f"the objective reads {', '.join(missing)}, and the pictures have "
                f'{", ".join(arrays)}; only those of config.data.mix have "part"'
            )
        batches.append(
            HeldOutBatch(
                batch=mesh.put(device_mesh, {name: arrays[name] for name in names}),
                times=mesh.put(device_mesh, times[mine]),
                indices=mesh.put(device_mesh, mine),
                key=key,
                samples=min(cfg.batch_size, cfg.samples - start),
            )
        )
    return batches


def losses(
    compiled: CompiledFunctions, params: Any, batches: Sequence[HeldOutBatch]
) -> np.ndarray:
    """The error of each validation picture in their order, float64 [samples].

    On a mesh of packed runs `params` and the result have a leading axis of runs.
    """
    found = []
    for b in batches:
        loss = compiled.per_example_loss(params, b.batch, b.times, b.indices, b.key)
        found.append(np.asarray(loss, np.float64)[..., : b.samples])
        goodput.batch_measured()
    return np.concatenate(found, axis=-1)
