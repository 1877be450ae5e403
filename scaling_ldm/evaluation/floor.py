"""Two reference values of a Frechet distance: that of real pictures, and of noise.

The distance of n real pictures is not zero. This floor falls with n and depends on the
network. The distance of noise shows how much the network can tell apart at all in
pictures unlike those it was trained on. Both are measured in the same way as the
distance itself:

    fd_..._real    n held-out pictures against the other held-out ones
    fd_..._noise   n pictures of uniform noise against all held-out ones
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import numpy as np

from scaling_ldm import config
from scaling_ldm.evaluation import measures, reference
from scaling_ldm.evaluation.feature_store import StoredFeatures
from scaling_ldm.evaluation.reference import Extract, RealStatistics
from scaling_ldm.metrics import Estimate, Moments, frechet
from scaling_ldm.records.measurements import floors
from scaling_ldm.training.progress import Progress


def names(cfg: config.EvaluateConfig, real: RealStatistics) -> tuple[str, ...]:
    """The names of those that can be measured; from a file of statistics only noise."""
    if "fd" not in cfg.metrics:
        return ()
    (distance,) = measures.names("fd", cfg.network)
    of_real, of_noise = floors(distance)
    enough = real.load is not None and _drawn(real, 2**62) >= _least()
    return (of_real, of_noise) if enough else (of_noise,)


def measure(
    experiment: config.Experiment,
    folder: pathlib.Path,
    extract: Extract,
    real: RealStatistics,
) -> dict[str, tuple[Estimate, int]]:
    """{name of `names`: (distance, number of pictures)}.

    Args:
      folder: where features are stored.
      extract: the network, as an `extractors.Extractor`.
      real: what the generated pictures are compared with.
    """
    cfg, images = experiment.evaluate, experiment.generate.images
    found = {}
    for name in names(cfg, real):
        if name.endswith("_noise"):
            noise = _of_noise(experiment, folder, extract)
            value = frechet.distance(Moments.of(noise), real.moments)
            found[name] = Estimate.without_interval(float(value)), images
        else:
            found[name] = _of_real(cfg, real, images)
    return found


def _least() -> int:
    return measures.METRICS["fd"].minimum_images


def _drawn(real: RealStatistics, images: int) -> int:
    """How many real pictures are compared with the others: at most half of them."""
    return min(images, real.images // 2)


def _of_real(
    cfg: config.EvaluateConfig, real: RealStatistics, images: int
) -> tuple[Estimate, int]:
    features, n = real.features, _drawn(real, images)
    if features is None:
        raise ValueError("the reference holds no features of real pictures")
    order = np.random.default_rng(cfg.seed).permutation(len(features))
    ours, theirs = (Moments.of([features[part]]) for part in np.split(order, [n]))
    doubt = ""
    if n < images:
        doubt = (
            f"{n:,} of {real.images:,} real pictures against the others, not "
            f"{images:,}: a distance falls with their number"
        )
    value = float(frechet.distance(ours, theirs))
    return Estimate(value=value, low=value, high=value, level=1.0, doubt=doubt), n


def _of_noise(
    experiment: config.Experiment, folder: pathlib.Path, extract: Extract
) -> Iterator[np.ndarray]:
    """The features of uniform noise, batches [n, D], stored like those of pictures."""
    height, width = reference.picture_size(experiment)
    images, seed = experiment.generate.images, experiment.evaluate.seed

    def drawn(start: int) -> Iterator[tuple[np.ndarray, int]]:
        for first in range(start, images, reference.BATCH):
            count = min(reference.BATCH, images - first)
            rng = np.random.default_rng([seed, first])
            shape = (count, height, width, 3)
            yield rng.integers(0, 256, shape, dtype=np.uint8), first + count

    kept = StoredFeatures(
        folder,
        {
            "noise": "uniform",
            "seed": seed,
            "side": [height, width],
            "images": images,
            "network": extract.identity,
        },
    )
    every = experiment.train.show_every_seconds
    kept.extract_missing(
        extract, drawn, Progress("evaluate", images, "pictures of noise", every)
    )
    return (np.asarray(batch.features) for batch in kept.batches())
