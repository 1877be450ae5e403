"""Real pictures' features and statistics, computed once and kept with their origin.

evaluate/reference-<digest>.npz   Moments and where they are from
evaluate/features/   float32 features, for KID and precision: see `kept`
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.data import pictures
from scaling_ldm.evaluation.extractors import Extractor
from scaling_ldm.evaluation.feature_store import Kept
from scaling_ldm.metrics import Moments
from scaling_ldm.models import pretrained
from scaling_ldm.training import mesh, progress

BATCH = 256  # pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
    """Statistics of real pictures.

    digest: of the pictures and of how the network sees them, which rounding does not
      change; of the statistics where a file does not say it.
    load: their features [images, D]; None where a file gave the statistics alone.
    """

    moments: Moments
    load: Callable[[], np.ndarray] | None
    digest: str
    images: int

    @functools.cached_property
    def features(self) -> np.ndarray | None:
        """In memory from the first use on."""
        return self.load and self.load()


def held_out(
    experiment: config.Experiment, side: tuple[int, int], most: int, start: int = 0
) -> Iterator[tuple[np.ndarray, int]]:
    """Real pictures of the validation split, in the order of their source.

    They are the pictures themselves, not what an autoencoder makes of them. Unreadable
    ones are left out: the encode stage has named and counted them.

    Args:
      most: pictures in all.
      start: position in the source.

    Yields:
      uint8 [n, height, width, 3], and the position in the source behind them.
    """
    cfg = experiment.data
    if most < 1:
        return
    if cfg.source == "icons":
        options: dict[str, Any] = {"count": start + most, "split": "validation"}
        options |= {"validation_fraction": cfg.validation_fraction, "seed": cfg.seed}
        found = pictures.open_pictures("icons", **options)
    else:
        found = pictures.of_experiment(experiment)
    batch, taken = [], 0
    for index, picture in pictures.read_ahead(
        found,
        range(start, len(found)),
        experiment.encode.workers,
        lambda picture: picture,
    ):
        if isinstance(picture, pictures.BadRecord):
            continue
        if cfg.source != "icons" and not pictures.held_out(
            picture.caption, cfg.validation_fraction
        ):
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
    folder: pathlib.Path,
    extract: Extractor,
    side: tuple[int, int],
) -> Real:
    """The real pictures' statistics: from config.evaluate.reference, kept, or anew.

    Raises:
      ConfigError: as `given`; no picture is held out.
    """
    cfg = experiment.evaluate
    if cfg.reference:
        return given(cfg.reference, extract.identity)
    provenance = {
        "source": experiment.data.source,
        "split": "validation",
        "fraction": experiment.data.validation_fraction,
        "seed": experiment.data.seed,
        "path": pathlib.PurePath(experiment.data.path).name,
        "data_split": experiment.data.split,
        "side": list(side),
        "most": cfg.reference_images,
        "network": extract.identity,
    }
    kept = Kept(folder, provenance)
    kept.fill(
        extract,
        lambda start: held_out(
            experiment, side, cfg.reference_images - kept.images, start
        ),
        progress.Progress(
            "evaluate",
            cfg.reference_images,
            "real pictures at most",
            experiment.train.show_every_seconds,
        ),
    )
    if not kept.images:
        raise config.ConfigError(
            "config.evaluate: no picture is held out to compare with; raise "
            "config.data.validation_fraction, or give config.evaluate.reference"
        )
    path = folder / f"reference-{records.digest(provenance)}.npz"
    digest = records.digest({"pictures": kept.pictures(), "network": extract.identity})
    if mesh.is_primary() and _digest_of(path) != digest:
        total = Moments.of(features for features, _ in kept.parts())
        total.save(path, provenance | {"images": kept.images, "digest": digest})
    mesh.barrier("reference")
    total, _ = Moments.load(path)
    return Real(
        moments=total,
        load=lambda: kept.all().features,
        digest=digest,
        images=kept.images,
    )


def _digest_of(path: pathlib.Path) -> str | None:
    """Of statistics that are kept; None where they are not, or are damaged."""
    try:
        return Moments.load(path)[1].get("digest")
    except (OSError, ValueError):
        return None


def given(name: str, identity: Mapping[str, str]) -> Real:
    """Of a file that an evaluation left behind, or that `Moments.save` wrote.

    Args:
      identity: of the network, as a protocol names it.

    Raises:
      ConfigError: it holds no statistics, or those of another network.
    """
    where, path = f"config.evaluate.reference = {name!r}", pathlib.Path(name)
    try:
        total, provenance = Moments.load(path.expanduser())
    except (OSError, ValueError) as e:
        raise config.ConfigError(
            f"{where} is no evaluate/reference-*.npz as an evaluation leaves it: {e}"
        ) from e
    network = provenance.get("network", identity)
    differing = [
        f"{part} {network.get(part)!r} there, {identity[part]!r} wanted"
        for part in identity
        if network.get(part) != identity[part]
    ]
    if differing:
        raise config.ConfigError(
            f"{where} was measured another way: {'; '.join(differing)}"
        )
    return Real(
        moments=total,
        load=None,
        digest=provenance.get("digest", total.digest()),
        images=total.count,
    )


def side(experiment: config.Experiment) -> tuple[int, int]:
    """Height and width of the pictures that an experiment's samples become."""
    H, W, _ = experiment.data.shape
    name = experiment.encode.autoencoder
    factor = 1 if name == "none" else pretrained.autoencoder_identity(name)["factor"]
    return H * factor, W * factor
