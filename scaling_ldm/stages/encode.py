"""The encode stage: pictures and captions -> records of latents and text features.

Shard s is encoded by process s modulo the number of processes, on the devices of that
process's host. Processes exchange only whether one of them fails. A shard is
complete or absent, so a stage that was stopped continues with the first missing one.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, data, records
from scaling_ldm.data import (
    encoded,
    label_names,
    manifests,
    pictures,
    seals,
    shards,
    split,
    stored_split,
)
from scaling_ldm.data.pictures import BadRecord, Picture, Tally
from scaling_ldm.data.pictures.read import read_ahead
from scaling_ldm.records.errors import TooManyBad
from scaling_ldm.training import encoding, mesh, progress, survey, time_left
from scaling_ldm.training.encode_progress import EncodeProgress, by_channel, size
from scaling_ldm.workdir import lock

_ACCEPTED = "What is accepted is config.encode.largest_bad_fraction."


def run(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Encodes the data set of an experiment, or each part of its mix, once.

    If another process encodes into the same folder, this one waits for it.

    Raises:
      ConfigError: pictures or networks are missing or do not fit, too many records are
        bad, or the folder holds other records.
    """
    told: dict[str, str] = {}
    for name, (part, folder) in data.parts(experiment, workdir).items():
        if name:
            progress.say(f"part {name} of the mix")
        with (
            data.naming(name),
            lock.holding(
                mesh.failing_together(functools.partial(_locks, folder, workdir)),
                primary=mesh.is_primary(),
                any_process=mesh.any_process,
                wait=True,
            ),
        ):
            _run(part, folder)
            say = functools.partial(stored_split.line, part, folder)
            primary = mesh.is_primary()
            told[name] = mesh.failing_together(say if primary else lambda: "")
    if mesh.is_primary():
        training = data.training_pictures(experiment, workdir)
        stored_split.write(workdir, told, training)


def _locks(folder: str, workdir: pathlib.Path) -> list[pathlib.Path]:
    """The locks that are held while records are written; none if they are complete.

    They are in the folder of the records, or in the workdir if that folder is a URL.
    """
    store = shards.Store(folder)
    if seals.stored_manifest(store) is not None:
        return []
    return [(store.local or workdir / "encoded") / lock.NAME]


def _run(experiment: config.Experiment, folder: str) -> None:
    """Encodes the pictures of one part; the records are locked, unless complete."""
    encoder = mesh.failing_together(lambda: _Encoder(experiment, folder))
    if encoder.manifest is not None:
        progress.say(
            f"encoded already: {encoder.manifest['records']:,} pictures in {folder}"
        )
        summary = encoder.manifest["identity"].get("split", {})
        if experiment.data.source not in config.ENDLESS:
            progress.say(split.in_words(summary))
        return
    encoder.split()
    encoder.encode()
    mesh.failing_together(lambda: encoder.finish() if mesh.is_primary() else None)


@contextlib.contextmanager
def _accepting() -> Generator[None, None, None]:
    """A context that adds the field that accepts bad records to TooManyBad."""
    try:
        yield
    except TooManyBad as e:
        raise TooManyBad(f"{e}\n{_ACCEPTED}") from e


class _Encoder:
    """Writes the records of an experiment's pictures.

    manifest: of records that are complete already; None if there is work to do.
    """

    def __init__(self, experiment: config.Experiment, folder: str) -> None:
        self._experiment, self._folder = experiment, folder
        self._store, self._begun = shards.Store(folder), time.perf_counter()
        self._split: split.Split | None = None
        self.manifest = seals.stored_manifest(self._store)
        wanted = encoded.identity(experiment)
        if self.manifest is not None:
            held = self.manifest["identity"]
            encoded.refuse(folder, encoded.differences(held, wanted))
            try:
                found = pictures.of_experiment(experiment)
            except config.ConfigError as e:
                reason = str(e).splitlines()[0]
                progress.say(f"the pictures themselves are not read: {reason}")
            else:
                wanted = {"set": found.identity}
                encoded.refuse(folder, encoded.differences(held, wanted))
            return
        held = self._store.read_json(shards.IDENTITY, "source", "set")
        self._older = held is not None and "split_by" not in held
        if self._older:  # an older folder continues by its own rules
            first = dataclasses.replace(experiment.encode, choose="first")
            experiment = dataclasses.replace(experiment, encode=first)
        cfg = experiment.encode
        self._pictures = pictures.of_experiment(experiment)
        self._positions = pictures.chosen(experiment, self._pictures)
        self._total = len(self._positions)
        self._per_shard = cfg.records_per_shard
        self._shards = -(-self._total // self._per_shard)
        wanted |= {
            "set": self._pictures.identity,
            "found": self._total,
            "records_per_shard": self._per_shard,
        }
        if held is not None:
            encoded.refuse(folder, encoded.differences(held, wanted))
        self._held = held
        self._identity = {k: v for k, v in wanted.items() if held is None or k in held}
        progress.say(
            f"encode: {self._total:,} pictures of {experiment.data.source} into "
            f"{self._shards:,} shards in {folder}"
        )
        for line in pictures.examples_of(self._pictures):
            progress.say(line)
        self._networks = encoding.FrozenNetworks(experiment)
        took = time_left.format_duration(time.perf_counter() - self._begun)
        progress.say(f"networks are ready after {took}: {self._networks.describe()}")
        self._tally = Tally(allowed=cfg.largest_bad_fraction)

    def split(self) -> None:
        """Decides which pictures are held out, or reads what was decided before.

        Raises:
          ConfigError: the split is refused, or too many records are bad.
        """
        cfg, held = self._experiment.data, self._held
        if held is not None:
            self._split = stored_split.read_split(self._folder)
        elif cfg.source not in config.ENDLESS and cfg.split_by != "caption_alone":
            tally = Tally(allowed=self._tally.allowed)
            with _accepting():
                self._split = survey.run(
                    self._experiment,
                    self._pictures,
                    self._positions,
                    self._store,
                    tally,
                )
        if self._split is not None:
            self._identity["split"] = self._split.summary
            progress.say(split.in_words(self._split.summary))
            label_names.refuse_number(
                self._experiment.model.classes,
                label_names.of(self._pictures),
                self._split.summary.get("labels", 0),
            )
        if held is None:
            mesh.failing_together(self._begin if mesh.is_primary() else lambda: None)
        self._of = records.digest(held or self._identity)

    def _begin(self) -> None:
        """Writes the identity of the records that follow."""
        if self._split is not None:
            self._store.write_json(shards.SPLIT, split.to_json(self._split))
        self._store.write_json(shards.IDENTITY, self._identity)
        survey.remove(self._store)

    def encode(self) -> None:
        """Writes every missing shard.

        All processes finish a shard before one of them starts the next. So an error of
        one process reaches all of them.
        """
        names = self._store.names()
        complete = {
            n
            for n in range(self._shards)
            if {shards.shard_name(n), shards.summary_name(n)} <= names
        }
        if complete:
            progress.say(f"{len(complete):,} of {self._shards:,} shards are there")
        processes = jax.process_count()
        shown = EncodeProgress(
            self._total,
            sum(len(self._indices(n)) for n in complete),
            processes,
            self._experiment.train.show_every_seconds,
        )
        for first in range(0, self._shards, processes):
            number = first + jax.process_index()
            if number in complete:
                self._recall(number)
            missing = [n for n in range(first, first + processes) if n not in complete]
            mine = number in missing and number < self._shards
            work = functools.partial(self._shard, number, shown)
            mesh.failing_together(work if mine else lambda: None)
            shown.level(sum(len(self._indices(n)) for n in missing if n < self._shards))

    def _indices(self, number: int) -> np.ndarray:
        """The positions in the set of the pictures of a shard."""
        first = number * self._per_shard
        return self._positions[first : first + self._per_shard]

    def _recall(self, number: int) -> None:
        """Counts the records that an earlier call wrote or found bad in a shard."""
        summary = seals.stored_shard(self._store, number, self._of)
        self._tally.good += summary["records"]
        for name, reason in summary["bad"]:
            self._count(BadRecord(name, reason))

    def _count(self, found: Any) -> bool:
        """Whether this is a picture.

        Raises:
          ConfigError: too many records are bad.
        """
        with _accepting():
            return self._tally.add(found)

    def _shard(self, number: int, shown: EncodeProgress) -> None:
        """Writes one shard."""
        bad: list[tuple[str, str]] = []
        with self._store.replace(shards.shard_name(number)) as path:
            layout = self._networks.layout
            words, pixels = layout.text_width == 0, layout.dtype == "uint8"
            with contextlib.closing(shards.Writer(path, words, pixels)) as writer:
                self._fill(writer, number, bad, shown)
                summary = writer.finish(bad)
        whole = seals.summary_of(summary, number, self._of)
        self._store.write_json(shards.summary_name(number), whole)

    def _fill(
        self,
        writer: shards.Writer,
        number: int,
        bad: list[tuple[str, str]],
        shown: EncodeProgress,
    ) -> None:
        """Writes the pictures of a shard; the devices compute while a batch is read."""
        under_way: collections.deque[Any] = collections.deque()
        for batch in self._batches(number, bad):
            started = self._networks.start(
                [picture.image for picture in batch],
                [picture.caption for picture in batch],
            )
            under_way.append((batch, started))
            if len(under_way) > 1:
                self._write(writer, *under_way.popleft())
            shown.show(len(batch), writer.bytes, self._tally.bad)
        while under_way:
            self._write(writer, *under_way.popleft())
        shown.written(writer.bytes)

    def _batches(
        self, number: int, bad: list[tuple[str, str]]
    ) -> Iterator[list[Picture]]:
        """The good pictures of a shard in order; the others are added to `bad`."""
        cfg, (height, width) = self._experiment.encode, self._networks.side

        def prepare(picture: Picture) -> Picture:
            image = pictures.fit(picture.image, height, width)
            return dataclasses.replace(picture, image=image)

        batch: list[Picture] = []
        indices = self._indices(number)
        for position, found in read_ahead(
            self._pictures, indices, cfg.workers, prepare
        ):
            if isinstance(found, Picture):
                found = self._placed(position, found)
            if not self._count(found):
                bad.append((found.name, found.reason))
                continue
            batch.append(found)
            if len(batch) == cfg.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _placed(self, position: int, picture: Picture) -> Picture | BadRecord:
        """A picture with its side of the split."""
        if self._split is None:
            side = pictures.is_held_out(picture, self._experiment.data)
        else:
            side = self._split.side(position)
        if side is None:
            why = "it could not be read when the set was split"
            return BadRecord(picture.name, why)
        return dataclasses.replace(picture, held_out=side)

    def _write(
        self, writer: shards.Writer, batch: Sequence[Picture], started: Any
    ) -> None:
        x, features = self._networks.read(started)
        means, variances = self._networks.scaled(x)
        for i, picture in enumerate(batch):
            given = None if features is None else features[i]
            self._check_range(picture, x[i], given)
            record = shards.Record(
                x=x[i],
                features=given,
                caption=picture.caption,
                name=picture.name,
                label=picture.label,
                held_out=bool(picture.held_out),
            )
            writer.add(record, means[i], variances[i])

    def _check_range(
        self, picture: Picture, x: np.ndarray, features: np.ndarray | None
    ) -> None:
        for what, values in (("latents", x), ("text features", features)):
            if values is not None and values.dtype != np.uint8:
                if not np.isfinite(values.astype(np.float32)).all():
                    raise config.ConfigError(
                        f"{picture.name}: its {what} are beyond the range of "
                        f"{values.dtype}, or no numbers; try "
                        "--config.encode.dtype=bfloat16, or "
                        "--config.encode.compute_dtype=float32"
                    )

    def finish(self) -> None:
        """Writes the manifest, after every process has written its shards.

        Raises:
          ConfigError: shards of another host are not visible here, or too many records
            are bad.
        """
        summaries = seals.stored_summaries(self._store, self._shards, self._of)
        tally = self._tally = Tally(allowed=self._tally.allowed)
        tally.good = sum(summary["records"] for summary in summaries)
        for summary in summaries:
            for name, reason in summary["bad"]:
                self._count(BadRecord(name, reason))
        with _accepting():
            tally.finish()
        manifest = manifests.write(
            self._store,
            self._identity,
            self._networks.layout,
            summaries,
            self._networks.uncond,
            tally.first,
            label_names.of(self._pictures),
        )
        written = sum(summary["bytes"] for summary in summaries)
        took = time_left.format_duration(time.perf_counter() - self._begun)
        progress.say(
            f"encoded after {took}: {tally.summary()}\n"
            f"  {manifest['train']:,} to train on, {manifest['validation']:,} to "
            "validate with\n"
            f"  {size(written)} in {self._folder}\n"
            f"  a network sees {by_channel(manifest)}"
            f"{label_names.unlabelled(summaries)}"
        )
