"""Which of seven DiT sizes is best at 6e18 FLOPs? Paper B's isoFLOP curve.

Cost: 7 x 6e18 FLOPs. Expect an optimum near 42M parameters. Paper B's law gives a
training loss of 0.735 there, on its own data.
Command: python -m scaling_ldm.main --config experiments/dit_6e18.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_6e18", 6e18)
