"""Tables of what was fitted, beside what others have published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaling_ldm.laws.published import PublishedLaw
from scaling_ldm.records import (
    FitResult,
    HeldOut,
    OffsetLaw,
    Parabola,
    PowerLaw,
    Refusal,
)
from scaling_ldm.report import estimate_tables
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import QUANTITIES, Study
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

_LAW = (
    "quantity source model exponent exponent_low exponent_high for_10 coef coef_low "
    "coef_high middle middle_coef middle_coef_low middle_coef_high offset offset_low "
    "offset_high flops_min flops_max points rmse_log "
    "at_top_budget refused"
)


def tables(study: Study, published: Sequence[PublishedLaw]) -> list[Table]:
    """Every table of each group and metric; laws are followed by the published ones."""
    found = []
    for part in (one for group in study.parts() for one in group.by_metric()):
        if part.fit is None:
            continue
        every = [
            minima(part.fit),
            estimate_tables.estimates(part.fit),
            laws(part.fit, published, max(part.budgets())),
            loss_forms(part.fit),
            held_out(part.fit),
            estimate_tables.left_out(part.fit),
            parametric(part.fit),
            excluded(part.fit),
        ]
        found += [_of_group(table, part) for table in every]
    return found


def _of_group(table: Table, part: Study) -> Table:
    """The table under the name of its group and metric; the CSV says the group."""
    group = {"group": part.group} if part.group else {}
    return dataclasses.replace(
        table,
        name=table.name + part.suffix,
        caption=". ".join(filter(None, (part.title, table.caption))),
        rows=[{**group, **row} for row in table.rows],
    )


def minima(fit: FitResult) -> Table:
    """The minimum of each budget's curve, or the refusal."""
    rows = []
    for p in fit.parabolas:
        row = pick(p, "budget_flops points") | spread(p, "n_opt d_opt l_opt")
        share = p.d_opt / p.n_opt if isinstance(p, Parabola) else None
        rows.append(row | {"tokens_per_param": share} | pick(p, "rmse") | refused(p))
    columns = (
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        cell("points", "points", fmt.count),
        ranged("N at the minimum", "n_opt", fmt.prefixed),
        ranged("D at the minimum, tokens", "d_opt", fmt.prefixed),
        ranged("L at the minimum", "l_opt", fmt.loss),
        cell("D / N", "tokens_per_param", fmt.plain),
        cell("rms residual, loss", "rmse", fmt.scientific),
        text("refused", "refused"),
    )
    caption = (
        f"Minimum of each isoFLOP curve ({fit.estimator}), with {level(fit)} "
        "intervals. L is the "
        f"{fmt.measure(fit.metric, fit.weights)}."
    )
    return Table("minima", caption, rows, columns)


def laws(fit: FitResult, published: Sequence[PublishedLaw], top: float) -> Table:
    """Each law and the published ones; `top` is the largest budget, in FLOPs."""
    rows = []
    for q in QUANTITIES:
        if q in fit.laws:
            rows.append(_law_row(q, fit.laws[q], top))
        rows += [_published_row(p, top) for p in published if p.quantity == q]
    columns = (
        text("quantity", "quantity"),
        Column("source", lambda r: fmt.cited(r["source"]), False),
        ranged("exponent", "exponent", fmt.plain),
        cell("for 10 × C", "for_10", fmt.plain),
        ranged("coefficient", "coef", fmt.compact),
        Column("coefficient at the middle budget", _in_the_middle),
        ranged("offset E", "offset", fmt.loss),
        Column("fitted over, FLOPs", _fitted_over),
        cell("budgets", "points", fmt.count),
        Column(f"law at {fmt.scientific(top)} FLOPs", _shown("at_top_budget")),
        text("refused", "refused"),
    )
    caption = (
        "quantity = offset + coefficient × C^exponent, C in FLOPs, N in parameters, D "
        f"in tokens; {level(fit)} intervals. At the middle budget, C is divided by "
        "that budget: the coefficient is far better known there than at C = 1. An "
        "exponent belongs to its offset: only those of equal offset may be compared. "
        "Published laws are extrapolated far outside the budgets they were fitted "
        "over: compare exponents, not values."
    )
    return Table("laws", caption, rows, columns)


def published_laws(study: Study, published: Sequence[PublishedLaw]) -> Table:
    """Every published power law of N, D or L against C, as data."""
    top = max(study.budgets())
    rows = [
        _published_row(p, top) | pick(p, "reliability note")
        for q in QUANTITIES
        for p in published
        if p.quantity == q and p.form == "power"
    ]
    columns = (
        text("quantity", "quantity"),
        text("source", "source"),
        text("model", "model"),
        cell("exponent", "exponent", fmt.plain),
        Column("fitted over, FLOPs", _fitted_over),
        text("known from", "reliability"),
    )
    caption = "Published exponents: N, D or L against FLOPs."
    return Table("published", caption, rows, columns)


def _law_row(
    name: str, law: PowerLaw | OffsetLaw | Refusal, top: float
) -> dict[str, Any]:
    row = dict.fromkeys(_LAW.split()) | spread(law, "exponent coef offset middle_coef")
    row |= pick(law, "middle")
    row |= {"quantity": name, "source": "this study", "model": ""} | refused(law)
    if isinstance(law, PowerLaw) and name == "L_opt":  # of an older release
        row["offset"] = 0.0
    if not isinstance(law, Refusal):
        row |= {"flops_min": law.x_min, "flops_max": law.x_max}
        row |= pick(law, "points rmse_log")
        row |= {"at_top_budget": law(top), "for_10": law(10 * top) / law(top)}
    return row


def _published_row(law: PublishedLaw, top: float) -> dict[str, Any]:
    row = dict.fromkeys(_LAW.split()) | pick(law, "quantity source model")
    row |= {"exponent": law.constants.get("exponent"), "refused": ""}
    row["offset"] = law.constants.get(
        "offset", 0.0 if law.quantity == "L_opt" else None
    )
    if row["exponent"] is not None and not row["offset"]:
        row["for_10"] = 10 ** row["exponent"]
    if law.input_scale == law.output_scale == 1.0:
        row["coef"] = law.constants.get("coef")
        if None not in law.constants.values():
            row["at_top_budget"] = law(top)
    if law.domain:
        row["flops_min"], row["flops_max"] = law.domain
    return row


def _fitted_over(row: Row) -> str:
    if row["flops_min"] is None:
        return fmt.NONE
    low, high = (fmt.scientific(row[k], 2) for k in ("flops_min", "flops_max"))
    return f"{low} to {high}"


def _in_the_middle(row: Row) -> str:
    if not row["middle_coef"]:
        return fmt.NONE
    show = fmt.quantity(row["quantity"])
    return f"{bracketed(row, 'middle_coef', show)} at {fmt.scientific(row['middle'])}"


def _shown(key: str) -> Any:
    """How a value of N_opt, D_opt or L_opt is shown."""
    return lambda r: fmt.quantity(r["quantity"])(r[key])


def held_out(fit: FitResult) -> Table:
    rows = []
    for h in fit.held_out:
        row = pick(h, "quantity budget_flops") | spread(h, "predicted")
        row |= pick(h, "measured relative_error")
        row["inside"] = _inside(h)
        rows.append(row | refused(h))
    columns = (
        text("quantity", "quantity"),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        Column(
            "predicted",
            lambda r: bracketed(r, "predicted", fmt.quantity(r["quantity"])),
        ),
        Column("measured", _shown("measured")),
        cell("error", "relative_error", fmt.percent),
        text("inside the interval", "inside"),
        text("refused", "refused"),
    )
    caption = (
        "The largest budget, predicted by laws fitted to the smaller ones only. "
        "Error = predicted / measured − 1; N in parameters, D in tokens."
    )
    return Table("held_out", caption, rows, columns)


def loss_forms(fit: FitResult) -> Table:
    """The law of L_opt without and with an offset, and how well each predicts."""
    rows = []
    for one in fit.loss_forms:
        row = {"form": _FORMS[one.form]} | spread(one.law, "offset exponent coef")
        if isinstance(one.law, PowerLaw):
            row["offset"] = 0.0
        row |= pick(one, "left_out_error") | spread(one.held_out, "predicted")
        row["inside"] = _inside(one.held_out)
        rows.append(row | refused(one.law))
    columns = (
        text("form", "form"),
        ranged("offset E", "offset", fmt.loss),
        ranged("exponent", "exponent", fmt.plain),
        ranged("coefficient", "coef", fmt.compact),
        Column("error of a budget left out", _left_out),
        ranged("held-out budget, predicted", "predicted", fmt.loss),
        text("measured inside", "inside"),
        text("refused", "refused"),
    )
    caption = (
        "Both forms of the law of L. The error is the rms of predicted / measured "
        "− 1, each budget predicted from all others; the form with the "
        "smaller one is the law. The intervals of the pure law hold only if E is 0."
    )
    return Table("loss_forms", caption, rows, columns)


_FORMS = {"power": "L = A C^b (E = 0)", "offset": "L = E + A C^b"}


def _left_out(row: Row) -> str:
    error = row["left_out_error"]
    return fmt.NONE if error is None else f"{100 * error:.2g}%"


def _inside(check: HeldOut | Refusal | None) -> str:
    return ("yes" if check.inside else "no") if isinstance(check, HeldOut) else ""


def parametric(fit: FitResult) -> Table:
    p, rows = fit.parametric, []
    if isinstance(p, Refusal):
        return Table("parametric", "", rows, ())
    for name, i in p.intervals.items():
        row = {"constant": name, "value": getattr(p, name)}
        rows.append(row | {"value_low": i.low, "value_high": i.high})
    show = {"A": fmt.compact, "B": fmt.compact, "E": fmt.loss}
    columns = (
        text("constant", "constant"),
        Column(
            "value",
            lambda r: bracketed(r, "value", show.get(r["constant"], fmt.plain)),
        ),
    )
    caption = (
        f"L(N, D) = E + A / N^alpha + B / D^beta over {p.points} runs, rms residual "
        f"{fmt.scientific(p.rmse)} in loss; n_opt_exponent = beta / (alpha + beta)."
    )
    return Table("parametric", caption, rows, columns)


def excluded(fit: FitResult) -> Table:
    rows = [{"excluded": line} for line in fit.excluded]
    columns = (text("point, and why it was left out", "excluded"),)
    return Table("excluded", "Runs that did not enter the fit.", rows, columns)


def level(fit: FitResult) -> str:
    """The level of the fit's intervals, e.g. "90% bootstrap"."""
    for found in fit.parabolas:
        if isinstance(found, Parabola):
            return f"{100 * found.n_opt_interval.level:.0f}% bootstrap"
    return "bootstrap"
