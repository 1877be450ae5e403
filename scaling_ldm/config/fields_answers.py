"""Fields of fits, comparisons, questions to a finished study, and its report.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Whose laws are held against each other; config.fit says of which metrics."""

    # Working directories, as folders or URLs; the others are held against the first.
    # (): the groups of this study are.
    studies: tuple[str, ...] = ()
    # Groups of runs in these studies; the others are held against the first. (): all.
    groups: tuple[str, ...] = ()
    # FLOPs at which losses and equal compute are stated; (): the least, the middle and
    # the largest of those compared.
    budgets: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """One of two questions. `budget` asks for a sampler, the other three for a run."""

    # How to sample: what one image may cost, in `unit`; see frontier/advise.py.
    budget: float = 0.0
    unit: str = "seconds"  # one of ADVICE_UNITS
    # What to train, from one of these; see laws/planning.py. Training FLOPs,
    flops: float = 0.0
    hours: float = 0.0  # or hours of `chips` devices,
    loss: float = 0.0  # or the loss to reach
    chips: int = 1  # devices that train the run together
    # A device with a known peak (flops/peaks.py); "": where seconds were measured, or
    # none for training.
    device: str = ""
    dtype: str = "bfloat16"  # on another device: its peak for this type; one of DTYPES
    utilisation: float = 0.3  # assumed share of that peak
    # Model FLOP/s of one device in training, instead of `device`. 0: not given.
    flops_per_second: float = 0.0
    run: str = ""  # a finished run whose measured FLOP/s per device count instead
    price: float = 0.0  # of one device for an hour, in any currency; 0: not asked
    images: float = 0.0  # to be sampled with the model; their cost is counted, too
    # Where the laws are from: laws.json or a workdir, with #GROUP if it has several, or
    # published:STUDY of laws/published.json; "": this workdir.
    laws: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows beside the study."""

    # Studies of laws/published.json whose laws are drawn in the figures of the laws,
    # converted to C in FLOPs, N in parameters and D in tokens; "all": every one.
    published: tuple[str, ...] = ()
