"""Records of the encode stage: what they are made of, and the source that reads them.

The row of position p is a pure function of (data.seed, p). An order for each epoch (see
`row_order`) says which record p has, and a latent is drawn from the moments of the
record with noise keyed by p. Validation rows are drawn in the same way, so that the
loss is measured on the distribution that is trained on. Their positions are fixed, so
their draws are too.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.data import (
    hashing,
    row_noise,
    row_order,
    seals,
    shard_files,
    shard_table,
    shard_windows,
    shards,
)
from scaling_ldm.data.manifests import Manifest
from scaling_ldm.data.pipeline import Rows
from scaling_ldm.data.vocabulary import PADDING, RESERVED, Vocabulary
from scaling_ldm.models import pretrained

_NOISE = 102  # a stream of the hash; `row_order` has others
# Fields of config.data that decide nothing, or that another entry stands for.
_NO_IDENTITY = ("path", "validation_path", "validation_minimum")
_PART = 64  # rows that a thread makes at a time
KEPT_BYTES = 1 << 29  # a split of at most this size stays in memory once it is read


def identity(experiment: config.Experiment) -> dict[str, Any]:
    """What the records of an experiment are made of, as far as its config tells.

    A network whose files are not found on this machine is identified by its name alone.
    """
    cfg, source = experiment.encode, experiment.data.source
    found: dict[str, Any] = {
        "version": shards.VERSION,
        "source": source,
        "pictures": cfg.pictures,
        "shape": list(experiment.data.shape),
        "validation_fraction": experiment.data.validation_fraction,
        "autoencoder": pretrained.autoencoder_identity(cfg.autoencoder),
        "text_encoder": pretrained.text_identity(cfg.text_encoder),
    }
    for field in config.DATA_SOURCES[source]:
        if field not in _NO_IDENTITY:
            found[field] = getattr(experiment.data, field)
    if source not in config.ENDLESS:
        found["validation"] = "given" if experiment.data.validation_path else ""
        if cfg.pictures:
            found["choose"] = cfg.choose
    if source in config.ENDLESS or found.get("choose") == "random":
        found["seed"] = experiment.data.seed
    if not experiment.reads_words:
        found["text_tokens"] = experiment.data.text_tokens
    if cfg.autoencoder != "none" or not experiment.reads_words:
        found |= {"dtype": cfg.dtype, "compute_dtype": cfg.compute_dtype}
    return found


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The entries of `wanted` that differ in `held`, a line for each.

    Two networks are the same if their files are the same. If the files of one are not
    known, they are the same if they have the same name. An entry that older records
    lack counts as not given. Older records keep the way in which their pictures were
    chosen and held out, unless the experiment names another way.
    """
    lines = []
    older = "split_by" not in held
    of_before = {"split_by": "caption_alone"} if older else {}
    for key, value in wanted.items():
        chosen = key == "choose" or (key == "seed" and "choose" in wanted)
        if older and (chosen or (key, value) == ("split_by", "auto")):
            continue
        there = held.get(key, of_before.get(key))
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            by = "digest" if value.get("digest") and there.get("digest") else "name"
            if value.get(by) != there.get(by):
                a, b = (
                    f"{x.get('name')!r} ({x.get('digest')})" for x in (there, value)
                )
                lines.append(f"{key}: {a} there, {b} here")
        elif ("" if there is None else there) != value:
            lines.append(f"{key}: {there!r} there, {value!r} here")
    return lines


def refuse(folder: str, found: list[str]) -> None:
    """Raises ConfigError if a folder's records differ from what is wanted."""
    if found:
        listed = "".join(f"\n  {line}" for line in found)
        raise config.ConfigError(
            f"{folder} holds records of another experiment:{listed}\n"
            "Use another --config.encode.path or --workdir, or remove that folder"
        )


def read_manifest(folder: str, experiment: config.Experiment) -> Manifest:
    """The manifest of a folder of finished records of an experiment.

    Raises:
      ConfigError: there are no finished records, or they differ from the experiment's.
      Damaged: the manifest was changed after it was written.
    """
    store = shards.Store(folder)
    manifest = seals.stored_manifest(store)
    if manifest is None:
        begun = store.read_json(shards.IDENTITY) is not None
        state = "the records in {} are not finished" if begun else "no records in {}"
        raise config.ConfigError(f"{state.format(folder)}: add encode to --stages")
    refuse(folder, differences(manifest["identity"], identity(experiment)))
    return manifest


def training_pictures(folder: str, experiment: config.Experiment) -> int:
    """Pictures in the training split of finished records.

    Raises:
      ConfigError, Damaged: as `read_manifest`.
    """
    return read_manifest(folder, experiment)["train"]


class Encoded:
    """Latents (or pixels) and text that the encode stage wrote; a pipeline.Source.

    Text features of its rows have the type in which they are stored.

    Args:
      words: the vocabulary, by rank; None: that of these records.
      seed: of the order and the noise; None: config.data.seed.

    Attributes:
      layout: of the records.
      vocabulary: the words whose ids rows have; None if they have features.

    Raises:
      ConfigError: as `read_manifest`; no record is in this split, text features have
        another width than config.model.text_width, or remote records that are larger
        than the local cache would be read in no windows.
      Damaged: files have changed since they were written. Reading rows raises it too.
        The first rows also raise ConfigError if the local cache is smaller than the
        windows that are read now and next.
    """

    def __init__(
        self,
        folder: str,
        experiment: config.Experiment,
        split: str,
        *,
        words: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        store = shards.Store(folder)
        manifest = read_manifest(folder, experiment)
        layout = manifest["layout"]
        self.layout = shards.Layout(**layout | {"shape": tuple(layout["shape"])})
        check_width(experiment, self.layout.text_width)
        H, W, C = experiment.data.shape
        self.shape = (H, W, C)
        self.classes = manifest["classes"]
        named = manifest.get("label_names", ())  # not of 0.1.0
        self.label_names = tuple(named[: self.classes])
        self.identity = manifest["identity"]
        self._manifest = manifest
        self._seed = experiment.data.seed if seed is None else seed
        self._network = manifest["identity"]["autoencoder"]
        self._length = experiment.data.text_tokens
        table = shard_table.read(store, manifest)
        self._validation = split == "validation"
        self._side = shard_table.Side(table, self._validation)
        if not len(self._side):
            raise config.ConfigError(
                f"{folder}: none of its {manifest['records']:,} pictures is in the "
                f"{split} split; give more pictures, or another "
                "config.data.validation_fraction"
            )
        window = experiment.data.shuffle_window
        self._order = self._ordered(window)
        known = manifest["vocabulary"] if words is None else words
        vocabulary = (*RESERVED, *known)
        self._vocabulary = Vocabulary(vocabulary[: experiment.data.vocab_size])
        self.vocabulary = None if self.layout.text_width else self._vocabulary
        self._threads = experiment.data.reader_threads
        cache_bytes = int(experiment.data.cache_gigabytes * 1e9)
        self._files = shard_files.ShardFiles(
            store,
            table,
            self.layout,
            cache_bytes,
            self._threads,
            max(
                shard_files.OPEN_SHARDS,
                row_order.shards_of_batch(window) if window else 0,
            ),
        )
        self._windows: shard_windows.Windows | None = None
        if store.local is None and isinstance(self._order, row_order.WindowOrder):
            self._windows = shard_windows.Windows(
                self._order,
                self._files,
                table,
                folder=folder,
                cache_bytes=cache_bytes,
                continues=not self._validation,
            )
        elif store.local is None:
            _check_cache(folder, int(table.nbytes.sum()), cache_bytes)
        self._memory: Rows = {}
        self.uncond = self._null()

    def __len__(self) -> int:
        """Number of pictures in the split, which are the positions of an epoch."""
        return len(self._side)

    def _ordered(self, window: int) -> row_order.Order:
        if window:
            return row_order.WindowOrder(self._seed, self._side.starts, window)
        return row_order.WholeOrder(self._seed, len(self))

    def rows(self, positions: np.ndarray) -> Rows:
        positions = np.asarray(positions, np.int64)
        places = self._order.places(positions)
        if self._windows and not (self._fits and self._are_kept(places)):
            self._windows.ahead(positions)
        stored = self._kept(places) if self._fits else self._fresh(places)
        rows = stored | {"x": self._sample(stored["x"], positions)}
        if not self.classes:
            rows.pop("label", None)
        return rows

    def captions(self, positions: np.ndarray) -> list[str]:
        places = self._order.places(np.asarray(positions, np.int64))
        return [record.caption for record in self._records(places)]

    def _are_kept(self, places: np.ndarray) -> bool:
        """Whether all of these rows are in memory."""
        return bool(self._memory) and bool(self._memory["there"][places].all())

    @functools.cached_property
    def _fits(self) -> bool:
        """Whether the whole split may stay in memory once it has been read."""
        if len(self) * self.layout.nbytes > KEPT_BYTES:
            return False
        one = self._fresh(np.zeros(1, np.int64))
        return len(self) * sum(array.nbytes for array in one.values()) <= KEPT_BYTES

    def _kept(self, places: np.ndarray) -> Rows:
        """Rows from memory; those that are not there yet are read first.

        Several threads may read the same record; they write the same values.
        """
        if not self._memory:
            one = self._fresh(places[:1])
            memory = {
                name: np.zeros((len(self), *value.shape[1:]), value.dtype)
                for name, value in one.items()
            }
            self._memory = memory | {"there": np.zeros(len(self), bool)}
        memory = self._memory
        missing = np.unique(places[~memory["there"][places]])
        if len(missing):
            for name, value in self._fresh(missing).items():
                memory[name][missing] = value
            memory["there"][missing] = True
        return {name: memory[name][places] for name in memory if name != "there"}

    def _fresh(self, places: np.ndarray) -> Rows:
        """Records as arrays, read from their shards."""
        found = self._records(places)
        x = np.empty((len(found), *self.layout.shape), np.dtype(self.layout.dtype))
        stored = {"x": x, **self._blank_text(len(found))}

        def fill(part: slice) -> None:
            for i in range(part.start, part.stop):
                x[i] = found[i].x
                self._fill_text(stored, i, found[i])

        shard_files.each_of(fill, _parts(len(found)), self._threads)
        if self.classes:
            stored["label"] = np.array([record.label for record in found], np.int32)
        return stored

    def _records(self, places: np.ndarray) -> list[shards.Record]:
        numbers, indices = self._side.shards(places), np.empty_like(places)
        for number in np.unique(numbers).tolist():
            these = numbers == number
            indices[these] = self._side.within(number, places[these])
        found = self._files.read(numbers, indices)
        if self._validation:  # it is read once, so its shards may leave the cache
            self._files.close()
        return found

    def _sample(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Stored pixels as the network sees them, or a draw from stored moments."""
        if self.layout.dtype == "uint8":
            return x.astype(np.float32) / np.float32(127.5) - np.float32(1)
        key = int(hashing.draw(self._seed, _NOISE, np.zeros(1, np.uint64))[0])
        found = np.empty((*x.shape[:-1], x.shape[-1] // 2), np.float32)

        def draw(part: slice) -> None:
            mean, log_variance = np.split(x[part].astype(np.float32), 2, axis=-1)
            noise = row_noise.normals(key, positions[part], mean.shape[1:])
            noise *= np.exp(0.5 * log_variance)
            noise += mean
            noise -= np.float32(self._network["shift"])
            noise *= np.float32(self._network["scale"])
            found[part] = noise

        shard_files.each_of(draw, _parts(len(x)), self._threads)
        return found

    def _blank_text(self, rows: int) -> Rows:
        mask = np.zeros((rows, self._length), bool)
        if not self.layout.text_width:
            return {"text": np.zeros(mask.shape, np.int32), "mask": mask}
        shape = (*mask.shape, self.layout.text_width)
        return {"text": np.zeros(shape, np.dtype(self.layout.text_dtype)), "mask": mask}

    def _fill_text(self, stored: Rows, i: int, record: shards.Record) -> None:
        """Writes a record's text into row i."""
        text, mask = stored["text"], stored["mask"]
        if not self.layout.text_width:
            text[i] = self._vocabulary.encode(record.caption, self._length)
            mask[i] = text[i] != PADDING
            return
        if record.features is None:
            raise records.Damaged(f"{record.name} has no features of its caption")
        tokens = len(record.features)
        text[i, :tokens], mask[i, :tokens] = record.features, True

    def _null(self) -> Rows:
        label = np.array(self.classes, np.int32)
        if not self.layout.text_width:
            text = self._vocabulary.uncond(self._length)
            return {"text": text, "mask": text != PADDING, "label": label}
        data = base64.b64decode(self._manifest["null"])
        kind = np.dtype(self.layout.text_dtype)
        features = np.frombuffer(data, kind).reshape(-1, self.layout.text_width)
        text = np.zeros((self._length, self.layout.text_width), kind)
        text[: len(features)] = features
        mask = np.arange(self._length) < len(features)
        return {"text": text, "mask": mask, "label": label}


def _parts(rows: int) -> list[slice]:
    """Some rows in parts, for threads."""
    return [slice(i, min(i + _PART, rows)) for i in range(0, rows, _PART)]


def _check_cache(folder: str, nbytes: int, cache_bytes: int) -> None:
    """Refuses to shuffle all of a remote set that does not fit the local cache."""
    if nbytes > cache_bytes:
        raise config.ConfigError(
            f"{folder} has {nbytes / 1e9:,.1f} GB of shards, and the local cache holds "
            f"{cache_bytes / 1e9:,.1f} GB. Each batch would fetch whole shards for "
            "single records: set config.data.shuffle_window to a few shards, or raise "
            "config.data.cache_gigabytes"
        )


def check_width(experiment: config.Experiment, width: int) -> None:
    """Checks that the network takes text features of the encoder's width.

    Raises:
      ConfigError: it does not; the error names the right width.
    """
    wanted = experiment.model.text_width
    if width and width != wanted:
        raise config.ConfigError(
            f"config.model.text_width = {wanted}, but the features of "
            f"{experiment.encode.text_encoder} are {width} wide: set "
            f"--config.model.text_width={width}"
        )
