"""The best learning rates that a study is tuned by, as its directory records them.

    tuned.json   the RateFit of the study that config.optimizer.tuned_from names

So a study continues with the same rates without its source. Needs no jax.
"""

from __future__ import annotations

import dataclasses
import pathlib

from scaling_ldm import config, records
from scaling_ldm.records import places
from scaling_ldm.records.measurements import LOSS

_NAME = "tuned.json"
_FIELD = "config.optimizer.tuned_from"
TUNED = "tuned"  # of config.LEARNING_RATE_POLICIES


def is_tuned(experiment: config.Experiment) -> bool:
    return experiment.optimizer.learning_rate_policy == TUNED


def rates(
    experiment: config.Experiment, workdir: pathlib.Path | None
) -> records.RateFit:
    """The best rates of a study with the policy "tuned".

    Args:
      workdir: of the study; None: it has none.

    Raises:
      ConfigError: they are neither there nor recorded, or changed since they were.
    """
    known = None if workdir is None else _recorded(workdir)
    there = _file(experiment)
    if not there.exists():
        if known is None:
            raise config.ConfigError(
                f"{_FIELD} = {experiment.optimizer.tuned_from!r}: there is no {there}; "
                "run the stage fit of a study with an axis of learning rates"
            )
        return known
    found = _read(experiment, there)
    if known is not None and _digest(known) != _digest(found):
        raise config.ConfigError(
            f"{there} has other best rates than this study was planned with "
            f"({_NAME}): use another --workdir"
        )
    return found


def identified(
    experiment: config.Experiment, workdir: pathlib.Path
) -> config.Experiment:
    """The experiment with the identity of its rates in optimizer.tuned_digest.

    Raises:
      ConfigError: as `rates`, or optimizer.tuned_digest is that of other rates.
    """
    digest, cfg = _digest(rates(experiment, workdir)), experiment.optimizer
    if cfg.tuned_digest not in ("", digest):
        raise config.ConfigError(
            f"config.optimizer.tuned_digest = {cfg.tuned_digest!r}, but that of the "
            f"best rates in {cfg.tuned_from} is {digest}"
        )
    changed = dataclasses.replace(cfg, tuned_digest=digest)
    return dataclasses.replace(experiment, optimizer=changed)


def record(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Records the rates in the directory of the study."""
    if _recorded(workdir) is None:
        found = rates(experiment, workdir)
        records.write_text(workdir / _NAME, records.dumps(found) + "\n")


def _recorded(workdir: pathlib.Path) -> records.RateFit | None:
    path = workdir / _NAME
    try:
        return records.read(path, records.RateFit) if path.exists() else None
    except records.Damaged as e:
        raise config.ConfigError(f"{e}: put a copy back") from e


def _digest(fit: records.RateFit) -> str:
    return records.digest(records.to_json(fit))


def _file(experiment: config.Experiment) -> pathlib.Path:
    """The laws that the experiment names, or those of the directory that it names."""
    given = places.place(experiment.optimizer.tuned_from, _FIELD).expanduser()
    return given if given.suffix == ".json" else given / "laws.json"


def _read(experiment: config.Experiment, path: pathlib.Path) -> records.RateFit:
    """The best rates of the loss, of the one group or of the named one."""
    wanted = experiment.optimizer.tuned_group
    try:
        laws = records.read_jsonl(path)
    except records.Damaged as e:
        raise config.ConfigError(f"{_FIELD}: {e}") from e
    every = [
        fit for fit in laws if isinstance(fit, records.RateFit) and fit.metric == LOSS
    ]
    if not every:
        raise config.ConfigError(
            f"{_FIELD}: {path} has no best learning rates of the loss; its study needs "
            "several values of optimizer.learning_rate in config.plan.axes, and the "
            "stage fit"
        )
    found = [fit for fit in every if fit.group == wanted]
    if not wanted and len(every) == 1:
        found = every
    if not found:
        named = ", ".join(repr(fit.group) for fit in every)
        raise config.ConfigError(
            f"config.optimizer.tuned_group = {wanted!r}: {path} has the groups {named}"
        )
    return found[0]
