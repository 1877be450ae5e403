"""The page itself: one self-contained HTML text from a study, figures and tables."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from html import escape

from scaling_ldm.records import HeldOut, PowerLaw, Refusal
from scaling_ldm.report import (
    frontier_section,
    law_tables,
    plotting,
    run_tables,
    style,
    training_quality,
)
from scaling_ldm.report.format import (
    SYMBOLS,
    bracket,
    percent,
    plain,
    prefixed,
    scientific,
    sentence,
)
from scaling_ldm.report.plotting import Plot
from scaling_ldm.report.study import QUANTITIES, Study
from scaling_ldm.report.table import Row, Table

MOST_IMAGES = 64
MOST_ROWS = 12  # of a table that is not folded away beside its figure
# What a line may not be broken in: a size, a number with its unit, an interval, names
# and ranges with a digit and a hyphen in them.
_WHOLE = re.compile(
    r"\b\d+ x \d+\b|\b\d+ px\b|\[[^\[\]&]{1,40}\]"
    r"|(?<![\w.+-])(?=[\w.+-]*\d)[\w.+]{1,16}(?:-[\w.+]{1,16})+(?<=\w)(?![\w+-]|\.\w)"
)
_NAMES = {"N_opt": "best size N", "D_opt": "tokens D", "L_opt": "loss L"}


def render(study: Study, pictures: Iterable[Plot], tables: Iterable[Table]) -> str:
    """The whole page.

    Args:
      study: what was read.
      pictures: figures, found by name.
      tables: tables, found by name; the page leaves out what is not there.
    """
    figures = {p.name: p for p in pictures}
    by_name = {t.name: t for t in tables}
    parts = [
        f"<h1>{escape(study.name)}</h1>",
        f'<p class="question">{escape(study.question)}</p>' if study.question else "",
        _headline(study),
        _facts(study, by_name["ledger"].total),
        _troubles(study),
        *_answers(study, figures, by_name),
        *_costs(study, by_name),
        "<h2>Configuration and environment</h2>",
        _config(study),
        _table(by_name.get("environment")),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study.name)}</title>\n<style>{style.sheet(body)}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _answers(
    study: Study, figures: Mapping[str, Plot], tables: Mapping[str, Table]
) -> list[str]:
    """The sections of results, that of the study's question first."""
    training = [
        "<h2>Training</h2>",
        _figure(figures.get("training"), "wide"),
        _folded(f"Every run ({len(study.runs)})", _table(tables["runs"])),
    ]
    frontier = _frontier(study, figures, tables)
    samples = _samples(study)
    evaluations = _evaluations(study, figures, tables)
    if study.by_steps:
        return [*frontier, *samples, *evaluations, *training]
    laws = _laws(study, figures, tables)
    return [*laws, *training, *frontier, *samples, *evaluations]


def _prose(words: str) -> str:
    """Words as HTML; what belongs together stays on one line."""
    return _WHOLE.sub(r'<span class="whole">\g<0></span>', escape(words))


def _headline(study: Study) -> str:
    """The answer in a sentence or two, or what was refused and why."""
    if study.by_steps:
        steps = ", ".join(sorted({f"{run.steps:,}" for run in study.runs}))
        lines = [
            f"{len(study.runs)} runs of {steps} steps each: sizes are compared at the "
            "same number of steps, not along budgets, so there are no laws to fit."
        ]
        if study.frontier is not None:
            lines = [_prose(study.frontier.sentences[0]), *lines]
        said = "".join(f"<p>{line}</p>" for line in lines)
        return f'<div class="headline">{said}</div>'
    if study.fit is None:
        return (
            '<div class="headline"><p>No laws yet: laws.json is missing or unreadable. '
            "Run the same command with <code>--stages fit</code>, then again with "
            "<code>--stages report</code>.</p></div>"
        )
    said, refused = [], []
    for q in QUANTITIES:
        law = study.fit.laws.get(q)
        if isinstance(law, PowerLaw):
            said.append(
                f'<span class="law">{SYMBOLS[q]} ∝ C<sup>{plain(law.exponent)}</sup> '
                f"{bracket(law.exponent_interval, plain)}</span>"
            )
        elif law is not None:
            refused.append((q, law))
    lines = []
    if said:
        law = next(v for v in study.fit.laws.values() if isinstance(v, PowerLaw))
        lines.append(
            f"At the best size for each budget C: {', '.join(said)}, fitted over "
            f"{law.points} budgets from {scientific(law.x_min)} to "
            f"{scientific(law.x_max)} FLOPs; in brackets {law_tables.level(study)} "
            "intervals."
        )
        tenfold = ", ".join(
            f"{SYMBOLS[q]}&nbsp;×&nbsp;{plain(10**law.exponent)}"
            for q, law in study.fit.laws.items()
            if isinstance(law, PowerLaw) and q in QUANTITIES
        )
        lines.append(f"Ten times the compute: {tenfold}.")
    for q, why in refused:
        lines.append(
            f'<span class="bad">No law for the {_NAMES[q]}:</span> '
            f"{_prose(sentence(why))}."
        )
    lines += _held_out_words(study)
    return f'<div class="headline">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _held_out_words(study: Study) -> list[str]:
    found = [h for h in study.fit.held_out if isinstance(h, HeldOut)]
    lines = []
    if found:
        errors = ", ".join(
            f"{SYMBOLS.get(h.quantity, h.quantity)}&nbsp;{percent(h.relative_error)}"
            for h in found
        )
        inside = sum(
            h.predicted_interval.low <= h.measured <= h.predicted_interval.high
            for h in found
        )
        lines.append(
            f"Held out and predicted from the smaller budgets, C = "
            f"{scientific(found[0].budget_flops)} FLOPs: error {errors}; "
            f"{inside} of {len(found)} measurements inside the prediction interval."
        )
    reasons: dict[str, list[str]] = {}
    for h in study.fit.held_out:
        if isinstance(h, Refusal):
            reasons.setdefault(sentence(h), []).append(h.what)
    lines += [
        f'<span class="bad">Not predicted:</span> {escape(", ".join(what))}: '
        f"{_prose(why)}."
        for why, what in reasons.items()
    ]
    return lines


def _facts(study: Study, total: Row | None) -> str:
    done = sum(r.status == "finished" for r in study.records.values())
    facts = [
        ("runs finished", f"{done} of {len(study.runs)}"),
    ]
    if not study.by_steps:
        facts.append(("budgets", str(len(study.budgets()))))
    if total:
        facts += [
            ("model FLOPs spent", scientific(total["model_flops"])),
            ("images seen", prefixed(total["images"])),
            ("device-hours", plain(total["device_hours"])),
        ]
    facts.append(("configuration", f"<code>{escape(study.config_hash)}</code>"))
    items = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts)
    return f'<dl class="facts">{items}</dl>'


def _troubles(study: Study) -> str:
    """Failed and missing runs, unreadable files and the fit's own doubts."""
    lines = [
        f"Run {r.run_id} ended as {r.status}{': ' + r.detail if r.detail else ''}."
        for r in study.records.values()
        if r.status != "finished"
    ]
    missing = [r.run_id for r in study.runs if r.run_id not in study.records]
    if missing:
        named = ", ".join(missing[:6]) + (", …" if len(missing) > 6 else "")
        lines.append(
            f"{len(missing)} of {len(study.runs)} runs have no record yet ({named}): "
            "run the same command again to train them."
        )
    lines += study.notes
    if study.fit is not None:
        lines += [f"Fit: {note}" for note in study.fit.notes]
    if study.frontier is not None:
        lines += [f"Frontier: {note}" for note in study.frontier.notes]
    if not lines:
        return ""
    items = "".join(f"<p>{_prose(line)}</p>" for line in lines)
    return f'<div class="alarm">{items}</div>'


def _laws(
    study: Study, figures: Mapping[str, Plot], tables: Mapping[str, Table]
) -> list[str]:
    parts = ["<h2>IsoFLOP curves</h2>", _figure(figures.get("isoflop"), "plot")]
    parts.append(_table(tables.get("minima")))
    if study.fit is None:
        return parts
    trio = [_figure(figures.get(f"law_{SYMBOLS[q]}")) for q in QUANTITIES]
    parts += [
        "<h2>Laws</h2>",
        f'<div class="three">{"".join(trio)}</div>',
        '<p class="soft">The dashed line has the exponent of a published law and is '
        "drawn through the middle of these minima: that law was fitted at other "
        "budgets (see the table) to other data, so its own values lie elsewhere.</p>",
        _table(tables["laws"]),
        _folded("Other published laws", _table(tables.get("published"))),
        "<h3>Held-out budget</h3>",
        _table(tables.get("held_out")) or "<p>No budget was held out.</p>",
        "<h3>Parametric fit</h3>",
        _parametric(study, tables),
        "<h3>Points left out</h3>",
        _table(tables.get("excluded")) or "<p>None: every run entered the fit.</p>",
    ]
    return parts


def _parametric(study: Study, tables: Mapping[str, Table]) -> str:
    if isinstance(study.fit.parametric, Refusal):
        why = _prose(sentence(study.fit.parametric))
        return f'<p><span class="bad">Refused:</span> {why}.</p>'
    return _table(tables.get("parametric"))


def _frontier(
    study: Study, figures: Mapping[str, Plot], tables: Mapping[str, Table]
) -> list[str]:
    if study.frontier is None:
        return []
    lines = study.frontier.sentences[1 if study.by_steps else 0 :]  # see _headline
    said = "".join(f"<p>{_prose(line)}</p>" for line in lines)
    return [
        "<h2>Quality against the cost of sampling</h2>",
        f'<div class="headline">{said}</div>' if said else "",
        f'<p class="soft">{_prose(frontier_section.basis(study.frontier))}</p>',
        _figure(figures.get("frontier"), "wide"),
        _figure(figures.get("best_size"), "wide"),
        _figure(figures.get("best_guidance"), "wide"),
        _shown("Where the larger wins", tables.get("crossings"))
        or "<p>There is one size only: none larger to win.</p>",
        _folded("The Pareto sets", _table(tables.get("frontier"))),
        _folded("The best of each budget", _table(tables.get("best_at_budget"))),
        _folded("The best guidance", _table(tables.get("best_guidance"))),
        _folded("Every cell", _table(tables.get("cells"))),
    ]


def _evaluations(
    study: Study, figures: Mapping[str, Plot], tables: Mapping[str, Table]
) -> list[str]:
    if not study.evaluations:
        return []
    compared = training_quality.comparisons(study)
    drawn = [
        f'<p><span class="bad">Not complete:</span> {_prose(line)}</p>'
        for line in training_quality.unmeasured(study, compared)
    ]
    for found in compared:
        drawn.append(_figure(figures.get(training_quality.name(found)), "plot"))
        said = " ".join(training_quality.sentences(found))
        drawn.append(f"<p>{_prose(said)}</p>")
    if drawn:
        drawn.insert(0, "<h3>Quality against training compute</h3>")
    doubts = sorted({(r.metric, r.doubt) for r in study.evaluations if r.doubt})
    return [
        "<h2>Measured pictures</h2>",
        '<p class="soft">Numbers of one metric are comparable where the protocol is '
        "the same; evaluations.jsonl has every part of it.</p>",
        *drawn,
        *(
            f'<p><span class="bad">In doubt:</span> {_prose(f"{metric}: {why}.")}</p>'
            for metric, why in doubts
        ),
        _shown("Every number", tables.get("evaluations")),
    ]


def _samples(study: Study) -> list[str]:
    s = study.samples
    if s is None:
        return ["<h2>Samples</h2>", "<p>No samples were drawn.</p>"]
    known_by = f" (SHA-256 {escape(s.checksum)})" if s.checksum else ""
    parts = [
        "<h2>Samples</h2>",
        f"<p>Run {_prose(s.run_id)}, {escape(s.weights)} weights{known_by}; sampler "
        f"{escape(s.sampler)}, {s.steps} steps, guidance {plain(s.guidance)}: {s.nfe} "
        f"network evaluations an image, {scientific(s.flops)} FLOPs and "
        f"{plain(s.seconds)} s for all {s.images}; seed {s.seed}.</p>",
    ]
    if study.images is None:
        return [*parts, "<p>The pictures themselves could not be read.</p>"]
    images = study.images[:MOST_IMAGES]
    captions = (*s.captions, *[""] * len(images))[: len(images)]
    # Whole pixels, and room for the words of a caption.
    width = images.shape[2] * max(1, round(100 / images.shape[2]))
    cells = []
    for image, words in zip(images, captions, strict=True):
        data = base64.b64encode(plotting.png(image)).decode()
        cells.append(
            f'<figure><img alt="{escape(words)}" width="{image.shape[1]}" '
            f'height="{image.shape[0]}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    parts.append(
        '<div class="grid" style="grid-template-columns: '
        f'repeat(auto-fill, {width}px)">{"".join(cells)}</div>'
    )
    if s.images > len(images):
        parts.append(f"<p>The first {len(images)} of {s.images}.</p>")
    return parts


def _costs(study: Study, tables: Mapping[str, Table]) -> list[str]:
    parts = ["<h2>Cost</h2>", _table(tables["costs"])]
    if not study.records:
        parts.append("<p>No run has been trained yet.</p>")
    reasons = sorted(
        {
            f"{r.device}: {r.mfu_reason}"
            for r in study.records.values()
            if r.mfu is None and r.mfu_reason
        }
    )
    parts += [f"<p>MFU is absent on {_prose(reason)}.</p>" for reason in reasons]
    rows = tables["plan"].rows
    planned = max(abs(row["planned_over_budget"]) for row in rows)
    spent = [
        abs(row["actual_over_planned"])
        for row in rows
        if row["run_id"] in study.records
        and study.records[row["run_id"]].status == "finished"
    ]
    said = []
    if not study.by_steps:
        said.append(
            f"planned FLOPs differ from the budget by at most {100 * planned:.2g}%"
        )
    if spent and max(spent) < 1e-9:
        said.append("finished runs spent exactly what was planned")
    elif spent:
        said.append(
            f"finished runs spent what was planned within {100 * max(spent):.2g}%"
        )
    words = "; ".join(said)
    return [
        *parts,
        _folded("Cost of every run", _table(tables["ledger"])),
        "<h3>Planned and spent</h3>",
        f"<p>{words[:1].upper()}{words[1:]}.</p>" if words else "",
        _folded("Plan of every run", _table(tables["plan"])),
    ]


def _config(study: Study) -> str:
    if not study.config:
        return "<p>experiment.json holds no configuration.</p>"
    text = escape(json.dumps(study.config, indent=2, ensure_ascii=False))
    return _folded("Resolved configuration", f"<pre>{text}</pre>")


def _folded(title: str, inside: str) -> str:
    if not inside:
        return ""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _shown(title: str, table: Table | None) -> str:
    """A table under its title; folded away where it is long: figures say the most."""
    if table is None or len(table.rows) <= MOST_ROWS:
        inside = _table(table)
        return f"<h3>{escape(title)}</h3>{inside}" if inside else ""
    return _folded(f"{title} ({len(table.rows)})", _table(table))


def _figure(picture: Plot | None, kind: str = "") -> str:
    if picture is None:
        return ""
    return (
        f'<figure><div class="scroll {kind}">{picture.svg}</div>'
        f"<figcaption>{_prose(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table | None) -> str:
    """A table as HTML; columns in which no row has anything are left out."""
    if table is None or not table.rows:
        return ""
    columns = [
        c
        for c in table.columns
        if any(c.show(r) != run_tables.NONE for r in table.rows)
    ]
    head = "".join(
        f"<th{'' if c.number else ' class=words'}>{_prose(c.title)}</th>"
        for c in columns
    )
    body = "".join(f"<tr>{_cells(columns, row)}</tr>" for row in table.rows)
    foot = ""
    if table.total is not None:
        foot = f"<tfoot><tr>{_cells(columns, table.total)}</tr></tfoot>"
    caption = f'<p class="caption">{_prose(table.caption)}</p>' if table.caption else ""
    return (
        f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def _cells(columns: Iterable, row: Row) -> str:
    cells = []
    for c in columns:
        shown = c.show(row)
        names = [] if c.number else ["words"]
        if len(shown) > 36 and not c.number:
            names.append("long")
        if c.badge and shown != "finished":
            names.append("bad")
        kind = f' class="{" ".join(names)}"' if names else ""
        long = "long" in names  # elsewhere a cell is one line
        cells.append(f"<td{kind}>{_prose(shown) if long else escape(shown)}</td>")
    return "".join(cells)
