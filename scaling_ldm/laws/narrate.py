"""Advice about a run to train, as aligned lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from scaling_ldm.laws import planning
from scaling_ldm.laws.advice import TrainingAdvice
from scaling_ldm.laws.planning import Alternative, Prediction
from scaling_ldm.records import Interval, Refusal

_LABEL = 10  # characters of a label


def lines(found: TrainingAdvice) -> list[str]:
    """The advice: what to train, then other sizes, then published laws, then doubts."""
    said = [f"what to train, by {found.source}"]
    said += [f"  {label:<{_LABEL}}{text}" for label, text in _rows(found)]
    said += ["", *_others(found)]
    if found.published:
        said += ["", "published laws at the same FLOPs (other data and networks), "]
        said[-1] += "D by C = 6 N D"
        cells = [["", "N", "D"]]
        cells += [[name, si(n), si(d)] for name, n, d in found.published]
        said += table(cells)
    return said


def _rows(found: TrainingAdvice) -> Iterator[tuple[str, str]]:
    """(label, text) of each line about the run."""
    level = "" if found.level is None else f" at {100 * found.level:g}%"
    yield "compute", f"{found.budget_flops:.4g} FLOPs{_reached(found)}"
    size = f"{si(found.size)}{_between(found.size_interval, si)}{level}"
    yield "best N", f"{size}, {found.counts}" if found.metric else f"{size} parameters"
    if not found.metric:
        yield "counts", found.counts
    yield "best D", _said(found.tokens, si, "tokens")
    if found.metric:
        yield "loss", _said(found.loss, _loss, found.metric)
    run = found.run
    if run is not None:
        without = f"{si(run.params)} parameters, "
        without += f"{si(run.params_without_embeddings)} without embeddings"
        yield "network", f"{run.width} x {run.depth}: {without}"
        yield (
            "run",
            f"{run.steps:,} steps of {run.batch_size} images: {si(run.images)} images, "
            f"{si(run.tokens)} tokens",
        )
        where = f" ({run.rate_source})" if run.rate_source else ""
        yield "rate", f"{run.learning_rate:.3g}{where}"
    speed = found.speed
    if speed is not None:
        hours = speed.hours(found.budget_flops)
        yield (
            "time",
            f"{duration(3600 * hours)} on {speed.devices} x {speed.basis}; "
            f"{amount(hours * speed.devices)} device hours",
        )
        if speed.price:
            money = hours * speed.devices * speed.price
            yield "money", f"{amount(money)} at {speed.price:g} for a device hour"
    for doubt in found.doubts:
        yield "warning", doubt


def _reached(found: TrainingAdvice) -> str:
    """The compute of a loss with the ends of its interval."""
    if found.reached is None:
        return ""
    i = found.reached.interval
    low = "none known" if not i.low else f"{i.low:.3g}"
    high = "no compute" if math.isinf(i.high) else f"{i.high:.3g}"
    return f" [{low}, {high}] at {100 * i.level:g}%"


def _said(value: Prediction | Refusal, show: Callable[[float], str], what: str) -> str:
    if isinstance(value, Refusal):
        return f"not known: {value.why}"
    return f"{show(value.value)}{_between(value.interval, show)}, {what}"


def _between(interval: Interval | None, show: Callable[[float], str]) -> str:
    if interval is None or not math.isfinite(interval.level):
        return ""
    return f" [{show(interval.low)}, {show(interval.high)}]"


def _others(found: TrainingAdvice) -> list[str]:
    """A table of other sizes and of overtraining."""
    if len(found.others) == 1 and isinstance(found.others[0], Refusal):
        refusal = found.others[0]
        return [f"other sizes: not known, {refusal.what}: {refusal.why}"]
    rows = [row for row in found.others if isinstance(row, Alternative)]
    best, images = rows[0], found.images
    speed = found.speed
    head = ["", "N", "D", "training", "loss", "more loss", "an image"]
    head += [f"{si(images)} images", "in all"] if images else ["pays from"]
    if speed is not None:
        head.append("time")
    cells = [head]
    for row in rows:
        more = row.loss - best.loss
        cell = [row.what, si(row.params), si(row.tokens), f"{row.train_flops:.3g}"]
        cell += [_loss(row.loss), f"{more:+.4f}" if abs(more) > 1e-9 else "-"]
        cell += [f"{row.sampling_flops:.3g}"]
        if images:
            cell.append(f"{images * row.sampling_flops:.3g}")
            cell.append(f"{row.total_flops(images):.3g}")
        else:
            cell.append(_pays(best, row, more))
        if speed is not None:
            cell.append(duration(3600 * speed.hours(row.train_flops)))
        cells.append(cell)
    said = ["other sizes, training and drawing in FLOPs", *table(cells)]
    said += [
        f"  {row.what}: {row.why}" for row in found.others if isinstance(row, Refusal)
    ]
    said.append(f"  loss of other sizes: from {found.others_from}")
    if images:
        equal = [r for r in rows if abs(r.loss - best.loss) < 1e-9]
        least = min(equal, key=lambda r: r.total_flops(images))
        said.append(f"  least FLOPs in all for that loss: {least.what}")
    return said


def _pays(best: Alternative, row: Alternative, more: float) -> str:
    if row is best or abs(more) > 1e-9:
        return "-"
    images = planning.pays_from(best, row)
    return "never" if images is None else f"{si(images)} images"


def table(cells: list[list[str]]) -> list[str]:
    """Rows of aligned columns; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    said = []
    for row in cells:
        first, *rest = row
        text = first.ljust(widths[0])
        numbers = (c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))
        said.append("  " + "  ".join([text, *numbers]).rstrip())
    return said


def _loss(value: float) -> str:
    return f"{value:.4g}"


def amount(value: float) -> str:
    """Three digits, positional: 0.0123, 12.3, 1,230."""
    if not value or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Three significant digits in a unit that fits: 9.1 s, 12.5 min, 3.2 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 1000 else f"{hours:,.0f} h"


def si(value: float) -> str:
    """Three significant digits with k, M, G, T."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}P"
