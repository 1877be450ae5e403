"""Tables of the runs: what was planned, what they reached, what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_ldm.records import RunSpec, results
from scaling_ldm.records import epochs as epochs_of
from scaling_ldm.records.measurements import (
    LOSS,
    RAW,
    STRATA,
    TRAIN_LOSS,
    stratum,
)
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import Study, flatten
from scaling_ldm.report.table import Column, Row, Table, cell, pick, ranged, text

_SEPARATE = "separate_flops"
_REUSED = (
    " Separate runs: what they would have cost, one for each budget that was measured. "
    "The steps that a branch takes over from its trunk are counted there alone."
)
_ADDITIVE = (
    "budget_flops model_flops hardware_flops six_nd_flops images tokens seconds "
    "device_hours"
)
_BEFORE = "FLOPs of pretraining", "pretraining_flops"
_COSTS = (
    cell("budget, FLOPs", "budget_flops", fmt.scientific),
    cell("model FLOPs", "model_flops", fmt.scientific),
    cell("hardware FLOPs", "hardware_flops", fmt.scientific),
    cell("6ND, FLOPs", "six_nd_flops", fmt.scientific),
    cell("6ND / model", "six_nd_over_model", fmt.plain),
    cell("images", "images", fmt.prefixed),
    cell("tokens", "tokens", fmt.prefixed),
    cell("time", "seconds", fmt.duration),
    Column("device time", lambda r: fmt.duration(3600 * r["device_hours"])),
    cell("FLOP/s", "flops_per_second", fmt.scientific),
    cell("MFU", "mfu", lambda x: fmt.NONE if x is None else f"{100 * x:.1f}%"),
)


def _costs(reused: bool) -> tuple[Column, ...]:
    """The columns of costs; with that of separate runs where runs stand for several."""
    column = cell("as separate runs, FLOPs", _SEPARATE, fmt.scientific)
    return (*_COSTS[:2], column, *_COSTS[2:]) if reused else _COSTS


def runs(study: Study) -> Table:
    """Every planned run: what it reached, or why it failed; plan beside result."""
    rows, started = [], any(run.pretraining_flops != 0 for run in study.runs)
    measured, repeats = _measured(study), bool(study.training_pictures)
    for run in study.runs:
        r = study.records.get(run.run_id)
        row = pick(run, "run_id group budget_flops width depth params")
        row |= pick(run, "params_without_embeddings learning_rate seed")
        row |= {"steps_planned": run.steps} | pick(r, "tokens steps")
        row |= {key: found.get(run.run_id) for key, (_, found) in measured.items()}
        row |= {"average": study.averages(run)[0]} | pick(r, "restarts")
        row |= {"planned_flops": run.planned_flops, "actual_flops": r and r.flops}
        row |= {"epochs": epochs(study, run)} if study.training_pictures else {}
        row["planned_over_budget"] = run.planned_flops / run.budget_flops - 1
        row["actual_over_planned"] = r and r.flops / run.planned_flops - 1
        if started:  # from weights
            row |= pick(run, "pretraining_flops")
        row |= {"status": r.status if r else "not run", "detail": r.detail if r else ""}
        rows.append(row)
    columns = (
        text("run", "run_id"),
        Column("status", _status, False, True),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        Column("width × depth", lambda r: f"{r['width']} × {r['depth']}"),
        cell("N", study.size, fmt.prefixed),
        cell("D, tokens", "tokens", fmt.prefixed),
        *(cell("epochs", "epochs", fmt.plain) for _ in range(repeats)),
        text("group", "group"),
        cell("learning rate", "learning_rate", fmt.scientific),
        Column("seed", lambda r: str(r["seed"]) if study.varied else fmt.NONE),
        *(cell(title, key, fmt.loss) for key, (title, _) in measured.items()),
        cell("steps planned", "steps_planned", fmt.count),
        cell("steps taken", "steps", fmt.count),
        cell("planned FLOPs against budget", "planned_over_budget", fmt.percent),
        cell("spent against planned", "actual_over_planned", fmt.percent),
        cell("restarts", "restarts", fmt.count),
        *(cell(*_BEFORE, fmt.scientific) for _ in range(started)),
    )
    caption = f"Every planned run. N counts {fmt.spoken(study.size)}"
    if not study.by_steps:
        caption += f"; the laws are fitted to: {_fitted(study)}"
    return Table("runs", f"{caption}.", rows, columns)


def epochs(study: Study, run: RunSpec) -> float:
    """How often a run sees each picture: planned, or done where it has ended.

    0.0 where the number of pictures is not known.
    """
    record = study.records.get(run.run_id)
    shares = dict(study.config.get("data", {}).get("mix") or {"": 1.0})
    images = run.images if record is None else record.images
    return epochs_of(images, shares, study.training_pictures)


def _measured(study: Study) -> dict[str, tuple[str, Mapping[str, float]]]:
    """By key of a column: its title and the numbers at the end of each finished run.

    The losses of the raw weights and of the first average, and what else is fitted.
    """
    first = {study.averages(run)[0] for run in study.runs}
    average = f"average {first.pop()}" if len(first) == 1 else "first average"
    loss = fmt.spoken(LOSS)
    found: dict[str, tuple[str, Mapping[str, float]]] = {
        "loss_raw": (fmt.measure(LOSS, RAW), study.at_end(LOSS, RAW)),
        "loss_average": (f"{loss}, {average}", study.at_end(LOSS)),
        "train_loss_smoothed": (fmt.spoken(TRAIN_LOSS), study.at_end(TRAIN_LOSS)),
    }
    for part in (one for group in study.parts() for one in group.by_metric()):
        key = part.metric
        if key == LOSS and part.weights not in (RAW, study.averages(part.runs[0])[0]):
            key = f"{LOSS}_{part.weights}"
        if key not in (LOSS, TRAIN_LOSS):
            own = part.at_end(part.metric, part.weights)
            found[key] = part.measure, {**found.get(key, ("", {}))[1], **own}
    return found


def _fitted(study: Study) -> str:
    """What the laws are fitted to, as words."""
    fits = [(fit.metric, fit.weights) for fit in study.fits]
    fits = fits or [(study.metric, study.weights)]
    return "; ".join(fmt.measure(*fit) for fit in dict.fromkeys(fits))


def strata(study: Study) -> Table:
    """The loss of each finished run in each stratum of t, for the fitted weights."""
    found, said = {}, set()
    for part in study.parts():
        first = part.averages(part.runs[0])[0]
        weights = part.weights if part.metric == LOSS else first
        said.add(fmt.measure(LOSS, weights))
        for number in range(STRATA):
            own = part.at_end(stratum(number), weights)
            found.setdefault(f"t{number}", {}).update(own)
    keys = [key for key, values in found.items() if values]
    rows = [
        pick(run, "run_id group budget_flops params params_without_embeddings")
        | {key: found[key].get(run.run_id) for key in keys}
        for run in study.finished()
        if any(run.run_id in found[key] for key in keys)
    ]
    columns = (
        text("run", "run_id"),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        cell("N", study.size, fmt.prefixed),
        *(cell(key, key, fmt.loss) for key in keys),
    )
    caption = (
        f"The {' or '.join(sorted(said))}, of finished runs by stratum of t: t0 is the "
        "tenth of its distribution that is nearest to the data."
    )
    return Table("strata", caption, rows, columns)


def losses(study: Study) -> Table:
    """The loss of each group, budget and size; the spread is over seeds."""
    same: dict[tuple[Any, ...], list[RunSpec]] = {}
    for run in study.separate():
        key = run.group, run.budget_flops, run.width, run.depth
        same.setdefault(key, []).append(run)
    rows, measured = [], {}
    reached = {_at(point) for run in study.runs for point in study.reached(run)}
    for part in study.parts():
        measured |= part.at_points(part.metric, part.weights)
    for (group, budget, width, depth), runs in same.items():
        values = [measured[_at(run)] for run in runs if _at(run) in measured]
        row = {"group": group, "budget_flops": budget, "width": width, "depth": depth}
        row |= pick(runs[0], "params params_without_embeddings")
        done = sum(_at(run) in reached for run in runs)
        row |= {"runs": len(runs), "finished": done}
        row |= {"loss": None, "loss_low": None, "loss_high": None, "deviation": None}
        if values:
            row["loss"] = statistics.fmean(values)
        if len(values) > 1:
            row |= {"loss_low": min(values), "loss_high": max(values)}
            row["deviation"] = statistics.stdev(values)
        rows.append(row)
    rows.sort(key=lambda row: (row["group"], row["budget_flops"], row["params"]))
    columns = (
        text("group", "group"),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        Column("width × depth", lambda r: f"{r['width']} × {r['depth']}"),
        cell("N", study.size, fmt.prefixed),
        cell("runs", "runs", fmt.count),
        cell("finished", "finished", fmt.count),
        ranged("mean loss [lowest, highest]", "loss", fmt.loss),
        cell("standard deviation", "deviation", fmt.compact),
    )
    said = " or ".join(dict.fromkeys(part.measure for part in study.parts()))
    caption = (
        f"L is the {said}. Several runs of one row differ in their seed "
        "alone; their standard deviation is that of one run."
    )
    return Table("losses", caption, rows, columns)


def _at(run: RunSpec) -> results.Point:
    return run.run_id, run.steps


def ledger(study: Study) -> Table:
    """What each run cost, and all of them together."""
    rows, reused = [], study.reused
    for run in study.runs:
        if (r := study.records.get(run.run_id)) is None:
            continue
        own = r.own_share  # a branch has spent nothing on what its trunk has
        row = pick(r, "run_id budget_flops") | {"model_flops": r.flops * own}
        if reused:  # a separate run would have failed where the trajectory did
            row[_SEPARATE] = sum(min(p.planned_flops, r.flops) for p in run.points())
        row |= {
            "hardware_flops": r.hardware_flops * own,
            "six_nd_flops": r.six_nd * own,
        }
        row["six_nd_over_model"] = _ratio(r.six_nd, r.flops)
        row |= {"images": round(r.images * own), "tokens": round(r.tokens * own)}
        row |= pick(r, "seconds devices")
        row["device_hours"] = r.seconds * r.devices / 3600
        rows.append(row | pick(r, "flops_per_second mfu mfu_reason device"))
    caption = (
        "Model FLOPs: 2 × multiply-adds, forward and backward. Hardware FLOPs: with "
        "recomputation. 6ND: N without embeddings, D all tokens. Time: wall time "
        "in the train loop, over all restarts, with compilation, measurements and "
        "checkpoints; device time is that of all devices together, and the FLOP/s of "
        "a sum are of that time, too. A run's FLOP/s and MFU are of its steps alone. "
        "Failed runs are counted."
    )
    if reused:
        caption += _REUSED
    columns = (text("run", "run_id"), *_costs(reused))
    total = _sum(rows) | {"run_id": f"all {len(rows)}"} if rows else None
    return Table("ledger", caption, rows, columns, total)


def costs(study: Study) -> Table:
    """The ledger summed over the runs of each budget, and over all."""
    every = ledger(study)
    groups = [
        (b, [r for r in every.rows if r["budget_flops"] == b]) for b in study.budgets()
    ]
    rows = [
        {"budget_flops": budget, "runs": len(group)} | _without_budget(_sum(group))
        for budget, group in groups
        if group
    ]
    total = None
    if every.total:
        total = {"budget_flops": None, "runs": len(every.rows)}
        total |= _without_budget(every.total)
    columns = (
        cell("C, FLOPs", "budget_flops", lambda c: fmt.scientific(c) if c else "all"),
        cell("runs", "runs", fmt.count),
        *_costs(study.reused)[1:],
    )
    return Table("costs", every.caption, rows, columns, total)


def _without_budget(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "budget_flops"}


def _sum(rows: Sequence[Row]) -> dict[str, Any]:
    """The totals of some rows; ratios are computed from the sums."""
    keys = [key for key in (*_ADDITIVE.split(), _SEPARATE) if key in rows[0]]
    out = {k: sum(row[k] for row in rows) for k in keys}
    mfu = None
    if all(row["mfu"] is not None for row in rows):
        weighted = sum(row["mfu"] * row["device_hours"] for row in rows)
        mfu = _ratio(weighted, out["device_hours"])
    return {
        **out,
        "six_nd_over_model": _ratio(out["six_nd_flops"], out["model_flops"]),
        "flops_per_second": _ratio(out["model_flops"], out["seconds"]),
        "mfu": mfu,
    }


def _status(row: Row) -> str:
    return f"{row['status']}: {row['detail']}" if row["detail"] else row["status"]


def samples(study: Study) -> Table:
    captions = study.samples.captions if study.samples else ()
    rows = [{"image": i, "caption": c} for i, c in enumerate(captions)]
    columns = (cell("image", "image", str), text("caption", "caption"))
    return Table("samples", "", rows, columns)


def pairs(name: str, tree: Mapping[str, Any], caption: str) -> Table:
    """A nested mapping, one dotted key a row."""
    rows = [{"key": k, "value": str(v)} for k, v in flatten(tree)]
    return Table(name, caption, rows, (text("key", "key"), text("value", "value")))


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
