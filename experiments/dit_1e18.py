"""The isoFLOP curve of paper B at 1e18 FLOPs: seven in-context sizes.

Cost: 7 x 1e18 FLOPs. Expect an optimum near 15M parameters; paper B's law, on its own
data, has a training loss of 0.772 there.
Command: python -m scaling_ldm.main --config experiments/dit_1e18.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_1e18", 1e18)
