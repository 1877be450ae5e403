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
    "relative_cost_steps": ("cost", ""),
    "flops": ("", " FLOPs"),
    "seconds": ("", " s"),
}


def sentences(
    metric: str,
    fronts: Iterable[Front],
    crossings: Iterable[Crossing | Refusal],
    best: Sequence[BestGuidance] = (),
) -> tuple[str, ...]:
    """A line per front, a line per crossing, and one about doubtful guidances.

    Args:
      metric: what was measured.
      fronts: the fronts to speak of.
      crossings: of neighbouring sizes.
      best: the best guidances, for the doubts about them.
    """
    lines = [_front(metric, front) for front in fronts]
    lines += [_crossing(c) for c in crossings]
    edges = [b for b in best if b.edge]
    if edges:
        lines.append(
            f"At {len(edges)} of {len(best)} settings the best guidance is an end of "
            f"what was tried ({_ends(edges)}), so a better one may lie beyond."
        )
    return tuple(lines)


def cost_words(cost: str, value: float) -> str:
    """cost 3.2; 1.2e+09 FLOPs; 0.4 s."""
    before, after = _COSTS[cost]
    return f"{before} {value:.3g}{after}".strip()


def _front(metric: str, front: Front) -> str:
    parts = []
    for run in _stretches(front.points):
        first, last = run[0], run[-1]
        where = f"at {cost_words(front.cost, first.budget)}"
        if len(run) > 1:
            where = f"from {cost_words(front.cost, first.budget)} to "
            where += f"{last.budget:.3g}{_COSTS[front.cost][1]}"
        parts.append(f"{where} {last.choice.label} ({_reached(metric, run)})")
    name = front.sampler or "All samplers together"
    return f"{name}: best {'; '.join(parts)}."


def _stretches(points: Sequence[FrontPoint]) -> list[list[FrontPoint]]:
    """Neighbouring budgets at which the same model is the best."""
    runs: list[list[FrontPoint]] = []
    for point in points:
        if runs and runs[-1][0].choice.model == point.choice.model:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _reached(metric: str, run: Sequence[FrontPoint]) -> str:
    choice = run[-1].choice
    words = f"{metric} {_value(choice)}"
    sure = [p.probabilities[choice.model] for p in run if p.probabilities]
    if sure:
        low, high = min(sure), max(sure)
        share = f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
        words += f", probability {share}"
    return words


def _value(choice: Choice) -> str:
    return f"{choice.expected:.4g}{_bracket(choice.interval, '.4g')}"


def _bracket(interval: Interval | None, form: str) -> str:
    if interval is None:
        return ""
    return f" [{interval.low:{form}}, {interval.high:{form}}]"


def _crossing(found: Crossing | Refusal) -> str:
    if isinstance(found, Refusal):
        return f"No {found.what}: {found.reason} ({found.detail})."
    where = cost_words(found.cost, found.at) + _bracket(found.interval, ".3g")
    doubt = f" ({found.doubt})" if found.doubt else ""
    return (
        f"{found.sampler or 'All samplers together'}: {found.larger} is better than "
        f"{found.smaller} from {where}{doubt}."
    )


def _ends(edges: Sequence[BestGuidance]) -> str:
    counts = {kind: sum(b.edge == kind for b in edges) for kind in ("low", "high")}
    counts["only"] = sum(b.edge == "only" for b in edges)
    said = {"low": "the lowest", "high": "the highest", "only": "the only one"}
    return ", ".join(f"{said[k]} {n} times" for k, n in counts.items() if n)
