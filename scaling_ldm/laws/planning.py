"""What fitted laws say of one budget, of a loss to reach, and of other sizes.

    n = predict(fit, "N_opt", 1e20)        its value, interval, and how far outside
    reached = budget_of_loss(fit, 0.6)     the compute of a loss
    rows = alternatives(fit, 1e20, ...)    what other sizes and longer training cost

Within its band a law's interval is that of the band. Beyond, it is made wider: that of
N and D by the interval of the exponent, times ln of the distance. The error of a line
at a distance is at most its error at the nearer place, plus that of its slope times the
way between. A loss that levels off falls ever more slowly in log-log, so beyond the
band its interval lies between the last upper end and a pure power law from the last
lower end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize

from scaling_ldm.records import (
    FitResult,
    Interval,
    OffsetLaw,
    Parabola,
    PowerLaw,
    Refusal,
)

MOST = 1e6  # a budget this far from the fitted ones has no advice
_SEARCHED = 1e12  # compute of a loss is looked for up to this factor
OVERTRAINED = (2.0, 4.0)  # tokens per parameter, over those of the best size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says at one budget."""

    value: float
    interval: Interval
    outside: float  # factor from the fitted budgets: above 1 outside of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """The compute at which the law of the loss reaches a loss, in training FLOPs."""

    loss: float
    budget_flops: float
    # Where the ends of the loss's interval reach it. 0: the lower one lies below it all
    # along the band. Infinite: the upper one never reaches it.
    interval: Interval
    outside: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another size, or longer training, beside the best size of a budget."""

    what: str
    params: float
    tokens: float
    train_flops: float
    loss: float
    sampling_flops: float  # of one image

    def total_flops(self, images: float) -> float:
        """Of training and of so many sampled images."""
        return self.train_flops + images * self.sampling_flops


def outside(low: float, high: float, x: float) -> float:
    """The factor from [low, high] to x; 1 inside."""
    return max(low / x, x / high, 1.0)


def predict(fit: FitResult, quantity: str, budget: float) -> Prediction | Refusal:
    """The value of a law at a budget, with an interval also beyond its band.

    Args:
      fit: the laws of one group and metric.
      quantity: "N_opt", "D_opt" or "L_opt".
      budget: training FLOPs.

    Returns:
      A Refusal where the law is refused, where the budget is more than MOST times
      outside of the fitted ones, or where it is far below them (a loss alone).
    """
    law = fit.laws.get(quantity)
    if not isinstance(law, (PowerLaw, OffsetLaw)):
        return _of_refused(quantity, law)
    factor = outside(law.x_min, law.x_max, budget)
    if factor > MOST:
        return Refusal(
            quantity=quantity,
            reason=f"more than {MOST:g} times outside of the fitted budgets",
            detail=f"{budget:.4g} FLOPs; they are {law.x_min:.4g} to {law.x_max:.4g}",
        )
    x, low, high = np.array(law.band).T
    level = law.exponent_interval.level
    inside = min(max(budget, float(x[0])), float(x[-1]))
    lower = _between(inside, x, low)
    upper = _between(inside, x, high)
    beyond = math.log(budget / inside)
    if beyond and isinstance(law, PowerLaw) and quantity != "L_opt":
        i = law.exponent_interval
        slopes = (i.low, i.high) if beyond > 0 else (i.high, i.low)
        lower, upper = (
            end * math.exp(slope * beyond)
            for end, slope in zip((lower, upper), slopes, strict=True)
        )
    elif beyond > 0:
        steepest = _steepest(fit)
        if isinstance(steepest, Refusal):
            return steepest
        lower *= math.exp(steepest * beyond)
    elif beyond < 0:
        return Refusal(
            quantity=quantity,
            reason="below the band of the law",
            detail=f"it begins at {x[0]:.4g} FLOPs",
        )
    value = law(budget)
    interval = Interval(low=min(lower, value), high=max(upper, value), level=level)
    return Prediction(value=value, interval=interval, outside=factor)


def _of_refused(quantity: str, law: Refusal | None) -> Refusal:
    """Why there is no value of a quantity without a law."""
    if law is None:
        return Refusal(quantity=quantity, reason="there is no such law", detail="")
    return Refusal(
        quantity=quantity, reason=f"its law is refused: {law.reason}", detail=law.detail
    )


def _between(x: float, grid: np.ndarray, values: np.ndarray) -> float:
    """Interpolated in log-log; in ln x alone where a value is not positive."""
    at, places = math.log(x), np.log(grid)
    if (values > 0).all():
        return float(np.exp(np.interp(at, places, np.log(values))))
    return float(np.interp(at, places, values))


def _steepest(fit: FitResult) -> float | Refusal:
    """The lowest exponent of a pure power law of the loss, at the end of the band."""
    for form in fit.loss_forms:
        if form.form == "power" and isinstance(form.law, PowerLaw):
            return min(form.law.exponent_interval.low, 0.0)
    law = fit.laws.get("L_opt")
    if isinstance(law, PowerLaw):  # of an older release
        return min(law.exponent_interval.low, 0.0)
    # The form without an offset is refused, as one that its held-out budget refutes is.
    # The band's own fall at its end is steeper than any of a loss that levels off.
    if isinstance(law, OffsetLaw):
        (x0, low0, _), (x1, low1, _) = law.band[-5], law.band[-1]
        if low0 > 0 and low1 > 0:
            return min(math.log(low1 / low0) / math.log(x1 / x0), 0.0)
    return Refusal(
        quantity="L_opt",
        reason="beyond the band of the law",
        detail="and how fast the loss falls there is not known",
    )


def budget_of_loss(fit: FitResult, loss: float) -> Reached | Refusal:
    """The training FLOPs at which the law of the loss reaches `loss`.

    Returns:
      A Refusal where the law is refused or levels off above `loss`, where the compute
      is more than MOST times outside of the fitted budgets, or where the loss is that
      of a budget below the band.
    """
    law = fit.laws.get("L_opt")
    if not isinstance(law, (PowerLaw, OffsetLaw)):
        return _of_refused("L_opt", law)
    offset = getattr(law, "offset", 0.0)
    if loss <= offset or law.exponent >= 0:
        detail = f"wanted {loss:.6g}"
        if isinstance(law, OffsetLaw):
            i = law.offset_interval
            detail = f"E = {offset:.4g} [{i.low:.4g}, {i.high:.4g}], {detail}"
        return Refusal(
            quantity="L_opt", reason="the loss levels off above that", detail=detail
        )
    budget = ((loss - offset) / law.coef) ** (1 / law.exponent)
    found = predict(fit, "L_opt", budget)
    if isinstance(found, Refusal):
        return found

    def at(end: str) -> float:
        def above(ln_c: float) -> float:
            there = predict(fit, "L_opt", math.exp(ln_c))
            if isinstance(there, Refusal):
                raise AssertionError(there.why)
            return getattr(there.interval, end) - loss

        least = math.log(law.band[0][0]) + 1e-9
        most = math.log(law.x_max * MOST) - 1e-9
        if above(least) <= 0:
            return 0.0
        if above(most) > 0:
            return math.inf
        return math.exp(_root(above, least, most))

    level = found.interval.level
    return Reached(
        loss=loss,
        budget_flops=budget,
        interval=Interval(low=at("low"), high=at("high"), level=level),
        outside=found.outside,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalty:
    """What a size away from the best one costs in loss: curvature (ln N / N_opt)^2."""

    curvature: float
    source: str

    def __call__(self, factor: float) -> float:
        return self.curvature * math.log(factor) ** 2


def penalty(fit: FitResult, budget: float) -> Penalty | Refusal:
    """From the parabola of the budget that is nearest in its logarithm."""
    found = [p for p in fit.parabolas if isinstance(p, Parabola)]
    if not found:
        return Refusal(
            quantity="the cost of other sizes",
            reason="no budget has a parabola",
            detail="and a surface is not used for it",
        )
    nearest = min(found, key=lambda p: abs(math.log(p.budget_flops / budget)))
    return Penalty(
        curvature=nearest.curvature,
        source=f"the parabola at {nearest.budget_flops:.4g} FLOPs",
    )


def alternatives(
    fit: FitResult,
    budget: float,
    *,
    tokens_per_flop: Callable[[float], float],
    sampling_flops: Callable[[float], float],
) -> tuple[list[Alternative | Refusal], str]:
    """The best size, half and twice of it, and longer training of smaller sizes.

    Half and twice the size spend the same FLOPs and lose loss. Overtraining by k has
    the loss of the best size, with a smaller network that sees k times as many tokens
    per parameter as is best for its compute. It needs more training and less sampling.

    Args:
      tokens_per_flop: N -> training tokens for a FLOP.
      sampling_flops: N -> FLOPs of one sampled image.

    Returns:
      The rows, the best size first; and where their losses are from.
    """
    n, loss = predict(fit, "N_opt", budget), predict(fit, "L_opt", budget)
    lost = penalty(fit, budget)
    for refusal in (n, loss, lost):
        if isinstance(refusal, Refusal):
            return [refusal], ""
    assert isinstance(n, Prediction) and isinstance(loss, Prediction)
    assert isinstance(lost, Penalty)

    def row(what: str, params: float, flops: float, at: float) -> Alternative:
        return Alternative(
            what=what,
            params=params,
            tokens=flops * tokens_per_flop(params),
            train_flops=flops,
            loss=at,
            sampling_flops=sampling_flops(params),
        )

    best = loss.value
    rows: list[Alternative | Refusal] = [row("best size", n.value, budget, best)]
    for what, factor in (("half the size", 0.5), ("twice the size", 2.0)):
        rows.append(row(what, factor * n.value, budget, best + lost(factor)))
    for k in OVERTRAINED:
        what = f"overtrained {k:g} x"
        flops = _overtrained(fit, budget, best, k)
        if isinstance(flops, Refusal):
            rows.append(dataclasses.replace(flops, quantity=what))
            continue
        law = fit.laws["N_opt"]
        assert isinstance(law, PowerLaw)
        rows.append(row(what, law(flops) / math.sqrt(k), flops, best))
    return rows, lost.source


def _overtrained(
    fit: FitResult, budget: float, loss: float, k: float
) -> float | Refusal:
    """Training FLOPs at which N_opt / sqrt(k) reaches a loss.

    With C in proportion to N D, such a size has k times the tokens per parameter.
    """
    law = fit.laws["L_opt"]
    assert isinstance(law, (PowerLaw, OffsetLaw))

    def above(ln_c: float) -> float:
        flops = math.exp(ln_c)
        lost = penalty(fit, flops)
        assert isinstance(lost, Penalty)
        return law(flops) + lost(math.sqrt(k)) - loss

    low, high = math.log(budget), math.log(budget * _SEARCHED)
    # The curvature changes by steps between budgets, so the first sign change counts.
    places = np.linspace(low, high, 2000)
    at = next((i for i, x in enumerate(places) if above(float(x)) <= 0), None)
    if at is None:
        return Refusal(
            quantity="overtraining",
            reason="no compute makes up for the smaller size",
            detail="the loss levels off too early",
        )
    if at == 0:
        return budget
    return math.exp(_root(above, float(places[at - 1]), float(places[at])))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that changes its sign between two places is 0."""
    found = optimize.root_scalar(function, bracket=(low, high), xtol=1e-9)
    return float(found.root)


def pays_from(best: Alternative, other: Alternative) -> float | None:
    """How many sampled images make `other` the cheaper one; None: no number does."""
    saved = best.sampling_flops - other.sampling_flops
    if saved <= 0:
        return None
    return max(other.train_flops - best.train_flops, 0.0) / saved
