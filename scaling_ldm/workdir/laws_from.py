"""Fitted laws that advice and a plan are made from: where they are, and which of them.

    PATH            laws.json or the working directory of a study
    PATH#GROUP      the laws of one of its groups
    published:STUDY laws of laws/published.json

A study that is planned from laws records them in its own directory:

    planned_from.json   the laws of config.plan.from_laws, with the budget

So it is continued without their file, and never with other laws. Needs no jax.
"""

from __future__ import annotations

import dataclasses
import pathlib

from scaling_ldm import config, records
from scaling_ldm.config import names
from scaling_ldm.laws import advice, converted
from scaling_ldm.laws.converted import ConvertedStudy
from scaling_ldm.laws.narrate import si
from scaling_ldm.records import FitResult, places
from scaling_ldm.records.measurements import in_words
from scaling_ldm.training import progress

PUBLISHED = "published:"
_NAME = "planned_from.json"
_FIELD = "config.plan.from_laws"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawSource:
    """Laws with a name for people; `found` is a study's own or a published one."""

    name: str
    found: FitResult | ConvertedStudy

    @property
    def size(self) -> str:
        """What N counts."""
        return self.found.size if isinstance(self.found, FitResult) else "params"


def read(
    given: str, field: str, metric: str, workdir: pathlib.Path | None = None
) -> LawSource:
    """The laws that a field names.

    Args:
      given: as above; "": those of `workdir`.
      field: for messages, e.g. "config.advise.laws".
      metric: of several metrics, whose laws.

    Raises:
      ConfigError: there are no such laws.
    """
    if given.startswith(PUBLISHED):
        return _published(given.removeprefix(PUBLISHED), field)
    path, _, group = given.partition("#")
    if path:
        place = places.place(path, field).expanduser()
    else:
        assert workdir is not None
        place = workdir
    file = place if place.suffix == ".json" else place / "laws.json"
    if not file.exists():
        raise config.ConfigError(
            f"{field} = {given!r}: there is no {file}; run the stage fit of a study"
            + ("" if given else f", or name laws in {field}")
        )
    try:
        laws = records.read_jsonl(file)
    except records.Damaged as e:
        raise config.ConfigError(f"{field}: {e}") from e
    return LawSource(name=str(file), found=_chosen(laws, group, metric, file, field))


def _published(study: str, field: str) -> LawSource:
    (known, _) = converted.named([study])
    if len(known) != 1:
        usable = [s for s in converted.studies() if converted.converted(s).usable]
        close = names.did_you_mean([study], usable)
        raise config.ConfigError(
            f"{field} = {PUBLISHED + study!r}: {close}published laws of the best size: "
            f"{', '.join(usable)}"
        )
    found = converted.converted(study)
    return LawSource(name=found.source, found=found)


def _chosen(
    laws: list[object], group: str, metric: str, file: pathlib.Path, field: str
) -> FitResult:
    """The one FitResult of a file that fits; of several groups, one is named."""
    every = [fit for fit in laws if isinstance(fit, FitResult)]
    if not every:
        raise config.ConfigError(
            f"{field}: {file} has no laws of budgets; a study with plan.steps has none"
        )
    of_metric = [fit for fit in every if fit.metric == metric]
    if not of_metric:
        there = ", ".join(sorted({in_words(fit.metric) for fit in every}))
        raise config.ConfigError(
            f"{field}: {file} has no laws of {in_words(metric)} "
            f"(config.fit.metrics); it has those of {there}"
        )
    found = [fit for fit in of_metric if not group or fit.group == group]
    if len(found) != 1:
        groups = ", ".join(repr(fit.group) for fit in of_metric)
        raise config.ConfigError(
            f"{field}: {file} has laws of the groups {groups}: name one, as in "
            f"{file}#{of_metric[0].group}"
        )
    return found[0]


def planned(experiment: config.Experiment, workdir: pathlib.Path | None) -> LawSource:
    """The laws of config.plan.from_laws, which the directory may have recorded.

    Raises:
      ConfigError: they are neither there nor recorded, or changed since they were.
    """
    given, metric = experiment.plan.from_laws, experiment.fit.metrics[0]
    known = None if workdir is None else _recorded(workdir)
    path = given.partition("#")[0]
    is_file = not given.startswith(PUBLISHED)
    if known is not None and is_file and not _exists(path):
        return LawSource(name=path, found=known)
    source = read(given, _FIELD, metric)
    if known is not None and _digest(known) != _digest(source.found):
        raise config.ConfigError(
            f"{given} has other laws than this study was planned with ({_NAME}): use "
            "another --workdir"
        )
    return source


def one_run(
    experiment: config.Experiment, workdir: pathlib.Path | None
) -> config.Experiment:
    """The experiment whose plan is the one run of config.plan.from_laws.

    Its size is the nearest of the family of config.plan.sizes to what the laws say.

    Raises:
      ConfigError: the laws say no size, or there is no such network; as `planned`.
    """
    from scaling_ldm.training import shape_search  # it needs jax

    cfg, source = experiment.plan, planned(experiment, workdir)
    found = advice.size_at(source.found, cfg.budget)
    if isinstance(found, records.Refusal):
        raise config.ConfigError(
            f"{_FIELD} = {cfg.from_laws!r}: no size for {cfg.budget:.4g} FLOPs: "
            f"{found.why}"
        )
    n, interval, far = found
    shape, own = shape_search.nearest(experiment, n, source.size)
    between = "" if interval is None else f" [{si(interval.low)}, {si(interval.high)}]"
    progress.say(
        f"{source.name}: N = {si(n)}{between} at {cfg.budget:.4g} FLOPs; "
        f"{shape[0]} x {shape[1]} has {si(own)} ({source.size})"
    )
    if far is None or far > 1:
        how = f"is {far:.3g} times outside of the fitted budgets: an extrapolation"
        if far is None:
            how = "may be far from the fitted budgets, which are not known"
        progress.say(f"caution: {cfg.budget:.4g} FLOPs {how}")
    changed = dataclasses.replace(
        cfg, budgets_flops=(cfg.budget,), sizes=(shape,), from_laws="", budget=0.0
    )
    return dataclasses.replace(experiment, plan=changed)


def record(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Records the laws of config.plan.from_laws; published ones are in the library."""
    if _recorded(workdir) is None:
        found = planned(experiment, workdir).found
        if isinstance(found, FitResult):
            records.write_text(workdir / _NAME, records.dumps(found) + "\n")


def _digest(found: FitResult | ConvertedStudy) -> str:
    is_own = isinstance(found, FitResult)
    return records.digest(records.to_json(found) if is_own else found.study)


def _recorded(workdir: pathlib.Path) -> FitResult | None:
    path = workdir / _NAME
    try:
        return records.read(path, FitResult) if path.exists() else None
    except records.Damaged as e:
        raise config.ConfigError(f"{e}: put a copy back") from e


def _exists(path: str) -> bool:
    place = places.place(path, _FIELD).expanduser()
    return (place if place.suffix == ".json" else place / "laws.json").exists()
