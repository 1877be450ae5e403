"""Which of seven DiT sizes is best at 6e17 FLOPs? Paper B's isoFLOP curve.

Cost: 7 x 6e17 FLOPs. Expect an optimum near 11M parameters. Paper B's law gives a
training loss of 0.783 there, on its own data.
Command: python -m scaling_ldm.main --config experiments/dit_6e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_6e17", 6e17)
