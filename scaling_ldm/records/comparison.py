"""The result of comparing the laws of two studies, or of two groups of one study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scaling_ldm.records.laws import Interval, OffsetLaw, Refusal

# What a comparison comes to. Of a pair, "second" is the one that is held against the
# first.
CROSS, NO_DIFFERENCE, NO_VERDICT = "they cross", "no difference shown", "no verdict"
FIRST_BETTER, SECOND_BETTER = "first better", "second better"
VERDICTS = (FIRST_BETTER, SECOND_BETTER, CROSS, NO_DIFFERENCE, NO_VERDICT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedLaw:
    """One quantity of both sides: y = at_middle (C / middle)^exponent.

    The lines are of ln y on ln C, over the budgets that both sides have. The exponent
    of L_opt is the mean slope of ln L over these budgets, with E = 0 on both sides: an
    exponent beside an offset could not be compared. `band` rows are (budget, second /
    first, low, high). They hold together over all the budgets.
    """

    quantity: str  # "N_opt" | "D_opt" | "L_opt"
    exponents: tuple[float, float]  # of the first and of the second
    exponent_intervals: tuple[Interval, Interval]  # of the same
    difference: float  # of the exponents, second minus first
    difference_interval: Interval  # of the difference of the exponents
    at_middle: tuple[float, float]  # value of the line at the middle budget
    at_middle_intervals: tuple[Interval, Interval]  # of the same
    ratio: float  # of these values, second / first
    ratio_interval: Interval  # of that ratio
    rmse_log: float  # of ln(second / first) about its line: sqrt(RSS / (budgets - 2))
    minima: tuple[tuple[float, float, float], ...]  # (budget, first, second)
    band: tuple[tuple[float, float, float, float], ...]  # rows of four, see above
    # (budget, difference of the exponents without it); (): there are three budgets.
    left_out: tuple[tuple[float, float], ...]

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference of the exponents excludes 0."""
        i = self.difference_interval
        return i.low > 0 or i.high < 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossingBudget:
    """The budget at which both have the same least loss."""

    budget_flops: float
    interval: Interval  # of that budget, Fieller's
    better_beyond: str  # "first" | "second": the one with the lower loss above it


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualLoss:
    """The compute that the second needs for the loss that the first has at a budget."""

    ratio: float  # over the first's budget; below 1 the second needs less
    interval: Interval  # of the ratio
    extrapolated: bool  # whether the second's budget lies outside of those compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Both sides at one budget. Intervals of the loss hold at all budgets together."""

    budget_flops: float
    loss_ratio: float  # second / first
    loss_ratio_interval: Interval  # of that ratio
    compute: EqualLoss | Refusal  # that the second needs for equal loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class LawComparison:
    """The laws of two sides over the budgets that both have.

    `better` rows are (from, to, "first" | "second"): budgets at which that side is
    shown to have the lower loss, by intervals that hold together over all budgets.
    """

    first: str  # name of the side that the other is held against
    second: str  # name of the other
    metric: str  # what is compared as the loss
    size: str  # which N
    data: str  # which D: "tokens" or "pictures"
    weights: str  # "": points that do not say it
    protocol_hash: str  # "": points that do not say it
    budgets: tuple[float, ...]  # those compared, ascending
    middle: float  # their geometric mean
    paired: bool  # whether noise that both sides share is taken out
    # Of the drawn errors of the least losses of both, mean over budgets; None: the
    # sides are not paired.
    correlation: float | None
    laws: Mapping[str, ComparedLaw | Refusal]  # by quantity
    # Of L_opt with an offset, over the same budgets: of the first and of the second.
    offset_laws: tuple[OffsetLaw | Refusal, OffsetLaw | Refusal]
    crossing: CrossingBudget | Refusal  # where the least losses are equal
    at_budgets: tuple[AtBudget | Refusal, ...]  # both at stated budgets
    verdict: str  # one of VERDICTS
    better: tuple[tuple[float, float, str], ...]  # rows, see above
    excluded: tuple[str, ...]  # a line for each run or budget left out
    notes: tuple[str, ...]  # doubts that are no refusals
    bootstrap: int
    seed: int  # of the draws


RECORDS = (ComparedLaw, CrossingBudget, EqualLoss, AtBudget, LawComparison)
