"""Which of seven DiT sizes is best at 1e18 FLOPs? Paper B's isoFLOP curve.

Cost: 7 x 1e18 FLOPs. Expect an optimum near 15M parameters. Paper B's law gives a
training loss of 0.772 there, on its own data.
Command: python -m scaling_ldm.main --config experiments/dit_1e18.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_1e18", 1e18)
