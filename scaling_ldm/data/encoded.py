"""Records of the encode stage: what they are made of, and the source that reads them.

The row of position p is a pure function of (data.seed, p). A permutation for each epoch
says which record p has, and a latent is drawn from the moments of the record with noise
keyed by p. Validation rows are drawn in the same way, so that the loss is measured on
the distribution that is trained on. Their positions are fixed, so their draws are too.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.data import hashing, seals, shards
from scaling_ldm.data.pipeline import Rows
from scaling_ldm.data.vocabulary import PADDING, RESERVED, Vocabulary
from scaling_ldm.models import pretrained

Manifest = dict[str, Any]

_ORDER, _NOISE = 101, 102  # streams of the hash; the icons use none of them
# Fields of config.data that decide nothing, or that another entry stands for.
_NO_IDENTITY = ("path", "validation_path", "validation_minimum")
_OPEN_FILES = 256  # shards held open at once
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
    found = read_manifest(folder, experiment)["shards"]
    return sum(int((~shards.held_out_bits(one)).sum()) for one in found)


class Encoded:
    """Latents (or pixels) and text that the encode stage wrote; a pipeline.Source.

    Args:
      words: the vocabulary, by rank; None: that of these records.
      seed: of the order and the noise; None: config.data.seed.

    Attributes:
      layout: of the records.
      vocabulary: the words whose ids rows have; None if they have features.

    Raises:
      ConfigError: as `read_manifest`; no record is in this split, or text features have
        another width than config.model.text_width.
      Damaged: files have changed since they were written. Reading rows raises it too.
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
        self._store = shards.Store(folder)
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
        self._index = self._split(split == "validation")
        if not len(self._index):
            raise config.ConfigError(
                f"{folder}: none of its {manifest['records']:,} pictures is in the "
                f"{split} split; give more pictures, or another "
                "config.data.validation_fraction"
            )
        known = manifest["vocabulary"] if words is None else words
        vocabulary = (*RESERVED, *known)
        self._vocabulary = Vocabulary(vocabulary[: experiment.data.vocab_size])
        self.vocabulary = None if self.layout.text_width else self._vocabulary
        self._reader = functools.lru_cache(maxsize=_OPEN_FILES)(self._open)
        self._memory: Rows = {}
        self._checked: set[int] = set()  # shards whose bytes have been compared
        self.uncond = self._null()

    def __len__(self) -> int:
        """Number of pictures in the split, which are the positions of an epoch."""
        return len(self._index)

    def rows(self, positions: np.ndarray) -> Rows:
        places = self._places(positions)
        stored = self._kept(places) if self._fits else self._fresh(places)
        rows = {"x": self._sample(stored["x"], positions), "mask": stored["mask"]}
        text = stored["text"]
        rows["text"] = text.astype(np.float32) if self.layout.text_width else text
        if self.classes:
            rows["label"] = stored["label"]
        return rows

    def captions(self, positions: np.ndarray) -> list[str]:
        return [record.caption for record in self._records(self._places(positions))]

    @functools.cached_property
    def _fits(self) -> bool:
        """Whether the whole split may stay in memory once it has been read."""
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
        stored = {"x": np.stack([record.x for record in found]), **self._text(found)}
        if self.classes:
            stored["label"] = np.array([record.label for record in found], np.int32)
        return stored

    def _split(self, validation: bool) -> np.ndarray:
        """int64 [records of the split, 2]: the shard, and the index in the shard."""
        parts = []
        for number, summary in enumerate(self._manifest["shards"]):
            places = np.flatnonzero(shards.held_out_bits(summary) == validation)
            parts.append(np.stack([np.full_like(places, number), places], axis=1))
        return np.concatenate(parts)

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """The record of each position: every epoch has its own permutation."""
        positions = np.asarray(positions, np.int64)
        epoch, slot = np.divmod(positions, len(self._index))
        keys = hashing.draw(self._seed, _ORDER, epoch.astype(np.uint64))
        return hashing.permute(slot, keys, len(self._index))

    def _records(self, places: np.ndarray) -> list[shards.Record]:
        at = self._index[places]
        found: list[Any] = [None] * len(at)
        order = np.lexsort((at[:, 1], at[:, 0]))
        cuts = np.flatnonzero(np.diff(at[order, 0])) + 1
        for places in np.split(order, cuts):
            if len(places):
                reader = self._reader(int(at[places[0], 0]))
                for place, record in zip(
                    places, reader.read(at[places, 1].tolist()), strict=True
                ):
                    found[place] = record
        return found

    def _open(self, number: int) -> shards.ShardReader:
        path = self._paths[shards.shard_name(number)]
        summary = self._manifest["shards"][number]
        if number not in self._checked:  # another thread may do the same
            seals.check_shard(path, summary)
            self._checked.add(number)
        return shards.ShardReader(path, summary, self.layout)

    @functools.cached_property
    def _paths(self) -> dict[str, Any]:
        count = len(self._manifest["shards"])
        return self._store.fetch([shards.shard_name(n) for n in range(count)])

    def _sample(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Stored pixels as the network sees them, or a draw from stored moments."""
        if self.layout.dtype == "uint8":
            return x.astype(np.float32) / np.float32(127.5) - np.float32(1)
        mean, log_variance = np.split(x.astype(np.float32), 2, axis=-1)
        key = hashing.draw(self._seed, _NOISE, np.zeros(1, np.uint64))[0]
        noise = np.empty_like(mean)
        for row, position in zip(noise, positions, strict=True):
            bits = np.random.Philox(key=[key, np.uint64(position)])
            np.random.Generator(bits).standard_normal(dtype=np.float32, out=row)
        noise *= np.exp(0.5 * log_variance)
        noise += mean
        noise -= np.float32(self._network["shift"])
        noise *= np.float32(self._network["scale"])
        return noise

    def _text(self, found: list[shards.Record]) -> Rows:
        if not self.layout.text_width:
            ids = np.stack([self._ids(record.caption) for record in found])
            return {"text": ids, "mask": ids != PADDING}
        shape = (len(found), self._length, self.layout.text_width)
        text = np.zeros(shape, np.dtype(self.layout.text_dtype))
        mask = np.zeros(shape[:2], bool)
        for i, record in enumerate(found):
            if record.features is None:
                raise records.Damaged(f"{record.name} has no features of its caption")
            tokens = len(record.features)
            text[i, :tokens], mask[i, :tokens] = record.features, True
        return {"text": text, "mask": mask}

    def _ids(self, caption: str) -> np.ndarray:
        return self._vocabulary.encode(caption, self._length)

    def _null(self) -> Rows:
        label = np.array(self.classes, np.int32)
        if not self.layout.text_width:
            text = self._vocabulary.uncond(self._length)
            return {"text": text, "mask": text != PADDING, "label": label}
        data = base64.b64decode(self._manifest["null"])
        features = np.frombuffer(data, np.dtype(self.layout.text_dtype))
        features = features.reshape(-1, self.layout.text_width)
        text = np.zeros((self._length, self.layout.text_width), np.float32)
        text[: len(features)] = features
        mask = np.arange(self._length) < len(features)
        return {"text": text, "mask": mask, "label": label}


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


def manifest_of(
    identity: Mapping[str, Any],
    layout: shards.Layout,
    summaries: list[dict[str, Any]],
    uncond: np.ndarray | None,
    first_bad: list[tuple[str, str]],
    names: Sequence[str],
) -> Manifest:
    """The manifest of a folder of records, for JSON, from the summaries of its shards.

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
        "classes": 1 + largest if labels == total else 0,
        "label_names": list(names) if labels == total else [],
        "layout": json.loads(json.dumps(vars(layout))),
        # Of the values that a denoiser reads, by channel, over the training split.
        "mean": np.atleast_1d(mean).tolist(),
        "std": np.atleast_1d(np.sqrt(variance)).tolist(),
        "null": None if uncond is None else base64.b64encode(uncond.tobytes()).decode(),
        "vocabulary": ranked[: config.LARGEST_VOCABULARY],
        "shards": [
            {k: s[k] for k in ("records", "bytes", "checksum", "held_out")}
            for s in summaries
        ],
    }
    return seals.sealed(manifest)
