"""Checks that the files of a folder of records are unchanged and belong to it.

The manifest and every summary of a shard have a digest of their content. So no count,
word or checksum in them changes unnoticed. A summary also holds the number of its shard
and the digest of its records' identity. The bytes of a shard are compared with the
checksum in its summary. Folders of 0.1.0 have only the checksums.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Mapping
from typing import Any

from scaling_ldm import config, records
from scaling_ldm.data import shards

_THREADS = 16  # for many small requests to a remote store
_MANIFEST = (
    "identity records train validation classes layout null vocabulary shards"
).split()
_SUMMARY = (
    "records train held_out bytes checksum labels largest_label sums squares words bad"
).split()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file with the digest of all of it."""
    return {**content, "digest": records.digest(content)}


def _unsealed(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The inverse of `sealed`; Damaged if the digest does not fit."""
    held = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") not in (None, records.digest(held)):
        raise records.Damaged(f"{where} has changed: its digest differs")
    return held


def stored_manifest(store: shards.Store) -> dict[str, Any] | None:
    """The manifest of a folder; None if there is none.

    Raises:
      Damaged: it was changed after it was written.
    """
    found = store.read_json(shards.MANIFEST, *_MANIFEST)
    where = f"{store.folder}/{shards.MANIFEST}"
    return None if found is None else _unsealed(found, where)


def summary_of(summary: Mapping[str, Any], number: int, of: str) -> dict[str, Any]:
    """The summary of a shard as `stored_summary` reads it, for JSON.

    Args:
      of: digest of the identity of the records.
    """
    return sealed({**summary, "number": number, "of": of})


def stored_summary(store: shards.Store, number: int, of: str) -> dict[str, Any] | None:
    """The summary of a shard; None if there is none. See `summary_of`.

    Raises:
      Damaged: it was changed, or belongs to another shard or to other records.
    """
    name = shards.summary_name(number)
    if (found := store.read_json(name, *_SUMMARY)) is None:
        return None
    where = f"{store.folder}/{name}"
    found = _unsealed(found, where)
    if found.get("number", number) != number:
        raise records.Damaged(f"{where} belongs to shard {found['number']}")
    if found.get("of", of) != of:
        raise records.Damaged(f"{where} belongs to other records than identity.json")
    return found


def stored_summaries(store: shards.Store, count: int, of: str) -> list[dict[str, Any]]:
    """The summaries of shards 0 to count - 1; Damaged as `stored_summary`.

    Raises:
      ConfigError: shards of another host are not visible here.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda n: stored_summary(store, n, of), range(count)))
    summaries = [summary for summary in found if summary is not None]
    if len(summaries) < count:
        first = found.index(None)
        raise config.ConfigError(
            f"{count - len(summaries):,} shards, {shards.summary_name(first)} among "
            f"them, are not in {store.folder}: is it a folder that all hosts share?"
        )
    return summaries


def stored_shard(store: shards.Store, number: int, of: str) -> dict[str, Any]:
    """The summary of a complete shard, whose bytes are compared if it is local.

    Raises:
      Damaged: as `stored_summary` and `check_shard`, or there is no summary.
    """
    summary = stored_summary(store, number, of)
    if summary is None:
        name = shards.summary_name(number)
        raise records.Damaged(f"{store.folder}/{name} is missing", shards.MADE_ANEW)
    if store.local is not None:
        check_shard(store.local / shards.shard_name(number), summary)
    return summary


def check_shard(
    path: pathlib.Path, summary: Mapping[str, Any], known_as: str = ""
) -> None:
    """Checks all bytes of a file against the summary of its shard.

    Args:
      known_as: what messages call the file; "": its path.

    Raises:
      Damaged: its size or its checksum differs.
    """
    where, size = known_as or path, path.stat().st_size
    if size != summary["bytes"]:
        raise records.Damaged(
            f"{where}: {size} bytes; wanted {summary['bytes']}", shards.MADE_AGAIN
        )
    if shards.file_digest(path) != summary["checksum"]:
        raise records.Damaged(
            f"{where} is another shard, or damaged: its checksum is not that of its "
            "summary",
            shards.MADE_AGAIN,
        )
