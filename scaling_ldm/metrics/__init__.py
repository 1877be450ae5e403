"""Numbers of image quality from features and pixels; numpy and scipy only.

May import: records.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its two-sided interval at `level`, e.g. 0.9.

    doubt: why the value may be wrong by more than its interval says, or nothing.
    """

    value: float
    low: float
    high: float
    level: float
    doubt: str = ""
