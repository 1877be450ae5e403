"""Measures finished runs on held-out data, as rows of the table; samples nothing."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax

from scaling_ldm import config, records
from scaling_ldm.evaluation import measures
from scaling_ldm.records import measurements, table
from scaling_ldm.training import held_out_bound, mesh, progress
from scaling_ldm.training.trained_model import TrainedModel

# The functions of the names in config.HELD_OUT_METRICS: a number for each picture.
METRICS = {measurements.VLB: held_out_bound.bits_per_dim}


def measure(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    models: Sequence[tuple[records.RunSpec, pathlib.Path, TrainedModel]],
) -> list[records.Measurement]:
    """The rows of config.evaluate.held_out; rows that are in the table are kept.

    The interval covers other held-out pictures and other noise, for the same model.

    Args:
      experiment: of the study.
      models: of finished runs: the run, the file of its rows, and its weights.
    """
    cfg, device_mesh = experiment.evaluate, mesh.build(experiment.mesh, {})
    found = []
    for number, (spec, path, model) in enumerate(models, 1):
        own = config.with_overrides(experiment, spec.overrides)
        rows = table.read_rows(path)[0] if path.is_file() else []
        known = {table.key(row): row for row in rows}
        for metric in cfg.held_out:
            row = measurements.measurement(
                spec,
                step=model.step,
                metric=metric,
                value=math.nan,
                weights=str(model.weights),
                protocol_hash=table.loss_protocol_hash(
                    metric, records.to_json(own), {}
                ),
            )
            if table.key(row) not in known:
                with jax.set_mesh(device_mesh):
                    values = METRICS[metric](own, workdir, model, device_mesh)
                mean = measures.mean(values, cfg.confidence)
                ends = {"low": mean.low, "high": mean.high, "level": mean.level}
                row = dataclasses.replace(row, value=mean.value, **ends)
                if mesh.is_primary():
                    table.put_rows(path, [row])
            found.append(known.get(table.key(row), row))
            progress.say(f"evaluate  {number} of {len(models)}: {_line(found[-1])}")
    mesh.barrier("held out")
    return found


def _line(row: records.Measurement) -> str:
    """A row as a line for people."""
    return (
        f"{row.run_id}  {row.metric} {row.value:.5g} ({row.low:.5g} to {row.high:.5g} "
        f"at {100 * row.level:g}%) bits per dim, weights {row.weights}"
    )
