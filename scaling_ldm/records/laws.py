"""The results of a fit: intervals, minima, laws, and refusals with reasons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided interval at `level`, e.g. 0.9."""

    low: float
    high: float
    level: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A question that the data cannot answer, and why.

    The first three fields say what was asked. `quantity` is one of these: "isoFLOP
    minimum"; the y of a power law, such as "N_opt"; the prediction of that y, "N_opt
    held out"; "parametric surface"; "crossing"; or the advice with its budget, such as
    "advice within 0.001 s".
    """

    quantity: str
    budget_flops: float | None = None  # None: not asked of one budget
    group: str = ""  # the part of the data that was asked, e.g. "4M over 2M, ddim"
    reason: str  # e.g. "vertex outside the grid"
    detail: str  # the numbers behind the reason

    @property
    def what(self) -> str:
        """The question as text: "isoFLOP minimum at 1e+11 FLOPs"."""
        of = f" of {self.group}" if self.group else ""
        at = "" if self.budget_flops is None else f" at {self.budget_flops:.6g} FLOPs"
        return f"{self.quantity}{of}{at}"

    @property
    def why(self) -> str:
        """The reason with its numbers: "no spread in x (all near 2)"."""
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """The curve of one budget, a parabola unless `estimator` says another, with its
    minimum: loss = a (ln N - ln n_opt)^2 + l_opt.
    """

    budget_flops: float
    points: int
    curvature: float  # a > 0
    n_opt: float
    d_opt: float  # tokens at the minimum
    l_opt: float
    n_opt_interval: Interval
    d_opt_interval: Interval
    l_opt_interval: Interval
    rmse: float  # error of the loss around the curve: sqrt(RSS / degrees of freedom)
    estimator: str = "parabola"  # "shape", ...: see laws.estimators
    # a and b of a shared shape, E + A e^(-a x) + B e^(b x) with x = ln N; else None.
    exponents: tuple[float, float] | None = None

    def __call__(self, n: float) -> float:
        """The loss of the curve at a size; near the minimum for other estimators."""
        x = math.log(n / self.n_opt)
        if self.exponents is None:
            return self.curvature * x * x + self.l_opt
        a, b = self.exponents
        bent = (math.exp(b * x) - 1) / b + (math.exp(-a * x) - 1) / a
        return self.l_opt + 2 * self.curvature / (a + b) * bent


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coef * x^exponent, fitted in log-log over `points` points.

    `band` rows are (x, low, high): the pointwise prediction band for a newly measured y
    at `exponent_interval.level`, drawn a little beyond the fitted range.
    """

    x_name: str
    y_name: str
    coef: float
    exponent: float
    coef_interval: Interval
    exponent_interval: Interval
    points: int
    x_min: float
    x_max: float
    rmse_log: float  # error of ln y around the law: sqrt(RSS / (points - 2))
    band: tuple[tuple[float, float, float], ...]
    # y = middle_coef (x / middle)^exponent, with middle the mean x in logarithms: coef
    # is at x = 1, far from all points. 0: of an older file, or of `forms.power_law`.
    middle: float = 0.0
    middle_coef: float = 0.0
    middle_coef_interval: Interval | None = None

    def __call__(self, x: float) -> float:
        return self.coef * x**self.exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffsetLaw:
    """y = offset + coef * x^exponent: a loss that levels off at `offset`.

    `offset` is at least 0, and 0 where the pure power law predicts budgets that are
    left out at least as well. The intervals are in either case those of the law with an
    offset. `band` is as in PowerLaw.
    """

    x_name: str
    y_name: str
    offset: float
    coef: float
    exponent: float
    offset_interval: Interval
    coef_interval: Interval
    exponent_interval: Interval
    points: int
    x_min: float
    x_max: float
    rmse_log: float  # error of ln y around the law: sqrt(RSS / degrees of freedom)
    band: tuple[tuple[float, float, float], ...]
    # y = offset + middle_coef (x / middle)^exponent; as in PowerLaw.
    middle: float = 0.0
    middle_coef: float = 0.0
    middle_coef_interval: Interval | None = None

    def __call__(self, x: float) -> float:
        return self.offset + self.coef * x**self.exponent

    @property
    def bends(self) -> bool:
        """Whether the interval of the offset excludes 0, by 0.1% of the last y."""
        return self.offset_interval.low > 1e-3 * self(self.x_max)

    @property
    def identified(self) -> bool:
        """Whether the points bound the offset: from below, or well below the last y."""
        return self.bends or self.offset_interval.high < 0.95 * self(self.x_max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    intervals: Mapping[str, Interval]  # intervals of the constants and n_opt_exponent
    points: int
    rmse: float  # error of the loss around the surface: sqrt(RSS / (points - 5))
    n_opt_exponent: float  # beta / (alpha + beta)
    huber_delta: float | None = None  # None: least squares; else log-Huber width

    def __call__(self, n: float, d: float) -> float:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def n_opt(self, budget_flops: float) -> float:
        """The size of least loss under C = 6 N D (Hoffmann et al. 2022, Eq. 4)."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (
            1 / (self.alpha + self.beta)
        )
        return scale * (budget_flops / 6) ** self.n_opt_exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The largest budget, predicted from the smaller ones, beside its measurement."""

    quantity: str  # "N_opt" | "D_opt" | "L_opt"
    budget_flops: float
    predicted: float
    predicted_interval: Interval
    measured: float
    relative_error: float  # predicted / measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured value lies inside the predicted interval."""
        i = self.predicted_interval
        return i.low <= self.measured <= i.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossForm:
    """One form of the law of L_opt, and how well it predicts."""

    form: str  # "power": E = 0, the pure power law; "offset": E is fitted
    law: PowerLaw | OffsetLaw | Refusal
    # The rms of predicted / measured - 1, each budget predicted from all others; None:
    # fewer than 4 budgets.
    left_out_error: float | None
    held_out: HeldOut | Refusal | None  # None: no budget was held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The minimum of a budget, predicted by the law of all other budgets."""

    quantity: str  # "N_opt" | "D_opt" | "L_opt"
    budget_flops: float
    predicted: float
    measured: float
    relative_error: float  # predicted / measured - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinimaEstimate:
    """What one estimator of the minima says about N_opt, beside the others."""

    estimator: str  # see laws.estimators; "parabola, window 8"; "surface"
    minima: tuple[tuple[float, float, float], ...]  # budget, N_opt and L_opt
    exponent: float | None  # of N_opt; None: no law
    exponent_interval: Interval | None
    # The rms error of the loss at runs left out in turn; None: not known.
    run_error: float | None
    # The rms of ln(predicted / measured N_opt), budgets left out in turn.
    left_out_error: float | None
    held_out: HeldOut | None  # N_opt of the largest budget
    # Of the exponent from that of the first estimate, over the budgets of both, with
    # the interval of what noise makes of it; None: the first estimate, or no law.
    difference: float | None = None
    difference_interval: Interval | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """All results of one fit: laws, or the reasons why there is none."""

    metric: str  # what was fitted as the loss, e.g. "loss"; see Measurement
    size: str  # which N, e.g. "params_without_embeddings"
    parabolas: tuple[Parabola | Refusal, ...]
    # "N_opt", "D_opt", "L_opt" against budget; 0.1.0 had a PowerLaw of L_opt, too
    laws: Mapping[str, PowerLaw | OffsetLaw | Refusal]
    parametric: Parametric | Refusal
    held_out: tuple[HeldOut | Refusal, ...]
    excluded: tuple[str, ...]  # one line per point left out, with the reason
    bootstrap: int
    seed: int
    notes: tuple[str, ...] = ()  # doubts that are no refusals, a line each
    group: str = ""  # RunSpec.group of the runs; "": the study has one group
    weights: str = ""  # "raw" or an average's name; "": points that do not say it
    protocol_hash: str = ""  # of the fitted rows; "": points that do not say it
    loss_forms: tuple[LossForm, ...] = ()  # of L_opt, side by side; 0.1.0 had one
    estimator: str = "parabola"  # of the minima that the laws go through
    estimates: tuple[
        MinimaEstimate, ...
    ] = ()  # by all estimators, that of the laws first
    # The largest difference of an exponent of N_opt, over half of its interval: above
    # 1, estimators disagree; None: there is no other.
    disagreement: float | None = None
    left_out: tuple[LeftOut, ...] = ()  # each budget by the law of all others
