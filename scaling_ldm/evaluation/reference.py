"""Features and statistics of real pictures, computed once and stored with their origin.

evaluate/reference-<digest>.npz   Moments, with the network and pictures they are of
evaluate/features/   float32 features, for KID and precision: see `feature_store`
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from scaling_ldm import config, data, records
from scaling_ldm.config import mix
from scaling_ldm.data import pictures, split, stored_split
from scaling_ldm.evaluation.feature_store import StoredFeatures
from scaling_ldm.metrics import Moments
from scaling_ldm.models import pretrained
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.training import mesh
from scaling_ldm.training.progress import Progress

BATCH = 256  # pictures of a batch of features


@runtime_checkable
class Extract(Protocol):
    """Pictures to features, as `extractors.Extractor` does it."""

    identity: dict[str, str]

    def __call__(self, images: np.ndarray) -> Features: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealStatistics:
    """Statistics of real pictures.

    Attributes:
      moments: mean and covariance of their features.
      load: reads their features [images, D]; None if a file gave only the moments.
      digest: of the pictures and of the network's settings, so that rounding does not
        change it. If a file lacks it, the digest of the moments.
      images: number of pictures.
    """

    moments: Moments
    load: Callable[[], np.ndarray] | None
    digest: str
    images: int

    @functools.cached_property
    def features(self) -> np.ndarray | None:
        """Their features [images, D], in memory from the first use on."""
        return self.load() if self.load else None


def held_out(
    experiment: config.Experiment,
    side: tuple[int, int],
    most: int,
    start: int = 0,
    chosen: split.Split | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Real pictures of the validation split, in the order of their source.

    They are the pictures themselves, not what an autoencoder makes of them. Unreadable
    pictures are left out: the encode stage has named and counted them.

    Args:
      side: (height, width) that the pictures are resized to.
      most: the largest number of pictures.
      start: position in the source of the first picture to look at.
      chosen: the split of the records; None for the hash of each caption, or that of
        the source itself.

    Yields:
      uint8 [n, height, width, 3], and the position in the source after them.

    Raises:
      ConfigError: the pictures are not those of the split.
    """
    part = mix.held_out_part(experiment)
    if most < 1:
        return
    found = pictures.of_experiment(part, start + most)
    if chosen is None:
        positions = np.arange(start, len(found))
    else:
        if chosen.size != len(found):
            raise config.ConfigError(
                f"{part.data.path} holds {len(found):,} pictures, and the records were "
                f"made of {chosen.size:,}: put back those that were encoded"
            )
        positions = chosen.positions[chosen.held_out]
        positions = positions[positions >= start]
    batch, taken = [], 0
    for index, picture in pictures.read_ahead(
        found,
        positions,
        experiment.encode.workers,
        lambda picture: picture,
    ):
        if isinstance(picture, pictures.BadRecord):
            continue
        if chosen is None and not pictures.is_held_out(picture, part.data):
            continue
        batch.append(pictures.fit(picture.image, *side))
        taken += 1
        if len(batch) == BATCH or taken == most:
            yield np.stack(batch), index + 1
            batch = []
        if taken == most:
            return
    if batch:
        yield np.stack(batch), len(found)


def statistics(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    extract: Extract,
    side: tuple[int, int],
) -> RealStatistics:
    """The statistics of real pictures: read from a file, stored before, or made now.

    Args:
      workdir: of the study; they and the features are stored in evaluate/.
      extract: the network; its `identity` is stored with the statistics.
      side: (height, width) of the pictures.

    Raises:
      ConfigError: as `from_file`; no picture is held out; or the records, which say
        which pictures are, are missing.
    """
    cfg = experiment.evaluate
    if cfg.reference:
        return from_file(cfg.reference, extract.identity)
    folder, part = workdir / "evaluate", mix.held_out_part(experiment).data
    chosen = _split_of(experiment, workdir)
    provenance = {
        "source": part.source,
        "split": "validation",
        "fraction": part.validation_fraction,
        "seed": part.seed,
        "path": pathlib.PurePath(part.path).name,
        "data_split": part.split,
        "side": list(side),
        "most": cfg.reference_images,
        "network": extract.identity,
    }
    if chosen is not None:
        provenance["held_out"] = chosen.summary["digest"]
    if part.captions:  # they decide which pictures are held out
        provenance["captions"] = part.captions
    stored = StoredFeatures(folder, provenance)
    stored.extract_missing(
        extract,
        lambda start: held_out(
            experiment, side, cfg.reference_images - stored.images, start, chosen
        ),
        Progress(
            "evaluate",
            cfg.reference_images,
            "real pictures at most",
            experiment.train.show_every_seconds,
        ),
    )
    if not stored.images:
        raise config.ConfigError(
            "config.evaluate: no picture is held out to compare with; raise "
            "config.data.validation_fraction, or give config.evaluate.reference"
        )
    path = folder / f"reference-{records.digest(provenance)}.npz"
    digest = records.digest(
        {"pictures": stored.pictures_sha256(), "network": extract.identity}
    )
    if mesh.is_primary() and _digest_of(path) != digest:
        total = Moments.of(np.asarray(batch.features) for batch in stored.batches())
        total.save(path, provenance | {"images": stored.images, "digest": digest})
    mesh.barrier("reference")
    total, _ = Moments.load(path)
    return RealStatistics(
        moments=total,
        load=lambda: np.asarray(stored.load().features),
        digest=digest,
        images=stored.images,
    )


def _split_of(
    experiment: config.Experiment, workdir: pathlib.Path
) -> split.Split | None:
    """The split of the pictures that are compared with; see `held_out`."""
    (name,) = mix.held_out_parts(experiment)
    part, folder = data.parts(experiment, workdir)[name]
    ruled = part.data.split_by == "caption_alone" or part.data.source in config.ENDLESS
    return None if ruled else stored_split.read_split(folder)


def _digest_of(path: pathlib.Path) -> str | None:
    """The digest in a file of statistics; None if it is not there, or damaged."""
    try:
        return Moments.load(path)[1].get("digest")
    except (OSError, ValueError):
        return None


def from_file(name: str, identity: Mapping[str, str]) -> RealStatistics:
    """The statistics in a file that an evaluation left, or that `Moments.save` wrote.

    Args:
      name: the path, as config.evaluate.reference gives it.
      identity: of the network, as a protocol names it.

    Raises:
      ConfigError: the file holds no statistics, or those of another network.
    """
    where, path = f"config.evaluate.reference = {name!r}", pathlib.Path(name)
    try:
        total, provenance = Moments.load(path.expanduser())
    except (OSError, ValueError) as e:
        raise config.ConfigError(
            f"{where} is not an evaluate/reference-*.npz of an evaluation: {e}"
        ) from e
    network = provenance.get("network", identity)
    differing = [
        f"{part} {network.get(part)!r} there, {identity[part]!r} wanted"
        for part in identity
        if network.get(part) != identity[part]
    ]
    if differing:
        raise config.ConfigError(
            f"{where} was measured in another way: {'; '.join(differing)}"
        )
    return RealStatistics(
        moments=total,
        load=None,
        digest=provenance.get("digest", total.digest()),
        images=total.count,
    )


def picture_size(experiment: config.Experiment) -> tuple[int, int]:
    """(height, width) of the pictures that an experiment generates."""
    H, W, _ = experiment.data.shape
    name = experiment.encode.autoencoder
    factor = 1 if name == "none" else pretrained.autoencoder_identity(name)["factor"]
    return H * factor, W * factor
