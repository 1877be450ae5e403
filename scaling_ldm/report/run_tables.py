"""Tables of the runs: what they reached, what was planned, what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_ldm.report.format import (
    NONE,
    count,
    loss,
    percent,
    plain,
    prefixed,
    scientific,
    spoken,
)
from scaling_ldm.report.study import Study, flatten
from scaling_ldm.report.table import Column, Row, Table, cell, ranged, text

_ADDITIVE = (
    "budget_flops",
    "model_flops",
    "hardware_flops",
    "six_nd_flops",
    "images",
    "tokens",
    "seconds",
    "device_hours",
)
_HOW = ("sampler", "steps", "guidance", "seed")  # of a protocol, where it has them
_COSTS = (
    cell("budget, FLOPs", "budget_flops", scientific),
    cell("model FLOPs", "model_flops", scientific),
    cell("hardware FLOPs", "hardware_flops", scientific),
    cell("6ND, FLOPs", "six_nd_flops", scientific),
    cell("6ND / model", "six_nd_over_model", plain),
    cell("images", "images", prefixed),
    cell("tokens", "tokens", prefixed),
    cell("seconds", "seconds", plain),
    cell("device-hours", "device_hours", plain),
    cell("FLOP/s", "flops_per_second", scientific),
    cell("MFU", "mfu", lambda x: NONE if x is None else f"{100 * x:.1f}%"),
)


def runs(study: Study) -> Table:
    """Every planned run: what it reached, or why it did not; plan against actual."""
    rows = []
    for run in study.runs:
        r = study.records.get(run.run_id)
        rows.append(
            {
                "run_id": run.run_id,
                "budget_flops": run.budget_flops,
                "width": run.width,
                "depth": run.depth,
                "params": run.params,
                "params_without_embeddings": run.params_without_embeddings,
                "tokens": r.tokens if r else None,
                "learning_rate": run.learning_rate,
                "steps_planned": run.steps,
                "steps": r.steps if r else None,
                "validation_loss": r.validation_loss if r else None,
                "validation_loss_ema": r.validation_loss_ema if r else None,
                "train_loss_smoothed": r.train_loss_smoothed if r else None,
                "planned_flops": run.planned_flops,
                "actual_flops": r.flops if r else None,
                "actual_over_planned": r.flops / run.planned_flops - 1 if r else None,
                "planned_over_budget": run.planned_flops / run.budget_flops - 1,
                "restarts": r.restarts if r else None,
                "status": r.status if r else "not run",
                "detail": r.detail if r else "",
            }
        )
    columns = (
        text("run", "run_id"),
        cell("budget, FLOPs", "budget_flops", scientific),
        Column("width × depth", lambda r: f"{r['width']} × {r['depth']}"),
        cell("N", study.size, prefixed),
        cell("D, tokens", "tokens", prefixed),
        cell("learning rate", "learning_rate", scientific),
        cell("validation loss", "validation_loss", loss),
        cell("validation loss, EMA weights", "validation_loss_ema", loss),
        cell("training loss, smoothed", "train_loss_smoothed", loss),
        Column("status", _status, False, True),
    )
    caption = f"Every planned run. N counts {spoken(study.size)}"
    if not study.by_steps:
        caption += f"; the laws are fitted to the {spoken(study.metric)}"
    caption += "."
    return Table(name="runs", caption=caption, rows=tuple(rows), columns=columns)


def plan(study: Study) -> Table:
    """Planned against spent FLOPs, from the rows of `runs`."""
    keys = "run_id steps_planned steps budget_flops planned_flops actual_flops".split()
    keys += ["planned_over_budget", "actual_over_planned", "restarts"]
    rows = tuple({k: row[k] for k in keys} for row in runs(study).rows)
    columns = (
        text("run", "run_id"),
        cell("steps planned", "steps_planned", count),
        cell("steps taken", "steps", count),
        cell("budget, FLOPs", "budget_flops", scientific),
        cell("planned, FLOPs", "planned_flops", scientific),
        cell("planned against budget", "planned_over_budget", percent),
        cell("spent, FLOPs", "actual_flops", scientific),
        cell("spent against planned", "actual_over_planned", percent),
        cell("restarts", "restarts", count),
    )
    caption = "Model FLOPs planned and spent; a run that ended early spent less."
    return Table(name="plan", caption=caption, rows=rows, columns=columns)


def ledger(study: Study) -> Table:
    """What each run cost, and all of them together."""
    rows = []
    for run in study.runs:
        if (r := study.records.get(run.run_id)) is None:
            continue
        rows.append(
            {
                "run_id": r.run_id,
                "budget_flops": r.budget_flops,
                "model_flops": r.flops,
                "hardware_flops": r.hardware_flops,
                "six_nd_flops": r.six_nd,
                "six_nd_over_model": _ratio(r.six_nd, r.flops),
                "images": r.images,
                "tokens": r.tokens,
                "seconds": r.seconds,
                "devices": r.devices,
                "device_hours": r.seconds * r.devices / 3600,
                "flops_per_second": r.flops_per_second,
                "mfu": r.mfu,
                "mfu_reason": r.mfu_reason,
                "device": r.device,
            }
        )
    caption = (
        "Model FLOPs: 2 × multiply-adds, forward and backward. Hardware FLOPs: with "
        "recomputation. 6ND: N without embeddings, D all tokens. Seconds: wall time "
        "in the train loop, over all restarts. Failed runs are counted."
    )
    columns = (text("run", "run_id"), *_COSTS)
    total = _sum(rows) | {"run_id": f"all {len(rows)}"} if rows else None
    return Table(
        name="ledger",
        caption=caption,
        rows=tuple(rows),
        columns=columns,
        total=total,
    )


def costs(study: Study) -> Table:
    """The ledger summed over the runs of each budget, and over all."""
    every = ledger(study)
    rows = []
    for budget in study.budgets():
        group = [row for row in every.rows if row["budget_flops"] == budget]
        if group:
            row = {"budget_flops": budget, "runs": len(group)}
            rows.append(row | {k: v for k, v in _sum(group).items() if k not in row})
    total = {"budget_flops": None, "runs": len(every.rows)}
    total |= {k: v for k, v in (every.total or {}).items() if k not in total}
    columns = (
        Column(
            "C, FLOPs",
            lambda r: (
                "all" if r["budget_flops"] is None else scientific(r["budget_flops"])
            ),
        ),
        cell("runs", "runs", count),
        *_COSTS[1:],
    )
    return Table(
        name="costs",
        caption=every.caption,
        rows=tuple(rows),
        columns=columns,
        total=total if rows else None,
    )


def _sum(rows: Sequence[Row]) -> dict[str, Any]:
    """Sums of what adds up, ratios of the sums."""
    out = {k: sum(row[k] for row in rows) for k in _ADDITIVE}
    known = all(row["mfu"] is not None for row in rows)
    weighted = sum(row["mfu"] * row["device_hours"] for row in rows) if known else None
    return {
        **out,
        "six_nd_over_model": _ratio(out["six_nd_flops"], out["model_flops"]),
        "flops_per_second": _ratio(out["model_flops"], out["seconds"]),
        "mfu": _ratio(weighted, out["device_hours"]) if known else None,
    }


def _status(row: Row) -> str:
    return f"{row['status']}: {row['detail']}" if row["detail"] else row["status"]


def samples(study: Study) -> Table | None:
    if (s := study.samples) is None:
        return None
    rows = tuple({"image": i, "caption": c} for i, c in enumerate(s.captions))
    columns = (cell("image", "image", str), text("caption", "caption"))
    return Table(name="samples", caption="", rows=rows, columns=columns)


def evaluations(study: Study) -> Table | None:
    """Every measured number, by metric and training compute."""
    if not study.evaluations:
        return None
    found = sorted(
        study.evaluations,
        key=lambda r: (r.metric, r.protocol_hash, r.train_flops or math.inf),
    )
    rows = tuple(
        {
            "metric": r.metric,
            "run_id": r.run_id,
            "checksum": r.checksum,
            "step": r.step,
            "train_flops": r.train_flops,
            "value": r.value,
            "value_low": r.low,
            "value_high": r.high,
            "level": r.level,
            "doubt": r.doubt,
            "images": r.images,
            "nfe": r.nfe,
            "flops": r.flops,
            **{k: r.protocol.get(k) for k in _HOW},
            "protocol": r.protocol_hash,
        }
        for r in found
    )
    columns = (
        text("metric", "metric"),
        text("run", "run_id"),
        Column("weights", lambda r: r["checksum"][:8] or NONE, number=False),
        cell("step", "step", count),
        cell("training FLOPs", "train_flops", scientific),
        ranged("value", "value", plain),
        cell("pictures", "images", count),
        cell("evaluations a picture", "nfe", count),
        Column("sampler", lambda r: r["sampler"] or NONE, number=False),
        cell("steps", "steps", _given),
        cell("guidance", "guidance", _given),
        cell("seed", "seed", _given),
        text("protocol", "protocol"),
    )
    return Table(name="evaluations", caption="", rows=rows, columns=columns)


def _given(x: float | None) -> str:
    return NONE if x is None else f"{x:g}" if isinstance(x, float) else str(x)


def pairs(name: str, caption: str, tree: Mapping[str, Any]) -> Table:
    """A nested mapping, one dotted key a row."""
    rows = tuple({"key": k, "value": str(v)} for k, v in flatten(tree))
    columns = (text("key", "key"), text("value", "value"))
    return Table(name=name, caption=caption, rows=rows, columns=columns)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
