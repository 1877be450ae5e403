"""Paper B's whole study: six budgets, seven in-context sizes each, and its laws.

Cost: 7.6e19 FLOPs. Expect N_opt ~ C^0.57, D_opt ~ C^0.43, loss ~ C^-0.027.
Command: python -m scaling_ldm.main --config experiments/dit_isoflop.py
One run, on any host: add --run K. When all are there: --stages fit,generate,report
"""

from experiments import base


def get_config():
    return base.paper_b("dit_isoflop", 1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
