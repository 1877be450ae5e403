"""The advise stage: the best model and sampler within a budget of sampling cost."""

from __future__ import annotations

import dataclasses
import math
import pathlib

from scaling_ldm import config, frontier, records
from scaling_ldm.records import Advice, Refusal

_IN_DOUBT = 0.5  # below this probability, most draws choose another setting


def check(experiment: config.Experiment, workdir: pathlib.Path, made: bool) -> None:
    """Refuses, before any stage runs, a question that cannot be answered.

    Args:
      made: whether this call makes the frontier first.

    Raises:
      config.ConfigError: no budget is given, or there is no frontier.
    """
    if not 0 < experiment.advise.budget < math.inf:
        raise config.ConfigError(
            "--stages advise needs a finite budget for one image: "
            "--config.advise.budget=0.5 "
            f"in --config.advise.unit, one of {', '.join(config.ADVICE_UNITS)}"
        )
    if not made and not _path(workdir).exists():
        raise _missing(workdir)


def _path(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "frontier.json"


def _missing(workdir: pathlib.Path) -> config.ConfigError:
    return config.ConfigError(
        f"no frontier in {workdir}: add frontier to --stages, with "
        "--config.frontier.images and --config.evaluate.network"
    )


def run(experiment: config.Experiment, workdir: pathlib.Path) -> Advice | Refusal:
    """The best choice within config.advise's budget, by the frontier in `workdir`.

    Raises:
      config.ConfigError: there is no frontier, or config.advise does not fit it.
      records.Damaged: frontier.json holds no frontier.
    """
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


def lines(found: Advice | Refusal) -> list[str]:
    """Advice, or the reason why there is none, as lines for people."""
    if isinstance(found, Refusal):
        return [f"no {found.what}: {found.reason}; {found.detail}"]
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
