"""The isoFLOP curve of paper B at 3e17 FLOPs: seven in-context sizes.

Cost: 7 x 3e17 FLOPs. Expect an optimum near 7.6M parameters; paper B's law, on its own
data, has a training loss of 0.798 there.
Command: python -m scaling_ldm.main --config experiments/dit_3e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_3e17", 3e17)
