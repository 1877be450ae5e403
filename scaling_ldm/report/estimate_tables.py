"""Tables of all estimators of the minima, and of budgets that are left out in turn."""

from __future__ import annotations

from scaling_ldm.records import FitResult
from scaling_ldm.report import format as fmt
from scaling_ldm.report.table import (
    Column,
    Row,
    Table,
    cell,
    pick,
    ranged,
    spread,
    text,
)


def estimates(fit: FitResult) -> Table:
    """What each estimator says about N_opt; that of the laws comes first."""
    budgets = sorted({c for e in fit.estimates for c, _, _ in e.minima})
    rows = []
    for one in fit.estimates:
        sizes = {c: n for c, n, _ in one.minima}
        row = {"estimator": one.estimator, "of_the_laws": "yes" * (not rows)}
        row |= {f"n_opt_{i}": sizes.get(c) for i, c in enumerate(budgets)}
        row |= spread(one, "exponent difference")
        row |= pick(one, "run_error left_out_error")
        row |= spread(one.held_out, "predicted")
        rows.append(row | pick(one.held_out, "measured relative_error"))
    columns = (
        text("estimator", "estimator"),
        *(
            cell(f"N at {fmt.scientific(c)} FLOPs", f"n_opt_{i}", fmt.prefixed)
            for i, c in enumerate(budgets)
        ),
        ranged("exponent of N", "exponent", fmt.plain),
        ranged("difference", "difference", fmt.plain),
        Column("error of L, a run left out", _loss_error),
        Column("error of N, a budget left out", _size_error),
        ranged("held-out budget, predicted N", "predicted", fmt.prefixed),
        cell("measured N", "measured", fmt.prefixed),
        cell("error", "relative_error", fmt.percent),
    )
    index = "" if fit.disagreement is None else f"{fit.disagreement:.2g}"
    caption = (
        "N of least loss by each estimator, and the exponent that follows; the laws "
        "use the first row. The difference is that of the exponents, over the budgets "
        "that both rows have; what all runs have in common cancels in it. Errors are "
        "rms: of a loss, each run inside a grid predicted from all others; of ln N, "
        "each budget predicted from all others. The size of the least measured loss "
        "has no interval."
    )
    if index:
        caption += (
            f" Disagreement index {index}: the largest difference over half of its "
            "interval; above 1, estimators disagree by more than noise explains."
        )
    return Table("estimates", caption, rows, columns)


def _loss_error(row: Row) -> str:
    error = row["run_error"]
    return fmt.NONE if error is None else fmt.scientific(error)


def _size_error(row: Row) -> str:
    error = row["left_out_error"]
    return fmt.NONE if error is None else f"{100 * error:.2g}%"


def left_out(fit: FitResult) -> Table:
    """Each budget's minimum beside the prediction of the law of all other budgets."""
    names = "quantity budget_flops predicted measured relative_error"
    rows = [pick(one, names) for one in fit.left_out]

    def shown(key: str) -> Column:
        return Column(key, lambda r: fmt.quantity(r["quantity"])(r[key]))

    columns = (
        text("quantity", "quantity"),
        cell("budget, FLOPs", "budget_flops", fmt.scientific),
        shown("predicted"),
        shown("measured"),
        cell("error", "relative_error", fmt.percent),
    )
    caption = (
        "Each budget in turn, predicted by the law of all others. "
        "Error = predicted / measured − 1; N in parameters, D in tokens."
    )
    return Table("left_out", caption, rows, columns)
