"""Which of seven DiT sizes is best at 1e17 FLOPs? Paper B's isoFLOP curve.

Cost: 7 x 1e17 FLOPs. Expect an optimum near 4.1M parameters. Paper B's law gives a
training loss of 0.822 there, on its own data.
Command: python -m scaling_ldm.main --config experiments/dit_1e17.py
"""

from experiments import base


def get_config():
    return base.paper_b("dit_1e17", 1e17)
