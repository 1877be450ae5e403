"""Joins a set to train on and a set that is held out into one set."""

from __future__ import annotations

import dataclasses

from scaling_ldm import config
from scaling_ldm.data.pictures import record


class Joined:
    """The pictures of two sets, those to train on first.

    Args:
      path: of the held-out set, for messages.

    Attributes:
      train: how many pictures are to train on.

    Raises:
      ConfigError: the two sets are the same.
    """

    def __init__(
        self, train: record.Pictures, held_out: record.Pictures, path: str
    ) -> None:
        if train.identity == held_out.identity:
            raise config.ConfigError(
                f"{path}: its pictures are also those to train on; hold out other ones"
            )
        self._sets = (train, held_out)
        self.train = len(train)
        self.captions_from = getattr(train, "captions_from", "the set itself")
        self.label_names = getattr(train, "label_names", ())
        self.identity = record.digest("joined", train.identity, held_out.identity)

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def read(self, index: int) -> record.Picture:
        held_out = index >= self.train
        picture = self._sets[held_out].read(index - self.train * held_out)
        return dataclasses.replace(picture, held_out=held_out)
