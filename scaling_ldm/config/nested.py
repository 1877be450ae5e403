"""Settings under which a short run is not the beginning of a longer one.

Of nested budgets all of it is. With decay branches it is up to where its rate falls.
"""

from __future__ import annotations

from scaling_ldm.config import fields

NESTED, DECAY = "nested", "decay"  # of names.REUSE
_SCHEDULES = {NESTED: "constant", DECAY: "wsd"}


def problems_of(e: fields.Experiment) -> list[str]:
    """Every reason why budgets cannot share steps; empty if they do not, or can."""
    if e.plan.reuse not in _SCHEDULES:
        return []
    cfg, problems = e.optimizer, []
    where = f"config.plan.reuse = {e.plan.reuse!r}"
    if e.plan.steps:
        problems.append(
            f"{where} with config.plan.steps = {e.plan.steps}: runs of the same steps "
            "have no smaller budgets"
        )
    if e.plan.reuse == DECAY and cfg.schedule != "wsd":
        problems.append(
            f"{where} with config.optimizer.schedule = {cfg.schedule!r}: a branch is "
            "the decay of 'wsd'; set it, and optimizer.decay_fraction and decay_shape"
        )
    if e.plan.reuse == NESTED and cfg.schedule != "constant":
        problems.append(
            f"{where} with config.optimizer.schedule = {cfg.schedule!r}: the rate "
            "falls towards the end of a run, so a short run is not the beginning of a "
            "longer one; set 'constant'"
        )
    if cfg.warmup_fraction:
        problems.append(
            f"{where} with config.optimizer.warmup_fraction = {cfg.warmup_fraction}: "
            "the warm-up of a longer run would be longer; set warmup_fraction = 0.0 "
            "and, for a warm-up, warmup_steps or warmup_samples"
        )
    return problems
