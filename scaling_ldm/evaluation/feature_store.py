"""Features of pictures, kept batch by batch: what was stopped goes on where it was.

    evaluate/features/<digest>/00000.npz   a batch: features, logits if any, positions,
        SHA-256 of the pictures
    evaluate/features/<digest>/about.json   what they are of; written last

The folder may be deleted at any time: its features are then extracted again.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.training import mesh
from scaling_ldm.training import progress as progress_lib


class Kept:
    """Features of a row of pictures.

    Args:
      of: all that they depend on, as JSON holds it.

    Attributes:
      images: pictures whose features are there.
      after: the position in the row behind the last of them.
      complete: no more will come.
    """

    def __init__(self, folder: pathlib.Path, of: dict[str, Any]) -> None:
        self._folder = folder / "features" / records.digest(of)
        self._of = of
        self._parts = self.images = self.after = 0
        while self._path(self._parts).exists():
            self._parts += 1
        if self._parts:
            last = self._read(self._parts - 1)
            self.images, self.after = int(last["images"]), int(last["after"])
        about = self._folder / "about.json"
        self.complete = (
            about.exists() and json.loads(about.read_text())["images"] == self.images
        )

    def fill(
        self,
        extract: Callable[[np.ndarray], Features],
        pictures: Callable[[int], Iterable[tuple[np.ndarray, int]]],
        progress: progress_lib.Progress,
    ) -> None:
        """Extracts what is missing; all processes call it together.

        Args:
          pictures: from a position on: batches, and the position behind each.
        """
        if self.complete:
            return
        mesh.barrier("features")  # nobody writes before everybody has looked
        progress.begin(self.images)
        for images, after in pictures(self.after):
            self._add(images, extract(images), after)
            progress.show(self.images)
        if mesh.is_primary():
            about = {"of": self._of, "images": self.images}
            path = self._folder / "about.json"
            records.write_text(path, json.dumps(about, indent=1) + "\n")
        mesh.barrier("features-kept")
        self.complete = True

    def pictures(self) -> str:
        """SHA-256 of the pictures, by their bytes and batches."""
        sha = hashlib.sha256()
        for number in range(self._parts):
            sha.update(self._read(number)["sha256"].tobytes())
        return sha.hexdigest()

    def parts(self) -> Iterator[Features]:
        """Batch by batch, in order."""
        for number in range(self._parts):
            part = self._read(number)
            yield Features(part["features"], part.get("logits"))

    def all(self) -> Features:
        """Of all pictures, in memory.

        Raises:
          ValueError: there are none.
        """
        features, logits = zip(*self.parts(), strict=True)
        whole = None if logits[0] is None else np.concatenate(logits)
        return Features(np.concatenate(features), whole)

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:05d}.npz"

    def _read(self, number: int) -> dict[str, np.ndarray]:
        path = self._path(number)
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (ValueError, EOFError, zipfile.BadZipFile) as e:
            raise records.Damaged(f"{path} holds no features: {e}") from e

    def _add(self, pictures: np.ndarray, features: Features, after: int) -> None:
        self.images += len(features.features)
        self.after = after
        if mesh.is_primary():
            sha = hashlib.sha256(np.ascontiguousarray(pictures)).digest()
            arrays = {"images": np.int64(self.images), "after": np.int64(after)}
            arrays["sha256"] = np.frombuffer(sha, np.uint8)
            arrays |= {k: v for k, v in features._asdict().items() if v is not None}
            records.write_file(
                self._path(self._parts), lambda file: np.savez(file, **arrays)
            )
        self._parts += 1
