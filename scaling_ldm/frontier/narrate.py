"""The findings of a frontier as sentences, one each, with their intervals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from scaling_ldm.records import BestGuidance, Crossing, Front, Interval, Refusal

_COSTS = {
    "relative_cost_steps": "cost {:.3g}",
    "flops": "{:.3g} FLOPs",
    "seconds": "{:.3g} s",
}
_SURE = 0.9  # a sentence counts the choices with a lower probability
_REFUSED = {
    "never": "The smaller is the better one up to the largest cost measured",
    "always": "The larger wins wherever both can run",
    "uncertain": "The draws do not agree on where the larger wins, or whether it does",
    "the same size": "Both have the same size",
}
EDGES = {"low": "the lowest", "high": "the highest", "only": "the only one"}


def sentences(
    metric: str,
    fronts: Iterable[Front],
    crossings: Iterable[Crossing | Refusal],
    best: Sequence[BestGuidance] = (),
) -> tuple[str, ...]:
    """The findings, one line each.

    There is a line for each front, for the crossings of each sampler, and for each
    reason of refusals. If some best guidances are an end of what was tried, the last
    line says how many.

    Args:
      metric: what was measured.
      fronts: the fronts to speak of, of one cost.
      crossings: of neighbouring sizes.
      best: the best guidances.
    """
    lines = [_front(metric, front) for front in fronts]
    won: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for c in crossings:
        if isinstance(c, Crossing):
            won.setdefault(_scope(c.sampler), []).append(_crossing(c))
        else:
            refused.setdefault(_REFUSED.get(c.reason, c.reason), []).append(c.group)
    for scope, found in won.items():
        lines.append(f"{scope} the larger wins: {'; '.join(found)}.")
    lines += [f"{reason}: {'; '.join(groups)}." for reason, groups in refused.items()]
    edges = [b.edge for b in best if b.edge]
    if edges:
        ends = ", ".join(f"{EDGES[e]} at {edges.count(e)}" for e in sorted(set(edges)))
        lines.append(
            f"At {len(edges)} of {len(best)} settings the best guidance is an end of "
            f"what was tried ({ends}), so a better one may lie beyond."
        )
    return tuple(lines)


def _scope(sampler: str) -> str:
    return f"With {sampler}" if sampler else "With the best sampler"


def _front(metric: str, front: Front) -> str:
    """The best size of each stretch of budgets, and how sure that is."""
    cost = _COSTS[front.cost].format
    stretches = []
    for _, run in itertools.groupby(front.points, key=lambda p: p.choice.model):
        *_, last = run
        value = f"{last.choice.expected:.4g}{_bracket(last.choice.interval, '.4g')}"
        stretches.append(f"{last.choice.label} up to {cost(last.budget)} ({value})")
    line = f"{_scope(front.sampler)} the lowest {metric} within a budget is that of "
    line += f"{', then of '.join(stretches)}. {len(front.points)} budgets from "
    line += f"{cost(front.points[0].budget)} were compared."
    shares = (p.probabilities.get(p.choice.model, 1.0) for p in front.points)
    if unsure := sum(share < _SURE for share in shares):
        line += f" At {unsure} of them the probability that this size is the best is "
        line += f"below {_SURE:g}."
    return line


def _bracket(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    return f" [{interval.low:{form}}, {interval.high:{form}}]"


def _crossing(found: Crossing) -> str:
    where = _COSTS[found.cost].format(found.at) + _bracket(found.interval, ".3g")
    doubt = f" ({found.doubt})" if found.doubt else ""
    return f"{found.larger} over {found.smaller} from {where}{doubt}"
