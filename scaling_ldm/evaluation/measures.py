"""From config's names of metrics to numbers with intervals."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.evaluation.reference import Real
from scaling_ldm.metrics import (
    Estimate,
    Moments,
    classifier_score,
    frechet,
    kernel,
    manifold,
)
from scaling_ldm.models.encoders import clip_score

# What papers call a Frechet distance on the 2015 Inception network; no other is FID.
FID = {"inception_pytorch_fid": "fid", "inception_torch_fidelity": "fid"}


Show = Callable[[int], Any]  # of how many are done
LEAST = {  # pictures
    "fd": 4,  # of which halves are resampled
    "fd_infinity": 16,
    "kid": 4,
    "precision_recall": 6,  # of which two thirds have a third neighbour
    "inception_score": 10,
    "clip_score": 2,
}


# Metrics that the statistics of real pictures are not enough for.
OF_REAL_FEATURES = ("kid", "precision_recall")


def names(metric: str, network: str) -> tuple[str, ...]:
    """What the numbers of a metric are called when measured with a network."""
    match metric:
        case "fd":
            return (FID.get(network, f"fd_{network}"),)
        case "fd_infinity":
            return (FID.get(network, f"fd_{network}") + "_infinity",)
        case "precision_recall":
            return (f"precision_{network}", f"recall_{network}")
        case "inception_score" | "clip_score":
            return (metric,)
        case _:
            return (f"{metric}_{network}",)


def backend(cfg: config.EvaluateConfig, metric: str) -> str:
    """What computes a metric: the choice is the plain Frechet distance's alone."""
    return cfg.backend if metric == "fd" else "numpy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Generated pictures as a network sees them.

    words: [n, D] of what they were asked to show, where the network reads.
    """

    features: np.ndarray
    logits: np.ndarray | None
    words: np.ndarray | None


def measure(
    cfg: config.EvaluateConfig,
    metric: str,
    features: Generated,
    real: Real,
    show: Show = lambda done: None,
) -> dict[str, Estimate]:
    """The numbers of one metric by name.

    Args:
      real: with features for OF_REAL_FEATURES.
      show: told how many resamples are done, where they are what takes long.
    """
    found = _MEASURES[metric](cfg, features, real, show)
    return dict(zip(names(metric, cfg.network), found, strict=True))


def _fd(
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    ours = Moments.of([features.features])
    value = frechet.distance(ours, real.moments, backend=cfg.backend)
    if not cfg.bootstrap:
        return [_exact(value)]
    around = frechet.interval(
        features.features,
        frechet.Reference.of(real.moments),
        seed=cfg.seed,
        replicates=cfg.bootstrap,
        level=cfg.confidence,
        show=show,
    )
    return [dataclasses.replace(around, value=value)]


def _fd_infinity(
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    return [
        frechet.infinity(
            features.features,
            frechet.Reference.of(real.moments),
            seed=cfg.seed,
            replicates=cfg.bootstrap,
            level=cfg.confidence,
            show=show,
        )
    ]


def _kid(
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    del show
    ours, theirs = features.features, real.features
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
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    """The interval is of other generated pictures; the real ones are fixed."""
    del show
    theirs = real.features
    if not cfg.bootstrap:
        found = manifold.compare(theirs, features.features)
        return [_exact(found.precision), _exact(found.recall)]
    return list(
        manifold.precision_recall(
            theirs,
            features.features,
            seed=cfg.seed,
            replicates=cfg.bootstrap,
            level=cfg.confidence,
        )
    )


def _inception_score(
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    del real, show
    return [classifier_score.inception_score(features.logits, level=cfg.confidence)]


def _clip_score(
    cfg: config.EvaluateConfig, features: Generated, real: Real, show: Show
) -> list[Estimate]:
    """Mean of 100 cosines; the interval is the normal one of a mean."""
    del real, show
    scores = np.asarray(clip_score.clip_score(features.features, features.words))
    mean = float(np.mean(scores, dtype=np.float64))
    half = statistics.NormalDist().inv_cdf((1 + cfg.confidence) / 2)
    half *= float(np.std(scores, ddof=1)) / len(scores) ** 0.5
    return [
        Estimate(value=mean, low=mean - half, high=mean + half, level=cfg.confidence)
    ]


def _exact(value: float) -> Estimate:
    return Estimate(value=float(value), low=float(value), high=float(value), level=1.0)


_MEASURES: dict[str, Callable[[config.EvaluateConfig, Generated, Real, Show], Any]] = {
    "fd": _fd,
    "fd_infinity": _fd_infinity,
    "kid": _kid,
    "precision_recall": _precision_recall,
    "inception_score": _inception_score,
    "clip_score": _clip_score,
}
