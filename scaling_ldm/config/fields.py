"""Every field of an experiment, its default and its unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling_ldm import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = "icons"  # one of DATA_SOURCES; all but icons go through encode
    path: str = ""  # folder, shards or table of the source; a URL is one too
    split: str = "train"  # of the tfds and huggingface sources
    shape: tuple[int, ...] = (32, 32, 3)  # H, W, C of what the network sees
    coarse: int = 0  # k: x at 1/k of its size is given beside it (super-resolution)
    text_tokens: int = 16  # caption positions S; shorter captions are padded
    vocab_size: int = 2048  # caption words with an embedding of their own
    validation_fraction: float = 0.05  # of base names, kept out of training
    prefetch_batches: int = 2
    seed: int = 0  # of the order, colours and captions of the stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Frozen networks that run over a data set once; see data/encoded.py."""

    autoencoder: str = "none"  # one of AUTOENCODERS, a folder or a hub id
    # One of TEXT_ENCODERS, a folder or a hub id. "auto" is minilm where its package is
    # installed and there is something to encode, else vocabulary; `resolve` decides.
    text_encoder: str = "auto"
    path: str = ""  # folder of the records; "": encoded/ in the workdir
    pictures: int = 0  # how many; 0: all of a finite source
    batch_size: int = 64  # pictures in one call of the networks; each host its own
    records_per_shard: int = 4096
    dtype: str = "float16"  # of moments and features: one of RECORD_DTYPES
    compute_dtype: str = "float32"  # of the networks: one of DTYPES
    largest_bad_fraction: float = 0.01  # unreadable records beyond it are an error
    workers: int = 2  # threads that read and decode pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: str = "in_context"  # one of ARCHITECTURES
    patch_size: int = 2
    head_dim: int = 64  # heads = width / head_dim; 0: see heads
    heads: int = 0  # the same number at every width; 0: by head_dim
    mlp_ratio: int = 4
    activation: str = "gelu"  # one of ACTIVATIONS; gelu is the tanh form
    norm: str = "layer"  # transformers: one of NORMS
    qk_norm: str = "none"  # transformers: of queries and keys, one of QK_NORMS
    positions: str = "sinusoidal"  # transformers: of patches, one of POSITIONS
    text_width: int = 256  # E: caption word embedding, the same for every size
    time_width: int = 256  # sinusoidal features of t
    classes: int = 0  # labels of adaln_zero; 0 for text-conditioned models
    compute_dtype: str = "bfloat16"  # one of DTYPES; parameters stay float32
    latent_channels: int = 4  # autoencoder_kl
    groups: int = 32  # autoencoder_kl: of its GroupNorms; a unet has 32
    remat: bool = False  # recompute blocks in the backward pass
    unroll: str = "auto"  # layers: scanned, or unrolled ("auto": unrolled on CPU)

    def heads_at(self, width: int) -> int:
        """Attention heads of a network of this width."""
        return self.heads or width // self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    schedule: str = "rectified_flow"  # one of SCHEDULES; see noise.py
    schedule_steps: int = 1000  # of linear, scaled_linear and cosine
    zero_terminal_snr: bool = False  # of the same: the last step is noise alone
    prediction: str = "flow"  # one of PREDICTIONS; see prediction.py
    weighting: str = "uniform"  # one of WEIGHTINGS; see objectives/denoise.py
    min_snr_gamma: float = 5.0  # largest weight of the x0 error
    p2_gamma: float = 1.0  # 1 / (k + SNR)^gamma on the epsilon error
    p2_k: float = 1.0
    sigmoid_bias: float = 0.0  # sigmoid(bias - log SNR) on the epsilon error
    timestep_sampling: str = (
        "logit_normal"  # one of TIMESTEP_SAMPLING; see objectives/denoise.py
    )
    time_location: float = 0.0  # logit-normal t: sigmoid(location + scale * normal)
    time_scale: float = 1.0
    time_shift: float = 1.0  # above 1 moves t towards noise; t in [0, 1] alone
    caption_dropout: float = 0.1  # rate of the null caption, for guidance
    reconstruction: str = "l1"  # autoencoder_kl: one of RECONSTRUCTION
    kl_weight: float = 1e-6  # autoencoder_kl: of the latents' KL from a normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
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
class PlanConfig:
    # Either budgets, or one number of steps for every size and budgets_flops = ().
    budgets_flops: tuple[float, ...] = (1e18,)  # forward + backward, 2 x MAC
    steps: int = 0  # as in paper A; 0: what the budgets allow
    # The ladder of (width, depth); a budget takes the rungs around its optimum.
    sizes: tuple[tuple[int, int], ...] = tuple((64 * n, n) for n in range(2, 16))
    sizes_per_budget: int = 7  # 0: all of them, as always where steps are given
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
class TrainConfig:
    batch_size: int = 1024  # pictures per optimizer step, all devices together
    seed: int = 0  # of initialisation, noise, t and caption dropout
    steps_per_dispatch: int = 1  # optimizer steps in one compiled call
    optimize_code: bool = True  # False: on a CPU, compile sooner and run slower
    checkpoints_per_run: int = 10  # evenly spaced, the last one at the end
    keep_checkpoints: int = 2  # the latest; older ones are removed
    # Training FLOPs at which a run's checkpoint is kept for good, as its last is.
    checkpoint_flops: tuple[float, ...] = ()
    log_every_steps: int = 1  # lines of metrics.jsonl; one a dispatch at most
    show_every_seconds: float = 5.0
    tensorboard: bool = False
    profile_steps: int = 0  # trace this many steps into the run's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    samples: int = 4096  # pictures, each with its own noise and stratum of t
    batch_size: int = 1024
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    replica: int = -1  # copies of the parameters; -1: all devices that are left
    fsdp: int = 1  # devices that share one copy of the parameters
    cpu_devices: int = 0  # simulated devices on a CPU host; 0: one per core


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    run: str = ""  # run_id of the finished run to draw from; "": the best one
    weights: str = ""  # a folder of weights to draw from instead; "": a run's
    images: int = 16
    batch_size: int = 256  # pictures in one call, and in one file: all devices together
    sampler: str = "euler"  # one of SAMPLERS
    spacing: str = "auto"  # of the sampler's time grid: one of SPACINGS, or its own
    steps: int = 50
    guidance: float = 3.0
    seed: int = 0
    format: str = "png"  # of grid and tar, lossless: one of PICTURE_FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Generated pictures against real ones; see evaluate/."""

    network: str = "none"  # one of FEATURE_NETWORKS; "none": no evaluation
    weights: str = ""  # its file, folder or hub id; "": lite0's package
    input_size: int = 0  # side of lite0's input, >= LITE0_LEAST; 0: the network's own
    metrics: tuple[str, ...] = ("fd",)  # of METRICS
    backend: str = "numpy"  # of the Frechet distance: one of FD_BACKENDS
    reference: str = ""  # .npz of real pictures' statistics; "": held-out pictures
    reference_images: int = 4096  # held-out pictures; the most there are, if fewer
    through_training: bool = False  # the runs' kept checkpoints, too
    batch_size: int = 32
    bootstrap: int = 50  # resamples of the generated pictures
    confidence: float = 0.9
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Quality against sampling cost, over every finished run; see evaluate/cells.py."""

    images: int = 0  # of each cell of the grid; 0: no frontier
    samplers: tuple[str, ...] = ("ddim", "ddpm", "dpm++2m")
    steps: tuple[int, ...] = (4, 6, 8, 10, 20, 50)  # paper A, figure 8
    guidances: tuple[float, ...] = (
        1.5,
        2.0,
        3.0,
        4.0,
        5.0,
        6.0,
        7.0,
        8.0,
    )  # paper A, figure 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """What the best way of sampling may cost; see frontier/advise.py."""

    budget: float = 0.0  # of one image, in `unit`; 0: none given
    unit: str = "seconds"  # one of ADVICE_UNITS
    device: str = ""  # a name of peaks.PEAKS; "": where seconds were measured
    dtype: str = "bfloat16"  # whose peak counts on another device; one of DTYPES
    utilisation: float = 0.3  # assumed, of that peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    metric: str = "validation_loss_ema"  # one of FIT_METRICS
    size: str = "params_without_embeddings"  # one of FIT_SIZES
    confidence: float = 0.9
    bootstrap: int = 1000
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str = "experiment"
    question: str = ""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    plan: PlanConfig = dataclasses.field(default_factory=PlanConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    frontier: FrontierConfig = dataclasses.field(default_factory=FrontierConfig)
    advise: AdviseConfig = dataclasses.field(default_factory=AdviseConfig)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)

    @property
    def encoded(self) -> bool:
        """Whether training reads records that the encode stage writes."""
        return (
            self.data.source != "icons"
            or self.encode.autoencoder != "none"
            or not self.reads_words
        )

    @property
    def reads_words(self) -> bool:
        """Whether captions are ids of a vocabulary, not an encoder's features."""
        return self.encode.text_encoder in ("auto", "vocabulary")

    @property
    def recipe_hash(self) -> str:
        """Identity of the recipe: all that decides a run's numbers but its RunSpec.

        Left out: which runs there are (plan: a sweep may grow), where they run (mesh,
        accelerator), how they log, and the stages after training.
        """
        return records.digest(identity(dataclasses.asdict(self)))


def identity(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Of an experiment as nested dicts, what decides its runs' numbers."""
    kept = {
        section: dict(value) if isinstance(value, Mapping) else value
        for section, value in experiment.items()
        if section not in _NO_RECIPE
    }
    for section, field in _NOT_IDENTITY:
        kept.get(section, {}).pop(field, None)
    for (section, field), first in FIRST_NAMES.items():
        if field in kept.get(section, {}):
            kept[section][first] = kept[section].pop(field)
    return kept


# Renamed fields: the name of today -> the first one. The recipe hash keeps the first
# name, so that a rename orphans no working directory.
FIRST_NAMES = {
    ("objective", "timestep_sampling"): "time_law",
    ("train", "checkpoint_flops"): "keep_flops",
}
_NO_RECIPE = (
    "plan",
    "mesh",
    "generate",
    "evaluate",
    "frontier",
    "advise",
    "fit",
    "question",
    "record",
)
_NOT_IDENTITY = (
    ("data", "path"),
    ("data", "prefetch_batches"),
    ("encode", "path"),
    ("encode", "batch_size"),
    ("encode", "records_per_shard"),
    ("encode", "largest_bad_fraction"),
    ("encode", "workers"),
    ("model", "unroll"),
    ("model", "remat"),
    ("train", "steps_per_dispatch"),
    ("train", "optimize_code"),
    ("train", "checkpoints_per_run"),
    ("train", "keep_checkpoints"),
    ("train", "checkpoint_flops"),
    ("train", "log_every_steps"),
    ("train", "show_every_seconds"),
    ("train", "tensorboard"),
    ("train", "profile_steps"),
)
