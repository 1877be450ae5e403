"""Numbers of image quality from features and pixels; numpy and scipy only."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its two-sided interval at `level`, e.g. 0.9."""

    value: float
    low: float
    high: float
    level: float
