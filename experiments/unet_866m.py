"""What does paper A's reference, the 866M U-Net, learn, and at what cost?

This is the network of relative cost 1 in the study of eleven networks: the layout of
Stable Diffusion with a text condition 1024 wide. unet_family.py has the recipe and what
is assumed.

Cost: 2.5e21 FLOPs. Expect FID 21.55 and CLIP score 0.312 on COCO with 50 steps of DDIM
at guidance 7.5 (arXiv 2404.01367, table 1).
Command: python -m scaling_ldm.main --config experiments/unet_866m.py
"""

import ml_collections

from experiments import unet_family


def get_config() -> ml_collections.ConfigDict:
    c = unet_family.paper_a("unet_866m", 320)
    c.question = "What does the 866M U-Net learn, and at what cost?"
    return c
