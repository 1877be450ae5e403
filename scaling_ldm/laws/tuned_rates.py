"""The learning rate of a size, from the best rates that a smaller study has measured.

A size that was measured has its best rate. Another one has a rate by a power law in N
through the best rates of the same budget and batch, if that is asked for.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from scaling_ldm.laws import best_rates
from scaling_ldm.records import BestRate, RateFit, Refusal

LEAST = 3  # best rates that a law goes through
MEASURED = "measured"
BETWEEN, BEYOND = "law, between sizes", "law, beyond sizes"


@dataclasses.dataclass(frozen=True)
class TunedRate:
    """A rate, and whether it was measured, interpolated or extrapolated."""

    rate: float
    source: str  # MEASURED, BETWEEN or BEYOND


def tuned_rate(
    fit: RateFit, params: float, batch_size: float, budget: float, by_law: bool
) -> TunedRate | Refusal:
    """The rate of a size.

    Args:
      fit: of the study that the rates are measured in.
      params: what `fit.size` counts of the size.
      budget: FLOPs of the runs of `fit` that are used; 0.0: it has one budget.
      by_law: whether a size without a best rate has one by the law.

    Returns:
      A Refusal where the size has no best rate and the law is not asked for, where
      fewer than LEAST best rates make a law, or where no runs have such a batch or
      budget.
    """
    asked = f"{params:.6g} parameters, batch {batch_size:.6g}"

    def refuse(reason: str, detail: str) -> Refusal:
        return Refusal(
            quantity="tuned learning rate", group=asked, reason=reason, detail=detail
        )

    batches = sorted({run[2] for run in fit.runs})
    if not any(_same(batch_size, batch) for batch in batches):
        there = ", ".join(f"{batch:.6g}" for batch in batches) or "none"
        return refuse("rates were tuned for another batch", f"there are {there}")
    budgets = sorted({b.budget_flops or 0.0 for b in fit.best})
    if not budget and len(budgets) > 1:
        there = ", ".join(f"{value:.6g}" for value in budgets)
        return refuse(
            "rates were tuned at several budgets",
            f"there are {there} FLOPs: name one in config.optimizer.tuned_budget",
        )
    cells = {best_rates.name_of(*run[:3]): run for run in fit.runs}
    found: list[BestRate] = []
    refused = ""
    for best in fit.best:
        if budget and not _same(best.budget_flops or 0.0, budget):
            continue
        if isinstance(best, BestRate):
            if _same(best.batch_size, batch_size):
                found.append(best)
        elif (run := cells.get(best.group)) and _same(run[2], batch_size):
            refused = best.why if _same(run[0], params) else refused
    for best in found:
        if _same(best.params, params):
            return TunedRate(best.rate, MEASURED)
    if not by_law:
        if refused:
            return refuse("its best rate was refused", refused)
        sizes = ", ".join(f"{best.params:.6g}" for best in found) or "none"
        return refuse(
            "no best rate of this size",
            f"there are those of {sizes} parameters; config.optimizer.tuned_sizes = "
            "'law' takes it from a power law through them",
        )
    if len(found) < LEAST or len({best.params for best in found}) < 2:
        return refuse(f"fewer than {LEAST} best rates for a law", f"{len(found)}")
    x, y = np.log([(best.params, best.rate) for best in found]).T
    slope, start = np.polyfit(x, y, 1)
    inside = x.min() <= math.log(params) <= x.max()
    rate = math.exp(start + slope * math.log(params))
    return TunedRate(rate, BETWEEN if inside else BEYOND)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=best_rates.SAME)
