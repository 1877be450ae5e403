"""Quality against the cost of sampling: the frontier of a table of cells.

    found = frontier.build(cells, reference="866M", device="TPU v4")
    print(*found.sentences, sep="\n")
    frontier.advice(found, 0.5, "seconds", device="l4")

A cell is one model, sampler, step count and guidance, with its cost and its value of a
metric of which less is better. Everything is float64 numpy. No jax is imported.

May import: records, flops (peaks of devices).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from scaling_ldm.frontier.advise import advice, amount
from scaling_ldm.frontier.cells import COSTS, MIN_REPLICATES, compare, cost_of
from scaling_ldm.frontier.crossing import crossings, crossings_of
from scaling_ldm.frontier.fronts import (
    BUDGETS,
    best_guidance,
    front_of,
    guidance_of,
    pareto,
    pareto_optimal,
)
from scaling_ldm.frontier.narrate import sentences
from scaling_ldm.frontier.published import (
    GUIDANCE_GRID,
    REFERENCE,
    STEP_GRID,
    TABLE_1,
    relative_cost,
)
from scaling_ldm.records import Cell, Frontier

__all__ = [
    "COSTS",
    "GUIDANCE_GRID",
    "MIN_REPLICATES",
    "REFERENCE",
    "STEP_GRID",
    "TABLE_1",
    "advice",
    "amount",
    "best_guidance",
    "build",
    "cost_of",
    "crossings",
    "pareto",
    "relative_cost",
    "sentences",
    "pareto_optimal",
]


def build(
    cells: Iterable[Cell],
    *,
    reference: str,
    device: str,
    costs: Sequence[str] = tuple(COSTS),
    budgets: int = BUDGETS,
    bootstrap: int = 1000,
    level: float = 0.9,
    seed: int = 0,
    allow_protocols: Collection[str] = (),
) -> Frontier:
    """Fronts, crossings, best guidances and sentences of a table of cells.

    Args:
      cells: of one metric and protocol, in any order.
      reference: the model whose evaluation has the relative cost 1.
      device: where the seconds were measured.
      costs: names of COSTS; fronts and crossings are found in each, and the sentences
        are about the first.
      budgets: number of budgets on the logarithmic grid of each front.
      bootstrap: number of draws of the values.
      level: of every interval.
      seed: of the draws.
      allow_protocols: hashes of protocols that may be compared although they differ.

    Raises:
      ValueError: cells that must not be compared: see `cells.compare`.
    """
    table = compare(
        cells,
        bootstrap=bootstrap,
        level=level,
        seed=seed,
        allow_protocols=allow_protocols,
    )
    samplers = table.samplers()
    scopes = ["", *samplers] if len(samplers) > 1 else samplers
    pairs = [(cost, sampler) for cost in costs for sampler in scopes]
    fronts = {pair: front_of(table, *pair, budgets) for pair in pairs}
    found = {pair: crossings_of(table, *pair) for pair in pairs}
    best = guidance_of(table)
    first = pairs[: len(scopes)]
    told = sentences(
        table.cells[0].metric,
        [fronts[pair] for pair in first],
        [c for pair in first for c in found[pair]],
        best,
    )
    return Frontier(
        metric=table.cells[0].metric,
        protocols=tuple(sorted({cell.protocol for cell in table.cells})),
        reference=reference,
        device=device,
        cells=table.cells,
        best=best,
        fronts=tuple(fronts.values()),
        crossings=tuple(c for of_pair in found.values() for c in of_pair),
        sentences=told,
        level=level,
        bootstrap=bootstrap,
        seed=seed,
        notes=table.notes,
    )
