"""A stop that is asked for at a dispatch, in the process of the test."""

from scaling_ldm.training import signals


class StopAt(signals.StopSignal):
    """A signal that arrives at the n-th dispatch of the process."""

    def __init__(self, dispatch):
        super().__init__()
        self.left = dispatch

    @property
    def asked(self):
        self.left -= 1
        return self.left <= 0


def stop_at(monkeypatch, dispatch):
    """Runs that begin from now on are asked to stop at this dispatch."""
    monkeypatch.setattr(signals, "current", lambda: StopAt(dispatch))
