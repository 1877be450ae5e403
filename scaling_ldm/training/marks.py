"""Chooses the steps of a run at which its held-out loss is measured.

The steps depend on the plan alone. The loss is always measured at the end of the run.
Before that, measurements take at most SHARE of the run's FLOPs:

- at the smaller budgets of the plan, the largest first, as many as fit;
- at n marks, evenly spaced in log FLOPs over the last two decades of the run: they and
  the end divide the way from 1/SPAN of its FLOPs to all of them into n + 1 equal
  ratios. n is `validation.marks`, or the largest smaller number that fits.

A trajectory (plan.reuse) is measured at each smaller budget that it stands for, as
separate runs are at their ends, whatever that takes. Other marks share what is left.

The cost of a mark is counted in FLOPs, not timed. So a run has the same marks on every
process and after every restart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from scaling_ldm import config, flops, records
from scaling_ldm.training import objective_checks, train_step

SPAN = 100.0  # training FLOPs of a run over those at the lower end of its marks
SHARE = 0.02  # of a run's training FLOPs that measurements before its end may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
    """The steps at which a run is measured.

    steps: ascending; the last one is the end of the run.
    wanted: `validation.marks`.
    spaced: how many of these fit beside the smaller budgets of the plan.
    points: how many smaller budgets of a trajectory are among the steps.
    share: FLOPs of all measurements but the last one, over the run's training FLOPs.
    """

    steps: tuple[int, ...]
    wanted: int
    spaced: int
    share: float
    points: int = 0


def marks_of(experiment: config.Experiment, spec: records.RunSpec) -> Marks:
    """The marks of a run.

    Args:
      experiment: with the run's overrides.

    Raises:
      UnknownTripCount: the FLOPs of the held-out loss cannot be counted.
    """
    wanted = experiment.validation.marks
    points = {point.steps for point in spec.points()}  # the end is one of them
    if not wanted and len(points) == 1:
        return Marks(steps=(spec.steps,), wanted=0, spaced=0, share=0.0)
    each = measuring_flops(experiment, spec.width, spec.depth)
    total = spec.steps * spec.flops_per_step
    most = int(SHARE * total // max(each, 1))  # measurements before the end
    most = max(most, len(points) - 1) if wanted else len(points) - 1
    smaller = [b for b in experiment.plan.budgets_flops if b < spec.budget_flops]
    budgets = {_nearest(spec, b) for b in smaller} - points
    room = most + 1 - len(points)
    given = {*points, *sorted(budgets, reverse=True)[:room]}
    spaced = next(
        n for n in range(wanted, -1, -1) if len(_spaced(spec, n) | given) <= most + 1
    )
    steps = tuple(sorted(_spaced(spec, spaced) | given))
    return Marks(
        steps=steps,
        wanted=wanted,
        spaced=spaced,
        share=(len(steps) - 1) * each / total,
        points=len(points) - 1,
    )


def _spaced(spec: records.RunSpec, count: int) -> set[int]:
    """The steps nearest to `count` marks; small runs have several marks on one step."""
    total = float(spec.steps * spec.flops_per_step)
    ratio = SPAN ** (1 / (count + 1))
    return {_nearest(spec, total / ratio**k) for k in range(1, count + 1)}


def _nearest(spec: records.RunSpec, training_flops: float) -> int:
    """The step of a run that is nearest to FLOPs below its end."""
    return min(max(round(training_flops / spec.flops_per_step), 1), spec.steps)


def measuring_flops(experiment: config.Experiment, width: int, depth: int) -> int:
    """FLOPs of the held-out loss of a size, of the raw weights and every average."""
    weights = 1 + len(experiment.optimizer.averages)
    compiled = train_step.compiled_part(experiment)
    return weights * _held_out_flops(compiled, width, depth)


@functools.lru_cache(maxsize=64)
def _held_out_flops(experiment: config.Experiment, width: int, depth: int) -> int:
    """FLOPs of the held-out loss of one set of weights; compiles nothing."""
    functions = train_step.train_functions(experiment, width, depth, unroll=False)
    learnt, cfg = functions.objective, experiment.validation
    batch, _ = objective_checks.abstract_inputs(experiment, learnt, cfg.batch_size)
    one = flops.count(
        learnt.per_example_loss,
        train_step.abstract_state(functions).params,
        batch,
        jax.ShapeDtypeStruct((cfg.batch_size,), jnp.float32),
        jax.ShapeDtypeStruct((cfg.batch_size,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    # The last batch is filled.
    return math.ceil(cfg.samples / cfg.batch_size) * one.hardware


def line(marks: Collection[Marks]) -> str:
    """What is measured before the end where that is unusual; "" where it is not.

    Runs with fewer marks than wanted, and trajectories.
    """
    whole = [m for m in marks if m.points]
    said = ""
    if whole:
        said = (
            f"{len(whole)} of {len(marks)} runs are measured at their smaller budgets, "
            "too, as separate runs are at their ends (config.plan.reuse): all that is "
            f"measured before an end takes up to {max(m.share for m in whole):.2g} of "
            "a run's FLOPs"
        )
    return "\n".join(filter(None, (said, _fewer(marks))))


def _fewer(marks: Collection[Marks]) -> str:
    """A line about runs with fewer marks than wanted; "" if there are none."""
    fewer = [m.spaced for m in marks if m.spaced < m.wanted]
    if not fewer:
        return ""
    found = (
        f"{min(fewer)}" if min(fewer) == max(fewer) else f"{min(fewer)}-{max(fewer)}"
    )
    beside = " beside these" if any(m.points for m in marks) else ""
    return (
        f"{len(fewer)} of {len(marks)} runs are measured {found} times{beside} before "
        f"their end, not {max(m.wanted for m in marks)} (config.validation.marks): "
        f"more would take over {SHARE:.0%} of their FLOPs; all are measured at their "
        "end"
    )
