"""Fields of the stage fit.

The comment of a field stands on its line or directly above it, as in fields.py.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Which laws are fitted."""

    # What counts as the loss: metrics of the table of measurements, e.g. "fd_clip".
    metrics: tuple[str, ...] = ("loss",)
    weights: str = ""  # "raw", an average's name, or "": the run's first average
    # Which protocol to fit if a metric was measured by several: the first characters of
    # its hash, at most one for each metric. Otherwise the one that all runs have.
    protocols: tuple[str, ...] = ()
    size: str = "params_without_embeddings"  # what N counts; one of FIT_SIZES
    confidence: float = 0.9  # level of the intervals
    bootstrap: int = 1000  # draws, at least 50
    seed: int = 0  # seed of the bootstrap draws
    # Of the minima of isoFLOP curves: one of FIT_ESTIMATORS. "auto": the better of
    # parabola and shape at runs that are left out in turn.
    estimator: str = "auto"
    # The largest factor in N around the size of least loss that a curve uses; 0: all.
    window: float = 0.0
    huber: float = 0.0  # width of the surface's Huber loss of ln L; 0: least squares
    extend: float = 4.0  # prediction bands reach this factor beyond the largest budget
