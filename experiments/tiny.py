"""Does every stage work here? The smoke test of the library.

Cost: 3e10 FLOPs, 50 s on 2 CPU cores, most of it compilation. Expect 12 runs and no
law: the runs are so short that the fit refuses, and the report says why.
Command: python -m scaling_ldm.main --config experiments/tiny.py --workdir runs/tiny
"""

import ml_collections

from scaling_ldm import config


def get_config() -> ml_collections.ConfigDict:
    c = config.default()
    c.name = "tiny"
    c.question = "Does every stage work here?"
    c.data.text_tokens = 8
    c.data.vocab_size = 256
    c.data.shape = (16, 16, 3)
    c.model.patch_size = 4
    c.model.head_dim = 16
    c.model.text_width = c.model.time_width = 32
    c.model.compute_dtype = "float32"
    c.optimizer.averages = ("ema",)  # the published numbers are of it
    c.optimizer.learning_rate = 3e-3
    c.plan.budgets_flops = (1.6e9, 2.4e9, 3.6e9)
    c.plan.sizes = ((16, 1), (16, 2), (32, 1), (48, 1))
    c.plan.sizes_per_budget = 4
    c.plan.minimum_steps = 16
    c.plan.accelerator, c.plan.devices = "cpu", 1
    c.plan.flops_per_second_per_device = 1e10
    c.mesh.cpu_devices = 1
    c.train.batch_size = 16
    c.train.optimize_code = False
    c.train.steps_per_dispatch = 8
    c.train.checkpoints_per_run = 2
    c.train.log_every_steps = 10
    c.validation.samples = c.validation.batch_size = 64
    c.generate.images, c.generate.steps = 4, 4
    c.generate.sampler = "dpm++2m"
    c.fit.bootstrap = 100
    return c
