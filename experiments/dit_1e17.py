"""The isoFLOP curve of paper B at 1e17 FLOPs: seven in-context sizes.

Cost: 7 x 1e17 FLOPs. Expect an optimum near 4.1M parameters; paper B's law, on its own
data, has a training loss of 0.822 there.
Command: python -m scaling_ldm.main --config experiments/dit_1e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_1e17", 1e17)
