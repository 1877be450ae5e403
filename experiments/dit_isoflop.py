"""How do the best size, data and loss of a DiT grow with compute? Paper B's study.

Six budgets with seven in-context sizes each, and the laws through them.

Cost: 7.6e19 FLOPs. Expect N_opt ~ C^0.57, D_opt ~ C^0.43, loss ~ C^-0.027.
Command: python -m scaling_ldm.main --config experiments/dit_isoflop.py
To train one run, on any host, add --run K. When all runs are there, add
--stages fit,generate,report instead.
"""

from experiments import base


def get_config():
    return base.paper_b("dit_isoflop", 1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
