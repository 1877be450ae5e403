"""How do quality and cost of paper A's U-Nets grow from 39M to 5B parameters?

Paper A is "Bigger is not Always Better" (arXiv 2404.01367): eleven U-Nets of base width
64 to 768. All are trained for 500,000 steps of 2048 pictures at a rate of 1e-4, on
64 x 64 x 4 latents. The paper does not say, and this file assumes, as in Stable
Diffusion: epsilon on the scaled-linear schedule, its autoencoder (pictures of 512 px),
77 tokens of the text encoder of its second version (1024 wide, which the parameter
counts ask for), AdamW without decay, 10% caption dropout. It does not say either how
the weights are averaged: this file keeps the two averages that every study keeps.

Cost: 1.6e20 FLOPs (39M) to 1.3e22 (5B), 2.9e22 in all. Expect FID 25.30 to 20.14 and
CLIP score 0.305 to 0.314 on COCO with 50 steps of DDIM at guidance 7.5 (table 1).
Put WebDataset shards into data/shards, or set config.data.path.
Command: python -m scaling_ldm.main --config experiments/unet_family.py --stages plan
"""

import ml_collections

from scaling_ldm import config

WIDTHS = (64, 96, 128, 160, 192, 224, 256, 288, 320, 512, 768)


def get_config() -> ml_collections.ConfigDict:
    return paper_a("unet_family", *WIDTHS)


def paper_a(name: str, *widths: int) -> ml_collections.ConfigDict:
    """Paper A's text-to-image pretraining at the given base widths."""
    c = config.default()
    c.name = name
    c.question = "How do quality and cost of a latent U-Net grow with its width?"
    c.data.source, c.data.path = "webdataset", "data/shards"
    c.data.shape = (64, 64, 4)
    c.data.text_tokens = 77
    c.encode.autoencoder = "stabilityai/sd-vae-ft-mse"
    c.encode.text_encoder = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    c.model.architecture = "unet"
    c.model.heads, c.model.head_dim = 8, 0
    c.model.text_width = 1024
    c.model.remat = True
    c.objective.schedule, c.objective.prediction = "scaled_linear", "epsilon"
    c.objective.timestep_sampling = "uniform"
    c.plan.sizes = tuple((width, 4) for width in widths)
    c.plan.steps, c.plan.budgets_flops = 500_000, ()
    c.plan.accelerator, c.plan.devices = "tpu-v5p", 256
    c.train.batch_size = 2048
    c.mesh.fsdp = 8
    c.generate.sampler, c.generate.guidance = "ddim", 7.5
    return c
