"""Every field of an experiment, its default and its check; imports ml_collections.

An experiment file returns `default()` with a few fields changed. `resolve` turns that
mutable ConfigDict into a frozen `Experiment`, or raises one `ConfigError` that lists
everything wrong with it: what was given, what is allowed, what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from scaling_ldm import records

ARCHITECTURES = ("in_context", "cross_attention", "adaln_zero")
# Each known schedule, weighting and law of t: the fields that only some of them read.
SCHEDULES = {
    "linear": ("schedule_steps", "zero_terminal_snr"),
    "scaled_linear": ("schedule_steps", "zero_terminal_snr"),
    "cosine": ("schedule_steps", "zero_terminal_snr"),
    "vp_sde": ("time_shift",),
    "vp_cosine": ("time_shift",),
    "rectified_flow": ("time_shift",),
    "edm": (),
}
WEIGHTINGS = {
    "uniform": (),
    "min_snr": ("min_snr_gamma",),
    "truncated_snr": (),
    "p2": ("p2_gamma", "p2_k"),
    "sigmoid": ("sigmoid_bias",),
}
TIME_LAWS = {
    "uniform": (),
    "logit_normal": ("time_location", "time_scale"),
    "cosmap": (),
}
DISCRETE_SCHEDULES = tuple(s for s in SCHEDULES if "schedule_steps" in SCHEDULES[s])
PREDICTIONS = ("epsilon", "x0", "v", "flow", "score")
ACTIVATIONS = ("gelu", "relu", "silu")
DATA_SOURCES = ("icons", "latents")
DTYPES = ("float32", "bfloat16")
LEARNING_RATE_POLICIES = ("fixed", "by_width")
UNROLL = ("auto", "always", "never")
FIT_METRICS = ("validation_loss", "validation_loss_ema", "train_loss_smoothed")
FIT_SIZES = ("params", "params_without_embeddings")
SAMPLERS = (
    "ddim",
    "ddpm",
    "euler",
    "heun",
    "dpm++1",
    "dpm++2m",
    "dpm++3m",
    "dpm++2s",
    "dpm++3s",
    "sde-dpm++1",
    "sde-dpm++2m",
    "sde-dpm++3m",
    "sde-dpm++2s",
    "unipc1",
    "unipc2",
    "unipc3",
)
SPACINGS = (
    "uniform",
    "linspace",
    "leading",
    "trailing",
    "quadratic",
    "logsnr",
    "karras",
    "flow_shifted",
)
STAGES = ("plan", "train", "fit", "generate", "report")


class ConfigError(ValueError):
    """An experiment that cannot run; the message lists every reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "icons"  # one of DATA_SOURCES
    path: str = ""  # directory of the "latents" source
    shape: tuple[int, ...] = (32, 32, 3)  # H, W, C of what the denoiser sees
    text_tokens: int = 16  # caption positions S; shorter captions are padded
    vocab_size: int = 2048  # caption words with an embedding of their own
    validation_fraction: float = 0.05  # of base names, kept out of training
    prefetch_batches: int = 2
    seed: int = 0  # of the order, colours and captions of the stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    architecture: str = "in_context"  # one of ARCHITECTURES
    patch_size: int = 2
    head_dim: int = 64  # heads = width / head_dim; 0: see heads
    heads: int = 0  # the same number at every width; 0: by head_dim
    mlp_ratio: int = 4
    activation: str = "gelu"  # one of ACTIVATIONS; gelu is the tanh form
    text_width: int = 256  # E: caption word embedding, the same for every size
    time_width: int = 256  # sinusoidal features of t
    classes: int = 0  # labels of adaln_zero; 0 for text-conditioned models
    compute_dtype: str = "bfloat16"  # one of DTYPES; parameters stay float32
    remat: bool = False  # recompute blocks in the backward pass
    unroll: str = "auto"  # layers: scanned, or unrolled ("auto": unrolled on CPU)

    def heads_at(self, width: int) -> int:
        """Attention heads of a network of this width."""
        return self.heads or width // self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    schedule: str = "rectified_flow"  # one of SCHEDULES; see noise.py
    schedule_steps: int = 1000  # of linear, scaled_linear and cosine
    zero_terminal_snr: bool = False  # of the same: the last step is noise alone
    prediction: str = "flow"  # one of PREDICTIONS; see prediction.py
    weighting: str = "uniform"  # one of WEIGHTINGS; see objectives/denoise.py
    min_snr_gamma: float = 5.0  # largest weight of the x0 error
    p2_gamma: float = 1.0  # 1 / (k + SNR)^gamma on the epsilon error
    p2_k: float = 1.0
    sigmoid_bias: float = 0.0  # sigmoid(bias - log SNR) on the epsilon error
    time_law: str = "logit_normal"  # one of TIME_LAWS; see objectives/denoise.py
    time_location: float = 0.0  # logit-normal t: sigmoid(location + scale * normal)
    time_scale: float = 1.0
    time_shift: float = 1.0  # above 1 moves t towards noise; t in [0, 1] alone
    caption_dropout: float = 0.1  # rate of the null caption, for guidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    learning_rate: float = 1e-4  # peak
    learning_rate_policy: str = "fixed"  # or "by_width": x policy_width / width
    policy_width: int = 64  # the width at which "by_width" leaves the rate alone
    warmup_fraction: float = 0.02  # of a run's steps, linear from 0, then constant
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the gradient's global norm
    ema_decay: float = 0.9999  # reached by a ramp: min(decay, (1 + s) / (10 + s))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    budgets_flops: tuple[float, ...] = (1e18,)  # forward + backward, 2 x MAC
    # The ladder of (width, depth); a budget takes the rungs around its optimum.
    sizes: tuple[tuple[int, int], ...] = tuple((64 * n, n) for n in range(2, 16))
    sizes_per_budget: int = 7  # 0: all of them
    # Expected optimum N = coef * C^exponent (parameters without embeddings).
    expected_coef: float = 0.0009
    expected_exponent: float = 0.5681
    minimum_steps: int = 100  # a row with fewer optimizer steps is refused
    accelerator: str = "tpu-v5p"  # a name of peaks.PEAKS, or any with a stated speed
    devices: int = 64
    utilisation: float = 0.4  # of the accelerator's peak; stated, not measured
    # For hardware without a known peak: model FLOP/s of one device, measured.
    flops_per_second_per_device: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    batch_size: int = 1024  # pictures per optimizer step, all devices together
    seed: int = 0  # of initialisation, noise, t and caption dropout
    steps_per_dispatch: int = 1  # optimizer steps in one compiled call
    optimize_code: bool = True  # False: on a CPU, compile sooner and run slower
    checkpoints_per_run: int = 10  # evenly spaced, the last one at the end
    keep_checkpoints: int = 2
    log_every_steps: int = 1  # lines of metrics.jsonl; one a dispatch at most
    show_every_seconds: float = 5.0
    tensorboard: bool = False
    profile_steps: int = 0  # trace this many steps into the run's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    samples: int = 4096  # pictures, each with its own noise and stratum of t
    batch_size: int = 1024
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    replica: int = -1  # copies of the parameters; -1: all devices that are left
    fsdp: int = 1  # devices that share one copy of the parameters
    cpu_devices: int = 0  # simulated devices on a CPU host; 0: one per core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    images: int = 16
    sampler: str = "euler"  # one of SAMPLERS
    spacing: str = "auto"  # of the sampler's time grid: one of SPACINGS, or its own
    steps: int = 50
    guidance: float = 3.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    metric: str = "validation_loss_ema"  # one of FIT_METRICS
    size: str = "params_without_embeddings"  # one of FIT_SIZES
    confidence: float = 0.9
    bootstrap: int = 1000
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str = "experiment"
    question: str = ""
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    objective: Objective = dataclasses.field(default_factory=Objective)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    plan: Plan = dataclasses.field(default_factory=Plan)
    train: Train = dataclasses.field(default_factory=Train)
    validation: Validation = dataclasses.field(default_factory=Validation)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    generate: Generate = dataclasses.field(default_factory=Generate)
    fit: Fit = dataclasses.field(default_factory=Fit)

    @property
    def recipe_hash(self) -> str:
        """Identity of the recipe: all that decides a run's numbers but its RunSpec.

        Left out: which runs there are (plan: a sweep may grow), where they run (mesh,
        accelerator), how they log, and the stages after training.
        """
        identity = dataclasses.asdict(self)
        for section in ("plan", "mesh", "generate", "fit", "question"):
            del identity[section]
        for section, field in _NOT_IDENTITY:
            del identity[section][field]
        return records.digest(identity)


_NOT_IDENTITY = (
    ("data", "path"),
    ("data", "prefetch_batches"),
    ("model", "unroll"),
    ("model", "remat"),
    ("train", "steps_per_dispatch"),
    ("train", "optimize_code"),
    ("train", "checkpoints_per_run"),
    ("train", "keep_checkpoints"),
    ("train", "log_every_steps"),
    ("train", "show_every_seconds"),
    ("train", "tensorboard"),
    ("train", "profile_steps"),
)


def default() -> ml_collections.ConfigDict:
    """The default experiment (paper B's settings at 1e18 FLOPs) as a ConfigDict."""
    return to_config_dict(Experiment())


def to_config_dict(experiment: Experiment) -> ml_collections.ConfigDict:
    """The inverse of `resolve`."""
    return ml_collections.ConfigDict(dataclasses.asdict(experiment))


def check_file(path: str | os.PathLike) -> pathlib.Path:
    """The path of an experiment file that is there.

    Raises:
      ConfigError: no such file; names the nearest one.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py"))
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise ConfigError(f"no experiment file {path}{hint}")
    return path


def check_flag(arguments: Sequence[str]) -> None:
    """Checks the file of `--config FILE` or `--config=FILE`; see `check_file`."""
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--config" or flag.startswith("--config="):
            check_file(flag.partition("=")[2] or following)


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Runs an experiment file's `get_config()`.

    Experiment files may import their neighbours (`from experiments import base`)
    wherever the working directory is.

    Raises:
      ConfigError: no such file, or no `get_config` in it.
    """
    path = check_file(path)
    spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    root = str(path.resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(root)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config()")
    return module.get_config()


def resolve(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Experiment:
    """Checks a ConfigDict and freezes it.

    Raises:
      ConfigError: unknown keys (with the nearest known one), wrong types, values out
        of range, parts that do not fit together; all in one message.
    """
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    problems: list[str] = []
    experiment = _build(Experiment, given, "config", problems)
    if not problems:
        problems = _check(experiment)
    if problems:
        raise ConfigError(
            "this experiment cannot run:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return experiment


def _build(cls: type, given: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    defaults = cls()
    known = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(cls)}
    values = {}
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {where}.{close[0]}? " if close else ""
            problems.append(
                f"unknown key {where}.{key}: {hint}known: {', '.join(known)}"
            )
        elif dataclasses.is_dataclass(known[key]):
            if isinstance(value, Mapping):
                values[key] = _build(
                    type(known[key]), value, f"{where}.{key}", problems
                )
            else:
                problems.append(f"{where}.{key} is a section, got {value!r}")
        else:
            values[key] = _coerce(value, known[key], f"{where}.{key}", problems)
    return cls(**values)


def _coerce(value: Any, like: Any, where: str, problems: list[str]) -> Any:
    """Checks `value` against the default's type; ints become floats, lists tuples."""
    kind = type(like)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple:
        if isinstance(value, (list, tuple)):
            if like and value:
                return tuple(_coerce(v, like[0], where, problems) for v in value)
        problems.append(f"{where} must be a non-empty tuple like {like!r}: {value!r}")
        return like
    if type(value) is not kind:
        problems.append(
            f"{where} must be {kind.__name__} like {like!r}, "
            f"got {type(value).__name__} {value!r}"
        )
        return like
    return value


def _check(e: Experiment) -> list[str]:
    """Every reason why a well-typed experiment cannot run."""
    problems = []

    def require(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    def one_of(where: str, value: str, known: Iterable[str]) -> None:
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            problems.append(f"{where} = {value!r}; known: {', '.join(known)}{hint}")

    one_of("config.data.source", e.data.source, DATA_SOURCES)
    one_of("config.model.architecture", e.model.architecture, ARCHITECTURES)
    one_of("config.model.activation", e.model.activation, ACTIVATIONS)
    one_of("config.model.compute_dtype", e.model.compute_dtype, DTYPES)
    one_of("config.model.unroll", e.model.unroll, UNROLL)
    one_of("config.objective.schedule", e.objective.schedule, SCHEDULES)
    one_of("config.objective.prediction", e.objective.prediction, PREDICTIONS)
    one_of("config.objective.weighting", e.objective.weighting, WEIGHTINGS)
    one_of("config.objective.time_law", e.objective.time_law, TIME_LAWS)
    problems += _check_objective(e.objective)
    one_of("config.generate.sampler", e.generate.sampler, SAMPLERS)
    one_of("config.generate.spacing", e.generate.spacing, ("auto", *SPACINGS))
    one_of("config.fit.metric", e.fit.metric, FIT_METRICS)
    one_of("config.fit.size", e.fit.size, FIT_SIZES)
    one_of(
        "config.optimizer.learning_rate_policy",
        e.optimizer.learning_rate_policy,
        LEARNING_RATE_POLICIES,
    )
    for section, names in _POSITIVE.items():
        for name in names:
            value = getattr(getattr(e, section), name)
            require(value > 0, f"config.{section}.{name} = {value}: must be positive")
    for section, names in _NOT_NEGATIVE.items():
        for name in names:
            value = getattr(getattr(e, section), name)
            require(value >= 0, f"config.{section}.{name} = {value}: must be >= 0")
    for section, name, low, high in _RANGES:
        value = getattr(getattr(e, section), name)
        require(
            low <= value <= high,
            f"config.{section}.{name} = {value}: must lie in [{low}, {high}]",
        )
    h, w = (*e.data.shape, 0, 0)[:2]
    require(
        len(e.data.shape) == 3 and min(e.data.shape) > 0,
        f"config.data.shape = {e.data.shape}: must be (height, width, channels)",
    )
    p = e.model.patch_size
    require(
        p > 0 and h % max(p, 1) == 0 and w % max(p, 1) == 0,
        f"config.model.patch_size = {p} does not divide the {h}x{w} input",
    )
    require(
        (e.model.architecture == "adaln_zero") == (e.model.classes > 0),
        f"config.model.classes = {e.model.classes} with architecture "
        f"{e.model.architecture!r}: adaln_zero needs classes > 0, the others 0",
    )
    for width, depth in (s if len(s) == 2 else (0, 0) for s in e.plan.sizes):
        require(
            width > 0 and depth > 0,
            f"config.plan.sizes: ({width}, {depth}) is not (width, depth)",
        )
    require(
        (e.model.head_dim > 0) != (e.model.heads > 0),
        f"config.model.head_dim = {e.model.head_dim} and config.model.heads = "
        f"{e.model.heads}: exactly one of them is positive, the other 0",
    )
    name = "heads" if e.model.heads > 0 else "head_dim"
    divisor = max(getattr(e.model, name), 1)
    widths = sorted({width for width, *_ in e.plan.sizes if width > 0})
    odd = [width for width in widths if width % divisor]
    common = math.gcd(*widths) if widths else 1
    fits = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    require(
        not odd,
        f"config.model.{name} = {divisor} does not divide the widths {odd} of "
        f"config.plan.sizes; common divisors of all widths: {fits}",
    )
    require(
        len(set(e.plan.sizes)) == len(e.plan.sizes), "config.plan.sizes has duplicates"
    )
    require(
        all(b > 0 for b in e.plan.budgets_flops),
        f"config.plan.budgets_flops = {e.plan.budgets_flops}: must be positive",
    )
    require(
        list(e.plan.budgets_flops) == sorted(set(e.plan.budgets_flops)),
        f"config.plan.budgets_flops = {e.plan.budgets_flops}: must increase",
    )
    require(
        e.mesh.replica == -1 or e.mesh.replica > 0,
        f"config.mesh.replica = {e.mesh.replica}: -1 (what is left) or positive",
    )
    require(
        e.generate.images <= 256,
        f"config.generate.images = {e.generate.images}: at most 256 for the grid",
    )
    return problems


def _check_objective(o: Objective) -> list[str]:
    """Every combination of known choices that a network cannot learn."""
    problems = []
    defaults = Objective()
    for choice, readers in (
        ("schedule", SCHEDULES),
        ("weighting", WEIGHTINGS),
        ("time_law", TIME_LAWS),
    ):
        name = getattr(o, choice)
        if name not in readers:
            continue
        for field in sorted({f for fields in readers.values() for f in fields}):
            value = getattr(o, field)
            if field not in readers[name] and value != getattr(defaults, field):
                who = ", ".join(n for n, fields in readers.items() if field in fields)
                problems.append(
                    f"config.objective.{field} = {value} means nothing to "
                    f"config.objective.{choice} = {name!r}; it is for: {who}"
                )
    ends_in_noise = o.schedule == "rectified_flow" or o.zero_terminal_snr
    if ends_in_noise and o.prediction in ("epsilon", "score"):
        cause = (
            "config.objective.zero_terminal_snr"
            if o.zero_terminal_snr
            else "config.objective.schedule = 'rectified_flow'"
        )
        problems.append(
            f"config.objective.prediction = {o.prediction!r} with {cause}: where all "
            "is noise it says nothing of the picture; use v, x0 or flow"
        )
    short = o.schedule_steps < 1000 and not o.zero_terminal_snr
    if o.schedule in ("linear", "scaled_linear") and short:
        problems.append(
            f"config.objective.schedule_steps = {o.schedule_steps} with schedule "
            f"{o.schedule!r}: its betas are those of 1000 steps, fewer leave the "
            "picture visible at the end; use cosine, or zero_terminal_snr"
        )
    if o.schedule == "edm":
        problems.append(
            "config.objective.schedule = 'edm' is for sampling: its x has noise of up "
            "to 80, and networks here do not scale their input; train on vp_cosine"
        )
    return problems


_POSITIVE = {
    "data": ("text_tokens",),
    "model": ("patch_size", "mlp_ratio", "text_width", "time_width"),
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
    "generate": ("images", "steps"),
}
_NOT_NEGATIVE = {
    "data": ("prefetch_batches", "seed"),
    "model": ("classes", "head_dim", "heads"),
    "objective": ("p2_gamma",),
    "optimizer": ("weight_decay",),
    "plan": ("sizes_per_budget", "flops_per_second_per_device"),
    "train": ("seed", "show_every_seconds", "profile_steps"),
    "validation": ("seed",),
    "mesh": ("cpu_devices",),
    "generate": ("guidance", "seed"),
    "fit": ("bootstrap", "seed"),
}
_RANGES = (
    ("data", "validation_fraction", 0.001, 0.5),
    ("data", "vocab_size", 64, 65536),
    ("objective", "schedule_steps", 2, 100_000),
    ("objective", "caption_dropout", 0.0, 1.0),
    ("optimizer", "warmup_fraction", 0.0, 1.0),
    ("optimizer", "b1", 0.0, 0.99999),
    ("optimizer", "b2", 0.0, 0.999999),
    ("optimizer", "ema_decay", 0.0, 0.999999),
    ("plan", "utilisation", 0.001, 1.0),
    ("fit", "confidence", 0.5, 0.999),
)
