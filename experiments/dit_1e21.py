"""Does the law fitted up to 6e18 FLOPs predict the loss at 1e21? Paper B's check.

Cost: 1e21 FLOPs in one run. Expect 0.77G parameters and a training loss of 0.640, by
paper B's laws.
Command: python -m scaling_ldm.main --config experiments/dit_1e21.py --stages plan,train
"""

from experiments import base


def get_config():
    c = base.paper_b("dit_1e21", 1e21)
    c.question = "Does the law fitted up to 6e18 FLOPs predict the loss at 1e21?"
    c.plan.sizes = tuple((64 * n, n) for n in range(16, 31))
    c.plan.sizes_per_budget = 1
    c.plan.devices = 256
    c.mesh.fsdp = 16
    c.model.remat = True
    c.train.checkpoints_per_run = 100
    return c
