"""A fit as lines of text."""

from __future__ import annotations

from typing import Any

from scaling_ldm.records import (
    FitResult,
    HeldOut,
    LossForm,
    MinimaEstimate,
    OffsetLaw,
    PowerLaw,
    RateFit,
    RateLaw,
    Refusal,
)
from scaling_ldm.records.measurements import in_words


def summary(result: FitResult) -> list[str]:
    """The laws, the held-out check and every refusal, one line each.

    The first line names the fitted metric, if it is one of the table.
    """

    def line(found: Any) -> str | None:
        if isinstance(found, Refusal):
            return f"refused: {found.what}: {found.reason} ({found.detail})"
        if isinstance(found, PowerLaw):
            i = found.exponent_interval
            return (
                f"{found.y_name} = {found.coef:.3g} C^{found.exponent:.3f}  "
                f"({i.level:.0%} interval of the exponent {i.low:.3f} to {i.high:.3f}, "
                f"{found.points} budgets)"
            )
        if isinstance(found, OffsetLaw):
            i, e = found.exponent_interval, found.offset_interval
            known = "" if found.identified else ": not identified"
            return (
                f"{found.y_name} = {found.offset:.4g} + {found.coef:.3g} "
                f"C^{found.exponent:.3f}  ({i.level:.0%} intervals: E {e.low:.4g} to "
                f"{e.high:.4g}{known}; exponent {i.low:.3f} to {i.high:.3f}; "
                f"{found.points} budgets)"
            )
        if isinstance(found, HeldOut):
            i = found.predicted_interval
            return (
                f"held out {found.quantity} at {found.budget_flops:.3g} FLOPs: "
                f"predicted {found.predicted:.4g} ({i.low:.4g} to {i.high:.4g}), "
                f"measured {found.measured:.4g} ({found.relative_error:+.1%})"
            )
        if isinstance(found, MinimaEstimate):
            return _estimate(found)
        if isinstance(found, LossForm) and found.left_out_error is not None:
            name = "L = A C^b" if found.form == "power" else "L = E + A C^b"
            return (
                f"form of L_opt, {name}: budgets left out in turn are predicted within "
                f"{found.left_out_error:.2%} (rms)"
            )
        return None  # parabolas and surfaces are in the record

    everything = (
        *result.parabolas,
        *result.laws.values(),
        *result.loss_forms,
        *result.held_out,
        result.parametric,
        *result.estimates,
    )
    measured = result.weights and in_words(result.metric, result.weights)
    return [
        *([f"laws of: {measured}"] if measured else []),
        *filter(None, map(line, everything)),
        *_disagreement(result),
        *(f"note: {note}" for note in result.notes),
        *(f"left out: {why}" for why in result.excluded),
    ]


def _disagreement(result: FitResult) -> list[str]:
    if result.disagreement is None:
        return []
    said = "above 1, they disagree by more than their noise"
    index = f"disagreement index of the estimators: {result.disagreement:.2g} ({said})"
    return [f"the laws use the minima by {result.estimator}; {index}"]


def _estimate(found: MinimaEstimate) -> str | None:
    """What one estimator of the minima says; None if it has no exponent."""
    if found.exponent is None:
        return None
    line = f"minima by {found.estimator}: N_opt ~ C^{found.exponent:.3f}"
    if (i := found.exponent_interval) is not None:
        line += f" ({i.low:.3f} to {i.high:.3f})"
    if found.run_error is not None:
        line += f"; runs left out are predicted within {found.run_error:.3g} (rms)"
    if (h := found.held_out) is not None:
        line += f"; held-out N_opt {h.predicted:.4g} for {h.measured:.4g} "
        line += f"({h.relative_error:+.1%})"
    return line


def rates_summary(result: RateFit) -> list[str]:
    """The best learning rates, their law and every refusal, one line each."""
    measured = result.weights and in_words(result.metric, result.weights)
    lines = [f"best learning rates of: {measured}"] if measured else []
    for best in result.best:
        if isinstance(best, Refusal):
            lines.append(f"refused: {best.what}: {best.why}")
            continue
        i = best.rate_interval
        lines.append(
            f"{best.params:.6g} parameters, {best.tokens:.6g} tokens, batch "
            f"{best.batch_size:.6g}: {best.rate:.3g} ({i.level:.0%} interval "
            f"{i.low:.3g} to {i.high:.3g})"
        )
    law = result.law
    if isinstance(law, RateLaw):
        shown = [
            f"{name}^{value:.3f} ({i.low:.3f} to {i.high:.3f})"
            for name, value in law.exponents.items()
            for i in [law.intervals[name]]
        ]
        level = law.intervals["coef"].level
        lines.append(
            f"best rate = {law.coef:.3g} {' '.join(shown)}  ({level:.0%} intervals, "
            f"{law.points} best rates)"
        )
    else:
        lines.append(f"refused: {law.what}: {law.why}")
    return [*lines, *(f"left out: {why}" for why in result.excluded)]
