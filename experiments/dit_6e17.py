"""The isoFLOP curve of paper B at 6e17 FLOPs: seven in-context sizes.

Cost: 7 x 6e17 FLOPs. Expect an optimum near 11M parameters; paper B's law, on its own
data, has a training loss of 0.783 there.
Command: python -m scaling_ldm.main --config experiments/dit_6e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_6e17", 6e17)
