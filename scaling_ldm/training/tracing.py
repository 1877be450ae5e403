"""Python's garbage collector while functions are traced."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_ALLOCATED = 100_000  # containers between two collections; Python's default is 700


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """Lets the cycle collector run seldom, for work that traces networks.

    Tracing makes millions of objects that stay. By default the collector looks at all
    of them again and again, which takes a sixth of a plan's time. Objects without
    cycles are freed at once, as ever.
    """
    before = gc.get_threshold()
    if before[0]:  # 0: somebody has switched the collector off
        gc.set_threshold(max(before[0], _ALLOCATED), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
