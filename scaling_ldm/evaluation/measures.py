"""The metrics of config by name: what each needs, and its numbers with intervals."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.evaluation.reference import RealStatistics
from scaling_ldm.metrics import (
    Estimate,
    Moments,
    classifier_score,
    frechet,
    kernel,
    manifold,
)
from scaling_ldm.models.encoders import clip_score

# Papers call a Frechet distance FID only if its network is Inception of 2015.
FID = {"inception_pytorch_fid": "fid", "inception_torch_fidelity": "fid"}

Show = Callable[[int], Any]  # called with the number of resamples done


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated pictures as a feature network sees them.

    Attributes:
      features: [n, D].
      logits: [n, K] over classes; None if the network has none.
      captions: [n, D], vectors of the captions that were asked for; None if the network
        does not read captions, or no metric needs them.
    """

    features: np.ndarray
    logits: np.ndarray | None
    captions: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is measured.

    Attributes:
      measure: (settings, generated, real, show) -> an estimate for each of `numbers`.
      numbers: the names of its numbers; "{network}" stands for the network, "{fd}" for
        "fid" or "fd_{network}".
      minimum_images: the fewest generated pictures that it can be measured with.
      needs_real_features: the statistics of the real pictures are not enough.
    """

    measure: Callable[..., list[Estimate]]
    numbers: tuple[str, ...]
    minimum_images: int
    needs_real_features: bool = False


def names(metric: str, network: str) -> tuple[str, ...]:
    """The names of a metric's numbers when they are measured with a network."""
    fd = FID.get(network, f"fd_{network}")
    return tuple(n.format(fd=fd, network=network) for n in METRICS[metric].numbers)


def backend(cfg: config.EvaluateConfig, metric: str) -> str:
    """The library that computes a metric; only "fd" has a choice."""
    return cfg.backend if metric == "fd" else "numpy"


def measure(
    cfg: config.EvaluateConfig,
    metric: str,
    generated: Generated,
    real: RealStatistics,
    show: Show = lambda done: None,
) -> dict[str, Estimate]:
    """The numbers of one metric by name.

    Args:
      cfg: names the network and the resampling.
      metric: a name of METRICS.
      real: with features, if the metric needs them.
      show: called with the number of resamples that are done, if they take long.
    """
    found = METRICS[metric].measure(cfg, generated, real, show)
    return dict(zip(names(metric, cfg.network), found, strict=True))


def _given(array: np.ndarray | None, what: str) -> np.ndarray:
    """An array that a metric reads.

    Raises:
      ValueError: it is None.
    """
    if array is None:
        raise ValueError(f"this metric reads {what}, and there are none")
    return array


def _fd(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    ours = Moments.of([generated.features])
    value = frechet.distance(ours, real.moments, backend=cfg.backend)
    if not cfg.bootstrap:
        return [Estimate.without_interval(float(value))]
    around = frechet.interval(
        generated.features,
        frechet.Reference.of(real.moments),
        seed=cfg.seed,
        replicates=cfg.bootstrap,
        level=cfg.confidence,
        show=show,
    )
    return [dataclasses.replace(around, value=value)]


def _fd_infinity(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    return [
        frechet.infinity(
            generated.features,
            frechet.Reference.of(real.moments),
            seed=cfg.seed,
            replicates=cfg.bootstrap,
            level=cfg.confidence,
            show=show,
        )
    ]


def _kid(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    del show
    ours, theirs = generated.features, _given(real.features, "features of real ones")
    return [
        kernel.kid(
            ours,
            theirs,
            seed=cfg.seed,
            subset_size=min(1000, len(ours) // 2, len(theirs) // 2),
            level=cfg.confidence,
        )
    ]


def _precision_recall(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    """Precision and recall; the interval covers other generated pictures only."""
    del show
    theirs = _given(real.features, "features of real ones")
    if not cfg.bootstrap:
        found = manifold.compare(theirs, generated.features)
        return [
            Estimate.without_interval(value)
            for value in (found.precision, found.recall)
        ]
    return list(
        manifold.precision_recall(
            theirs,
            generated.features,
            seed=cfg.seed,
            replicates=cfg.bootstrap,
            level=cfg.confidence,
        )
    )


def _inception_score(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    del real, show
    logits = _given(generated.logits, "logits")
    return [classifier_score.inception_score(logits, level=cfg.confidence)]


def mean(values: np.ndarray, level: float) -> Estimate:
    """The mean of numbers of independent pictures, with its normal interval.

    Args:
      values: [n], of n pictures; one has no interval.
    """
    value = float(np.mean(values, dtype=np.float64))
    if len(values) < 2:
        return Estimate.without_interval(value)
    half = statistics.NormalDist().inv_cdf((1 + level) / 2)
    half *= float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Estimate.symmetric(value, half, level)


def _clip_score(
    cfg: config.EvaluateConfig, generated: Generated, real: RealStatistics, show: Show
) -> list[Estimate]:
    """The mean of 100 cosines, with the normal interval of a mean."""
    del real, show
    captions = _given(generated.captions, "vectors of captions")
    scores = np.asarray(clip_score.clip_score(generated.features, captions))
    return [mean(scores, cfg.confidence)]


# The keys are those of config.METRICS.
METRICS: dict[str, Metric] = {
    # Halves of the pictures are resampled.
    "fd": Metric(measure=_fd, numbers=("{fd}",), minimum_images=4),
    "fd_infinity": Metric(
        measure=_fd_infinity, numbers=("{fd}_infinity",), minimum_images=16
    ),
    "kid": Metric(
        measure=_kid,
        numbers=("kid_{network}",),
        minimum_images=4,
        needs_real_features=True,
    ),
    # A third neighbour in two thirds of the pictures needs 6 of them.
    "precision_recall": Metric(
        measure=_precision_recall,
        numbers=("precision_{network}", "recall_{network}"),
        minimum_images=6,
        needs_real_features=True,
    ),
    "inception_score": Metric(
        measure=_inception_score, numbers=("inception_score",), minimum_images=10
    ),
    "clip_score": Metric(
        measure=_clip_score, numbers=("clip_score",), minimum_images=2
    ),
}
