"""A measured value with its interval."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its two-sided interval.

    Attributes:
      value: the measured number.
      low: the lower end of the interval.
      high: the upper end of the interval.
      level: the share of such intervals that hold the true number, for example 0.9.
      doubt: why the value may be wrong by more than its interval says; empty if there
        is no reason.
    """

    value: float
    low: float
    high: float
    level: float
    doubt: str = ""

    @classmethod
    def symmetric(cls, value: float, half_width: float, level: float) -> Estimate:
        """A value with an interval of equal halves around it."""
        return cls(
            value=value, low=value - half_width, high=value + half_width, level=level
        )

    @classmethod
    def without_interval(cls, value: float) -> Estimate:
        """A value whose spread was not measured: its interval has no width."""
        return cls(value=value, low=value, high=value, level=1.0)
