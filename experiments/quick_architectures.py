"""Which way of reading the caption is better, and at which compute? Paper B, section 4.

The quickstart's study for three networks: text in one sequence with the patches
(in_context), cross-attention (PixArt) and two streams (MMDiT). They share sizes, seed,
pictures and noise. The stage compare holds the other two against the first; see
docs/compare.md. One size has other parameters in each network, so N differs, too.

Cost: 3.9e13 FLOPs, about 40 minutes on 2 CPU cores. Expect two comparisons, each with
the differences of the exponents and a verdict on the loss at these budgets alone.
Command: python -m scaling_ldm.main --config experiments/quick_architectures.py
Then: python -m scaling_ldm.main --config experiments/quick_architectures.py --stages compare
"""  # noqa: E501

import ml_collections

from experiments import quickstart


def get_config() -> ml_collections.ConfigDict:
    c = quickstart.get_config()
    c.name = "quick_architectures"
    c.question = "Which way of reading the caption is better, and at which compute?"
    architectures = ("in_context", "cross_attention", "mmdit")
    c.plan.axes = {"model.architecture": architectures}
    return c
