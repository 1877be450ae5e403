"""Every test runs on eight simulated CPU devices; ranks are never promoted."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is what the tests take their time for; what is compiled hardly runs.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny():
    """An Experiment small enough to compile in a second or two."""
    from scaling_ldm import config

    c = config.default()
    c.name = "tiny"
    c.data.shape = (8, 8, 3)
    c.data.text_tokens = 4
    c.data.vocab_size = 256
    c.model.patch_size = 4
    c.model.head_dim = 8
    c.model.text_width = c.model.time_width = 8
    c.model.compute_dtype = "float32"
    c.optimizer.learning_rate = 1e-2
    c.plan.budgets_flops = (3e8,)
    c.plan.sizes = ((16, 2),)
    c.plan.sizes_per_budget = 1
    c.plan.minimum_steps = 10
    c.plan.flops_per_second_per_device = 1e9
    c.train.batch_size = 8
    c.train.checkpoints_per_run = 2
    c.train.log_every_steps = 5
    c.validation.samples = c.validation.batch_size = 16
    c.lock()
    return c
