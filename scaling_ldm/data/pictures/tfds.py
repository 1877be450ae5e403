"""Data sets that TFDS has prepared as ArrayRecord files, without TensorFlow or TFDS.

coco_captions/2014/1.1.0/
  dataset_info.json    the splits and their files
  features.json        what is in the records, which are tf.train.Example
  label.labels.txt     names of classes
  coco_captions-train.array_record-00000-of-00064 ...
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Sequence

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, examples, record


class Tfds:
    """A split of a data set that TFDS has prepared as ArrayRecord files.

    Args:
      path: folder of a version, or a folder above it that holds a single version.
      split: its name, or several as "train+test".
      image, caption, label: features; those within others as "captions/text"; "" for
        the only Image, Text or ClassLabel feature, or the one with a usual name. If
        there is no Text, the caption is the name of the class.
      cache: local folder where remote files are copied.

    Raises:
      ConfigError: no such data set or split, other file formats, no such features.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image: str = "",
        caption: str = "",
        label: str = "",
        cache: str = "",
    ) -> None:
        self._folder = storage.find(path)
        base = self._version()
        info = self._json(posixpath.join(base, "dataset_info.json"))
        if info.get("fileFormat") != "array_record":
            raise config.ConfigError(
                f"{path}: it is prepared as {info.get('fileFormat', 'tfrecord')}, "
                "which has no random access; prepare it with file_format="
                "'array_record', or use `tfds convert_format` with --out_file_format="
                "array_record"
            )
        self._features(base, image, caption, label)
        names = [posixpath.join(base, n) for n in _shards(path, info, split)]
        if lost := [name for name in names if name not in self._folder.files]:
            raise config.ConfigError(
                f"{path}: {len(lost)} of {len(names)} files of split {split} are "
                f"missing: {', '.join(lost[:5])}"
            )
        self._records = examples.Records(
            self._folder.fetch(names, cache, examples.WHY), names
        )
        files = [
            (posixpath.relpath(name, base or "."), *rest)
            for name, *rest in self._folder.sketches(names)
        ]
        chosen = (self._image, self._caption, self._label)
        feature = self._caption or f"{self._label} as words"
        self.captions_from = f"the feature {feature}"
        self.identity = record.listing_digest("tfds", files, chosen, self.label_names)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> record.Picture:
        features, name = self._records.features(index), self._records.name(index)
        label = columns.first(features.get(self._label)) if self._label else None
        if isinstance(label, int) and label < 0:
            label = None  # how TFDS writes "unknown", as in a test split
        caption = columns.first(features.get(self._caption)) if self._caption else None
        known = isinstance(label, int) and label < len(self.label_names)
        if known and not self._caption:
            caption = columns.class_caption(self.label_names[label])
        return examples.picture(features, name, self._image, caption, label)

    def _version(self) -> str:
        """The folder of the version, relative to the root; "" for the root itself."""
        found = [
            posixpath.dirname(name)
            for name in self._folder.files
            if posixpath.basename(name) == "features.json"
        ]
        if "" in found:
            return ""
        if len(found) == 1:
            return found[0]
        if found:
            raise config.ConfigError(
                f"{self._folder.root}: there are several prepared data sets in it; "
                f"give the path of one: {', '.join(found[:10])}"
            )
        raise config.ConfigError(
            f"{self._folder.root}: it has no features.json, so TFDS has not "
            "prepared it; give the folder of its version, as "
            "~/tensorflow_datasets/coco_captions/2014/1.1.0"
        )

    def _json(self, name: str) -> dict:
        try:
            return json.loads(self._folder.read(name))
        except (KeyError, FileNotFoundError, ValueError, RecursionError) as e:
            raise config.ConfigError(
                f"{self._folder.root}: {name} cannot be read: {e}"
            ) from e

    def _features(self, base: str, image: str, caption: str, label: str) -> None:
        where = posixpath.join(base, "features.json")
        kinds = dict(_flat(self._json(where), ""))
        where = f"{self._folder.root}: {where}"
        of = {
            kind: [name for name, found in kinds.items() if found == kind]
            for kind in ("image", "text", "classLabel")
        }
        self._image = _only(of["image"], image, columns.IMAGE, "image", where)
        if label or of["classLabel"]:
            usual = ("label",)
            self._label = _only(of["classLabel"], label, usual, "label", where)
        else:
            self._label = ""
        if caption or of["text"] or not self._label:
            usual = (*columns.CAPTION, "captions/text")
            self._caption = _only(of["text"], caption, usual, "caption", where)
        else:
            self._caption = ""
        self.label_names: list[str] = []
        names = posixpath.join(base, f"{self._label.replace('/', '-')}.labels.txt")
        if self._label and names in self._folder.files:
            text = self._folder.read(names).decode("utf-8")
            self.label_names = text.splitlines()
        elif not self._caption:
            raise config.ConfigError(
                f"{where}: no Text feature, and no {names} with the classes' names"
            )


def _only(
    found: list[str], wanted: str, usual: Sequence[str], option: str, where: str
) -> str:
    if len(found) == 1 and not wanted:
        return found[0]
    return columns.choose(found, wanted, usual, option, where)


def _flat(feature: dict, name: str) -> Iterable[tuple[str, str]]:
    """("captions/text", "text") for each feature of a features.json."""
    inner = feature.get("sequence", {}).get("feature", feature)
    if "featuresDict" in inner:
        for key, value in inner["featuresDict"]["features"].items():
            yield from _flat(value, f"{name}/{key}" if name else key)
        return
    kind = next((k for k in ("image", "text", "classLabel") if k in inner), "other")
    yield name, kind


def _shards(path: str, info: dict, split: str) -> list[str]:
    """The files of the splits, relative to the version's folder."""
    splits = {one["name"]: one for one in info.get("splits", [])}
    names = []
    for wanted in split.split("+"):
        if wanted not in splits:
            raise config.ConfigError(
                f"{path}: no split {wanted!r}; it has: {', '.join(splits) or 'none'}"
            )
        one = splits[wanted]
        count = len(one.get("shardLengths", []))
        template = one.get("filepathTemplate") or (
            "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        )
        for i in range(count):
            values = {
                "DATASET": info["name"],
                "SPLIT": wanted,
                "FILEFORMAT": "array_record",
                "SHARD_INDEX": f"{i:05d}",
                "NUM_SHARDS": f"{count:05d}",
                "SHARD_X_OF_Y": f"{i:05d}-of-{count:05d}",
            }
            name = template.replace("${", "{")
            for key, value in values.items():
                name = name.replace(f"{{{key}}}", value)
            names.append(name)
    return names
