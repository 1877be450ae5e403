"""ArrayRecord files of tf.train.Example records, without TensorFlow.

A record has a bytes feature with an encoded picture (JPEG, PNG, ...) and one with the
caption in UTF-8; of several captions the first is taken. `write_array_record` makes
such files.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from scaling_ldm import config
from scaling_ldm.data import storage
from scaling_ldm.data.pictures import columns, record, wire

SUFFIXES = (".array_record", ".arrayrecord")
_TRIED = 16  # records that are read to find the names of the features
WHY = "ArrayRecord files are read"


class Records:
    """The records of several files, one after another."""

    def __init__(self, paths: Sequence[pathlib.Path], names: Sequence[str]) -> None:
        self._readers, broken = [], []
        for path, name in zip(paths, names, strict=True):
            try:
                reader = array_record_module.ArrayRecordReader(
                    str(path),
                    options="readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=1 << 15,
                )
                if not reader.ok():  # it has 0 records; reading one gives the reason
                    reader.read()
                self._readers.append(reader)
            except (OSError, RuntimeError, ValueError, IndexError) as e:
                broken.append(f"{name}: {e}")
        if broken:
            lines = "\n  ".join(broken[:20])
            raise config.ConfigError(
                f"{len(broken)} of {len(paths)} files are not complete ArrayRecord "
                f"files; copy them again or leave them out:\n  {lines}"
            )
        counts = [reader.num_records() for reader in self._readers]
        self._starts = [0, *itertools.accumulate(counts)]
        self._names = list(names)

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        return f"{self._names[number]}:{index - self._starts[number]}"

    def features(self, index: int) -> wire.Features:
        """The features of a record.

        Raises:
          BadRecord: the bytes are damaged, or are no tf.train.Example.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        reader, at = self._readers[number], index - self._starts[number]
        try:
            (data,) = reader.read([at])
        except (RuntimeError, ValueError, IndexError) as e:
            raise record.BadRecord(
                self.name(index), f"its bytes are damaged: {e}"
            ) from e
        try:
            return wire.parse_example(data)
        except ValueError as e:
            raise record.BadRecord(self.name(index), f"no tf.train.Example: {e}") from e


def picture(
    features: wire.Features, name: str, image: str, caption: object, label: object
) -> record.Picture:
    """The picture in the feature `image`.

    Raises:
      BadRecord: there is no picture or no caption.
    """
    encoded = columns.first(features.get(image))
    if not isinstance(encoded, bytes):
        raise record.BadRecord(name, f"it has no picture: no bytes in {image!r}")
    return record.Picture(
        image=record.decode(encoded, name),
        caption=record.clean_caption(caption, name),
        name=name,
        label=None if label is None else columns.whole(label, name),
    )


class ArrayRecords:
    """Pictures in ArrayRecord files, in the order of the files' names.

    Args:
      path: folder, file, pattern or URL.
      image, caption, label: features; "" for the usual names, or for no label.
      cache: local folder where remote files are copied.

    Raises:
      ConfigError: no files, broken files, no such features, or remote files without a
        cache.
    """

    def __init__(
        self,
        path: str,
        image: str = "",
        caption: str = "",
        label: str = "",
        cache: str = "",
    ) -> None:
        folder = storage.find(path)
        # "x.array_record" and "x.array_record-00000-of-00009" alike.
        names = [n for n in folder.files if any(s in n.lower() for s in SUFFIXES)]
        if not names:
            raise config.ConfigError(
                f"{path}: none of its {len(folder.files)} files has "
                f"{' or '.join(SUFFIXES)} in its name"
            )
        self._records = Records(folder.fetch(names, cache, WHY), names)
        if not len(self._records):
            raise config.ConfigError(f"{path}: there are no records in its files")
        found = self._feature_names(path)
        self._image = columns.choose(found, image, columns.IMAGE, "image", path)
        found.remove(self._image)
        self._caption = columns.choose(found, caption, columns.CAPTION, "caption", path)
        self._label = columns.optional(found, label, "label", path)
        chosen = (self._image, self._caption, self._label)
        self.captions_from = f"the feature {self._caption!r}"
        self.identity = record.listing_digest(
            "array_record", folder.sketches(names), chosen
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> record.Picture:
        features, name = self._records.features(index), self._records.name(index)
        caption = columns.first(features.get(self._caption))
        label = None
        if self._label:
            label = columns.whole(columns.first(features.get(self._label)), name)
        return picture(features, name, self._image, caption, label)

    def _feature_names(self, path: str) -> list[str]:
        problem = ""
        for index in range(min(_TRIED, len(self._records))):
            try:
                return list(self._records.features(index))
            except record.BadRecord as e:
                problem = str(e)
        raise config.ConfigError(
            f"{path}: its records are not tf.train.Example messages ({problem}); write "
            "them with scaling_ldm.data.pictures.examples.write_array_record"
        )


def write_array_record(
    path: str | os.PathLike[str],
    pictures: Iterable[record.Picture | tuple[bytes, str]],
    shards: int = 1,
) -> list[pathlib.Path]:
    """Writes pictures as ArrayRecord files that the source "array_record" reads.

    Args:
      path: "FOLDER/NAME"; the files are NAME-00000-of-00002.array_record and so on.
      pictures: each is a Picture, stored as PNG, or (encoded picture, caption), stored
        as it is.
      shards: number of files; the pictures go to them in turn.
    """
    base = pathlib.Path(path).expanduser()
    base.parent.mkdir(parents=True, exist_ok=True)
    paths = [
        base.with_name(f"{base.name}-{i:05d}-of-{shards:05d}.array_record")
        for i in range(shards)
    ]
    writers = [
        array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for path in paths
    ]
    try:
        for writer, picture in zip(itertools.cycle(writers), pictures, strict=False):
            writer.write(wire.encode_example(_to_features(picture)))
    finally:
        for writer in writers:
            writer.close()
    return paths


def _to_features(picture: record.Picture | tuple[bytes, str]) -> dict:
    if not isinstance(picture, record.Picture):
        return {"image": picture[0], "caption": picture[1]}
    out = io.BytesIO()
    Image.fromarray(np.asarray(picture.image)).save(out, "PNG")
    features = {"image": out.getvalue(), "caption": picture.caption}
    return features | ({} if picture.label is None else {"label": picture.label})
