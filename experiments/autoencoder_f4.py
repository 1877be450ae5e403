"""How well does a small autoencoder keep icons of 32 px in 8 x 8 latents of 4 numbers?

This is the library's own latent space: a KL autoencoder with the layout of Stable
Diffusion's, trained with L1 and a weak KL, without a perceptual loss or discriminator.
The training loop is that of every denoiser. `config.encode.autoencoder = "icons_f4"`
names the weights that this experiment gave; their folder also has the error on held-out
names.

Cost: 8e13 FLOPs, 25 to 40 minutes on 2 CPU cores. Expect a mean squared error of 0.0113
(25.5 dB) on 2,048 pictures of held-out names.
Command: python -m scaling_ldm.main --config experiments/autoencoder_f4.py --stages plan,train,export
"""  # noqa: E501

import ml_collections

from scaling_ldm import config


def get_config() -> ml_collections.ConfigDict:
    c = config.default()
    c.name = "autoencoder_f4"
    c.question = "How well does a small autoencoder keep icons it has not seen?"
    c.data.shape = (32, 32, 3)
    c.data.text_tokens = 8
    c.model.architecture = "autoencoder_kl"
    c.model.latent_channels, c.model.groups = 4, 8
    c.model.compute_dtype = "float32"
    c.objective.reconstruction, c.objective.kl_weight = "l1", 1e-5
    c.optimizer.averages = ("ema",)  # the published weights are of it
    c.optimizer.learning_rate, c.optimizer.ema_decay = 2e-3, 0.999
    c.optimizer.warmup_fraction = 0.02
    c.plan.sizes = ((16, 3),)
    c.plan.steps, c.plan.budgets_flops = 4000, ()
    c.plan.accelerator, c.plan.devices = "2-core CPU", 2
    c.plan.flops_per_second_per_device = 1.5e10
    c.mesh.cpu_devices = 1
    c.train.batch_size = 64
    c.train.checkpoints_per_run = 20
    c.train.log_every_steps = 20
    c.validation.samples, c.validation.batch_size = 2048, 128
    return c
