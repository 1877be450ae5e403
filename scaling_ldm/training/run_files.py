"""Where the files of one run are; needs no jax."""

from __future__ import annotations

import dataclasses
import pathlib

from scaling_ldm.records import table
from scaling_ldm.records.objects import COMMITTED, ObjectPath


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of one run, in a folder of their own."""

    folder: pathlib.Path

    @property
    def record(self) -> pathlib.Path:
        """The TrainRecord; there once the run is over."""
        return self.folder / "record.json"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON line for each logged step."""
        return self.folder / "metrics.jsonl"

    @property
    def measurements(self) -> pathlib.Path:
        """One `records.Measurement` a line."""
        return self.folder / table.FILE

    @property
    def attempts(self) -> pathlib.Path:
        """One `records.Attempt` a line: where the seconds of each process went."""
        return self.folder / "attempts.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        """A folder with one folder for each checkpoint, named by its step."""
        return self.folder / "checkpoints"

    @property
    def parameters(self) -> pathlib.Path:
        """A table of the parameters, for people."""
        return self.folder / "parameters.txt"

    @property
    def vocabulary(self) -> pathlib.Path:
        """The words whose ids the run reads, if it reads words."""
        return self.folder / "vocabulary.json"

    @property
    def label_names(self) -> pathlib.Path:
        """The names of the labels that the run reads, if it reads some with names."""
        return self.folder / "labels.json"

    @property
    def profile(self) -> pathlib.Path:
        """The folder of a profiler trace."""
        return self.folder / "profile"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of TensorBoard events."""
        return self.folder / "tensorboard"


def steps(checkpoints: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder that are complete, ascending.

    On a disk, a complete one is renamed to its step. In a store, orbax writes an object
    into it that says so.
    """
    mark = f"/{COMMITTED}" if isinstance(checkpoints, ObjectPath) else ""
    found = checkpoints.glob(f"*{mark}")
    names = [path.parent.name if mark else path.name for path in found]
    return sorted(int(name) for name in names if name.isdigit())


def unfinished(checkpoints: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """The checkpoints in a folder whose write was cut off.

    Args:
      suffix: that orbax gives to their names on a disk.
    """
    if not isinstance(checkpoints, ObjectPath):
        return sorted(checkpoints.glob(f"*{suffix}*"))
    complete = steps(checkpoints)
    names = [name for name in checkpoints.iterdir() if name.name.isdigit()]
    return [path for path in names if int(path.name) not in complete]
