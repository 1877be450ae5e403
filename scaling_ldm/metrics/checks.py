"""Checks of arguments that the metrics share."""

from __future__ import annotations

import numpy as np


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises ValueError if a value is not finite. It says how many, and the first."""
    finite = np.isfinite(values)
    if not finite.all():
        wrong = np.argwhere(~finite)
        raise ValueError(
            f"{len(wrong)} of {values.size} {what} are not finite, the first at "
            f"{tuple(int(i) for i in wrong[0])}"
        )


def check_level(level: float) -> None:
    """Raises ValueError if the level of an interval is not between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def check_replicates(count: int, what: str = "replicates") -> None:
    """Raises ValueError if there are fewer than two, which show no spread."""
    if count < 2:
        raise ValueError(f"{count} {what}; at least 2 are needed")
