"""How much does the seed change a loss, and which learning rate is better?

Two seeds at two learning rates, for three sizes and one budget of tiny.py. A run has
one value of each axis. Laws are fitted for each learning rate; seeds are replicates.

Cost: 3e10 FLOPs, a minute on 2 CPU cores. Expect 12 runs in two groups, no law (three
sizes are too few), and the table "Final losses" with the spread over the seeds.
Command: python -m scaling_ldm.main --config experiments/tiny_axes.py --workdir runs/tiny_axes
"""  # noqa: E501

import ml_collections

from experiments import tiny


def get_config() -> ml_collections.ConfigDict:
    c = tiny.get_config()
    c.name = "tiny_axes"
    c.question = "How much does the seed change a loss, and which rate is better?"
    c.plan.budgets_flops = (2.4e9,)
    c.plan.sizes = ((16, 1), (32, 1), (48, 1))
    c.plan.sizes_per_budget = 3
    c.plan.axes = {"optimizer.learning_rate": (3e-3, 1e-3), "train.seed": (0, 1)}
    return c
