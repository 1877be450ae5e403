"""Text that grows, in an object of a store, which can only be written whole."""

from __future__ import annotations

import time

from scaling_ldm.records.objects import ObjectPath

EVERY = 60.0  # seconds between two writes that nobody has asked for


class GrowingObject:
    """A log; the object is written when that is asked for, and every EVERY seconds.

    What a killed process had not written yet is lost. A run's log is written before
    each checkpoint, and the steps after the last one are done again.

    Args:
      held: what the object holds.
    """

    def __init__(self, path: ObjectPath, held: bytes) -> None:
        self.name, self._path, self._written = str(path), path, held
        self._text, self._since = held, time.monotonic()

    def write(self, text: str) -> None:
        self._text += text.encode()

    def flush(self) -> None:
        """Writes the object if EVERY seconds have passed."""
        if time.monotonic() - self._since > EVERY:
            self.write_now()

    def write_now(self) -> None:
        """Writes the object if there is new text.

        Raises:
          OSError: as `objects.asking`; the text is kept for the next call.
        """
        if self._text != self._written:
            self._path.write_bytes(self._text)
            self._written = self._text
        self._since = time.monotonic()

    def close(self) -> None:
        self.write_now()
