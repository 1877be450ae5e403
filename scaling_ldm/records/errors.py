"""Every exception that one part of the library raises for another to catch.

Each class is one thing that a caller can act on. `workdir.exit_status` gives each of
them its exit status.
"""

from __future__ import annotations

import zipfile

# What numpy raises where a file is no .npz, or one that is damaged.
NO_ARRAYS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,  # bits of a header that mean encryption, or another compression
    zipfile.BadZipFile,
)


class ConfigError(ValueError):
    """An experiment that cannot run; the message lists every reason."""


class Held(ConfigError):
    """Another process works in the same place; the message says which one."""


class CacheFull(ConfigError):
    """The bytes of the shard cache are all taken by shards that are being read."""


class TooManyBad(ConfigError):
    """More records of a data source are bad than the accepted fraction."""


class UnknownKey(KeyError, AttributeError):
    """A field that no experiment has; the message names the nearest one.

    It is what both `c["x"]` and `c.x` raise.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class Damaged(ValueError):
    """A file is cut off, changed, or does not hold what belongs there.

    Args:
      text: what is wrong with which file.
      remedy: what to do, in one sentence after the text; "": remove the file or put a
        copy back.
    """

    def __init__(self, text: str = "", remedy: str = "") -> None:
        super().__init__(text, remedy)
        self.remedy = remedy

    def __str__(self) -> str:
        text, remedy = self.args
        return f"{text}: {remedy}" if remedy else str(text)


class NewerVersion(ConfigError):
    """A file that a newer version of the library wrote; `needed` is the oldest one.

    Only a newer installation helps, not another host or a copy of the file. So the exit
    status is that of a bad configuration, not that of damaged storage.
    """

    def __init__(self, where: object, needed: str, here: str) -> None:
        super().__init__(
            f"{where} was written by scaling_ldm {needed} or later; this is {here}: "
            "install a newer one"
        )
        self.needed = needed


class BadRecord(ValueError):
    """A record of a data source cannot be used, for a reason that lies in it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        return BadRecord, (self.name, self.reason)


class AverageError(ValueError):
    """An average of weights that does not exist, or that stored ones cannot give."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not belong to this run."""


class LocalOnly(TypeError):
    """A path in a store was given to what reads or writes local files alone.

    It is no ValueError, because `os.path.exists` takes one for "no".
    """


class MeasurementConflict(ValueError):
    """Two rows of the table have the same key and different values."""


class NonFiniteLoss(Exception):
    """The loss is not finite at `step`; nothing was saved after the last good step."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(f"{text} at step {step}; lower the learning rate or clip more")
        self.step = step


class Preempted(Exception):
    """A signal to stop arrived. What is finished is kept; the next call continues."""


class ProtocolError(ValueError):
    """Two numbers that were not measured the same way."""


class UncountedPrimitive(ValueError):
    """An operation does matrix products that cannot be counted from the jaxpr."""


class UnknownTripCount(ValueError):
    """A `while` loop does FLOPs, and its number of iterations is not constant."""


class WeightsError(ValueError):
    """Tensors that do not fit a network; the message lists all of them."""
