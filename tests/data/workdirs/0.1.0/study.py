"""Is a working directory of this release read by later ones? An example for the tests.

Command: python tests/older_workdirs.py
"""

import ml_collections

from scaling_ldm import config


def get_config() -> ml_collections.ConfigDict:
    c = config.default()
    c.name = "older"
    c.question = "Is a working directory of this release read by later ones?"
    c.data.text_tokens = 8
    c.data.vocab_size = 256
    c.data.shape = (16, 16, 3)
    c.model.patch_size = 4
    c.model.head_dim = 8
    c.model.text_width = c.model.time_width = 32
    c.model.compute_dtype = "float32"
    c.optimizer.learning_rate = 3e-3
    c.plan.budgets_flops = (1.6e9, 2.4e9, 3.6e9)
    c.plan.sizes = ((16, 1), (24, 1), (32, 1), (48, 1))
    c.plan.sizes_per_budget = 0
    c.plan.minimum_steps = 8
    c.plan.accelerator, c.plan.devices = "cpu", 1
    c.plan.flops_per_second_per_device = 1e10
    c.mesh.cpu_devices = 1
    c.train.batch_size = 16
    c.train.optimize_code = False
    c.train.steps_per_dispatch = 8
    c.train.checkpoints_per_run = 2
    c.train.log_every_steps = 10
    c.validation.samples = c.validation.batch_size = 128
    c.generate.images, c.generate.batch_size, c.generate.steps = 16, 8, 4
    c.generate.sampler = "dpm++2m"
    c.evaluate.network = "lite0"
    c.evaluate.input_size = 64
    c.evaluate.reference_images = 32
    c.evaluate.bootstrap = 4
    c.frontier.images = 8
    c.frontier.samplers = ("ddim",)
    c.frontier.steps = (2, 4)
    c.frontier.guidances = (1.5, 3.0)
    c.fit.bootstrap = 100
    return c
