"""Which of seven DiT sizes is best at 3e17 FLOPs? Paper B's isoFLOP curve.

Cost: 7 x 3e17 FLOPs. Expect an optimum near 7.6M parameters. Paper B's law gives a
training loss of 0.798 there, on its own data.
Command: python -m scaling_ldm.main --config experiments/dit_3e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_3e17", 3e17)
