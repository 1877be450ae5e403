"""Stores features of pictures batch by batch, so that a stopped extraction continues.

    evaluate/features/<digest>/00000.npz   a batch: features, logits if there are any,
        the counts behind it, SHA-256 of the pictures, and the place of this file
    evaluate/features/<digest>/about.json   what the features are of; written last

The folder may be deleted at any time: its features are then extracted again.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.records.errors import NO_ARRAYS
from scaling_ldm.training import mesh
from scaling_ldm.training.progress import Progress


class StoredFeatures:
    """Features of a sequence of pictures, in batches.

    Args:
      folder: where the folder "features" lies.
      of: everything that the features depend on, as a JSON value.

    Attributes:
      images: number of pictures whose features are stored.
      after: the position in the sequence after the last of them. It is larger than
        `images` if pictures were left out.
      complete: no more pictures will come.
    """

    def __init__(self, folder: pathlib.Path, of: dict[str, Any]) -> None:
        self._folder = folder / "features" / records.digest(of)
        self._of = of
        self._count = self.images = self.after = 0
        while self._path(self._count).exists():
            self._count += 1
        if self._count:
            last = self._read(self._count - 1)
            self.images, self.after = int(last["images"]), int(last["after"])
        about = self._folder / "about.json"
        self.complete = (
            about.exists()
            and records.read_json(about, "images")["images"] == self.images
        )

    def extract_missing(
        self,
        extract: Callable[[np.ndarray], Features],
        pictures: Callable[[int], Iterable[tuple[np.ndarray, int]]],
        progress: Progress,
    ) -> None:
        """Extracts the features that are missing; all processes call it together.

        Args:
          extract: pictures of a batch -> their features.
          pictures: position -> batches of the pictures from there on, each with the
            position after it.
          progress: shows how many pictures are done.
        """
        if self.complete:
            return
        mesh.barrier("features")  # no process writes before all have looked
        progress.begin()
        for images, after in pictures(self.after):
            self._add(images, extract(images), after)
            progress.show(self.images)
        if mesh.is_primary():
            about = {"of": self._of, "images": self.images}
            path = self._folder / "about.json"
            records.write_json(path, about)
        mesh.barrier("features-kept")
        self.complete = True

    def pictures_sha256(self) -> str:
        """SHA-256 of the pictures, from their bytes and their batches."""
        sha = hashlib.sha256()
        for number in range(self._count):
            sha.update(self._read(number)["sha256"].tobytes())
        return sha.hexdigest()

    def batches(self) -> Iterator[Features]:
        """The features batch by batch, in the order of the pictures."""
        for number in range(self._count):
            batch = self._read(number)
            yield Features(batch["features"], batch.get("logits"))

    def load(self) -> Features:
        """The features of all pictures.

        Raises:
          ValueError: there are none.
        """
        features, logits = zip(*self.batches(), strict=True)
        all_logits = None if logits[0] is None else np.concatenate(logits)
        return Features(np.concatenate(features), all_logits)

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:05d}.npz"

    def _read(self, number: int) -> dict[str, np.ndarray]:
        path = self._path(number)
        try:
            # numpy leaves a damaged file open that it has opened itself.
            with (
                path.open("rb") as opened,
                np.load(opened, allow_pickle=False) as file,
            ):
                found = dict(file)
            if missing := {"features", "images", "after", "sha256"} - found.keys():
                raise ValueError(f"no {', '.join(sorted(missing))}")
            place = found.get("place", self._place(number)).tobytes()
        except NO_ARRAYS as e:
            raise records.Damaged(f"{path} holds no features: {e}") from e
        if place != self._place(number).tobytes():
            raise records.Damaged(f"{path} is that of {place.decode(errors='replace')}")
        return found

    def _place(self, number: int) -> np.ndarray:
        """Whose features a batch are: the folder, and the number in it."""
        return np.frombuffer(f"{self._folder.name}/{number:05d}".encode(), np.uint8)

    def _add(self, pictures: np.ndarray, features: Features, after: int) -> None:
        self.images += len(features.features)
        self.after = after
        if mesh.is_primary():
            sha = hashlib.sha256(np.ascontiguousarray(pictures).data).digest()
            arrays: dict[str, Any] = {
                "images": np.int64(self.images),
                "after": np.int64(after),
                "sha256": np.frombuffer(sha, np.uint8),
                "place": self._place(self._count),
            }
            arrays |= {k: v for k, v in features._asdict().items() if v is not None}
            records.write_file(
                self._path(self._count), lambda file: np.savez(file, **arrays)
            )
        self._count += 1
