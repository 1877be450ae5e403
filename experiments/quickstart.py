"""How do the best model size and data grow with compute? The whole study in miniature.

In-context transformers of 8k to 109k parameters learn the latents of the embedded icons
at four budgets, the largest eight times the smallest. The icons are 32 x 32 pixels; the
autoencoder of the library makes 8 x 8 x 4 latents of them. A network sees 64 image
tokens and 15 caption words. Two settings differ from paper B's, for the sake of a
laptop: batch 16 instead of 1024, and a learning rate that suits short runs. Both move
the optimum, so the laws hold for this setting alone.

Cost: 1.3e13 FLOPs, about ten minutes on 2 CPU cores. Expect N_opt ~ C^0.07 (90%
interval -0.10 to 0.23), every minimum inside its grid, and the loss of the largest
budget, held out, predicted within 3%.
Command: python -m scaling_ldm.main --config experiments/quickstart.py
"""

from scaling_ldm import config


def get_config():
    c = config.default()
    c.name = "quickstart"
    c.question = "How do the best model size and data grow with training compute?"
    c.data.shape = (8, 8, 4)
    c.data.text_tokens = 15
    c.data.vocab_size = 1024
    c.encode.autoencoder, c.encode.text_encoder = "icons_f4", "vocabulary"
    c.encode.pictures = 64_000
    c.model.patch_size = 1
    c.model.head_dim, c.model.heads = 0, 2
    c.model.text_width = c.model.time_width = 32
    c.model.compute_dtype = "float32"
    c.optimizer.averages = ("ema",)  # the published numbers are of it
    c.optimizer.learning_rate = 6e-3
    c.optimizer.warmup_fraction = 0.05
    c.plan.budgets_flops = (1.2e11, 2.4e11, 4.8e11, 9.6e11)
    c.plan.sizes = tuple((width, 2) for width in (16, 20, 24, 32, 40, 48, 64))
    c.plan.sizes_per_budget = 0
    c.plan.minimum_steps = 50
    c.plan.accelerator, c.plan.devices = "2-core CPU", 2
    c.plan.flops_per_second_per_device = 1.5e10
    c.train.batch_size = 16
    c.train.steps_per_dispatch = 8
    c.train.checkpoints_per_run = 2
    c.train.log_every_steps = 10
    c.validation.samples, c.validation.batch_size = 1024, 128
    c.generate.images, c.generate.steps = 24, 30
    return c
