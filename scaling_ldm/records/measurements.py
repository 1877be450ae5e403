"""One row of the table of measurements, and what makes two rows comparable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from scaling_ldm.records.runs import RunSpec

# Metrics of training. A stratum of t adds its number: see `stratum`.
LOSS, TRAIN_LOSS = "loss", "train_loss_smoothed"
VLB = "vlb"  # the bound on -log2 p of held-out data, in bits per dim
# Names of weights: those of the last step, and the only average that 0.1.0 kept.
RAW, EMA = "raw", "ema"
NO_INTERVAL = 1.0  # level of a row whose low and high are its value
# A metric whose name begins with one of these is better if it is higher.
HIGHER_IS_BETTER = (
    "clip_score",
    "clip_i",
    "inception_score",
    "precision",
    "recall",
    "psnr",
    "ssim",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number about a run at one step: a row of the table of measurements."""

    study: str
    run_id: str
    group: str  # RunSpec.group, as the plan has it today
    seed: int
    # Training FLOPs that the run is planned for, or the smaller budget of a trajectory
    # that the step stands for; as the plan has it today.
    budget_flops: float
    params: int
    params_without_embeddings: int
    step: int  # optimizer steps done
    flops: float  # training FLOPs up to the step
    images: int  # pictures seen up to the step
    tokens: int  # tokens processed up to the step
    metric: str  # e.g. "loss", "loss_t0", "train_loss_smoothed", "fd_lite0"
    value: float  # what was measured
    low: float  # the interval at `level`; the value itself where there is none
    high: float
    level: float  # of the interval; 1.0 where there is no interval
    weights: str  # "raw", or the name of an average
    protocol_hash: str  # values of one metric are compared where it is the same


def measurement(
    spec: RunSpec,
    *,
    step: int,
    metric: str,
    value: float,
    weights: str,
    protocol_hash: str,
    low: float | None = None,
    high: float | None = None,
    level: float = NO_INTERVAL,
) -> Measurement:
    """A row of a planned run, with what its step has cost.

    Args:
      low, high: None where there is no interval.
    """
    return Measurement(
        study=spec.study,
        run_id=spec.run_id,
        group=spec.group,
        seed=spec.seed,
        budget_flops=spec.budget_at(step),
        params=spec.params,
        params_without_embeddings=spec.params_without_embeddings,
        step=step,
        flops=float(step * spec.flops_per_step),
        images=step * spec.batch_size,
        tokens=step * spec.tokens // spec.steps,
        metric=metric,
        value=value,
        low=value if low is None else low,
        high=value if high is None else high,
        level=level,
        weights=weights,
        protocol_hash=protocol_hash,
    )


STRATA = 10  # parts of the distribution of t, equally likely


def stratum(number: int) -> str:
    """The metric of the loss in one tenth of the distribution of t, ascending in t."""
    return f"{LOSS}_t{number}"


def of_cell(metric: str) -> str:
    """The name of a metric where it is measured at a cell of the frontier.

    It differs from the name that the study's own sampling settings have. So the cells
    of the frontier never enter the fits and figures of that metric.
    """
    return f"{metric}_cell"


def floors(metric: str) -> tuple[str, str]:
    """The names of a distance's two references: real pictures and noise."""
    return f"{metric}_real", f"{metric}_noise"


def is_floor(metric: str) -> bool:
    """Whether a metric is one of `floors`; these do not depend on the model."""
    return metric.endswith(("_real", "_noise"))


def in_words(metric: str, weights: str = "", known: str = "") -> str:
    """What was measured, as text: "validation loss, average ema".

    Args:
      weights: "raw", or an average's name; "": they are not named.
      known: the caller's words for the metric; "": those of this function.
    """
    words = {
        LOSS: "validation loss",
        TRAIN_LOSS: "smoothed training loss",
        VLB: "variational bound in bits per dim",
    }
    said = words.get(metric, known or metric)
    if (tenth := metric.removeprefix(f"{LOSS}_t")).isdigit():
        said = f"{words[LOSS]} in stratum {tenth} of t"
    return said + {"": "", RAW: ", raw weights"}.get(weights, f", average {weights}")


# Fields of an experiment that decide what a held-out loss measures: the pictures and
# what the network sees of them, the noise, and the quantity that is predicted.
_PICTURES = (
    "data.source",
    "data.split",
    "data.shape",
    "data.coarse",
    "data.text_tokens",
    "data.vocab_size",
    "data.validation_fraction",
    "data.seed",
    "encode.autoencoder",
    "encode.text_encoder",
    "encode.pictures",
    "encode.dtype",
)
_HELD_OUT = ("validation.samples", "validation.seed")
# Those of the objective; losses that differ in one of them are different quantities.
MEASURES = (
    "objective.schedule",
    "objective.schedule_steps",
    "objective.zero_terminal_snr",
    "objective.prediction",
    "objective.timestep_sampling",
    "objective.time_location",
    "objective.time_scale",
    "objective.time_shift",
)
# What the training loss depends on beside them.
_TRAINED = (
    "objective.weighting",
    "objective.min_snr_gamma",
    "objective.p2_gamma",
    "objective.p2_k",
    "objective.sigmoid_bias",
    "objective.caption_dropout",
    "objective.reconstruction",
    "objective.kl_weight",
)

# What a bound depends on beside the pictures; the weights of a loss are no part of it.
_BOUND = (
    "objective.schedule",
    "objective.schedule_steps",
    "objective.zero_terminal_snr",
    "evaluate.held_out_draws",
)

# Fields of later versions that decide it too -> the value that behaves as before. A
# field at that value is left out, so the protocol of older studies does not change.
_LATER = {
    "data.mix": [],
    "data.parts": [],
    "data.captions": "",
    "data.label": "",
    "data.shuffle_window": 0,
    "data.split_by": "caption_alone",
    "data.validation_path": "",
    "data.validation_split": "",
    "encode.choose": "first",
    "validation.part": "",
    "objective.kind": "auto",
    "objective.digest": "",
}


def _unread(value: Callable[[str], Any]) -> tuple[str, ...]:
    """Fields of `_LATER` that an experiment does not read, at any value."""
    if value("data.source") == "icons" and not value("data.mix"):
        return "data.split_by", "encode.choose"
    return () if value("encode.pictures") else ("encode.choose",)


def loss_protocol(
    metric: str, experiment: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """How a loss or a bound was measured; its digest is the rows' `protocol_hash`.

    All strata of t have the protocol of the whole loss.

    Args:
      metric: LOSS, TRAIN_LOSS or VLB.
      experiment: every field of the study, as nested dicts of JSON values. That of an
        older version gives the same digest; a field that it lacks is None.
      overrides: those of the run, "section.field" -> value.
    """
    own = {LOSS: MEASURES + _HELD_OUT, VLB: _BOUND + _HELD_OUT}
    fields = _PICTURES + own.get(metric, MEASURES + _TRAINED)

    def value(path: str) -> Any:
        section, _, name = path.partition(".")
        return overrides.get(path, experiment.get(section, {}).get(name))

    reconstructs = value("model.architecture") == "autoencoder_kl"
    quantity = "reconstruction" if reconstructs else "prediction"
    later = {path: value(path) for path in _LATER if path not in _unread(value)}
    if later.get("data.validation_path"):
        later["data.validation_path"] = "given"  # its place decides nothing
    if metric == VLB:  # it does not depend on the objective of training
        quantity = "bits per dim"
        later = {p: v for p, v in later.items() if not p.startswith("objective.")}
    return (
        {"metric": metric, "quantity": quantity}
        | {path: value(path) for path in fields}
        | {p: v for p, v in later.items() if v not in (None, _LATER[p])}
    )
