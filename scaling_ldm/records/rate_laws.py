"""The results of a fit of learning rates: best rates, their law, and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scaling_ldm.records.laws import Interval, Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestRate:
    """The learning rate of least loss of one size, one length and one batch."""

    params: float
    tokens: float
    batch_size: float  # pictures of an optimizer step
    rates: int  # distinct rates that were trained
    points: int  # runs that the parabola in ln rate goes through
    curvature: float  # a > 0 of loss = a (ln rate - ln best)^2 + loss
    rate: float  # the vertex
    rate_interval: Interval  # by Fieller's theorem
    loss: float  # at the best rate
    lost_at_half: float | None  # loss at half the best rate, minus `loss`
    lost_at_double: float | None  # None: the rates do not reach so far
    budget_flops: float | None = None  # planned; None: not one budget, or not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateLaw:
    """rate = coef N^b D^c B^d, fitted in logarithms over best rates."""

    coef: float
    exponents: Mapping[str, float]  # of those of params, tokens, batch_size that vary
    intervals: Mapping[str, Interval]  # of coef and of each exponent
    held: Mapping[str, float]  # what does not vary, and its value
    points: int  # best rates that were fitted
    rmse_log: float  # error of ln rate around the law, with its degrees of freedom

    def __call__(self, params: float, tokens: float, batch_size: float) -> float:
        """The rate. What does not vary in the data must have its value in `held`.

        Raises:
          ValueError: it has another one, so that the law says nothing.
        """
        given = {"params": params, "tokens": tokens, "batch_size": batch_size}
        for name, value in self.held.items():
            if abs(given[name] / value - 1) > 1e-6:
                raise ValueError(
                    f"the law was measured at {name} = {value:.6g} alone, and is asked "
                    f"at {given[name]:.6g}"
                )
        rate = self.coef
        for name, exponent in self.exponents.items():
            rate *= given[name] ** exponent
        return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateFit:
    """All results of one fit of learning rates."""

    metric: str  # what was fitted as the loss
    size: str  # which N, e.g. "params_without_embeddings"
    best: tuple[BestRate | Refusal, ...]  # by size, length and batch, ascending
    law: RateLaw | Refusal  # through the best rates
    excluded: tuple[str, ...]  # one line per run left out, with the reason
    noise: float | None  # deviation of one run's loss; None: the runs do not tell it
    noise_dof: int  # degrees of freedom of that
    # (N, tokens, batch size, rate, loss) of every run that was used.
    runs: tuple[tuple[float, ...], ...] = ()
    group: str = ""  # what the runs share beside size, length, batch, rate and seed
    weights: str = ""  # "raw" or an average's name; "": rows that do not say it
    protocol_hash: str = ""  # of the rows; "": rows that do not say it
