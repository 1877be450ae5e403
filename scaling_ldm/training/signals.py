"""Signals of the operating system: stop, or save and go on; needs no jax."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

from scaling_ldm import config
from scaling_ldm.records.errors import Preempted

# What a process asks of the training loop, by urgency. A job does what is most urgent
# among the requests of its processes.
GO_ON, SAVE, SAVE_AND_SAY, STOP = range(4)


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(getattr(signal, name)) for name in names)


class StopSignal:
    """Notes which signals arrived within a `with` block.

    `asked`: SIGTERM, Ctrl-C or one of train.stop_signals. A second Ctrl-C raises
    KeyboardInterrupt at once. `save_asked`: one of train.save_signals.
    """

    asked = False
    save_asked = False

    def __init__(self, cfg: config.TrainConfig) -> None:
        self._stop = (signal.SIGTERM, signal.SIGINT, *_numbers(cfg.stop_signals))
        self._save = _numbers(cfg.save_signals)

    def __enter__(self) -> StopSignal:
        handlers = dict.fromkeys(self._stop, self._ask)
        handlers |= dict.fromkeys(self._save, self._ask_to_save)
        self._previous = {n: signal.signal(n, h) for n, h in handlers.items()}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def _ask_to_save(self, *_: Any) -> None:
        self.save_asked = True

    def request(self) -> int:
        """STOP, SAVE_AND_SAY or GO_ON; a signal to save is told once."""
        if self.asked:
            return STOP
        if self.save_asked:
            self.save_asked = False
            return SAVE_AND_SAY
        return GO_ON


@contextlib.contextmanager
def ending(
    cfg: config.TrainConfig, doing: Callable[[], str]
) -> Generator[None, None, None]:
    """Ends at once what has nothing to save.

    Args:
      doing: what the process does now, for the message.

    One of train.save_signals has no effect. A `StopSignal` within the block takes
    precedence. In another thread than the main one, no signal arrives.

    Raises:
      Preempted: SIGTERM or one of train.stop_signals arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Preempted(f"{doing()} stops; what it has finished is kept")

    handlers = dict.fromkeys((signal.SIGTERM, *_numbers(cfg.stop_signals)), stop)
    handlers |= dict.fromkeys(_numbers(cfg.save_signals), lambda *_: None)
    previous = {n: signal.signal(n, handler) for n, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
