"""Counts good and bad records, and stops when too many are bad."""

from __future__ import annotations

import dataclasses
from typing import Any

from scaling_ldm import config
from scaling_ldm.data.pictures.record import BadRecord
from scaling_ldm.records.errors import TooManyBad

REMEMBERED = 20  # bad records kept by name; all are counted


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Counts records and stops when more than a fraction of them are bad.

    Attributes:
      allowed: the largest accepted fraction of bad records.
      minimum: the fraction is checked after this many records. `finish` checks it at
        any count, and allowed = 0 refuses the first bad record.
      good: number of good records.
      bad: number of bad records.
      first: (name, reason) of the first bad records.

    `dataclasses.asdict` gives its state for JSON; `Tally(**state)` continues from it.

    Example:
      tally = Tally(allowed=0.01)
      for index, found in read_ahead(pictures, range(len(pictures)), workers=2):
          if tally.add(found):
              encode(found)
      tally.finish()
    """

    allowed: float | int
    minimum: int = 1000
    good: int = 0
    bad: int = 0
    first: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.allowed < 1:
            raise config.ConfigError(
                f"the accepted fraction of bad records is {self.allowed}; it must be "
                "at least 0 and below 1"
            )
        self.first = [(name, reason) for name, reason in self.first]

    @property
    def seen(self) -> int:
        return self.good + self.bad

    def add(self, found: object) -> bool:
        """Counts a picture or a BadRecord; true if it is good.

        Raises:
          TooManyBad: too many are bad; the error names the first of them.
        """
        if not isinstance(found, BadRecord):
            self.good += 1
            return True
        self.bad += 1
        if len(self.first) < REMEMBERED:
            self.first.append((found.name, found.reason))
        if self.seen >= self.minimum or not self.allowed:
            self._judge()
        return False

    def finish(self) -> None:
        """Checks the fraction over all records.

        Raises:
          TooManyBad: too many are bad.
          ConfigError: none is good.
        """
        self._judge()
        if not self.good:
            raise config.ConfigError(f"no usable picture: {self.summary()}")

    def summary(self) -> str:
        """One line, and one more for each remembered bad record."""
        share = self.bad / max(self.seen, 1)
        lines = [f"{self.good:,} pictures, {self.bad:,} bad records ({share:.3%})"]
        lines += [f"  {name}: {reason}" for name, reason in self.first]
        if self.bad > len(self.first):
            lines.append(f"  and {self.bad - len(self.first):,} more")
        return "\n".join(lines)

    def _judge(self) -> None:
        if self.bad > self.allowed * self.seen:
            raise TooManyBad(
                f"{self.bad:,} of {self.seen:,} records are bad, more than the "
                f"accepted fraction of {self.allowed:g}. Repair or remove them, or "
                f"accept a larger fraction.\n{self.summary()}"
            )
