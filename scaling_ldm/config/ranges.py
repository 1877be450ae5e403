"""The range of each number of an experiment.

A number that is not finite never gets here: `files.resolve` refuses it as it reads it.
Every whole number has an upper limit, because devices count in 32 bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from scaling_ldm.config import fields, names

LARGEST_SEED = 2**32 - 1  # jax.random.key takes 32 bits: 2**32 would be 0 again
LARGEST_COUNT = 2**31 - 1  # steps, pictures and sizes are int32 on a device
# Whole numbers that no device counts with may be larger.
_LARGEST = {"encode.pictures": 2**40, "optimizer.warmup_samples": 2**40}

_POSITIVE = {
    "data": ("text_tokens", "cache_gigabytes"),
    "encode": ("batch_size", "records_per_shard"),
    "model": (
        "patch_size",
        "mlp_ratio",
        "text_width",
        "time_width",
        "latent_channels",
        "groups",
    ),
    "objective": ("min_snr_gamma", "p2_k", "time_scale", "time_shift"),
    "optimizer": ("learning_rate", "policy_width", "policy_depth", "eps", "clip_norm"),
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
    "compile": ("slices",),
    "advise": ("chips",),
    "generate": ("images", "batch_size"),
    "evaluate": ("reference_images", "batch_size", "held_out_draws"),
}
_NOT_NEGATIVE = {
    "data": ("prefetch_batches", "coarse", "validation_minimum", "shuffle_window"),
    "encode": ("pictures",),
    "model": ("classes", "head_dim", "heads"),
    "objective": ("p2_gamma", "kl_weight"),
    "optimizer": ("weight_decay", "warmup_steps", "warmup_samples", "tuned_budget"),
    "plan": (
        *("steps", "sizes_per_budget", "flops_per_second_per_device"),
        *("budget", "next"),
    ),
    "train": (
        "microbatch",
        "checkpoint_minutes",
        "show_every_seconds",
        "profile_steps",
    ),
    "mesh": ("stall_seconds", "stall_limit_seconds"),
    "generate": ("guidance",),
    "evaluate": ("input_size",),
    "frontier": ("images",),
    "advise": (
        *("budget", "flops", "hours", "loss", "flops_per_second", "price", "images"),
    ),
    "fit": ("window", "huber"),
}
_RANGES = (
    ("data", "validation_fraction", 0.001, 0.5),
    # At least one word beside the three reserved tokens of data.vocabulary.
    ("data", "vocab_size", 4, names.LARGEST_VOCABULARY),
    ("data", "seed", 0, LARGEST_SEED),
    ("data", "reader_threads", 1, 1024),
    ("encode", "workers", 1, 1024),
    ("encode", "largest_bad_fraction", 0.0, 0.999),
    ("objective", "schedule_steps", 2, 100_000),
    ("objective", "caption_dropout", 0.0, 1.0),
    ("optimizer", "warmup_fraction", 0.0, 1.0),
    ("optimizer", "decay_fraction", 0.001, 1.0),
    ("optimizer", "b1", 0.0, 0.99999),
    ("optimizer", "b2", 0.0, 0.999999),
    ("optimizer", "ema_decay", 0.0, 0.999999),
    ("plan", "utilisation", 0.001, 1.0),
    ("train", "seed", 0, LARGEST_SEED),
    ("validation", "seed", 0, LARGEST_SEED),
    ("validation", "marks", 0, 1000),
    ("mesh", "cpu_devices", 0, 4096),
    ("mesh", "runs", 0, 4096),
    ("mesh", "heartbeat_seconds", 5, 86_400),
    ("generate", "steps", 1, names.MOST_SAMPLER_STEPS),
    ("generate", "seed", 0, LARGEST_SEED),
    ("evaluate", "seed", 0, LARGEST_SEED),
    ("evaluate", "bootstrap", 0, 1_000_000),
    ("evaluate", "confidence", 0.5, 0.999),
    ("advise", "utilisation", 0.001, 1.0),
    ("fit", "bootstrap", 50, 1_000_000),
    ("fit", "confidence", 0.5, 0.999),
    ("fit", "extend", 1.0, 1e12),
    ("fit", "seed", 0, LARGEST_SEED),
)
# Sections whose numbers a device computes with, as float32: beyond these bounds they
# would be infinite or 0 there, without a word.
_ON_DEVICE = ("model", "objective", "optimizer", "generate", "frontier")
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
SMALLEST_FLOAT32 = 2.0**-126  # smaller ones are denormal, which most devices make 0
_PAIRS = ("data.mix", "data.parts", "plan.axes", "plan.axes_only")  # checked elsewhere


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
    known = {f"{section}.{name}" for section, name, *_ in _RANGES}
    for where, value in _fields(e):
        most = _LARGEST.get(where, LARGEST_COUNT)
        if where not in known and any(n > most for n in _whole_numbers(value)):
            problems.append(f"config.{where} = {value}: must be at most {most}")
        if where.split(".")[0] in _ON_DEVICE and not all(map(_float32, _floats(value))):
            problems.append(
                f"config.{where} = {value}: a float32 is 0, or between "
                f"{SMALLEST_FLOAT32:.4g} and {LARGEST_FLOAT32:.4g} in size"
            )
    problems += _check_microbatch(e.train)
    if 0 < e.fit.window <= 1:
        problems.append(
            f"config.fit.window = {e.fit.window}: must be a factor above 1, or 0"
        )
    if len(e.data.shape) != 3 or min(e.data.shape) <= 0:
        problems.append(
            f"config.data.shape = {e.data.shape}: must be (height, width, channels)"
        )
    return problems


def _check_microbatch(cfg: fields.TrainConfig) -> list[str]:
    rows, part = cfg.batch_size, cfg.microbatch
    if rows <= 0 or part <= 0 or rows % part == 0:
        return []
    fits = divisors(rows)
    near = [*[n for n in fits if n < part][-1:], *[n for n in fits if n > part][:1]]
    return [
        f"config.train.microbatch = {part} does not divide config.train.batch_size = "
        f"{rows}; nearest: {' or '.join(map(str, near))}"
    ]


def divisors(n: int) -> list[int]:
    """The whole numbers that divide n, ascending; n is positive."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def _fields(e: fields.Experiment) -> Iterator[tuple[str, Any]]:
    """("section.name", value) of every field but those of pairs."""
    for section, part in vars(e).items():
        if dataclasses.is_dataclass(part):
            for name, value in vars(part).items():
                if f"{section}.{name}" not in _PAIRS:
                    yield f"{section}.{name}", value


def _float32(value: float) -> bool:
    """Whether a number is neither infinite nor 0 as a float32, unless it is 0."""
    return not value or SMALLEST_FLOAT32 <= abs(value) <= LARGEST_FLOAT32


def _whole_numbers(value: Any) -> Iterator[int]:
    """The ints of a value, at any depth of tuples."""
    return (one for one in _leaves(value) if isinstance(one, int))


def _floats(value: Any) -> Iterator[float]:
    """The floats of a value, at any depth of tuples."""
    return (one for one in _leaves(value) if isinstance(one, float))


def _leaves(value: Any) -> Iterator[Any]:
    """What is in tuples of tuples."""
    if isinstance(value, tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
