"""Where the larger of two sizes becomes the better one; numpy only.

A size's curve g(c) is the lowest value that it reaches at cost c. It is the lowest over
the guidance at each sampler and step count, then the lowest so far along the cost. It
is linear in ln c between the measured step counts. Beyond the last it is constant, on
the assumption that more steps would not improve it. The crossing is the cost after
which the larger size's curve stays below that of the smaller. Each bootstrap draw has
its own curves, and so its own crossing, or none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from scaling_ldm.frontier.cells import COSTS, CellTable, compare
from scaling_ldm.records import Cell, Crossing, Interval, Refusal

Costs = Float[np.ndarray, "costs"]  # ln cost, ascending, or a value at each
Curves = Float[np.ndarray, "rows costs"]


def crossings(
    cells: Iterable[Cell],
    cost: str = "relative_cost_steps",
    *,
    sampler: str = "",
    **options,
) -> tuple[Crossing | Refusal, ...]:
    """For each pair of neighbouring sizes, the cost from which the larger wins.

    A refusal has one of four reasons. "never": at the largest cost measured, the
    smaller is still the better one. "always": the larger wins at every cost at which
    both can run. "uncertain": more draws than the level allows say otherwise. "the same
    size": there is no larger one.

    Args:
      cells: of one metric and protocol.
      cost: "relative_cost_steps", "flops" or "seconds", of an image.
      sampler: one of them, or "" for the best of all.
      **options: `bootstrap`, `level`, `seed`, `allow_protocols` of `cells.compare`.
    """
    return crossings_of(compare(cells, **options), cost, sampler)


def crossings_of(
    table: CellTable, cost: str, sampler: str = ""
) -> tuple[Crossing | Refusal, ...]:
    scope = {"sampler": sampler} if sampler else {}
    models = [m for m in table.models() if len(table.where(model=m, **scope))]
    return tuple(
        _crossing(table, smaller, larger, cost, sampler)
        for smaller, larger in zip(models, models[1:], strict=False)
    )


def _curve(
    table: CellTable, model: str, cost: str, sampler: str
) -> tuple[Costs, Curves]:
    """ln cost, and the lowest value that costs no more than that.

    The first row is that of the measured values, the others are those of the draws.
    """
    scope = {"sampler": sampler} if sampler else {}
    costs = table.cost(cost)
    values = table.value[None]
    if table.draws is not None:
        values = np.concatenate([values, table.draws])
    groups: dict[tuple, list[int]] = {}
    for i in table.where(model=model, **scope):
        cell = table.cells[i]
        groups.setdefault((cell.sampler, cell.steps, cell.nfe), []).append(i)
    at, lowest = [], []
    for group in groups.values():
        best = min(group, key=lambda i: table.value[i])
        at.append(costs[best])
        lowest.append(values[:, group].min(axis=1))
    order = np.argsort(at, kind="stable")
    x = np.log(np.array(at)[order])
    y = np.minimum.accumulate(np.stack(lowest, axis=1)[:, order], axis=1)
    last = np.append(np.diff(x) > 0, True)  # of equal costs the lowest
    return x[last], y[:, last]


def _at(
    x: Costs, curve: tuple[Float[np.ndarray, " knots"], Float[np.ndarray, "rows knots"]]
) -> Float[np.ndarray, "rows costs"]:
    """Curves, given at knots, interpolated at x."""
    knots, values = curve
    weights = np.stack([np.interp(x, knots, row) for row in np.eye(len(knots))])
    return values @ weights


def _crossing(
    table: CellTable, smaller: str, larger: str, cost: str, sampler: str
) -> Crossing | Refusal:
    small, large = (
        table.cells[table.where(model=model)[0]] for model in (smaller, larger)
    )
    unit = "" if cost == next(iter(COSTS)) else f", {cost}"
    group = f"{large.label} over {small.label}, {sampler or 'all samplers'}{unit}"

    def refuse(reason: str, detail: str) -> Refusal:
        return Refusal(quantity="crossing", group=group, reason=reason, detail=detail)

    if small.params == large.params:
        return refuse("the same size", f"{small.params} parameters both")
    s, g = (_curve(table, model, cost, sampler) for model in (smaller, larger))
    start = max(s[0][0], g[0][0])
    knots = np.union1d(s[0], g[0])
    x = np.append(start, knots[knots > start])
    gap = _at(x, g) - _at(x, s)
    at = np.array([_last_crossing(x, row) for row in gap])
    measured, drawn = at[0], at[1:]
    where = f"between costs {math.exp(x[0]):.4g} and {math.exp(x[-1]):.4g}"
    shares = {
        "never": np.mean(drawn == math.inf) if len(drawn) else 1.0,
        "always": np.mean(drawn == -math.inf) if len(drawn) else 1.0,
    }
    said = (
        f"{where}; of {len(drawn)} draws {shares['never']:.0%} say never, "
        f"{shares['always']:.0%} always"
        if len(drawn)
        else f"{where}, without replicates"
    )
    if math.isinf(measured):
        reason = "never" if measured > 0 else "always"
        edge = -1 if measured > 0 else 0
        detail = f"difference {gap[0, edge]:+.4g} at cost {math.exp(x[edge]):.4g}; "
        if shares[reason] < table.level:
            reason = "uncertain"
        return refuse(reason, detail + said)
    interval = None
    if len(drawn):
        a = (1 - table.level) / 2
        # Observed draws, not means of two: an end may be infinite.
        low = np.quantile(drawn, a, method="inverted_cdf")
        high = np.quantile(drawn, 1 - a, method="inverted_cdf")
        if math.isinf(low) or math.isinf(high):
            detail = f"measured at cost {math.exp(measured):.4g}; {said}"
            return refuse("uncertain", detail)
        interval = Interval(low=math.exp(low), high=math.exp(high), level=table.level)
    return Crossing(
        smaller=small.label,
        larger=large.label,
        cost=cost,
        sampler=sampler,
        at=math.exp(measured),
        interval=interval,
        doubt=_doubt(measured, gap[0], s[0][-1]),
    )


def _last_crossing(x: Costs, gap: Costs) -> float:
    """The x after which the gap stays negative; inf: never, -inf: everywhere."""
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return -math.inf
    i = above[-1]
    if i == len(x) - 1:
        return math.inf
    return float(x[i] + (x[i + 1] - x[i]) * gap[i] / (gap[i] - gap[i + 1]))


def _doubt(at: float, gap: np.ndarray, smaller_ends: float) -> str:
    doubts = []
    if at > smaller_ends:
        doubts.append(
            "beyond the smaller's last measured cost of "
            f"{math.exp(smaller_ends):.4g}: this assumes that more steps would not "
            "improve the smaller one"
        )
    turns = int(np.sum(np.diff(gap < 0)))
    if turns > 1:
        doubts.append(f"the last of {turns} crossings")
    return "; ".join(doubts)
