"""The compare stage: two studies or more, or the groups of one -> compare.json.

It reads the plans, records and measurements of the named studies and writes into its
own working directory alone. What is measured in two ways is refused, and the refusal
says in what the two differ.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.config import identity
from scaling_ldm.laws import fit, fitted_rows
from scaling_ldm.laws.comparison_summary import comparison_summary
from scaling_ldm.records import (
    LawComparison,
    Measurement,
    Refusal,
    places,
    results,
    table,
)
from scaling_ldm.records.measurements import LOSS, loss_protocol
from scaling_ldm.training import progress
from scaling_ldm.workdir import runs

FILE = "compare.json"
_SPLIT = "split.json"
Key = tuple[float, int, int, int]  # budget, width, depth, seed


@dataclasses.dataclass(frozen=True)
class SideRuns:
    """One group of runs of one study."""

    name: str
    workdir: pathlib.Path
    specs: tuple[records.RunSpec, ...]
    rows: tuple[Measurement, ...]  # at the ends of the runs
    trained: tuple[records.TrainRecord, ...]
    experiment: Mapping[str, Any]  # as nested dicts
    protocols: Mapping[str, Mapping[str, Any]]  # of evaluations, by hash

    def key(self, row: Measurement) -> Key:
        """What the runs of a pair have in common."""
        spec = self._by_id[row.run_id]
        return row.budget_flops, spec.width, spec.depth, spec.seed

    @property
    def _by_id(self) -> dict[str, records.RunSpec]:
        return {spec.run_id: spec for spec in self.specs}

    def planned(self) -> set[Key]:
        """The keys of every run, finished or not."""
        every = [point for spec in self.specs for point in spec.points()]
        return {(p.budget_flops, p.width, p.depth, p.seed) for p in every}

    def weights(self, metric: str, asked: str) -> str:
        """The name of the weights that are meant."""
        kept = table.averages_of(self.experiment, self.specs[0].overrides)
        return results.weights_meant(metric, asked, kept)

    def positions(self) -> set[float]:
        """Tokens of a picture."""
        return {spec.tokens / max(spec.images, 1) for spec in self.specs}

    def compute(self) -> str:
        """What the FLOPs count, as text."""
        before = {spec.pretraining_flops for spec in self.specs}
        if before == {0.0}:
            return "all training FLOPs"
        spent = ", ".join("unknown" if f is None else f"{f:.4g}" for f in before)
        return f"training FLOPs after pretraining of {spent} FLOPs"

    def held_out(self) -> Any:
        """Which pictures are held out, in words; None: the recipe alone says it."""
        path = self.workdir / _SPLIT
        return records.read_json(path).get("held_out") if path.is_file() else None

    def protocol(self, metric: str, name: str) -> Mapping[str, Any]:
        """The parts of a protocol."""
        if name in self.protocols:
            return self.protocols[name]
        of_loss = LOSS if metric.startswith(f"{LOSS}_t") else metric
        overrides = self.specs[0].overrides
        return loss_protocol(of_loss, self.experiment, overrides)


def check(experiment: config.Experiment, workdir: pathlib.Path, planned: bool) -> None:
    """Refuses, before any stage runs, studies that cannot be read.

    Args:
      planned: whether this call plans the study of `workdir` first.

    Raises:
      config.ConfigError: a folder without a plan; fewer than two groups of runs; a
        group that no study has; a window of the fits, which is not read here.
    """
    if experiment.fit.window:
        raise config.ConfigError(
            f"config.fit.window = {experiment.fit.window:g} is not read by compare, "
            "which takes all sizes: set it to 0"
        )
    if experiment.compare.studies or not planned:
        _chosen(experiment.compare, _studies(experiment.compare, workdir))


def run(
    experiment: config.Experiment, workdir: pathlib.Path
) -> list[LawComparison | Refusal]:
    """Holds every side against the first, for each of config.fit.metrics.

    Returns:
      What compare.json has, a line each.

    Raises:
      config.ConfigError: as `check`, or two rows of a study have the same key and
        different values.
    """
    chosen = _chosen(experiment.compare, _studies(experiment.compare, workdir))
    try:
        first, *others = [_read(*side) for side in chosen]
    except records.MeasurementConflict as e:
        raise config.ConfigError(f"these studies cannot be compared: {e}") from e
    found = [
        _compared(experiment, metric, first, other)
        for metric in experiment.fit.metrics
        for other in others
    ]
    for one in found:
        for line in comparison_summary(one):
            progress.say(line)
    records.write_jsonl(workdir / FILE, found)
    return found


Plan = tuple[str, pathlib.Path, tuple[records.RunSpec, ...]]


def _studies(
    cfg: config.CompareConfig, workdir: pathlib.Path
) -> dict[str, tuple[pathlib.Path, dict[str, list[records.RunSpec]]]]:
    """Of each study, by name: its folder, and its runs by group."""
    named = {text: places.place(text, "a study to compare") for text in cfg.studies}
    given = named or {str(workdir): workdir}
    short = [path.name for path in given.values()]
    found = {}
    for text, path in given.items():
        if not (path / "runs.jsonl").is_file():
            raise config.ConfigError(
                f"config.compare.studies = {cfg.studies}: {text} holds no plan "
                "(runs.jsonl), so it is no study"
                if named
                else f"no plan in {workdir}: name the studies to compare, as in "
                '--config.compare.studies=\'("runs/a", "runs/b")\''
            )
        groups: dict[str, list[records.RunSpec]] = {}
        for spec in records.read_plan(path):
            groups.setdefault(spec.group, []).append(spec)
        name = path.name if short.count(path.name) == 1 else text
        found[name] = path, groups
    return found


def _chosen(
    cfg: config.CompareConfig,
    studies: Mapping[str, tuple[pathlib.Path, Mapping[str, list[records.RunSpec]]]],
) -> list[Plan]:
    """The sides, that which the others are held against first."""
    every = [group for _, groups in studies.values() for group in groups]
    if unknown := [group for group in cfg.groups if group not in every]:
        known = "; ".join(dict.fromkeys(filter(None, every))) or "no names"
        raise config.ConfigError(
            f"config.compare.groups = {cfg.groups}: no study has {unknown[0]!r}; the "
            f"groups have {known}"
        )
    sides = [
        (_side_name(name, group, len(studies), len(groups)), path, tuple(groups[group]))
        for wanted in cfg.groups or (None,)
        for name, (path, groups) in studies.items()
        for group in groups
        if wanted in (None, group)
    ]
    if len(sides) < 2:
        held = ", ".join(name for name, *_ in sides)
        raise config.ConfigError(
            f"config.compare: {held} alone cannot be compared; name two studies, or "
            "two groups of one"
        )
    return sides


def _side_name(study: str, group: str, studies: int, groups: int) -> str:
    if studies == 1 and group:
        return group
    return f"{study}: {group}" if group and groups > 1 else study


def _read(
    name: str, workdir: pathlib.Path, specs: tuple[records.RunSpec, ...]
) -> SideRuns:
    ids = {spec.run_id for spec in specs}
    rows = results.at_points(records.read_table(workdir), specs)
    found = [runs.read_record(workdir, spec.run_id) for spec in specs]
    return SideRuns(
        name=name,
        workdir=workdir,
        specs=specs,
        rows=tuple(row for row in rows if row.run_id in ids),
        trained=tuple(record for record in found if record is not None),
        experiment=table.experiment_of(workdir),
        protocols={
            record.protocol_hash: record.protocol
            for record in records.read_evaluations(workdir)
        },
    )


def _compared(
    experiment: config.Experiment, metric: str, first: SideRuns, second: SideRuns
) -> LawComparison | Refusal:
    """One side against the other, by one metric."""
    cfg, both = experiment.fit, (first, second)
    weights = [side.weights(metric, cfg.weights) for side in both]
    fitted = _one_protocol(metric, weights, both, cfg.protocols)
    as_tokens = len(first.positions() | second.positions()) == 1
    data = "tokens" if as_tokens else "pictures"
    paired = first.planned() == second.planned() and _same_data(first, second)
    points, left_out = [], []
    for side, one in zip(both, fitted, strict=True):
        points.append({side.key(row): _point(row, cfg.size, data) for row in one.rows})
        trained = {record.run_id for record in side.trained}
        lines = [
            f"{spec.run_id}: not trained yet"
            for spec in side.specs
            if spec.run_id not in trained
        ]
        lines += [*one.unfinished, *one.missing]
        left_out += [f"{side.name}: {line}" for line in lines]
    given = [list(of_side.values()) for of_side in points]
    if paired:
        together = sorted(points[0].keys() & points[1].keys())
        given = [[of_side[key] for key in together] for of_side in points]
        left_out += [
            f"{side.name}: the run of {key[1]} x {key[2]}, seed {key[3]}, at "
            f"{key[0]:.6g} FLOPs has no other of its pair"
            for side, of_side in zip(both, points, strict=True)
            for key in sorted(of_side.keys() - set(together))
        ]
    found = fit.compare(
        *given,
        names=(first.name, second.name),
        metric=metric,
        size=cfg.size,
        data=data,
        paired=paired,
        budgets=experiment.compare.budgets,
        confidence=cfg.confidence,
        bootstrap=cfg.bootstrap,
        estimator=cfg.estimator,
        seed=cfg.seed,
        conventions=_conventions(metric, weights, both, fitted),
    )
    if isinstance(found, Refusal):
        return found
    return dataclasses.replace(
        found,
        weights=weights[0],
        protocol_hash=fitted[0].protocol or "",
        excluded=(*left_out, *found.excluded),
        notes=(*_notes(first, second, data), *found.notes),
    )


def _notes(first: SideRuns, second: SideRuns, data: str) -> list[str]:
    """What both sides do not have in common, but what is no obstacle."""
    notes = []
    if data == "pictures":
        of_a, of_b = (
            ", ".join(f"{p:g}" for p in sorted(side.positions()))
            for side in (first, second)
        )
        notes.append(
            f"D is counted in pictures: a picture is {of_a} tokens in {first.name} "
            f"and {of_b} in {second.name}"
        )
    of_a, of_b = (
        side.experiment.get("data", {}).get("path", "") for side in (first, second)
    )
    if of_a != of_b:
        notes.append(
            f"data.path is {of_a!r} in {first.name} and {of_b!r} in {second.name}: "
            "their pictures count as the same, since all else is"
        )
    return notes


def _point(row: Measurement, size: str, data: str) -> dict[str, float | str]:
    return {
        "budget_flops": row.budget_flops,
        size: float(getattr(row, size)),
        "tokens": float(row.tokens if data == "tokens" else row.images),
        row.metric: row.value,
        "run_id": row.run_id,
    }


def _same_data(first: SideRuns, second: SideRuns) -> bool:
    """Whether both sides draw the same pictures in the same order."""
    deciding = [identity.deciding(side.experiment) for side in (first, second)]
    return all(deciding[0].get(s) == deciding[1].get(s) for s in ("data", "encode"))


def _one_protocol(
    metric: str, weights: Sequence[str], both: Sequence[SideRuns], asked: Sequence[str]
) -> list[fitted_rows.FittedRows]:
    """The rows of each side; of the one protocol that both have, if there is one."""

    def chosen(wanted: Sequence[str]) -> list[fitted_rows.FittedRows]:
        return [
            fitted_rows.choose(side.trained, side.rows, metric, name, wanted)
            for side, name in zip(both, weights, strict=True)
        ]

    found = chosen(asked)
    whole = [
        {one.protocol}
        if one.protocol
        else {name for name, count in one.measured.items() if count == one.wanted}
        for one in found
    ]
    common = whole[0] & whole[1]
    return chosen([*common]) if len(common) == 1 else found


def _conventions(
    metric: str,
    weights: Sequence[str],
    both: Sequence[SideRuns],
    fitted: Sequence[fitted_rows.FittedRows],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be equal on both sides, {what: value} of each."""
    found = []
    hashes = {one.protocol for one in fitted}
    for side, name, one in zip(both, weights, fitted, strict=True):
        kept: dict[str, Any] = {"weights": name, "C": side.compute()}
        kept["held-out pictures"] = side.held_out()
        if one.protocol is None:
            several = ", ".join(one.measured)
            what = f"several ({several})" if several else f"no {metric} at the end"
            kept["protocol"] = what
        elif len(hashes) > 1:
            parts = side.protocol(metric, one.protocol)
            kept |= parts
        found.append(kept)
    if found[0] == found[1] and (len(hashes) > 1 or None in hashes):
        for kept, side, one in zip(found, both, fitted, strict=True):
            kept["protocol"] = one.protocol or f"{kept.get('protocol')} in {side.name}"
    return found[0], found[1]
