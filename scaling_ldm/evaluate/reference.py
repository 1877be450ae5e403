"""Real pictures' features and statistics, computed once and kept with their origin.

evaluate/reference-<digest>.npz   Moments and where they are from
evaluate/reference-<digest>.npy   float32 features [n, D], for KID and precision
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from scaling_ldm import config, mesh, meters, records
from scaling_ldm.data import pictures
from scaling_ldm.evaluate.networks import Extractor
from scaling_ldm.metrics import moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Real:
    """Statistics of real pictures.

    features: None where a file gave the statistics alone.
    digest: of the statistics themselves.
    """

    moments: moments.Moments
    features: np.ndarray | None
    digest: str
    images: int


def held_out(
    experiment: config.Experiment, side: tuple[int, int], most: int
) -> Iterator[np.ndarray]:
    """Up to `most` real pictures of the validation split, uint8 [n, height, width, 3].

    They are the pictures themselves, not what an autoencoder makes of them. Unreadable
    ones are left out: the encode stage has named and counted them.
    """
    cfg = experiment.data
    if cfg.source == "icons":
        options: dict[str, Any] = {"count": most, "split": "validation"}
        options |= {"validation_fraction": cfg.validation_fraction, "seed": cfg.seed}
        found = pictures.open_pictures("icons", **options)
    else:
        found = pictures.of_experiment(experiment)
    batch, taken = [], 0
    for _, picture in pictures.read_ahead(
        found, range(len(found)), experiment.encode.workers, lambda picture: picture
    ):
        if isinstance(picture, pictures.BadRecord):
            continue
        if cfg.source != "icons" and not pictures.held_out(
            picture.caption, cfg.validation_fraction
        ):
            continue
        batch.append(pictures.fit(picture.image, *side))
        taken += 1
        if len(batch) == 256 or taken == most:
            yield np.stack(batch)
            batch = []
        if taken == most:
            return
    if batch:
        yield np.stack(batch)


def statistics(
    experiment: config.Experiment,
    folder: pathlib.Path,
    extract: Extractor,
    side: tuple[int, int],
) -> Real:
    """The real pictures' statistics: from config.evaluate.reference, cache, or anew.

    Raises:
      ConfigError: the file given holds none, or of another network; no picture is held
        out.
    """
    cfg = experiment.evaluate
    if cfg.reference:
        return _given(cfg.reference, extract)
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
    digest = records.digest(provenance)
    path = folder / f"reference-{digest}.npz"
    if not path.exists():
        meters.say(
            f"evaluate: features of up to {cfg.reference_images:,} real pictures"
        )
        parts = [
            extract(images).features
            for images in held_out(experiment, side, cfg.reference_images)
        ]
        if not parts:
            raise config.ConfigError(
                "config.evaluate: no picture is held out to compare with; raise "
                "config.data.validation_fraction, or give config.evaluate.reference"
            )
        features = np.concatenate(parts)
        if mesh.is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, features, allow_pickle=False)
            os.replace(temporary, path.with_suffix(".npy"))
            total = moments.Moments.empty(features.shape[1])
            total.add(features)
            total.save(path, provenance | {"images": len(features)})
    mesh.barrier("reference")
    total, held = moments.Moments.load(path)
    features = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    return Real(
        moments=total,
        features=features,
        digest=total.digest(),
        images=int(held["images"]),
    )


def _given(name: str, extract: Extractor) -> Real:
    path = pathlib.Path(name).expanduser()
    try:
        total, held = moments.Moments.load(path)
    except (OSError, ValueError, KeyError) as e:
        raise config.ConfigError(f"config.evaluate.reference = {name!r}: {e}") from e
    network = held.get("network")
    if network is not None and network != extract.identity:
        raise config.ConfigError(
            f"config.evaluate.reference = {name!r} is of the network {network}, wanted "
            f"{extract.identity}"
        )
    return Real(
        moments=total,
        features=None,
        digest=total.digest(),
        images=int(total.count),
    )
