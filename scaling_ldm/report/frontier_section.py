"""Tables and words of quality against the cost of sampling; figures are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scaling_ldm.records import Choice, Crossing, Frontier, Refusal
from scaling_ldm.report.format import NONE, compact, count, plain, sentence
from scaling_ldm.report.frontier_figures import sizes
from scaling_ldm.report.table import Column, Row, Table, cell, ranged, spread, text

_COSTS = {
    "relative_cost_steps": "steps × relative cost",
    "flops": "FLOPs an image",
    "seconds": "seconds an image",
}
_ALL = "all together"


def tables(frontier: Frontier) -> list[Table]:
    """Every table that the frontier has rows for."""
    found = [
        pareto(frontier),
        budgets(frontier),
        crossings(frontier),
        best_guidance(frontier),
        cells(frontier),
    ]
    return [table for table in found if table.rows]


def basis(frontier: Frontier) -> str:
    """What was measured, and on what the intervals rest, in a sentence or two."""
    images = sorted({c.images for c in frontier.cells})
    counts = count(images[0])
    if len(images) > 1:
        counts += f" to {count(images[-1])}"
    protocols = ", ".join(frontier.protocols)
    words = (
        f"{len(frontier.cells)} cells of {counts} images; {frontier.metric}, lower is "
        f"better, under protocol {protocols}. The evaluation of {frontier.reference} "
        f"costs 1; seconds were measured on {frontier.device}."
    )
    if any(b.choice.interval for b in frontier.best):
        words += (
            f" In brackets {100 * frontier.level:.0f}% intervals of "
            f"{frontier.bootstrap} bootstrap draws."
        )
    return words


def _choice(choice: Choice) -> dict[str, Any]:
    row = {
        "label": choice.label,
        "model": choice.model,
        "params": choice.params,
        "sampler": choice.sampler,
        "steps": choice.steps,
        "guidance": choice.guidance,
        "cost": choice.cost,
        "measured": choice.value,
    }
    row |= spread("expected", choice.expected, choice.interval)
    return row | {"probability": choice.probability}


_CHOICE = (
    text("size", "label"),
    text("sampler", "sampler"),
    cell("steps", "steps", count),
    cell("guidance", "guidance", "{:g}".format),
)


def _reached(metric: str) -> tuple[Column, ...]:
    return (
        ranged(f"{metric}, expected", "expected", lambda x: plain(x, 4)),
        cell("measured", "measured", lambda x: plain(x, 4)),
        cell("probability", "probability", _share),
    )


def _share(x: float | None) -> str:
    return NONE if x is None else f"{x:.2f}"


def _scope(row: Row) -> str:
    return row["among"] or _ALL


def pareto(frontier: Frontier) -> Table:
    rows = [
        {"cost_is": front.cost, "among": front.sampler} | _choice(choice)
        for front in frontier.fronts
        for choice in front.pareto
    ]
    columns = (
        Column("cost is", lambda r: _COSTS[r["cost_is"]], False),
        Column("among samplers", _scope, False),
        cell("cost", "cost", compact),
        *_CHOICE,
        *_reached(frontier.metric),
    )
    caption = (
        "The Pareto sets: settings, each at its best guidance, that nothing cheaper "
        "is expected to reach. The probability is that of being the best at that cost, "
        "all guidances counted."
    )
    return Table(name="frontier", caption=caption, rows=tuple(rows), columns=columns)


def budgets(frontier: Frontier) -> Table:
    names = sizes(frontier)
    rows = []
    for front in frontier.fronts:
        for point in front.points:
            row = {"cost_is": front.cost, "among": front.sampler}
            row |= {"budget": point.budget} | _choice(point.choice)
            shares = {
                f"probability_{model}": point.probabilities.get(model)
                for model in names
            }
            rows.append(row | shares)
    columns = (
        Column("cost is", lambda r: _COSTS[r["cost_is"]], False),
        Column("among samplers", _scope, False),
        cell("budget", "budget", compact),
        *_CHOICE,
        *_reached(frontier.metric)[:2],
        *(
            cell(f"P({label})", f"probability_{model}", _share)
            for model, label in names.items()
        ),
    )
    caption = (
        "The lowest as measured within each budget, and the probability of each size "
        "to be the best."
    )
    return Table(
        name="best_at_budget", caption=caption, rows=tuple(rows), columns=columns
    )


def crossings(frontier: Frontier) -> Table:
    rows = tuple(_crossing_rows(frontier))
    columns = (
        text("the larger over the smaller", "pair"),
        Column("cost is", lambda r: _COSTS.get(r["cost_is"], NONE), False),
        text("among samplers", "among"),
        ranged("from cost", "at", compact),
        text("doubt", "doubt"),
        text("refused", "refused"),
    )
    caption = (
        "Where the larger of two neighbouring sizes becomes the better one, each at "
        "its best guidance, linear in ln cost between the step counts."
    )
    return Table(name="crossings", caption=caption, rows=rows, columns=columns)


def _crossing_rows(frontier: Frontier) -> Iterator[dict[str, Any]]:
    for c in frontier.crossings:
        if isinstance(c, Refusal):
            row = {"pair": c.group, "larger": "", "smaller": ""}
            row |= {"cost_is": "", "among": ""}
            row |= spread("at", None, None)
            yield row | {"doubt": "", "refused": sentence(c)}
            continue
        assert isinstance(c, Crossing)
        row = {"pair": f"{c.larger} over {c.smaller}", "larger": c.larger}
        row |= {"smaller": c.smaller, "cost_is": c.cost}
        row |= {"among": c.sampler or _ALL} | spread("at", c.at, c.interval)
        yield row | {"doubt": c.doubt, "refused": ""}


def best_guidance(frontier: Frontier) -> Table:
    said = {"low": "the lowest tried", "high": "the highest tried", "only": "alone"}
    rows = tuple(
        _choice(b.choice)
        | {
            "ties": " ".join(f"{g:g}" for g in b.ties),
            "doubt": said.get(b.edge, ""),
            "tried": " ".join(f"{g:g}" for g in b.tried),
        }
        for b in frontier.best
    )
    columns = (
        *_CHOICE,
        text("not told apart from it", "ties"),
        text("doubt", "doubt"),
        *_reached(frontier.metric),
        text("tried", "tried"),
    )
    caption = "The guidance of the lowest value at each size, sampler and step count."
    return Table(name="best_guidance", caption=caption, rows=rows, columns=columns)


def cells(frontier: Frontier) -> Table:
    fields = (
        "label",
        "model",
        "params",
        "relative_cost",
        "sampler",
        "steps",
        "guidance",
        "nfe",
        "flops",
        "decoder_flops",
        "seconds",
        "value",
        "images",
        "protocol",
    )
    rows = tuple({k: getattr(c, k) for k in fields} for c in frontier.cells)
    columns = (
        *_CHOICE,
        cell("evaluations", "nfe", "{:g}".format),
        cell("FLOPs", "flops", compact),
        cell("decoder FLOPs", "decoder_flops", compact),
        cell("seconds", "seconds", compact),
        cell(frontier.metric, "value", lambda x: plain(x, 4)),
        cell("images", "images", count),
    )
    caption = "Every cell as measured; FLOPs and seconds are of one image."
    return Table(name="cells", caption=caption, rows=rows, columns=columns)
