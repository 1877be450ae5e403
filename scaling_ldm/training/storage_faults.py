"""Tells faults of storage from damaged files, and repairs weaknesses of orbax."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import time
import types
from collections.abc import Iterator

from orbax.checkpoint._src.futures import future, signaling_client
from orbax.checkpoint._src.serialization import tensorstore_utils

from scaling_ldm.records import objects
from scaling_ldm.records.errors import CheckpointError
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import s3_checkpoints

# A missing or misplaced file is damage; every other error of the system is not.
_MISPLACED = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# tensorstore and jax raise errors of their own, with the system's text in them.
_TEXTS = re.compile(
    "PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|"
    "Permission denied|Operation not permitted|Input/output error|"
    "Too many open files|Cannot allocate memory|Stale file handle|"
    "Connection timed out|No space left|Disk quota exceeded|Resource temporarily|"
    "retry attempts failed|CURL error|UNAUTHENTICATED"
)
# Packages whose exceptions say that a store, or the way to it, has failed.
_CLIENTS = (
    *("aiohttp.", "botocore.", "aiobotocore.", "s3fs."),
    *("gcsfs.", "google.a", "google.cloud.", "requests.", "urllib3."),
)
# Of a request to a store: a minute, where tensorstore would try for a quarter hour.
_RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "16s"}


def of_environment(error: BaseException | None) -> bool:
    """Whether a file could not be read for a reason outside of it.

    Permission denied, an error of the device, too many open files, no memory, a network
    file system that is gone: another call may read the same file.
    """
    seen: set[int] = set()
    left = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, MemoryError) or _TEXTS.search(str(one)):
            return True
        if isinstance(one, OSError) and one.errno not in {None, *_MISPLACED}:
            return True
        if type(one).__module__.startswith(_CLIENTS):
            return True
        left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return False


def behind(error: Exception | None, folder: pathlib.Path) -> Exception | None:
    """What is behind an error of reading a folder: a part of it that cannot be read.

    orbax says of a folder without permissions that its files are not there.

    Args:
      error: of reading the folder; None: there was none.

    Returns:
      The error itself if all of the folder can be read.
    """
    if error is None or of_environment(error) or isinstance(folder, ObjectPath):
        return error
    found: list[OSError] = []
    for place, _, names in os.walk(folder, onerror=found.append):
        for path in (os.path.join(place, name) for name in names):
            if not os.access(path, os.R_OK):
                found.append(PermissionError(errno.EACCES, "Permission denied", path))
    return next(filter(of_environment, found), error)


def cause(error: Exception | None) -> str:
    """An error in one line; None: another process has the error."""
    if error is None:
        return "seen by another process"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def damaged_end(
    folder: pathlib.Path, step: int, before: int, error: Exception | None
) -> CheckpointError:
    """The error that a finished run's last checkpoint is damaged.

    Args:
      folder: of the run's checkpoints.
      before: the step of the checkpoint before it; 0: there is none.
    """
    remove = folder.parent / "record.json" if before else folder.parent
    return CheckpointError(
        f"checkpoint {step} in {folder} is damaged ({cause(error)}). Put a copy of it "
        f"back; or remove {remove}, and the same command with --stages train trains "
        f"this run again from step {before}"
    )


@contextlib.contextmanager
def named_metadata(folder: pathlib.Path) -> Iterator[None]:
    """Around orbax's opening of a run's checkpoints, which reads a file in each.

    Raises:
      CheckpointError: one of these files is JSON, but no object. It may be removed.
    """
    try:
        yield
    except (ValueError, TypeError) as e:
        for path in sorted(folder.glob("*/_CHECKPOINT_METADATA")):
            with contextlib.suppress(ValueError):
                if not isinstance(json.loads(path.read_bytes()), dict):
                    raise CheckpointError(
                        f"{path} is damaged ({cause(e)}): remove it or put a copy back"
                    ) from e
        raise


@contextlib.contextmanager
def asking(folder: pathlib.Path) -> Iterator[None]:
    """Around what orbax asks of a store: its failures are OSErrors with the URL.

    On a disk they are what they were.
    """
    try:
        yield
    except Exception as e:
        if not isinstance(folder, ObjectPath) or not of_environment(e):
            raise
        with objects.asking(folder):
            raise


def prepare_orbax(folder: pathlib.Path) -> None:
    """Repairs what this library needs of orbax to keep checkpoints in this folder."""
    steady_clock()
    bounded_requests()
    s3_checkpoints.enable_for(folder)


def bounded_requests() -> None:
    """Makes orbax's requests to stores fail after about a minute without an answer."""
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context["gcs_request_retries"] = _RETRIES  # pyrefly: ignore
        context["s3_request_retries"] = _RETRIES  # pyrefly: ignore


def steady_clock() -> None:
    """Makes orbax measure its waits by the monotonic clock.

    orbax ends a wait by the time of day. If that is set back by an hour during a save,
    the save may wait an hour longer; if it is set forward, the save fails.
    """
    steady = types.SimpleNamespace(time=time.monotonic, sleep=time.sleep)
    for module in (future, signaling_client):
        module.time = steady  # pyrefly: ignore[bad-assignment]
