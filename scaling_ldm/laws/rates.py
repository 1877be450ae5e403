"""The best learning rate of each size, length and batch, and the law that they follow.

A cell is one N, D and batch size. `best_rates` fits its best rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from scaling_ldm.laws import best_rates
from scaling_ldm.laws import points as points_lib
from scaling_ldm.records import (
    BestRate,
    Interval,
    Measurement,
    RateFit,
    RateLaw,
    Refusal,
    TrainRecord,
)
from scaling_ldm.records import results as ends
from scaling_ldm.records.measurements import HIGHER_IS_BETTER, LOSS, in_words

LAW = "learning-rate law"  # what a refusal is about
VARIABLES = ("params", "tokens", "batch_size")
# Largest condition number of the law's design, of columns of unit length.
_LARGEST_CONDITION = 1e3


def rate_law(
    rows: Iterable[Any],
    *,
    metric: str = "loss",
    size: str = "params",
    neighbours: int = 2,
    confidence: float = 0.9,
) -> RateFit:
    """The best learning rates of a study with an axis of rates, and their law.

    Args:
      rows: one per run: (params, tokens, batch_size, learning_rate, loss), or a mapping
        or object with these fields, as `isoflop` takes them. Runs of the same four
        numbers are seeds. The loss is that at the end of the run.
      metric: field with the loss; for tuples only a label.
      size: field with the number of parameters; for tuples only a label.
      neighbours: rates on each side of the best one that its parabola uses, where there
        are so many.
      confidence: level of all intervals.

    Returns:
      A RateFit. A best rate or law that the runs do not support is a Refusal.

    Raises:
      ValueError: options out of range, or rows of another form.

    Example:
      >>> runs = [(n, 1e9, 64, 0.1 * n**-0.5 * 2**k, 1.0 + 0.01 * k**2 + noise)
      ...         for n in (1e4, 4e4, 1.6e5) for k in (-2, -1, 0, 1, 2)
      ...         for noise in (-1e-4, 1e-4)]
      >>> round(rate_law(runs).law.exponents["params"], 6)
      -0.5
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, given {confidence}")
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, given {neighbours}")
    cells, excluded = _cells(rows, metric, size)
    curves = [best_rates.fit_curve(cell, neighbours) for cell in cells]
    variance, dof = best_rates.noise(
        [c for c in curves if isinstance(c, best_rates.RateCurve)]
    )
    best = [
        c
        if isinstance(c, Refusal)
        else best_rates.best_rate(c, variance, dof, confidence)
        for c in curves
    ]
    found = [b for b in best if isinstance(b, BestRate)]
    return RateFit(
        metric=metric,
        size=size,
        best=tuple(best),
        law=_law(found, len(best), confidence),
        excluded=tuple(excluded),
        noise=math.sqrt(variance) if dof else None,
        noise_dof=dof,
        runs=tuple(
            (*cell.at, float(np.exp(x)), float(y))
            for cell in cells
            for x, y in zip(cell.x, cell.y, strict=True)
        ),
    )


def rate_records(
    records: Iterable[TrainRecord],
    rows: Iterable[Measurement],
    *,
    metric: str = LOSS,
    weights: str,
    size: str = "params_without_embeddings",
    asked: Sequence[str] = (),
    points: Collection[ends.Point] | None = None,
    **options: Any,
) -> RateFit:
    """`rate_law` of what runs have measured at their ends (`records.read_table`).

    A trajectory has an end at each of its budgets. Give the runs of one group: what
    they vary beside size, length, batch and rate would be taken for noise.

    Args:
      records: of the runs; those that are not finished are excluded by name.
      rows: of these runs and any others, of any step.
      metric: of the table, e.g. "loss"; smaller values are better.
      weights: "raw" or the name of an average.
      size: "params" or "params_without_embeddings".
      asked: the first characters of the hashes of protocols, as config.fit.protocols.
      points: (run_id, step) of the ends that are used; None: all.
      options: of `rate_law`.

    Raises:
      ValueError: a metric of which larger values are better; rows of several protocols,
        none of which all finished runs have.
    """
    if metric.startswith(HIGHER_IS_BETTER):
        raise ValueError(f"larger values of {metric} are better: it is no loss")
    trained = {record.run_id: record for record in records}
    excluded = [
        f"{run_id}: {r.status}" + (f" ({r.detail})" if r.detail else "")
        for run_id, r in trained.items()
        if r.status != "finished"
    ]
    found = [
        row
        for row in ends.of(rows, metric, weights)
        if ends.is_result(row, trained.get(row.run_id))
    ]
    wanted = {(i, r.steps) for i, r in trained.items() if r.status == "finished"}
    wanted |= {(row.run_id, row.step) for row in found}
    if points is not None:
        wanted &= set(points)
    protocol, measured = ends.shared_protocol(found, wanted, asked)
    if protocol is None and measured:
        raise ValueError(ends.why_none_is_shared(measured, len(wanted), {}))
    used = {
        (row.run_id, row.step): row
        for row in found
        if row.protocol_hash == protocol and (row.run_id, row.step) in wanted
    }
    for run_id, _ in wanted - used.keys():
        excluded.append(f"{run_id}: no {in_words(metric, weights)} at its last step")
    result = rate_law(
        [
            (
                getattr(row, size),
                row.tokens,
                trained[run_id].images / trained[run_id].steps,
                trained[run_id].learning_rate,
                row.value,
            )
            for (run_id, _), row in used.items()
        ],
        metric=metric,
        size=size,
        **options,
    )
    return dataclasses.replace(
        result,
        excluded=tuple(sorted(excluded)) + result.excluded,
        weights=weights,
        protocol_hash=protocol or "",
    )


def _cells(
    rows: Iterable[Any], metric: str, size: str
) -> tuple[list[best_rates.RateCell], list[str]]:
    """The runs by size, length and batch, and a line for each that is not usable."""
    names = (size, "tokens", "batch_size", "learning_rate", metric)
    kept: list[tuple[float, ...]] = []
    excluded = []
    for number, row in enumerate(rows):
        values = points_lib.values_of(row, names, number)
        bad = [
            f"{name} is {value:.6g}"
            for name, value in zip(names[:4], values[:4], strict=True)
            if not (math.isfinite(value) and value > 0)
        ]
        if not math.isfinite(values[4]):
            bad.append(f"{metric} is {values[4]:.6g}")
        if bad:
            excluded.append(
                f"run of {values[0]:.6g} parameters at rate {values[3]:.6g}: "
                f"{', '.join(bad)}"
            )
        else:
            kept.append(values)
    groups: list[list[tuple[float, ...]]] = []
    for values in sorted(kept):
        if not groups or not np.allclose(
            values[:3], groups[-1][0][:3], best_rates.SAME, 0
        ):
            groups.append([])
        groups[-1].append(values)
    cells = []
    for group in groups:
        n, d, b, rates, losses = np.array(sorted(group, key=lambda v: v[3:])).T
        cells.append(best_rates.RateCell((n[0], d[0], b[0]), np.log(rates), losses))
    return cells, sorted(excluded)


def _law(best: Sequence[BestRate], cells: int, level: float) -> RateLaw | Refusal:
    """The power law through best rates, by least squares of logarithms."""

    def refuse(reason: str, detail: str) -> Refusal:
        return Refusal(quantity=LAW, reason=reason, detail=detail)

    every = {name: np.array([getattr(b, name) for b in best]) for name in VARIABLES}
    varies = [
        name
        for name, x in every.items()
        if len(x) and np.ptp(np.log(x)) > best_rates.SAME
    ]
    needed = len(varies) + 2  # with the coefficient, and a degree of freedom
    if not varies or len(best) < needed:
        return refuse(
            f"fewer than {max(needed, 3)} best rates"
            if varies or len(best) < 3
            else "one size, one length and one batch",
            f"{len(best)} of {cells} have one",
        )
    x = np.stack([np.ones(len(best)), *(np.log(every[name]) for name in varies)], 1)
    centred = x[:, 1:] - x[:, 1:].mean(0)
    condition = np.linalg.cond(centred / np.linalg.norm(centred, axis=0))
    if condition > _LARGEST_CONDITION:
        return refuse(
            f"{' and '.join(varies)} vary together",
            "no runs tell their exponents apart: train other lengths or sizes",
        )
    y = np.log([b.rate for b in best])
    inverse = np.linalg.inv(x.T @ x)
    coefs = inverse @ x.T @ y
    dof = len(best) - len(coefs)
    s = math.sqrt(float(np.sum((y - x @ coefs) ** 2)) / dof)
    half = scipy.stats.t.ppf((1 + level) / 2, dof) * s * np.sqrt(np.diag(inverse))
    intervals = {
        name: Interval(low=float(value - h), high=float(value + h), level=level)
        for name, value, h in zip(("coef", *varies), coefs, half, strict=True)
    }
    ends = np.exp([intervals["coef"].low, intervals["coef"].high])
    return RateLaw(
        coef=float(np.exp(coefs[0])),
        exponents={n: float(v) for n, v in zip(varies, coefs[1:], strict=True)},
        intervals=intervals
        | {"coef": Interval(low=float(ends[0]), high=float(ends[1]), level=level)},
        held={n: float(every[n][0]) for n in VARIABLES if n not in varies},
        points=len(best),
        rmse_log=s,
    )
