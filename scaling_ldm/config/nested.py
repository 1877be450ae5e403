"""Settings under which a short run is not the beginning of a longer one."""

from __future__ import annotations

from scaling_ldm.config import fields

NESTED = "nested"  # of names.REUSE


def problems_of(e: fields.Experiment) -> list[str]:
    """Every reason why budgets cannot be nested; empty if they are not, or can be."""
    if e.plan.reuse != NESTED:
        return []
    where, cfg, problems = f"config.plan.reuse = {NESTED!r}", e.optimizer, []
    if e.plan.steps:
        problems.append(
            f"{where} with config.plan.steps = {e.plan.steps}: runs of the same steps "
            "have no smaller budgets"
        )
    if cfg.schedule != "constant":
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
