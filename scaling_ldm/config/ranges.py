"""The range of each number of an experiment."""

from __future__ import annotations

from scaling_ldm.config import fields, names

_POSITIVE = {
    "data": ("text_tokens",),
    "encode": ("batch_size", "records_per_shard", "workers"),
    "model": (
        "patch_size",
        "mlp_ratio",
        "text_width",
        "time_width",
        "latent_channels",
        "groups",
    ),
    "objective": ("min_snr_gamma", "p2_k", "time_scale", "time_shift"),
    "optimizer": ("learning_rate", "policy_width", "eps", "clip_norm"),
    "plan": ("expected_coef", "expected_exponent", "minimum_steps", "devices"),
    "train": (
        "batch_size",
        "steps_per_dispatch",
        "checkpoints_per_run",
        "keep_checkpoints",
        "log_every_steps",
    ),
    "validation": ("samples", "batch_size"),
    "mesh": ("fsdp",),
    "generate": ("images", "batch_size", "steps"),
    "evaluate": ("reference_images", "batch_size", "held_out_draws"),
}
_NOT_NEGATIVE = {
    "data": ("prefetch_batches", "seed", "coarse"),
    "encode": ("pictures",),
    "model": ("classes", "head_dim", "heads"),
    "objective": ("p2_gamma", "kl_weight"),
    "optimizer": ("weight_decay", "warmup_steps", "warmup_samples"),
    "plan": ("steps", "sizes_per_budget", "flops_per_second_per_device"),
    "train": ("seed", "checkpoint_minutes", "show_every_seconds", "profile_steps"),
    "validation": ("seed", "marks"),
    "mesh": ("cpu_devices",),
    "generate": ("guidance", "seed"),
    "evaluate": ("input_size", "bootstrap", "seed"),
    "frontier": ("images",),
    "advise": ("budget",),
    "fit": ("seed",),
}
_RANGES = (
    ("data", "validation_fraction", 0.001, 0.5),
    ("data", "vocab_size", 64, names.LARGEST_VOCABULARY),
    ("encode", "largest_bad_fraction", 0.0, 0.999),
    ("objective", "schedule_steps", 2, 100_000),
    ("objective", "caption_dropout", 0.0, 1.0),
    ("optimizer", "warmup_fraction", 0.0, 1.0),
    ("optimizer", "decay_fraction", 0.001, 1.0),
    ("optimizer", "b1", 0.0, 0.99999),
    ("optimizer", "b2", 0.0, 0.999999),
    ("optimizer", "ema_decay", 0.0, 0.999999),
    ("plan", "utilisation", 0.001, 1.0),
    ("evaluate", "confidence", 0.5, 0.999),
    ("advise", "utilisation", 0.001, 1.0),
    ("fit", "bootstrap", 50, 1_000_000),
    ("fit", "confidence", 0.5, 0.999),
)


def problems_of(e: fields.Experiment) -> list[str]:
    """A line for each number outside its range."""

    def value_of(section: str, name: str) -> float:
        return getattr(getattr(e, section), name)

    problems = []
    for section, keys in _POSITIVE.items():
        for name in keys:
            if not (value := value_of(section, name)) > 0:
                problems.append(f"config.{section}.{name} = {value}: must be positive")
    for section, keys in _NOT_NEGATIVE.items():
        for name in keys:
            if not (value := value_of(section, name)) >= 0:
                problems.append(f"config.{section}.{name} = {value}: must be >= 0")
    for section, name, low, high in _RANGES:
        if not low <= (value := value_of(section, name)) <= high:
            problems.append(
                f"config.{section}.{name} = {value}: must lie in [{low}, {high}]"
            )
    if len(e.data.shape) != 3 or min(e.data.shape) <= 0:
        problems.append(
            f"config.data.shape = {e.data.shape}: must be (height, width, channels)"
        )
    return problems
