"""Which quantity should a network predict: epsilon, v or the flow? By one bound.

The quickstart's study for three predictions on one noise schedule, the cosine of
Nichol and Dhariwal. Their losses are different quantities and are not compared. What is
compared is the variational bound on held-out pictures, in bits per dim, which means the
same for all three.

Cost: 3.9e13 FLOPs of training, about 45 minutes on 2 CPU cores with the bounds. Expect
the laws of the bound of each prediction and two comparisons.
Command: python -m scaling_ldm.main --config experiments/quick_predictions.py
Then: python -m scaling_ldm.main --config experiments/quick_predictions.py --stages compare
"""  # noqa: E501

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
    c = quickstart.get_config()
    c.name = "quick_predictions"
    c.question = "Which quantity should a network predict: epsilon, v or the flow?"
    c.objective.schedule = "cosine"
    c.objective.timestep_sampling = "uniform"
    c.plan.axes = {"objective.prediction": ("epsilon", "v", "flow")}
    c.evaluate.held_out = ("vlb",)
    c.fit.metrics = ("vlb",)
    return c
