"""Tables of quality against the cost of sampling; the figures are elsewhere."""

from __future__ import annotations

from typing import Any

from scaling_ldm.records import Choice, Crossing, Frontier
from scaling_ldm.report import format as fmt
from scaling_ldm.report.frontier_figures import sizes
from scaling_ldm.report.table import (
    Column,
    Row,
    Table,
    bracketed,
    cell,
    pick,
    ranged,
    refused,
    spread,
    text,
)

_COSTS = {
    "relative_cost_steps": "steps × relative cost",
    "flops": "FLOPs an image",
    "seconds": "time an image",
}
_ALL = "all together"
_EDGES = {"low": "the lowest tried", "high": "the highest tried", "only": "alone"}
_FRONT = (
    Column("cost is", lambda r: _COSTS[r["cost_is"]], False),
    Column("among samplers", lambda r: r["among"] or _ALL, False),
)
_CHOICE = (
    text("size", "label"),
    text("sampler", "sampler"),
    cell("steps", "steps", fmt.count),
    cell("guidance", "guidance", "{:g}".format),
)


def tables(frontier: Frontier) -> list[Table]:
    """Every table of a frontier."""
    found = [pareto(frontier), budgets(frontier), crossings(frontier)]
    return [*found, best_guidance(frontier), cells(frontier)]


def basis(frontier: Frontier) -> str:
    """What was measured, and on what the intervals rest."""
    images = sorted({c.images for c in frontier.cells})
    counts = " to ".join(fmt.count(n) for n in dict.fromkeys((images[0], images[-1])))
    words = (
        f"{len(frontier.cells)} settings were measured with {counts} images each. In "
        f"parentheses is {fmt.spoken(frontier.metric)}; lower is better. Cost is steps "
        f"× the cost of one evaluation of the network, that of {frontier.reference} "
        f"being 1. Times were measured on {frontier.device}. Protocol "
        f"{', '.join(frontier.protocols)}."
    )
    if any(b.choice.interval for b in frontier.best):
        words += (
            f" In brackets are {100 * frontier.level:.0f}% intervals of "
            f"{frontier.bootstrap} bootstrap draws."
        )
    return words


def _choice(choice: Choice) -> dict[str, Any]:
    row = pick(choice, "label model params sampler steps guidance cost")
    row |= {"measured": choice.value} | spread(choice, "expected")
    return row | {"probability": choice.probability}


def _amount(row: Row, key: str) -> str:
    """A cost in its unit, with its interval if there is one."""
    show = fmt.duration if row["cost_is"] == "seconds" else fmt.compact
    return bracketed(row, key, show) if f"{key}_low" in row else show(row[key])


def _reached(metric: str) -> tuple[Column, ...]:
    return (
        ranged(f"{fmt.spoken(metric)}, expected", "expected", fmt.loss),
        cell("measured", "measured", fmt.loss),
        cell("probability", "probability", _share),
    )


def _share(x: float | None) -> str:
    return fmt.NONE if x is None else f"{x:.2f}"


def pareto(frontier: Frontier) -> Table:
    rows = [
        {"cost_is": front.cost, "among": front.sampler} | _choice(choice)
        for front in frontier.fronts
        for choice in front.pareto
    ]
    reached = _reached(frontier.metric)
    columns = (
        *_FRONT,
        Column("cost", lambda r: _amount(r, "cost")),
        *_CHOICE,
        *reached,
    )
    caption = (
        "The Pareto sets: settings, each at its best guidance, that nothing cheaper "
        "is expected to reach. The probability is that of being the best at that cost, "
        "all guidances counted."
    )
    return Table("frontier", caption, rows, columns)


def budgets(frontier: Frontier) -> Table:
    names = sizes(frontier)
    rows = [
        {"cost_is": front.cost, "among": front.sampler, "budget": point.budget}
        | _choice(point.choice)
        | {f"probability_{model}": point.probabilities.get(model) for model in names}
        for front in frontier.fronts
        for point in front.points
    ]
    columns = (
        *_FRONT,
        Column("budget", lambda r: _amount(r, "budget")),
        *_CHOICE,
        *_reached(frontier.metric)[:2],
        *(
            cell(f"P({of})", f"probability_{model}", _share)
            for model, of in names.items()
        ),
    )
    caption = (
        "The lowest as measured within each budget, and the probability of each size "
        "to be the best."
    )
    return Table("best_at_budget", caption, rows, columns)


def crossings(frontier: Frontier) -> Table:
    rows = []
    for c in frontier.crossings:
        found = isinstance(c, Crossing)
        row = {"pair": f"{c.larger} over {c.smaller}" if found else c.group}
        row |= pick(c, "larger smaller") | {"cost_is": c.cost if found else None}
        row |= {"among": (c.sampler or _ALL) if found else ""} | spread(c, "at")
        rows.append(row | pick(c, "doubt") | refused(c))
    columns = (
        text("the larger over the smaller", "pair"),
        cell("cost is", "cost_is", lambda cost: _COSTS.get(cost, fmt.NONE)),
        text("among samplers", "among"),
        Column("from cost", lambda r: _amount(r, "at")),
        text("doubt", "doubt"),
        text("no crossing, because", "refused"),
    )
    caption = (
        "Where the larger of two neighbouring sizes becomes the better one, each at "
        "its best guidance, linear in ln cost between the step counts."
    )
    return Table("crossings", caption, rows, columns)


def best_guidance(frontier: Frontier) -> Table:
    rows = [
        _choice(b.choice)
        | {
            "ties": " ".join(f"{g:g}" for g in b.ties),
            "doubt": _EDGES.get(b.edge, ""),
            "tried": " ".join(f"{g:g}" for g in b.tried),
        }
        for b in frontier.best
    ]
    columns = (
        *_CHOICE,
        text("not told apart from it", "ties"),
        text("doubt", "doubt"),
        *_reached(frontier.metric),
        text("tried", "tried"),
    )
    caption = "The guidance of the lowest value at each size, sampler and step count."
    return Table("best_guidance", caption, rows, columns)


def cells(frontier: Frontier) -> Table:
    fields = "label model params relative_cost sampler steps guidance nfe flops"
    fields += " decoder_flops seconds value images protocol"
    columns = (
        *_CHOICE,
        cell("evaluations", "nfe", "{:g}".format),
        cell("FLOPs", "flops", fmt.compact),
        cell("decoder FLOPs", "decoder_flops", fmt.compact),
        cell("time", "seconds", fmt.duration),
        cell(fmt.spoken(frontier.metric), "value", fmt.loss),
        cell("images", "images", fmt.count),
    )
    caption = "Every setting as measured; FLOPs and time are of one image."
    return Table("cells", caption, [pick(c, fields) for c in frontier.cells], columns)
