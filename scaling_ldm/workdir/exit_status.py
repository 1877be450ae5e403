"""The exit status of a command: what each number means, and that of each error."""

from __future__ import annotations

from scaling_ldm.records.errors import (
    CheckpointError,
    ConfigError,
    Damaged,
    LocalOnly,
    Preempted,
)
from scaling_ldm.workdir import ending

EXIT = {
    "done": 0,
    "defect": 1,  # as in every Python program
    "bad configuration": 2,
    "storage": 3,
    "lost a process": 4,
    "no answer": 5,  # advise recommends nothing, compare refuses everything
    "preempted, run the same command again": 75,
}
# Each error that a user can act on -> the exit status. See also `of`.
STATUS: dict[type[Exception], int] = {
    ConfigError: EXIT["bad configuration"],
    LocalOnly: EXIT["bad configuration"],
    Damaged: EXIT["storage"],
    OSError: EXIT["storage"],
    CheckpointError: EXIT["storage"],
    Preempted: EXIT["preempted, run the same command again"],
}


def of(error: Exception) -> int:
    """The exit status after an error; one that is in no table is a defect."""
    kind = next((kind for kind in STATUS if isinstance(error, kind)), None)
    # Saving a checkpoint fails, too, when another process is gone.
    if kind in (None, CheckpointError) and ending.lost_a_process(error):
        return EXIT["lost a process"]
    return STATUS[kind] if kind else EXIT["defect"]
