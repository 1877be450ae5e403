"""Tables of what was fitted, beside what others have published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from scaling_ldm.laws.published import PublishedLaw
from scaling_ldm.records import Parametric, PowerLaw, Refusal
from scaling_ldm.report.format import (
    NONE,
    cited,
    compact,
    count,
    loss,
    percent,
    plain,
    prefixed,
    quantity,
    scientific,
    sentence,
)
from scaling_ldm.report.study import QUANTITIES, Study
from scaling_ldm.report.table import Column, Row, Table, cell, ranged, spread, text

_NO_RANGE = {"flops_min": None, "flops_max": None}


def minima(study: Study) -> Table | None:
    """The vertex of each budget's parabola, or the refusal."""
    if study.fit is None:
        return None
    rows = []
    for p in study.fit.parabolas:
        refused = isinstance(p, Refusal)
        row: dict[str, Any] = {"budget_flops": p.budget_flops}
        row["points"] = None if refused else p.points
        for q in QUANTITIES:
            key = q.lower()
            interval = None if refused else getattr(p, f"{key}_interval")
            row |= spread(key, None if refused else getattr(p, key), interval)
        row["tokens_per_param"] = None if refused else p.d_opt / p.n_opt
        row["rmse"] = None if refused else p.rmse
        row["refused"] = sentence(p) if refused else ""
        rows.append(row)
    columns = (
        cell("budget, FLOPs", "budget_flops", scientific),
        cell("points", "points", count),
        ranged("N at the minimum", "n_opt", prefixed),
        ranged("D at the minimum, tokens", "d_opt", prefixed),
        ranged("L at the minimum", "l_opt", loss),
        cell("D / N", "tokens_per_param", plain),
        cell("rms residual, loss", "rmse", scientific),
        text("refused", "refused"),
    )
    caption = f"Minimum of each isoFLOP parabola, with {level(study)} intervals."
    return Table(name="minima", caption=caption, rows=tuple(rows), columns=columns)


def laws(study: Study, published: Sequence[PublishedLaw] = ()) -> Table | None:
    """Fitted laws, each followed by the published ones for the same quantity."""
    if study.fit is None:
        return None
    top = max(study.budgets())
    rows = []
    for q in QUANTITIES:
        law = study.fit.laws.get(q)
        if law is not None:
            rows.append(_law_row(q, law, top))
        rows += [_published_row(p, top) for p in published if p.quantity == q]
    columns = (
        text("quantity", "quantity"),
        Column("source", lambda r: cited(r["source"]), False),
        ranged("exponent", "exponent", plain),
        ranged("coefficient", "coef", compact),
        Column("fitted over, FLOPs", _fitted_over),
        cell("budgets", "points", count),
        Column(
            f"law at {scientific(top)} FLOPs",
            lambda r: quantity(r["quantity"])(r["at_top_budget"]),
        ),
        text("refused", "refused"),
    )
    caption = (
        "quantity = coefficient × C^exponent, C in FLOPs, N in parameters, D in "
        f"tokens; {level(study)} intervals. Published laws are extrapolated far "
        "outside the budgets they were fitted over: compare exponents, not values."
    )
    return Table(name="laws", caption=caption, rows=tuple(rows), columns=columns)


def published_laws(study: Study, published: Sequence[PublishedLaw]) -> Table:
    """Every published power law of N, D or L against C, as data."""
    top = max(study.budgets())
    chosen = [p for q in QUANTITIES for p in published if p.quantity == q]
    rows = tuple(
        _published_row(p, top) | {"reliability": p.reliability, "note": p.note}
        for p in chosen
        if p.form == "power"
    )
    columns = (
        text("quantity", "quantity"),
        text("source", "source"),
        text("model", "model"),
        cell("exponent", "exponent", plain),
        Column("fitted over, FLOPs", _fitted_over),
        text("known from", "reliability"),
    )
    caption = "Published exponents: N, D or L against FLOPs."
    return Table(name="published", caption=caption, rows=rows, columns=columns)


def _law_row(name: str, law: PowerLaw | Refusal, top: float) -> dict[str, Any]:
    fitted = isinstance(law, PowerLaw)
    row = {"quantity": name, "source": "this study", "model": ""}
    for key in ("exponent", "coef"):
        interval = getattr(law, f"{key}_interval") if fitted else None
        row |= spread(key, getattr(law, key) if fitted else None, interval)
    row |= {"flops_min": law.x_min, "flops_max": law.x_max} if fitted else _NO_RANGE
    row["points"] = law.points if fitted else None
    row["rmse_log"] = law.rmse_log if fitted else None
    row["at_top_budget"] = law(top) if fitted else None
    return row | {"refused": "" if fitted else sentence(law)}


def _published_row(law: PublishedLaw, top: float) -> dict[str, Any]:
    constants = law.constants
    row = {"quantity": law.quantity, "source": law.source, "model": law.model}
    row |= spread("exponent", constants.get("exponent"), None)
    in_flops = law.input_scale == law.output_scale == 1.0
    row |= spread("coef", constants.get("coef") if in_flops else None, None)
    low, high = law.domain or (None, None)
    row |= {"flops_min": low, "flops_max": high, "points": None, "rmse_log": None}
    callable_here = in_flops and None not in constants.values()
    row["at_top_budget"] = law(top) if callable_here else None
    return row | {"refused": ""}


def _fitted_over(row: Row) -> str:
    if row["flops_min"] is None:
        return NONE
    return f"{scientific(row['flops_min'], 2)} to {scientific(row['flops_max'], 2)}"


def held_out(study: Study) -> Table | None:
    if study.fit is None or not study.fit.held_out:
        return None
    rows = []
    for h in study.fit.held_out:
        if isinstance(h, Refusal):
            row = {"quantity": h.quantity, "budget_flops": h.budget_flops}
            row |= spread("predicted", None, None)
            row |= {"measured": None, "relative_error": None, "inside": None}
            rows.append(row | {"refused": sentence(h)})
            continue
        inside = h.predicted_interval.low <= h.measured <= h.predicted_interval.high
        row = {"quantity": h.quantity, "budget_flops": h.budget_flops}
        row |= spread("predicted", h.predicted, h.predicted_interval)
        row |= {"measured": h.measured, "relative_error": h.relative_error}
        rows.append(row | {"inside": "yes" if inside else "no", "refused": ""})

    def shown(key: str) -> Callable[[Row], str]:
        return lambda r: ranged("", key, quantity(r["quantity"])).show(r)

    columns = (
        text("quantity", "quantity"),
        cell("budget, FLOPs", "budget_flops", scientific),
        Column("predicted", shown("predicted")),
        Column("measured", lambda r: quantity(r["quantity"])(r["measured"])),
        cell("error", "relative_error", percent),
        text("inside the interval", "inside"),
        text("refused", "refused"),
    )
    caption = (
        "The largest budget, predicted by laws fitted to the smaller ones only. "
        "Error = predicted / measured − 1; N in parameters, D in tokens."
    )
    return Table(name="held_out", caption=caption, rows=tuple(rows), columns=columns)


def parametric(study: Study) -> Table | None:
    if study.fit is None or not isinstance(study.fit.parametric, Parametric):
        return None
    p = study.fit.parametric
    rows = []
    for key in ("E", "A", "B", "alpha", "beta", "n_opt_exponent"):
        row = {"constant": key}
        rows.append(row | spread("value", getattr(p, key), p.intervals.get(key)))
    show = {"A": compact, "B": compact, "E": loss}
    columns = (
        text("constant", "constant"),
        Column(
            "value",
            lambda r: ranged("", "value", show.get(r["constant"], plain)).show(r),
        ),
    )
    caption = (
        f"L(N, D) = E + A / N^alpha + B / D^beta over {p.points} runs, rms residual "
        f"{scientific(p.rmse)} in loss; n_opt_exponent = beta / (alpha + beta)."
    )
    return Table(name="parametric", caption=caption, rows=tuple(rows), columns=columns)


def excluded(study: Study) -> Table | None:
    if study.fit is None or not study.fit.excluded:
        return None
    rows = tuple({"excluded": line} for line in study.fit.excluded)
    columns = (text("point, and why it was left out", "excluded"),)
    return Table(name="excluded", caption="", rows=rows, columns=columns)


def level(study: Study) -> str:
    """The level of the fit's intervals, e.g. "90% bootstrap"."""
    for p in (*study.fit.parabolas, *study.fit.laws.values()) if study.fit else ():
        interval = getattr(p, "n_opt_interval", None)
        interval = interval or getattr(p, "exponent_interval", None)
        if interval is not None:
            return f"{100 * interval.level:.0f}% bootstrap"
    return "bootstrap"
