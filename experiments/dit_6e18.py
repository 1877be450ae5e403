"""The isoFLOP curve of paper B at 6e18 FLOPs: seven in-context sizes.

Cost: 7 x 6e18 FLOPs. Expect an optimum near 42M parameters; paper B's law, on its own
data, has a training loss of 0.735 there.
Command: python -m scaling_ldm.main --config experiments/dit_6e18.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_6e18", 6e18)
