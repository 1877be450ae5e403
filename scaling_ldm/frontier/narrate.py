"""A frontier in plain lines: the best size at each cost; where the larger wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scaling_ldm.records import (
    BestGuidance,
    Choice,
    Crossing,
    Front,
    FrontPoint,
    Interval,
    Refusal,
)

_COSTS = {
    "relative_cost_steps": ("cost ", ""),
    "flops": ("", " FLOPs"),
    "seconds": ("", " s"),
}
_SURE = 0.9  # a choice of lower probability is said to be unsure
_REFUSED = {
    "never": "The smaller is the better one up to the largest cost measured",
    "always": "The larger wins wherever both can run",
    "uncertain": "Where the larger wins, if it does, the draws do not agree",
    "the same size": "Of the same size",
}


def sentences(
    metric: str,
    fronts: Iterable[Front],
    crossings: Iterable[Crossing | Refusal],
    best: Sequence[BestGuidance] = (),
) -> tuple[str, ...]:
    """Per front a line and one of its crossings, then one for all that were refused.

    Args:
      metric: what was measured.
      fronts: the fronts to speak of, of one cost; the first is told with every value.
      crossings: of neighbouring sizes.
      best: the best guidances; ends of what was tried get a line.
    """
    crossings = list(crossings)
    found = [c for c in crossings if isinstance(c, Crossing)]
    told = {front.sampler: front for front in fronts}
    lines = []
    for sampler in [*told, *dict.fromkeys(c.sampler for c in found)]:
        if sampler in told:
            full = not lines
            lines.append(_front(metric, told.pop(sampler), full))
        said = [_crossing(c) for c in found if c.sampler == sampler]
        found = [c for c in found if c.sampler != sampler]
        if said:
            lines.append(f"{_scope(sampler)} the larger wins: {'; '.join(said)}.")
    refused: dict[str, list[str]] = {}
    for c in crossings:
        if isinstance(c, Refusal):
            refused.setdefault(c.reason, []).append(c.group)
    if refused:
        said = [
            f"{_REFUSED.get(reason, reason)}: {'; '.join(groups)}."
            for reason, groups in refused.items()
        ]
        lines.append(" ".join(said))
    edges = [b for b in best if b.edge]
    if edges:
        lines.append(
            f"At {len(edges)} of {len(best)} settings the best guidance is an end of "
            f"what was tried ({_ends(edges)}), so a better one may lie beyond."
        )
    return tuple(line[0].upper() + line[1:] for line in lines)


def _scope(sampler: str) -> str:
    return f"with {sampler}" if sampler else "with the best sampler"


def _cost(cost: str, value: float) -> str:
    """cost 3.2; 1.2e+09 FLOPs; 0.4 s."""
    before, after = _COSTS[cost]
    return f"{before}{value:.3g}{after}"


def _front(metric: str, front: Front, full: bool) -> str:
    parts = []
    for run in _stretches(front.points):
        last = run[-1]
        part = f"{last.choice.label} to {_cost(front.cost, last.budget)}"
        if full or last is front.points[-1]:
            part += f" ({_value(last.choice)})"
        parts.append(part)
    line = f"{_scope(front.sampler)} the best by {metric}, of {len(front.points)} "
    line += f"budgets from {_cost(front.cost, front.points[0].budget)}, is "
    line += f"{', '.join(parts)}."
    shares = [p.probabilities[p.choice.model] for p in front.points if p.probabilities]
    unsure = sum(share < _SURE for share in shares)
    if unsure:
        line += (
            f" At {unsure} of them that size is the best with a "
            f"probability below {_SURE:g}."
        )
    return line


def _stretches(points: Sequence[FrontPoint]) -> list[list[FrontPoint]]:
    """Neighbouring budgets at which the same model is the best."""
    runs: list[list[FrontPoint]] = []
    for point in points:
        if runs and runs[-1][0].choice.model == point.choice.model:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _value(choice: Choice) -> str:
    return f"{choice.expected:.4g}{_bracket(choice.interval, '.4g')}"


def _bracket(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    return f" [{interval.low:{form}}, {interval.high:{form}}]"


def _crossing(found: Crossing) -> str:
    where = _cost(found.cost, found.at) + _bracket(found.interval, ".3g")
    doubt = f" ({found.doubt})" if found.doubt else ""
    return f"{found.larger} over {found.smaller} from {where}{doubt}"


def _ends(edges: Sequence[BestGuidance]) -> str:
    said = {"low": "the lowest", "high": "the highest", "only": "the only one"}
    counts = {kind: sum(b.edge == kind for b in edges) for kind in said}
    return ", ".join(f"{said[k]} at {n}" for k, n in counts.items() if n)
