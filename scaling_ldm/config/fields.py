"""Every field of an experiment, with its default and its unit; and `fields_*.py`.

The comment of a field stands on its line or directly above it. The config reference is
made from these comments and from names.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from scaling_ldm.config import identity, names
from scaling_ldm.config.fields_answers import (
    AdviseConfig,
    CompareConfig,
    FitConfig,
    ReportConfig,
)
from scaling_ldm.config.fields_devices import CompileConfig, MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pictures and captions come from, and what shape a network sees."""

    source: str = "icons"  # one of DATA_SOURCES; all but icons go through encode
    path: str = ""  # folder, shards or table of the source; may be a URL
    split: str = "train"  # split that the tfds and huggingface sources read
    # Where captions are: the column, feature or entry; of an image_folder the table,
    # "txt", "caption", "json" or "folders". "": by the usual names.
    captions: str = ""
    label: str = ""  # column or feature with the number of the class; "": none
    # Parts of the training stream, {name: share of the pictures}, or (name, share)
    # pairs. (): one source, given by the fields above.
    mix: tuple[tuple[str, float], ...] = ()
    # What a part has of its own, {name of the part: {field: value}}: source, path,
    # split, captions, label, split_by, validation_path, validation_split,
    # validation_minimum, encode.path or encode.pictures.
    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()
    shape: tuple[int, ...] = (32, 32, 3)  # height, width, channels the network sees
    # k > 0: the network also gets the picture at 1/k of its size (super-resolution).
    coarse: int = 0
    text_tokens: int = 16  # positions of a caption; shorter captions are padded
    vocab_size: int = 2048  # caption words with an embedding of their own
    validation_fraction: float = 0.05  # share that is kept out of training
    # What validation_fraction is a share of; one of SPLIT_BY. "auto": of the captions
    # if there are many, else of the pictures of each label or caption.
    split_by: str = "auto"
    # A set of the same source that is held out instead; "": a share is.
    validation_path: str = ""
    # Split that is held out, for the tfds and huggingface sources; "": the only one.
    validation_split: str = ""
    # Fewer held-out pictures are an error, and so is a label that only one side has.
    # 0: both are accepted.
    validation_minimum: int = 50
    # Shards whose records are shuffled together, for sets of millions of records; see
    # data/row_order.py. 0: the records of the whole set are.
    shuffle_window: int = 0
    prefetch_batches: int = 2  # batches prepared ahead of the training step
    reader_threads: int = 4  # threads that read records
    # Local copies of records whose folder is a URL, in 10^9 bytes: on each host, or of
    # all hosts that share their cache folder.
    cache_gigabytes: float = 100.0
    seed: int = 0  # seed of the stream: order, colours, captions


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Frozen networks that run over a data set once; see data/encoded.py."""

    autoencoder: str = "none"  # one of AUTOENCODERS, a folder or a hub id
    # One of TEXT_ENCODERS, a folder or a hub id. "auto" becomes minilm if its package
    # is installed and there is something to encode, else vocabulary.
    text_encoder: str = "auto"
    path: str = ""  # folder or URL of the records; "": encoded/ in the workdir
    pictures: int = 0  # how many are encoded; 0: all of a finite source
    choose: str = "random"  # which ones, one of CHOOSE: by data.seed, or by name
    batch_size: int = 64  # pictures in one call of the networks, on each host
    records_per_shard: int = 4096  # records in one file
    dtype: str = "float16"  # type of stored moments and features; one of RECORD_DTYPES
    compute_dtype: str = "float32"  # type of the networks' arithmetic; one of DTYPES
    largest_bad_fraction: float = 0.01  # more unreadable records than this: an error
    workers: int = 2  # threads that read and decode pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, apart from its size."""

    architecture: str = "in_context"  # one of ARCHITECTURES
    patch_size: int = 2  # side of a patch, in positions of the input
    head_dim: int = 64  # channels of one head; 0: heads is given instead
    heads: int = 0  # attention heads at every width; 0: width / head_dim
    mlp_ratio: int = 4  # hidden width of the MLP / width of the block
    activation: str = "gelu"  # one of ACTIVATIONS; gelu is the tanh form
    norm: str = "layer"  # normalisation of the blocks; one of NORMS
    qk_norm: str = "none"  # normalisation of queries and keys; one of QK_NORMS
    positions: str = "sinusoidal"  # encoding of patch positions; one of POSITIONS
    text_width: int = 256  # width of a caption token's features, at every model size
    time_width: int = 256  # sinusoidal features of t
    classes: int = 0  # labels of the source, for adaln_zero; 0: none
    compute_dtype: str = "bfloat16"  # one of DTYPES; parameters stay float32
    latent_channels: int = 4  # channels of the latent
    groups: int = 32  # groups of each GroupNorm; those of a unet have 32
    remat: bool = False  # compute again in the backward pass, to save memory
    remat_policy: str = "blocks"  # what remat computes again; one of REMAT_POLICIES
    attention: str = "auto"  # one of ATTENTION; "auto": the kernel of the backend
    unroll: str = "auto"  # whether layers are unrolled, not scanned; "auto": on a CPU

    def heads_at(self, width: int) -> int:
        """Attention heads of a network of this width."""
        return self.heads or width // self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a network learns; formulas in diffusion/noise and diffusion/losses."""

    # One of OBJECTIVES, or FILE.py:FUNCTION or MODULE:FUNCTION of your own; "auto": the
    # one of OBJECTIVES that trains the architecture.
    kind: str = "auto"
    folder: str = ""  # of FILE.py; the folder of the experiment file unless it is given
    digest: str = ""  # digest of the text of your own objective; filled in
    schedule: str = "rectified_flow"  # noise schedule; one of SCHEDULES
    schedule_steps: int = 1000  # steps of a discrete schedule
    zero_terminal_snr: bool = False  # the last step of the schedule is noise alone
    prediction: str = "flow"  # what the network predicts; one of PREDICTIONS
    weighting: str = "uniform"  # weight of the loss at each t; one of WEIGHTINGS
    min_snr_gamma: float = 5.0  # largest weight of the x0 error
    p2_gamma: float = 1.0  # gamma of the weight 1 / (k + SNR)^gamma
    p2_k: float = 1.0  # k of the same weight, which is on the epsilon error
    sigmoid_bias: float = 0.0  # weight sigmoid(bias - log SNR) on the epsilon error
    # Distribution of t in training; one of TIMESTEP_SAMPLING.
    timestep_sampling: str = "logit_normal"
    time_location: float = 0.0  # logit-normal t: sigmoid(location + scale * normal)
    time_scale: float = 1.0  # scale of the same formula
    time_shift: float = 1.0  # above 1 moves t towards noise; for t in [0, 1]
    caption_dropout: float = 0.1  # share of captions replaced by the null caption
    reconstruction: str = "l1"  # error of an autoencoder; one of RECONSTRUCTION
    kl_weight: float = 1e-6  # weight of the latents' KL divergence from a normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rate, and the averages of the weights."""

    learning_rate: float = 1e-4  # peak, which is reached at the end of the warm-up
    # One of LEARNING_RATE_POLICIES; "by_width" multiplies by policy_width / width,
    # "mup" scales each tensor by its role, "completep" is mup for the depth, too, and
    # "tuned" takes the best rate of each size from another study.
    learning_rate_policy: str = "fixed"
    policy_width: int = 64  # width at which the policy is "fixed"
    policy_depth: int = 2  # depth at which it is, too
    tuned_from: str = ""  # workdir or laws.json of a study with an axis of rates
    tuned_group: str = ""  # the group of its runs, if it has several
    tuned_budget: float = 0.0  # the budget of its runs, in FLOPs; 0: it has one
    # One of TUNED_SIZES; "law": other sizes are by a power law in N through these, too.
    tuned_sizes: str = "measured"
    tuned_digest: str = ""  # identity of these rates; filled in when they are read
    # Law of the peak in the size, the length and the batch of a run; one of RATE_LAWS.
    rate_law: str = "none"
    rate_law_constants: tuple[float, ...] = ()  # of own: (a, b, c, d) of a N^b D^c B^d
    # Where learning_rate is the peak: (parameters without embeddings, tokens of a run,
    # batch size). (): the law's own coefficient gives it.
    rate_law_at: tuple[float, ...] = ()
    # Course of the rate after the warm-up; one of LEARNING_RATE_SCHEDULES. cosine and
    # wsd (warm-up, stable, decay) fall to 0 at the end of the run.
    schedule: str = "constant"
    decay_fraction: float = 0.2  # share of a run's steps, its last, in which wsd falls
    decay_shape: str = "linear"  # shape of that fall; one of DECAY_SHAPES
    # Warm-up: steps with a rate that rises linearly from 0. At most one of the three is
    # positive. This one is a share of the run's steps.
    warmup_fraction: float = 0.02
    warmup_steps: int = 0  # the warm-up in optimizer steps
    warmup_samples: int = 0  # the warm-up in pictures, rounded to whole steps
    b1: float = 0.9  # decay of Adam's first moment
    b2: float = 0.999  # decay of Adam's second moment
    eps: float = 1e-8  # added to the root of the second moment
    # Type of the stored first moment; one of DTYPES.
    first_moment_dtype: str = "float32"
    weight_decay: float = 0.0  # decoupled, times the learning rate
    clip_norm: float = 1.0  # largest global norm of the gradient
    # Averages of the weights that a run keeps, the one to use first: "ema", or "power_"
    # and a width as a share of the run, as in "power_0.05"; see training/averages.py.
    # The width 0.1 comes first: "ema" has 0.09 in runs of up to 90,000 steps.
    averages: tuple[str, ...] = ("power_0.1", "power_0.05")
    ema_decay: float = 0.9999  # of "ema", at step s: min(ema_decay, (1 + s) / (10 + s))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Which runs there are, and on what hardware."""

    # Training FLOPs of a run: forward and backward, 2 per multiply-add. Either budgets
    # are given, or steps and budgets_flops = ().
    budgets_flops: tuple[float, ...] = (1e18,)
    steps: int = 0  # optimizer steps of every run, as in paper A; 0: by the budgets
    # The ladder of sizes (see ARCHITECTURES); a budget takes those around its optimum.
    sizes: tuple[tuple[int, int], ...] = tuple((64 * n, n) for n in range(2, 16))
    sizes_per_budget: int = 7  # 0: all sizes; if steps are given, always all
    # a of the expected optimum N = a * C^b, in parameters without embeddings.
    expected_coef: float = 0.0009
    expected_exponent: float = 0.5681  # b of the same formula
    minimum_steps: int = 100  # a row with fewer optimizer steps is refused
    # How the budgets of a size are trained, one of REUSE: as runs of their own, as
    # points of the run of the largest, or as runs that share its constant rate (wsd).
    reuse: str = "separate"
    # What runs vary beside size and budget: {"section.field": values}, or (name,
    # values) pairs. Fields with commas between them are tied.
    axes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    # Axes that vary in some budgets or sizes alone, with their first value elsewhere:
    # {name of an axis: {"budgets": budgets, "sizes": sizes}}.
    axes_only: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    # A device with a known peak (flops/peaks.py), or any name with a stated speed.
    accelerator: str = "tpu-v5p"
    devices: int = 64  # devices of one run
    utilisation: float = 0.4  # share of the accelerator's peak; stated, not measured
    # Model FLOP/s of one device, stated; for hardware without a known peak. 0: none.
    flops_per_second_per_device: float = 0.0
    # Whether the stage plan times a few steps of two sizes on the devices it finds.
    probe: bool = False
    # One run by fitted laws, instead of `budgets_flops`: the size that they say for
    # `budget`, in the shape of `sizes`. Where the laws are, as in advise.laws; "": the
    # runs are those of the budgets and sizes.
    from_laws: str = ""
    budget: float = 0.0  # training FLOPs of that run, or of what `next` is to narrow
    # How many more runs the stage plan proposes, for a study that is fitted; 0: none.
    next: int = 0
    next_of: str = "N_opt"  # what they are to narrow at `budget`; one of NEXT_OF


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    batch_size: int = 1024  # pictures per optimizer step, over all devices
    # Pictures of a step that are computed at once, over all devices; gradients of such
    # parts are added up. It divides batch_size; 0: the whole batch.
    microbatch: int = 0
    seed: int = 0  # seed of initialisation, noise, t, caption dropout
    # Weights to start from: WORKDIR#RUN_ID[@STEP][:raw], or a folder or file of
    # weights; "": random ones.
    init_from: str = ""
    # What may differ from these weights, as PATTERN=TREATMENT: a pattern of parameter
    # paths, and one of INIT_TREATMENTS.
    init_exceptions: tuple[str, ...] = ()
    init_checksum: str = ""  # identity of these weights; filled in when they are read
    steps_per_dispatch: int = 1  # optimizer steps in one compiled call
    optimize_code: bool = True  # False: on a CPU, compile faster and run slower
    checkpoints_per_run: int = 10  # evenly spaced; the last one is at the end
    keep_checkpoints: int = 2  # newest checkpoints to keep; older ones are removed
    # Training FLOPs at which a run's checkpoint is never removed, like its last one.
    checkpoint_flops: tuple[float, ...] = ()
    # Minutes after a checkpoint at which another one is written; 0: only those above.
    checkpoint_minutes: float = 10.0
    # Signals at which a run is saved and goes on; some of SIGNALS.
    save_signals: tuple[str, ...] = ("SIGUSR1",)
    # Signals at which a run is saved and ends, as at SIGTERM; some of SIGNALS.
    stop_signals: tuple[str, ...] = ("SIGUSR2",)
    log_every_steps: int = 1  # steps between lines of metrics.jsonl; >= one dispatch
    show_every_seconds: float = 5.0  # seconds between lines of progress
    tensorboard: bool = False  # write TensorBoard events, too
    profile_steps: int = 0  # steps that are traced into the run's folder; 0: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The loss on held-out pictures."""

    samples: int = 4096  # pictures, each with its own noise and stratum of t
    batch_size: int = 1024  # pictures in one call, over all devices
    seed: int = 0  # seed of the noise and of t
    # Part of data.mix whose held-out pictures are measured, drawn and compared with;
    # "": the first one; "mix": all of them, in their shares.
    part: str = ""
    # How often the loss is measured during a run, evenly spaced in log FLOPs over its
    # last two decades, and also at the smaller budgets of the plan. There are fewer if
    # they would take over 2% of its FLOPs. The end is always measured, and so are the
    # budgets of a trajectory (plan.reuse); 0: these alone.
    marks: int = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Drawing pictures from a trained network."""

    run: str = ""  # run_id of the finished run to draw from; "": the best one
    weights: str = ""  # folder of weights to draw from instead of a run
    captions: tuple[str, ...] = ()  # your own, drawn in turn; (): held-out ones
    images: int = 16  # how many pictures
    batch_size: int = 256  # pictures in one call and one file, over all devices
    sampler: str = "euler"  # one of SAMPLERS
    spacing: str = "auto"  # time grid; "auto": the sampler's own, or one of SPACINGS
    steps: int = 50  # sampler steps; some samplers evaluate the network twice a step
    guidance: float = 3.0  # classifier-free guidance scale; 1: none
    seed: int = 0  # seed of the noise
    format: str = "png"  # format of grid and archive; one of PICTURE_FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Generated pictures against real ones, and likelihoods; see evaluation/."""

    network: str = "none"  # one of FEATURE_NETWORKS; "none": no evaluation
    weights: str = ""  # its file, folder or hub id; "": the package of lite0
    # Side of lite0's input in pixels, at least LITE0_LEAST; 0: the network's own.
    input_size: int = 0
    metrics: tuple[str, ...] = ("fd",)  # some of METRICS
    backend: str = "numpy"  # computes the Frechet distance; one of FD_BACKENDS
    reference: str = ""  # .npz with statistics of real pictures; "": held-out ones
    reference_images: int = 4096  # held-out pictures; fewer if there are fewer
    through_training: bool = False  # measure the kept checkpoints of the runs, too
    batch_size: int = 32  # pictures in one call of the network
    bootstrap: int = 50  # resamples of the generated pictures; 0: no interval
    confidence: float = 0.9  # level of the interval
    seed: int = 0  # seed of the resamples
    # What is measured of every finished run on the held-out pictures of
    # config.validation, without sampling: some of HELD_OUT_METRICS.
    held_out: tuple[str, ...] = ()
    held_out_draws: int = 16  # times t at which each held-out picture is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Quality against sampling cost over every finished run; see stages/frontier.py."""

    images: int = 0  # pictures of each cell of the grid; 0: no frontier
    samplers: tuple[str, ...] = ("ddim", "ddpm", "dpm++2m")  # some of SAMPLERS
    # Sampler steps (paper A, figure 8).
    steps: tuple[int, ...] = (4, 6, 8, 10, 20, 50)
    # Guidance scales (paper A, figure 7).
    guidances: tuple[float, ...] = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment, checked and frozen; `resolve` makes it."""

    name: str = "experiment"  # name of the study and its default workdir
    question: str = ""  # printed at the head of the report
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
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    @property
    def encoded(self) -> bool:
        """Whether training reads records that the encode stage writes."""
        return (
            len(self.data.mix) > 0
            or self.data.source not in names.ENDLESS
            or self.encode.autoencoder != "none"
            or not self.reads_words
        )

    @property
    def reads_words(self) -> bool:
        """Whether captions are ids of a vocabulary, not an encoder's features."""
        return self.encode.text_encoder in ("auto", "vocabulary")

    @property
    def objective_kind(self) -> str:
        """objective.kind, or the objective that trains the architecture."""
        kind, network = self.objective.kind, self.model.architecture
        if kind != "auto":
            return kind
        every = names.OBJECTIVES.items()
        return next((name for name, trains in every if network in trains), kind)

    @property
    def recipe_hash(self) -> str:
        """Digest of all that decides a run's numbers; see identity."""
        return identity.recipe_hash(dataclasses.asdict(self))
