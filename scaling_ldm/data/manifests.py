"""The manifest of finished records, from the summaries of their shards."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.data import seals, shard_table, shards

Manifest = dict[str, Any]


def write(
    store: shards.Store,
    identity: Mapping[str, Any],
    layout: shards.Layout,
    summaries: list[dict[str, Any]],
    uncond: np.ndarray | None,
    first_bad: list[tuple[str, str]],
    names: Sequence[str],
) -> Manifest:
    """Writes the table of the shards, then the manifest; returns the manifest.

    Args:
      identity: see the function `identity`.
      summaries: one for each shard; see `shards.Writer.finish`.
      uncond: features of the empty caption, [tokens, E]; None if text is words.
      first_bad: (name, reason) of the first bad records.
      names: of the labels; () if they have none.
    """
    words: dict[str, int] = {}
    for summary in summaries:
        for word, count in summary["words"].items():
            words[word] = words.get(word, 0) + count
    ranked = sorted(words, key=lambda word: (-words[word], word))
    total, train = (sum(s[name] for s in summaries) for name in ("records", "train"))
    labels = sum(s["labels"] for s in summaries)
    largest = max(s["largest_label"] for s in summaries)
    sums, squares = (
        np.sum([s[name] for s in summaries if s["train"]], axis=0)
        for name in ("sums", "squares")
    )
    h, w, _ = layout.shape
    mean = sums / max(train * h * w, 1)
    variance = np.maximum(squares / max(train * h * w, 1) - mean**2, 0)
    table = shard_table.ShardTable.of_summaries(summaries).to_bytes()
    manifest = {
        "identity": dict(identity),
        "records": total,
        "train": train,
        "validation": total - train,
        "bad": {
            "count": sum(len(s["bad"]) for s in summaries),
            "first": [list(one) for one in first_bad],
        },
        # Labels count only if every picture has one.
        "classes": max(len(names), 1 + largest) if labels == total else 0,
        "label_names": list(names) if labels == total else [],
        "layout": json.loads(json.dumps(vars(layout))),
        # Of the values that a denoiser reads, by channel, over the training split.
        "mean": np.atleast_1d(mean).tolist(),
        "std": np.atleast_1d(np.sqrt(variance)).tolist(),
        "null": None if uncond is None else base64.b64encode(uncond.tobytes()).decode(),
        "vocabulary": ranked[: config.LARGEST_VOCABULARY],
        "shards": shard_table.described(table, len(summaries)),
    }
    found = seals.sealed(manifest)
    store.write(shard_table.FILE, table)
    store.write_json(shards.MANIFEST, found)
    return found
