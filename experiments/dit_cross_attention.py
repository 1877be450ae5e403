"""Does cross-attention change where compute is best spent? Paper B's comparison.

The grid of dit_isoflop.py with text read by cross-attention, as in PixArt.

Cost: 7.6e19 FLOPs. Expect N_opt ~ C^0.54, D_opt ~ C^0.46, loss ~ C^-0.0385.
Command: python -m scaling_ldm.main --config experiments/dit_cross_attention.py
"""

from experiments import base


def get_config():
    c = base.paper_b("dit_cross_attention", 1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
    c.question = "Does cross-attention change where compute is best spent?"
    c.model.architecture = "cross_attention"
    return c
