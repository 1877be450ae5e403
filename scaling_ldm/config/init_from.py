"""How config.train.init_from and init_exceptions are written; parses both."""

from __future__ import annotations

import dataclasses

from scaling_ldm.config import names
from scaling_ldm.config.fields import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunWeights:
    """Weights of a run: WORKDIR#RUN_ID[@STEP][:WEIGHTS].

    step: None for the end of the run.
    weights: "" for its average, or "raw".
    """

    workdir: str
    run_id: str
    step: int | None
    weights: str


def parsed(given: str) -> RunWeights | None:
    """The run that config.train.init_from names; None if it is a folder or file.

    Raises:
      ValueError: the step is not a number.
    """
    workdir, mark, run = given.rpartition("#")
    if not mark:
        return None
    run, _, weights = run.partition(":")
    run_id, at, step = run.partition("@")
    if at and not step.isdigit():
        raise ValueError(f"the step {step!r} is not a number")
    return RunWeights(
        workdir=workdir,
        run_id=run_id,
        step=int(step) if at else None,
        weights=weights,
    )


def exception(given: str) -> tuple[str, str]:
    """(pattern of paths, treatment) of one of config.train.init_exceptions."""
    pattern, _, treatment = given.rpartition("=")
    return pattern, treatment


def problems_of(e: Experiment) -> list[str]:
    """What is wrong with the two fields, before any file is read."""
    cfg, found = e.train, []
    if not cfg.init_from:
        found += [
            f"config.train.{name} = {getattr(cfg, name)!r} is not read without "
            "config.train.init_from"
            for name in ("init_exceptions", "init_checksum")
            if getattr(cfg, name)
        ]
        return found
    try:
        parsed(cfg.init_from)
    except ValueError as error:
        found.append(f"config.train.init_from = {cfg.init_from!r}: {error}")
    for given in cfg.init_exceptions:
        pattern, treatment = exception(given)
        if not pattern or treatment not in names.INIT_TREATMENTS:
            found.append(
                f"config.train.init_exceptions: {given!r} is not PATTERN=TREATMENT; "
                f"treatments: {', '.join(names.INIT_TREATMENTS)}"
            )
    return found
