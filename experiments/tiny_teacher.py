"""Does an objective of one's own train like those of the library?

One run of tiny.py whose loss is in objectives/teacher_l1.py.

Cost: 5e9 FLOPs, 30 s on 2 CPU cores. Expect a run that spends a quarter of its FLOPs on
the teacher, whose forward pass stands beside forward and backward.
Command: python -m scaling_ldm.main --config experiments/tiny_teacher.py --workdir runs/tiny_teacher
"""  # noqa: E501

import ml_collections

from experiments import tiny


def get_config() -> ml_collections.ConfigDict:
    c = tiny.get_config()
    c.name = "tiny_teacher"
    c.question = "Does an objective of one's own train like those of the library?"
    c.objective.kind = "objectives/teacher_l1.py:build"
    c.objective.prediction = "x0"
    c.plan.budgets_flops = (4.8e9,)
    c.plan.sizes = ((16, 2),)
    c.plan.sizes_per_budget = 1
    return c
