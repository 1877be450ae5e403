"""What to train, as lines for people: a run, what other sizes cost, and doubts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from scaling_ldm.laws import converted, planning
from scaling_ldm.laws.converted import ConvertedStudy
from scaling_ldm.laws.planning import Alternative, Prediction, Reached
from scaling_ldm.records import FitResult, Interval, Refusal, RunSpec
from scaling_ldm.records.measurements import in_words

_ENOUGH_STEPS = 100  # fewer optimizer steps are no training
_FAR_SHAPE = 1.25  # a buildable shape off by more than this factor gives a warning
_SIZES = {
    "params": "all parameters",
    "params_without_embeddings": "parameters without embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast the devices train together."""

    flops_per_second: float  # model FLOP/s of all devices
    devices: int
    basis: str  # e.g. "tpu-v5e at 0.4 of its bfloat16 peak"
    price: float  # of one device for an hour; 0: not given

    def hours(self, flops: float) -> float:
        return flops / self.flops_per_second / 3600


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingAdvice:
    """The best run within a budget by some laws, and what else there is.

    `size`, `tokens` and `loss` are what the laws say, `run` what can be built and what
    it takes. A published law says no interval and no loss.
    """

    source: str  # whose laws, for people
    budget_flops: float
    level: float | None  # of the intervals; None: there are none
    counts: str  # what N counts
    metric: str  # what the loss is; "": none
    reached: Reached | None  # the loss that was asked for
    size: float
    size_interval: Interval | None
    tokens: Prediction | Refusal
    loss: Prediction | Refusal
    outside: float | None  # factor from the fitted budgets; None: they are not known
    domain: tuple[float, float] | None  # FLOPs of the fitted budgets
    run: RunSpec | None  # None: no network can be planned, `doubts` says why
    speed: Speed | None
    others: Sequence[Alternative | Refusal]  # the best size first
    others_from: str  # where their losses are from
    images: float  # to be sampled; 0: not asked
    published: Sequence[tuple[str, float, float]]  # (label, N, D by C = 6 N D)
    doubts: Sequence[str]


def size_at(
    laws: FitResult | ConvertedStudy, budget: float
) -> tuple[float, Interval | None, float | None] | Refusal:
    """(the best N of a budget, its interval, how far outside of the fitted budgets).

    Args:
      laws: of a study of one's own, or published ones; these have no interval.
      budget: training FLOPs.
    """
    if isinstance(laws, FitResult):
        found = planning.predict(laws, "N_opt", budget)
        if isinstance(found, Refusal):
            return found
        return found.value, found.interval, found.outside
    law = laws.laws["N_opt"]
    if isinstance(law, Refusal):
        return law
    far = planning.outside(*laws.domain, budget) if laws.domain else None
    return law(budget), None, far


def training_advice(
    laws: FitResult | ConvertedStudy,
    source: str,
    *,
    budget: float = 0.0,
    loss: float = 0.0,
    speed: Speed | None = None,
    images: float = 0.0,
    plan: Callable[[float, float], tuple[RunSpec | None, str]],
    sampling: Callable[[RunSpec], float],
) -> TrainingAdvice | Refusal:
    """The best run for a budget, or for the loss that it is to reach.

    Args:
      laws: of a study, or published ones.
      source: their name for people.
      budget: training FLOPs; 0: those at which `loss` is reached.
      loss: to reach.
      speed: of the devices; None: hours and money are not said.
      images: that the model will draw.
      plan: (N, FLOPs) -> the run of the nearest network that can be built; or None, and
        why there is none.
      sampling: a run -> the FLOPs of one drawn image.

    Returns:
      A Refusal where the law of N, or of the loss that is asked for, is refused.
    """
    asked = f"advice for {budget:.4g} FLOPs" if budget else f"advice for loss {loss:g}"
    reached = None
    if not budget:
        reached = _reached(laws, loss)
        if isinstance(reached, Refusal):
            return dataclasses.replace(reached, quantity=asked)
        budget = reached.budget_flops
    size = size_at(laws, budget)
    if isinstance(size, Refusal):
        return dataclasses.replace(size, quantity=asked)
    n, interval, far = size
    run, why = plan(n, budget)
    others, others_from = _others(laws, budget, run, sampling)
    fitted = isinstance(laws, FitResult)
    return TrainingAdvice(
        source=source,
        budget_flops=budget,
        level=interval.level if interval else None,
        counts=_SIZES.get(laws.size, laws.size) if fitted else laws.counts,
        metric=in_words(laws.metric, laws.weights) if fitted else "",
        reached=reached,
        size=n,
        size_interval=interval,
        tokens=_at(laws, "D_opt", budget),
        loss=_at(laws, "L_opt", budget),
        outside=far,
        domain=_domain(laws),
        run=run,
        speed=speed,
        others=others,
        others_from=others_from,
        images=images,
        published=[] if not fitted else list(_published(budget)),
        doubts=[*([why] if why else []), *_doubts(laws, n, run, far, loss, reached)],
    )


def _reached(laws: FitResult | ConvertedStudy, loss: float) -> Reached | Refusal:
    if isinstance(laws, FitResult):
        return planning.budget_of_loss(laws, loss)
    found = laws.laws["L_opt"]
    assert isinstance(found, Refusal)
    return found


def _at(
    laws: FitResult | ConvertedStudy, quantity: str, budget: float
) -> Prediction | Refusal:
    if isinstance(laws, FitResult):
        return planning.predict(laws, quantity, budget)
    law = laws.laws[quantity]
    if isinstance(law, Refusal):
        return law
    value = law(budget)
    nothing = Interval(low=math.nan, high=math.nan, level=math.nan)
    return Prediction(value=value, interval=nothing, outside=math.nan)


def _others(
    laws: FitResult | ConvertedStudy,
    budget: float,
    run: RunSpec | None,
    sampling: Callable[[RunSpec], float],
) -> tuple[list[Alternative | Refusal], str]:
    """Other sizes, with tokens and sampling in proportion to those of the run."""
    if not isinstance(laws, FitResult):
        what, why = "published laws", "no curves of the loss against the size"
        return [Refusal(quantity=what, reason=why, detail="")], ""
    if run is None:
        return [Refusal(quantity="network", reason="none planned", detail="")], ""
    own = float(getattr(run, laws.size))
    tokens, each = run.tokens / run.planned_flops * own, sampling(run) / own
    return planning.alternatives(
        laws,
        budget,
        tokens_per_flop=lambda n: tokens / n,
        sampling_flops=lambda n: each * n,
    )


def _published(budget: float) -> Iterator[tuple[str, float, float]]:
    """What the recommended laws of diffusion models of pictures say of the budget."""
    for study, laws in converted.studies().items():
        found = converted.converted(study)
        law = found.laws["N_opt"]
        if laws[0].headline and found.subject == "text to image":
            if not isinstance(law, Refusal):
                n = law(budget)
                yield f"{study} ({found.estimator})", n, budget / (6 * n)


def _doubts(
    laws: FitResult | ConvertedStudy,
    n: float,
    run: RunSpec | None,
    far: float | None,
    loss: float,
    reached: Reached | None,
) -> Iterator[str]:
    if far is None:
        yield "the budgets that these laws were fitted over are not known"
    elif far > 1:
        low, high = _domain(laws) or (math.nan, math.nan)
        yield (
            f"{far:.3g} times outside of the fitted budgets, {low:.3g} to {high:.3g} "
            "FLOPs: an extrapolation"
        )
    if reached is not None and math.isinf(reached.interval.high):
        yield (
            f"no compute may reach loss {loss:g}: the upper end of the loss's interval "
            "stays above it"
        )
    if run is None:
        return
    own = getattr(run, laws.size) if isinstance(laws, FitResult) else run.params
    factor = max(own / n, n / own)
    if factor > _FAR_SHAPE:
        yield f"the nearest network is {factor:.3g} times off the best size"
    if run.steps < _ENOUGH_STEPS:
        yield f"{run.steps} optimizer steps are too few: lower config.train.batch_size"
    if isinstance(laws, FitResult):
        yield from laws.notes
    else:
        yield "other data, networks and losses than yours, and N and D as they count"


def _domain(laws: FitResult | ConvertedStudy) -> tuple[float, float] | None:
    """FLOPs of the fitted budgets."""
    if not isinstance(laws, FitResult):
        return laws.domain
    law = laws.laws["N_opt"]
    return (law.x_min, law.x_max) if not isinstance(law, Refusal) else None
