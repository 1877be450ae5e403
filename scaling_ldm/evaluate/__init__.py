"""Pictures -> numbers that cannot be compared with numbers measured another way.

`stage` measures finished runs, `cells` the grid of sampler, steps and guidance.
"""

from scaling_ldm.evaluate.cells import check as check_frontier
from scaling_ldm.evaluate.cells import run as run_frontier
from scaling_ldm.evaluate.protocol import ProtocolError, difference, same_protocol
from scaling_ldm.evaluate.stage import check, run

__all__ = [
    "ProtocolError",
    "check",
    "check_frontier",
    "difference",
    "run",
    "run_frontier",
    "same_protocol",
]
