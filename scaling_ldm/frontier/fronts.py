"""The best guidance of each setting, and the best of each budget; numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from scaling_ldm.frontier.cells import CellTable, choose, compare, make_choice
from scaling_ldm.records import BestGuidance, Cell, Choice, Front, FrontPoint

BUDGETS = 25  # of the logarithmic grid of budgets


def best_guidance(cells: Iterable[Cell], **options) -> tuple[BestGuidance, ...]:
    """For each model, sampler and step count the guidance of the lowest value.

    If the best guidance is the lowest or highest that was tried, a better one may lie
    outside: `edge` says so. `ties` are the guidances whose draws are as low as those of
    the best in more than (1 - level) / 2 of the cases. Without replicates they are
    those of equal value.

    Args:
      cells: of one metric and protocol.
      **options: `bootstrap`, `level`, `seed`, `allow_protocols` of `cells.compare`.
    """
    return guidance_of(compare(cells, **options))


def guidance_of(table: CellTable) -> tuple[BestGuidance, ...]:
    groups: dict[tuple, list[int]] = {}
    for i, cell in enumerate(table.cells):
        groups.setdefault((cell.sampler, cell.model, cell.steps), []).append(i)
    cost = table.cost("relative_cost_steps")
    return tuple(_best(table, np.array(g), cost) for g in groups.values())


def _best(table: CellTable, among: np.ndarray, cost: np.ndarray) -> BestGuidance:
    best, choice = choose(table, among, cost)
    tried = sorted(table.cells[i].guidance for i in among)
    ties = []
    for i in among:
        if table.draws is None:
            near = table.value[i] == table.value[best]
        else:
            lower = np.mean(table.draws[:, i] <= table.draws[:, best])
            near = lower > (1 - table.level) / 2
        if near and i != best:
            ties.append(table.cells[i].guidance)
    edge = ""
    if len(tried) == 1:
        edge = "only"
    elif choice.guidance == tried[0]:
        edge = "low"
    elif choice.guidance == tried[-1]:
        edge = "high"
    return BestGuidance(
        choice=choice, tried=tuple(tried), ties=tuple(sorted(ties)), edge=edge
    )


def pareto(
    cells: Iterable[Cell],
    cost: str = "relative_cost_steps",
    *,
    sampler: str = "",
    budgets: int | Sequence[float] = BUDGETS,
    **options,
) -> Front:
    """The Pareto-optimal settings, and the best choice at each budget.

    A setting is a model, sampler, number of steps and FLOPs, at its best guidance.
    Settings are compared by `Choice.expected`, the expectation of a new measurement.
    The best of a budget is the cell with the lowest measured value.

    Args:
      cells: of one metric and protocol.
      cost: "relative_cost_steps", "flops" or "seconds", of an image.
      sampler: one of them, or "" for all together.
      budgets: how many, from the cheapest cell to the most expensive; or their values.
      **options: `bootstrap`, `level`, `seed`, `allow_protocols` of `cells.compare`.

    Raises:
      ValueError: a sampler that no cell has, or a budget below every cost.
    """
    return front_of(compare(cells, **options), cost, sampler, budgets)


def front_of(
    table: CellTable,
    cost: str,
    sampler: str = "",
    budgets: int | Sequence[float] = BUDGETS,
) -> Front:
    members = table.where(sampler=sampler) if sampler else np.arange(len(table.cells))
    if not len(members):
        raise ValueError(
            f"no cell of sampler {sampler!r}; there are {', '.join(table.samplers())}"
        )
    costs = table.cost(cost)
    order = members[np.argsort(costs[members], kind="stable")]
    at_cost = costs[order]
    best = _running_best(table.value[None, order])[0]
    drawn = None
    if table.draws is not None:
        values = table.draws[:, order]
        drawn = values, _running_best(values)

    def buys(budget: float) -> tuple[int, np.ndarray | None]:
        """The best cell within a budget, as its place in `order`.

        Returns:
          The place by the measured values, and the place by each draw [bootstrap].
        """
        last = int(np.searchsorted(at_cost, budget * (1 + 1e-9), side="right")) - 1
        if last < 0:
            raise ValueError(
                f"budget {budget:g} is below the cheapest cell's {at_cost[0]:g}"
            )
        return int(best[last]), None if drawn is None else drawn[1][:, last]

    def choice(place: int, chosen: np.ndarray | None):
        pair = None
        if drawn is not None and chosen is not None:
            pair = order[chosen], drawn[0][np.arange(len(chosen)), chosen]
        return make_choice(table, int(order[place]), costs, pair)

    if isinstance(budgets, int):
        spaced = np.geomspace(at_cost[0], at_cost[-1], budgets)
        budgets = np.unique(spaced).tolist()
    names = np.array([cell.model for cell in table.cells])
    points = []
    for budget in budgets:
        place, chosen = buys(float(budget))
        shares = {}
        if chosen is not None:
            models = names[order[chosen]]
            shares = {m: float(np.mean(models == m)) for m in table.models()}
        best_there = choice(place, chosen)
        points.append(
            FrontPoint(budget=float(budget), choice=best_there, probabilities=shares)
        )
    settings = []
    for among in _settings(table, members, cost):
        index, found = choose(table, among, costs)
        if drawn is not None:
            _, chosen = buys(found.cost)
            at_that_cost = float(np.mean(order[chosen] == index))
            found = dataclasses.replace(found, probability=at_that_cost)
        settings.append(found)
    pareto_set = pareto_optimal(settings)
    return Front(cost=cost, sampler=sampler, pareto=pareto_set, points=tuple(points))


def _settings(table: CellTable, members: np.ndarray, cost: str) -> list[np.ndarray]:
    """Groups of cells that differ only in guidance, or also in measured seconds."""
    key = table.cost("flops" if cost == "seconds" else cost)
    groups: dict[tuple, list[int]] = {}
    for i in members:
        cell = table.cells[i]
        at = (cell.sampler, cell.model, cell.steps, key[i])
        groups.setdefault(at, []).append(i)
    return [np.array(group) for group in groups.values()]


def pareto_optimal(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """The choices whose expected value no other of equal or lower cost reaches."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.expected)):
        if not kept or choice.expected < kept[-1].expected:
            kept.append(choice)
    return tuple(kept)


def _running_best(values: np.ndarray) -> np.ndarray:
    """The index of the lowest value so far along the last axis; of equals the first."""
    lowest = np.minimum.accumulate(values, axis=-1)
    new = np.ones_like(values, dtype=bool)
    new[..., 1:] = values[..., 1:] < lowest[..., :-1]
    return np.maximum.accumulate(np.where(new, np.arange(values.shape[-1]), 0), axis=-1)
