"""Published laws beside those of the study, in one convention (`laws.converted`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from scaling_ldm.laws.converted import ConvertedStudy
from scaling_ldm.records import Refusal
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import OTHER
from scaling_ldm.report.table import Column, Table, cell, text

_DASHES = ("-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))


def draw(
    axes: Axes, quantity: str, chosen: Sequence[ConvertedStudy], ends: np.ndarray
) -> list[float]:
    """The laws of one quantity that can be converted; returns their heights.

    Args:
      ends: the budgets between which they are drawn, in FLOPs.
    """
    heights, x = [], np.geomspace(ends.min(), ends.max(), 30)
    for number, study in enumerate(chosen):
        law = study.laws[quantity]
        if isinstance(law, Refusal):
            continue
        y = [law(float(c)) for c in x]
        heights += [min(y), max(y)]
        axes.plot(
            x,
            y,
            linestyle=_DASHES[number % len(_DASHES)],
            color=OTHER,
            linewidth=1.1,
            label=f"published: {study.study}",
        )
    return heights


def table(chosen: Sequence[ConvertedStudy], top: float) -> Table:
    """What each chosen study says of a budget, and why a law of it is not drawn.

    Args:
      top: the largest budget of the study, in FLOPs.
    """
    rows = []
    for study in chosen:
        n, d, loss = (study.laws[q] for q in ("N_opt", "D_opt", "L_opt"))
        low, high = study.domain or (None, None)
        refused = [law for law in (n, d, loss) if isinstance(law, Refusal)]
        rows.append(
            {
                "study": study.study,
                "source": study.source,
                "subject": study.subject,
                "estimator": study.estimator,
                "counts": study.counts,
                "flops_min": low,
                "flops_max": high,
                "N_opt": None if isinstance(n, Refusal) else n(top),
                "D_opt": None if isinstance(d, Refusal) else d(top),
                "not_drawn": "; ".join(f"{r.quantity}: {r.why}" for r in refused),
            }
        )
    columns = (
        text("study", "study"),
        Column("source", lambda r: fmt.cited(r["source"]), False),
        text("of", "subject"),
        text("estimator", "estimator"),
        text("what C, N and D are", "counts"),
        cell("N", "N_opt", fmt.prefixed),
        cell("D, tokens", "D_opt", fmt.prefixed),
        text("not drawn", "not_drawn"),
    )
    caption = (
        "Published laws in the figures, as C in training FLOPs, N in parameters and D "
        f"in tokens, here at {fmt.scientific(top)} FLOPs. They are of other data and "
        "networks, and extrapolated to the budgets of this study."
    )
    return Table("overlaid", caption, rows, columns)
