"""Measured pictures: every number, and between what a Frechet distance lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scaling_ldm import records
from scaling_ldm.records import Evaluation
from scaling_ldm.records.measurements import floors, is_floor
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import Study
from scaling_ldm.report.table import Column, Table, cell, pick, ranged, text


def evaluations(study: Study) -> Table:
    """Every measured number, by metric and training compute.

    Beside a Frechet distance stand those of real pictures and of noise.
    """
    ends = _ends(study)
    found = sorted(
        (r for r in study.evaluations if not is_floor(r.metric)),
        key=lambda r: (r.metric, r.protocol_hash, r.train_flops or math.inf),
    )
    how = ("sampler", "steps", "guidance", "seed")  # where a protocol has them
    rows = [
        pick(r, "metric run_id checksum step train_flops value")
        | {"value_low": r.low, "value_high": r.high}
        | {
            end: getattr(found, "value", None)
            for end, found in zip(("real", "noise"), _beside(r, ends), strict=True)
        }
        | pick(r, "level doubt images nfe flops")
        | {k: r.protocol.get(k) for k in how}
        | {"protocol": r.protocol_hash}
        for r in found
    ]
    columns = (
        text("metric", "metric"),
        text("run", "run_id"),
        Column("weights", lambda r: r["checksum"][:8] or fmt.NONE, False),
        cell("step", "step", fmt.count),
        cell("training FLOPs", "train_flops", fmt.scientific),
        ranged("value", "value", fmt.plain),
        cell("real pictures have", "real", fmt.plain),
        cell("noise has", "noise", fmt.plain),
        cell("pictures", "images", fmt.count),
        cell("evaluations a picture", "nfe", fmt.count),
        text("sampler", "sampler"),
        cell("steps", "steps", _given),
        cell("guidance", "guidance", _given),
        cell("seed", "seed", _given),
        text("protocol", "protocol"),
    )
    caption = (
        "Numbers of one metric are comparable where the protocol is the same; "
        "evaluations.jsonl has every part of it."
    )
    return Table("evaluations", caption, rows, columns)


def _place(r: Evaluation, metric: str = "") -> tuple[Any, ...]:
    """Of which weights, and how measured; metric: another one measured as this is."""
    same = {k: v for k, v in r.protocol.items() if k not in ("metric", "backend")}
    return r.run_id, r.checksum, r.step, metric or r.metric, records.digest(same)


def _given(x: float | None) -> str:
    return fmt.NONE if x is None else f"{x:g}" if isinstance(x, float) else str(x)


def between(study: Study) -> list[str]:
    """The lowest Frechet distance of each protocol, and between what it lies."""
    ends, lowest = _ends(study), {}
    for r in study.evaluations:
        if not is_floor(r.metric) and any(_beside(r, ends)) and math.isfinite(r.value):
            key = r.metric, r.protocol_hash
            lowest[key] = min(r, lowest.get(key, r), key=lambda one: one.value)
    return [_placed(r, *_beside(r, ends)) for r in lowest.values()]


def _placed(r: Evaluation, real: Evaluation | None, noise: Evaluation | None) -> str:
    name = fmt.spoken(r.metric)
    line = f"The lowest {name} is {fmt.plain(r.value)}, of run {r.run_id}."
    if real is not None:
        line += (
            f" {fmt.count(real.images)} real pictures have {fmt.plain(real.value)}, "
            "measured the same way: that is the floor, and a perfect model is not "
            "expected below it."
        )
    if noise is not None:
        line += f" {fmt.count(noise.images)} pictures of noise have "
        line += f"{fmt.plain(noise.value)}."
        if r.value >= noise.value:
            line += (
                f" So by {name} these pictures are no nearer to real ones than noise "
                "is: it says nothing good about the model."
            )
    return line


def _ends(study: Study) -> Mapping[Any, Evaluation]:
    """The distances of real pictures and of noise, by what they belong to."""
    return {_place(r): r for r in study.evaluations if is_floor(r.metric)}


def _beside(
    r: Evaluation, ends: Mapping[Any, Evaluation]
) -> tuple[Evaluation | None, Evaluation | None]:
    """Of real pictures and of noise, measured as a distance is."""
    real, noise = floors(r.metric)
    return ends.get(_place(r, real)), ends.get(_place(r, noise))
