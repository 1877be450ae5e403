"""The advise stage: the best sampler within a cost, or the best run within a budget.

config.advise.budget asks for a sampler, which frontier.json answers. config.advise.
flops, hours or loss ask what to train, which laws answer (`config.questions`).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection

from scaling_ldm import config, frontier, records
from scaling_ldm.config import names, questions
from scaling_ldm.flops import peaks
from scaling_ldm.laws import advice, narrate
from scaling_ldm.laws.advice import Speed, TrainingAdvice
from scaling_ldm.records import Advice, Refusal
from scaling_ldm.workdir import laws_from, runs

_IN_DOUBT = 0.5  # below this probability, most draws choose another setting
Plan = Callable[[config.Experiment], list[records.RunSpec]]


def check(
    experiment: config.Experiment, workdir: pathlib.Path, stages: Collection[str] = ()
) -> None:
    """Refuses, before any stage runs, a question that cannot be answered.

    Args:
      stages: that run before it; they may make the frontier or the laws.

    Raises:
      config.ConfigError: nothing is asked, or there is no frontier or law to ask.
    """
    cfg = experiment.advise
    if not questions.asked(cfg):
        raise config.ConfigError(questions.ASK)
    if cfg.budget:
        if "frontier" not in stages and not _path(workdir).exists():
            raise _missing(workdir)
        return
    if cfg.laws or "fit" not in stages:
        _laws(experiment, workdir)
    _speed(experiment, workdir)


def _path(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "frontier.json"


def _missing(workdir: pathlib.Path) -> config.ConfigError:
    return config.ConfigError(
        f"no frontier in {workdir}: add frontier to --stages, with "
        "--config.frontier.images and --config.evaluate.network"
    )


def run(
    experiment: config.Experiment, workdir: pathlib.Path, plan: Plan
) -> Advice | TrainingAdvice | Refusal:
    """The answer to the question of config.advise.

    Args:
      plan: plans the runs of an experiment.

    Raises:
      config.ConfigError: there is no frontier or law, or config.advise does not fit it.
      records.Damaged: frontier.json holds no frontier.
    """
    if not experiment.advise.budget:
        return _training(experiment, workdir, plan)
    cfg, path = experiment.advise, _path(workdir)
    if not path.exists():
        raise _missing(workdir)
    found = records.read_frontier(workdir)
    try:
        return frontier.advice(
            found,
            cfg.budget,
            cfg.unit,
            device=cfg.device or None,
            dtype=cfg.dtype,
            utilisation=cfg.utilisation,
        )
    except ValueError as e:
        raise config.ConfigError(f"config.advise: {e}") from e


def _laws(experiment: config.Experiment, workdir: pathlib.Path) -> laws_from.LawSource:
    metric = experiment.fit.metrics[0]
    return laws_from.read(experiment.advise.laws, "config.advise.laws", metric, workdir)


def _training(
    experiment: config.Experiment, workdir: pathlib.Path, plan: Plan
) -> TrainingAdvice | Refusal:
    """What to train."""
    from scaling_ldm.training import inference, shape_search  # they need jax

    cfg, source = experiment.advise, _laws(experiment, workdir)
    speed = _speed(experiment, workdir)

    def planned(n: float, budget: float) -> tuple[records.RunSpec | None, str]:
        try:
            shape, _ = shape_search.nearest(experiment, n, source.size)
            row = plan(_with(experiment, budget, shape))[0]
        except config.ConfigError as e:
            return None, " ".join(str(e).split())
        return row, ""

    def sampling(row: records.RunSpec) -> float:
        nfe = inference.sampling_plan(experiment, experiment.generate).nfe
        return nfe * row.flops_per_step / row.batch_size / 3  # a step is three passes

    budget = cfg.flops
    if cfg.hours and speed is not None:
        budget = cfg.hours * 3600 * speed.flops_per_second
    return advice.training_advice(
        source.found,
        source.name,
        budget=budget,
        loss=cfg.loss,
        speed=speed,
        images=cfg.images,
        plan=planned,
        sampling=sampling,
    )


def _with(
    experiment: config.Experiment, budget: float, shape: tuple[int, int]
) -> config.Experiment:
    """The experiment with the plan of one run, however short it is."""
    alone = dataclasses.replace(
        experiment.plan,
        budgets_flops=(budget,),
        steps=0,
        sizes=(shape,),
        minimum_steps=1,
        reuse="separate",
        axes=(),
        axes_only=(),
        from_laws="",
        budget=0.0,
        next=0,
        next_of=config.PlanConfig.next_of,
    )
    return dataclasses.replace(experiment, plan=alone)


def _speed(experiment: config.Experiment, workdir: pathlib.Path) -> Speed | None:
    """How fast the devices of config.advise are; None: it is not said.

    Raises:
      ConfigError: an unknown device, or a run without a measured speed.
    """
    cfg = experiment.advise
    if cfg.run:
        each, basis = _measured(workdir, cfg.run)
    elif cfg.flops_per_second:
        each = cfg.flops_per_second
        basis = f"{each:.3g} FLOP/s (stated)"
    elif cfg.device:
        each = _peak(cfg.device, cfg.dtype) * cfg.utilisation
        basis = f"{cfg.device} at {cfg.utilisation:g} of its {cfg.dtype} peak (assumed)"
    else:
        return None
    return Speed(
        flops_per_second=each * cfg.chips,
        devices=cfg.chips,
        basis=basis,
        price=cfg.price,
    )


def _peak(device: str, dtype: str) -> float:
    row = peaks.PEAKS.get(device)
    if row is None:
        close = names.did_you_mean([device], peaks.PEAKS)
        raise config.ConfigError(
            f"config.advise.device = {device!r}: {close}known: "
            f"{', '.join(peaks.PEAKS)}; config.advise.flops_per_second states a speed"
        )
    if dtype not in row.flops_per_second:
        raise config.ConfigError(
            f"config.advise.dtype = {dtype!r}: no published rate of {device}; there "
            f"are {', '.join(row.flops_per_second)}"
        )
    return row.flops_per_second[dtype]


def _measured(workdir: pathlib.Path, run_id: str) -> tuple[float, str]:
    """Model FLOP/s of one device in a run, and how it is known."""
    record = runs.read_record(workdir, run_id)
    if record is None or not 0 < record.flops_per_second < math.inf:
        raise config.ConfigError(
            f"config.advise.run = {run_id!r}: {workdir} has no such run that is over "
            "and has a measured speed"
        )
    each = record.flops_per_second / record.devices
    return each, f"{record.device} at {each:.3g} FLOP/s (measured, {run_id})"


def lines(found: Advice | TrainingAdvice | Refusal) -> list[str]:
    """Advice, or the reason why there is none, as lines for people."""
    if isinstance(found, Refusal):
        return [f"no {found.what}: {found.reason}; {found.detail}".removesuffix("; ")]
    if isinstance(found, TrainingAdvice):
        return narrate.lines(found)
    choice = found.choice
    quality = f"{found.metric} {choice.expected:.4g}"
    if choice.interval is None:
        quality += " (no interval is known)"
    else:
        low, high, level = dataclasses.astuple(choice.interval)
        quality += f" [{low:.4g}, {high:.4g}] at {100 * level:.0f}%"
    quality += ", less is better"
    if choice.probability is not None:
        quality += (
            f"; probability that no other setting is better {choice.probability:.2f}"
        )
    said = [
        f"within {frontier.amount(found.budget, found.unit)} an image:",
        f"  model    {choice.label}, {choice.params:,} parameters, run {choice.model}",
        f"  sampler  {choice.sampler}, {choice.steps} steps, guidance "
        f"{choice.guidance:g}",
        f"  expected {quality}",
        f"  cost     {frontier.amount(choice.cost, found.unit)} ({found.basis})",
    ]
    if choice.probability is not None and choice.probability < _IN_DOUBT:
        said.append("  in doubt another setting is the best in most bootstrap draws")
    return said + [f"  in doubt {doubt}" for doubt in found.doubts]
