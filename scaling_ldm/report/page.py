"""The page itself: one self-contained HTML text from a study, figures and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from html import escape

from scaling_ldm.records import FitResult, HeldOut, OffsetLaw, PowerLaw, Refusal
from scaling_ldm.report import (
    conclusion,
    frontier_tables,
    html,
    law_tables,
    learning_figures,
    pictures,
    rate_tables,
    run_tables,
    style,
)
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import Plot
from scaling_ldm.report.study import QUANTITIES, Study
from scaling_ldm.report.table import Row, Table

Figures = Mapping[str, Plot]
Tables = Mapping[str, Table]


def render(study: Study, plots: Iterable[Plot], tables: Iterable[Table]) -> str:
    """The whole page.

    Args:
      study: what was read.
      plots: figures, found by name.
      tables: tables, found by name; the page leaves out what is not there.
    """
    figures = {p.name: p for p in plots}
    by_name = {t.name: t for t in tables}
    config = json.dumps(study.config, indent=2, ensure_ascii=False)
    parts = [
        f"<h1>{escape(study.name)}</h1>",
        f'<p class="question">{escape(study.question)}</p>' if study.question else "",
        f'<div class="headline">{_headline(study)}</div>',
        _facts(study, by_name["ledger"]),
        html.paragraphs(
            f"{of}: {said}." if of else f"{said}."
            for of, said in study.held_out.items()
        ),
        html.paragraphs(_troubles(study), kind="alarm"),
        *_answers(study, figures, by_name),
        "<h2>Cost</h2>",
        html.table(by_name["costs"]) or "<p>No run has been trained yet.</p>",
        html.paragraphs(_no_mfu(study)),
        html.folded("Cost of every run", html.table(by_name["ledger"])),
        html.shown("Where the time went", by_name.get("goodput")),
        html.folded("Time of every run", html.table(by_name.get("goodput_runs"))),
        "<h2>Configuration and environment</h2>",
        html.folded("Resolved configuration", f"<pre>{escape(config)}</pre>")
        if study.config
        else "<p>experiment.json holds no configuration.</p>",
        html.table(by_name.get("environment")),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study.name)}</title>\n<style>{style.sheet(body)}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _answers(study: Study, figures: Figures, tables: Tables) -> list[str]:
    """The sections of results, that of the study's question first."""
    parts = study.parts()
    training = [
        "<h2>Training</h2>",
        html.shown("Final losses", tables.get("losses")),
        *(
            html.figure(figures.get(name + part.suffix), "wide")
            for part in parts
            for name in ("training", "learning")
        ),
        html.paragraphs(filter(None, map(learning_figures.missing, parts))),
        html.folded("Loss by stratum of t", html.table(tables.get("strata"))),
        html.folded(f"Every run ({len(study.runs)})", html.table(tables["runs"])),
    ]
    frontier = _frontier(study, figures, tables)
    seen = [*pictures.samples(study), *pictures.measured(study, figures, tables)]
    rates = _rates(study, figures, tables)
    if study.by_steps:
        return [*rates, *frontier, *seen, *training]
    every = [one for part in parts for one in part.by_metric()]
    laws = [piece for part in every for piece in _laws(part, figures, tables)]
    published = html.folded("Published laws", html.table(tables["published"]))
    overlaid = html.shown("Published laws in the figures", tables.get("overlaid"))
    return [*laws, overlaid, published, *rates, *training, *frontier, *seen]


def _headline(study: Study) -> str:
    """The answer in a sentence or two, or what was refused and why."""
    if study.by_steps:
        taken = sorted({run.steps for run in study.runs})
        steps = " to ".join(fmt.count(n) for n in dict.fromkeys((taken[0], taken[-1])))
        answer = study.frontier.sentences[:1] if study.frontier else ()
        why = (
            f"{len(study.runs)} runs of {steps} steps each: sizes are compared at the "
            "same number of steps, not along budgets, so there are no laws to fit."
        )
        return html.paragraphs([*answer, *_best(study), why])
    every = [one for part in study.parts() for one in part.by_metric()]
    found: dict[str, list[str]] = {}
    for one in every:
        if one.fit is not None:
            most = max(run_tables.epochs(one, run) for run in one.runs)
            found.setdefault(_found(one.fit, most), []).append(one.title)
    if not found:
        return (
            "<p>No laws yet: laws.json is missing or unreadable. Run the same command "
            "with <code>--stages fit</code>, then again with "
            "<code>--stages report</code>.</p>"
        )
    return "".join(
        _heading(titles, len(every)) + words for words, titles in found.items()
    )


def _heading(titles: list[str], parts: int) -> str:
    """The groups and metrics of which the same is true; "" if there is one in all."""
    if parts < 2:
        return ""
    named = f"All {parts} groups" if len(titles) == parts else "; ".join(titles)
    return f'<p class="group">{escape(named)}</p>'


def _best(study: Study) -> list[str]:
    """The lowest held-out loss of runs that were trained for the same steps."""
    measured = study.at_end(study.metric, study.weights)
    at_end = {i: value for i, value in measured.items() if math.isfinite(value)}
    runs = [run for run in study.runs if run.run_id in at_end]
    if not runs:
        return []
    best = min(runs, key=lambda run: at_end[run.run_id])
    return [
        f"The lowest loss at the end is {fmt.loss(at_end[best.run_id])} "
        f"({study.measure}), of run {best.run_id} with "
        f"{fmt.prefixed(getattr(best, study.size))} {fmt.spoken(study.size)}. "
        "Each run has one such number, without an interval."
    ]


def _found(fit: FitResult, epochs: float) -> str:
    """What follows and what speaks against it, the laws, and what was refused.

    Args:
      epochs: of its runs, the most.
    """
    laws = {q: fit.laws.get(q) for q in QUANTITIES}
    fitted = {
        q: law for q, law in laws.items() if isinstance(law, (PowerLaw, OffsetLaw))
    }
    formulas = ""
    if fitted:
        shown = ", ".join(
            f'<span class="law">{fmt.SYMBOLS[q]} {_rises(law)} '
            f"C<sup>{fmt.plain(law.exponent)}</sup> "
            f"{fmt.bracket(law.exponent_interval, fmt.plain)}</span>"
            for q, law in fitted.items()
        )
        law = next(iter(fitted.values()))
        formulas = (
            f"<p>At the best size for each budget C: {shown}, fitted to the minima by "
            f"{escape(fit.estimator)} over {law.points} budgets from "
            f"{fmt.scientific(law.x_min)} to {fmt.scientific(law.x_max)} FLOPs; N in "
            "parameters, D in tokens, L the "
            f"{escape(fmt.measure(fit.metric, fit.weights))}; in brackets "
            f"{law_tables.level(fit)} intervals.</p>"
        )
    reasons: dict[str, list[str]] = {}
    for found in (*laws.values(), *fit.held_out):
        if isinstance(found, Refusal):
            reasons.setdefault(found.why, []).append(found.what)
    refused = [f"{', '.join(of)}: {why}." for why, of in reasons.items()]
    against = conclusion.against(fit, epochs)
    doubt = [f"{'; '.join(against)}."] if against else []
    return (
        html.paragraphs([conclusion.said(fit, epochs)])
        + html.paragraphs(doubt, "Not convincing:")
        + formulas
        + html.paragraphs(_held_out(fit))
        + html.paragraphs(refused, "Refused:")
    )


def _rises(law: PowerLaw | OffsetLaw) -> str:
    """What stands between a quantity and C: "∝", or its offset with the interval."""
    if isinstance(law, PowerLaw):
        return "∝"
    known = "" if law.identified else ", not identified"
    interval = fmt.bracket(law.offset_interval, fmt.loss)
    return f"− {fmt.loss(law.offset)} {interval}{known} ∝"


def _held_out(fit: FitResult) -> list[str]:
    """The largest budget, predicted from the smaller ones: errors, how many inside."""
    found = [h for h in fit.held_out if isinstance(h, HeldOut)]
    if not found:
        return []
    errors = (
        f"{fmt.SYMBOLS[h.quantity]}\N{NO-BREAK SPACE}{fmt.percent(h.relative_error)}"
        for h in found
    )
    inside = sum(h.inside for h in found)
    return [
        f"Held out, C = {fmt.scientific(found[0].budget_flops)} FLOPs: error "
        f"{', '.join(errors)}; {inside} of {len(found)} measurements inside the "
        "prediction interval."
    ]


def _facts(study: Study, ledger: Table) -> str:
    done = sum(r.status == "finished" for r in study.records.values())
    facts = {"runs finished": f"{done} of {len(study.runs)}"}
    if not study.by_steps:
        facts["budgets"] = str(len(study.budgets()))
    if total := ledger.total:
        facts |= {
            "model FLOPs spent": fmt.scientific(total["model_flops"]),
        } | _saved(study, total)
        facts |= {
            "images seen": fmt.prefixed(total["images"]),
            "device time": fmt.duration(3600 * total["device_hours"]),
        }
    facts["configuration"] = f"<code>{escape(study.config_hash)}</code>"
    items = (f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


def _saved(study: Study, total: Row) -> dict[str, str]:
    """What separate runs would have cost, where runs stand for several (plan.reuse)."""
    if not study.reused:
        return {}
    separate, spent = total["separate_flops"], total["model_flops"]
    factor = f" ({separate / spent:.3g} times as much)" if spent else ""
    return {"as separate runs": fmt.scientific(separate) + factor}


def _troubles(study: Study) -> list[str]:
    """Failed and missing runs, unreadable files and the doubts of fit and frontier.

    Those of the frontier stand at its sentences, too.
    """
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
    fit = [
        ": ".join(filter(None, (one.title, note)))
        for part in study.parts()
        for one in part.by_metric()
        for note in (one.fit.notes if one.fit else ())
    ]
    frontier = study.frontier.notes if study.frontier else ()
    return [
        *lines,
        *study.notes,
        *(f"Fit: {note}" for note in fit),
        *(f"Frontier: {note}" for note in frontier),
    ]


def _laws(study: Study, figures: Figures, tables: Tables) -> list[str]:
    """The curves and laws of one group and metric."""
    of = f": {escape(study.title)}" if study.title else ""

    def figure(name: str, kind: str = "") -> str:
        return html.figure(figures.get(name + study.suffix), kind)

    def table(name: str) -> str:
        return html.table(tables.get(name + study.suffix))

    drawn = [figure("isoflop", "plot"), table("minima"), table("estimates")]
    curves = [f"<h2>IsoFLOP curves{of}</h2>", *drawn] if any(drawn) else []
    if study.fit is None:
        return curves
    trio = "".join(figure(f"law_{fmt.SYMBOLS[q]}") for q in QUANTITIES)
    surface, held_out = study.fit.parametric, table("held_out")
    left_out = table("left_out")
    excluded = table("excluded")
    laws = [
        f'<div class="three">{trio}</div>',
        '<p class="soft">The dashed line has the exponent of a published law and is '
        "drawn through the middle of these minima: that law was fitted at other "
        "budgets (see the table) to other data, so its own values lie elsewhere.</p>",
        table("laws"),
        table("loss_forms"),
    ]
    return [
        *curves,
        f"<h2>Laws{of}</h2>",
        *(laws if trio else ["<p>No budget has a minimum, so there are no laws.</p>"]),
        *(("<h3>Held-out budget</h3>", held_out) if held_out else ()),
        *(("<h3>Budgets left out in turn</h3>", left_out) if left_out else ()),
        "<h3>Parametric fit</h3>",
        html.paragraphs([f"{surface.why}."], "Refused:")
        if isinstance(surface, Refusal)
        else table("parametric"),
        *(("<h3>Points left out</h3>", excluded) if excluded else ()),
    ]


def _rates(study: Study, figures: Figures, tables: Tables) -> list[str]:
    """The best learning rates, where the study has an axis of rates."""
    parts = []
    for name, title, fit in rate_tables.named(study):
        of = f": {escape(title)}" if title else ""
        parts += [
            f"<h2>Best learning rates{of}</h2>",
            html.paragraphs(rate_tables.said(fit)),
            html.paragraphs(rate_tables.refusals(fit), "Refused:"),
            html.figure(figures.get(name), "wide"),
            html.table(tables.get(name)),
            html.folded("Runs left out", html.table(tables.get(f"{name}_excluded"))),
        ]
    return parts


def _frontier(study: Study, figures: Figures, tables: Tables) -> list[str]:
    if study.frontier is None:
        return []
    lines = study.frontier.sentences[1 if study.by_steps else 0 :]  # see _headline
    return [
        "<h2>Quality against the cost of sampling</h2>",
        html.paragraphs(lines, kind="headline"),
        html.paragraphs(study.frontier.notes, "In doubt:"),
        html.paragraphs([frontier_tables.basis(study.frontier)], kind="soft"),
        *(
            html.figure(figures.get(name), "wide")
            for name in ("frontier", "best_size", "best_guidance")
        ),
        html.shown("Where the larger wins", tables.get("crossings"))
        or "<p>There is only one size, so no larger one can win.</p>",
        html.folded("The Pareto sets", html.table(tables.get("frontier"))),
        html.folded(
            "The best of each budget", html.table(tables.get("best_at_budget"))
        ),
        html.folded("The best guidance", html.table(tables.get("best_guidance"))),
        html.folded("Every setting", html.table(tables.get("cells"))),
    ]


def _no_mfu(study: Study) -> list[str]:
    """Why there is no MFU, a line per device and reason."""
    reasons = {
        f"{r.device}: {r.mfu_reason}"
        for r in study.records.values()
        if r.mfu is None and r.mfu_reason
    }
    return [f"MFU is absent on {reason}." for reason in sorted(reasons)]
