"""Which choice reads which field; a field that nothing reads may not be changed.

A field that is in no table here is always read. So are text_tokens and vocab_size, even
if a network reads only labels or pixels: they belong to the captions of the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from scaling_ldm.config import fields, names

AUTOENCODER = names.OBJECTIVES["reconstruction"]
DENOISERS = names.OBJECTIVES["denoising"]
TRANSFORMERS = tuple(a for a in DENOISERS if a not in names.CONVOLUTIONAL)
READ_CAPTIONS = tuple(a for a in DENOISERS if a != "adaln_zero")
RECONSTRUCTION = ("objective.reconstruction", "objective.kl_weight")
# Fields of config.evaluate that need no feature network, as the level of intervals.
HELD_OUT = ("held_out", "held_out_draws")
# Fields of config.objective that say which objective it is, for every architecture.
WHICH = ("kind", "folder", "digest")


def _names(section: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(section))


def _by_field(
    section: str, table: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Turns {choice: its fields} into {"section.field": the choices that read it}."""
    every = sorted({field for used in table.values() for field in used})
    return {
        f"{section}.{field}": tuple(name for name in table if field in table[name])
        for field in every
    }


# Field that holds a choice -> {field: the choices that read it}.
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "model.architecture": {
        "data.coarse": ("unet",),
        "model.patch_size": TRANSFORMERS,
        "model.head_dim": (*TRANSFORMERS, "unet"),
        "model.heads": (*TRANSFORMERS, "unet"),
        "model.mlp_ratio": TRANSFORMERS,
        "model.activation": TRANSFORMERS,
        "model.norm": TRANSFORMERS,
        "model.qk_norm": TRANSFORMERS,
        "model.positions": TRANSFORMERS,
        "model.text_width": READ_CAPTIONS,
        "model.time_width": TRANSFORMERS,
        "model.classes": ("adaln_zero",),
        "model.latent_channels": AUTOENCODER,
        "model.groups": AUTOENCODER,
        "model.remat": DENOISERS,
        "model.remat_policy": DENOISERS,
        "model.attention": DENOISERS,
        "model.unroll": TRANSFORMERS,
    }
    | {
        f"objective.{name}": DENOISERS
        for name in _names(fields.ObjectiveConfig)
        if name not in WHICH
    }
    | dict.fromkeys(RECONSTRUCTION, AUTOENCODER)
    | {f"generate.{name}": DENOISERS for name in _names(fields.GenerateConfig)}
    | {"generate.captions": READ_CAPTIONS}
    | {f"evaluate.{name}": DENOISERS for name in _names(fields.EvaluateConfig)}
    | {f"frontier.{name}": DENOISERS for name in _names(fields.FrontierConfig)}
    | {f"advise.{name}": DENOISERS for name in _names(fields.AdviseConfig)},
    "evaluate.network": {
        f"evaluate.{name}": tuple(n for n in names.FEATURE_NETWORKS if n != "none")
        for name in _names(fields.EvaluateConfig)
        if name not in ("network", "input_size", "confidence", *HELD_OUT)
    }
    | {"evaluate.input_size": ("lite0",)},
    "advise.unit": {"advise.dtype": ("seconds",), "advise.utilisation": ("seconds",)},
    "data.source": _by_field("data", names.DATA_SOURCES),
    "objective.schedule": _by_field("objective", names.SCHEDULES),
    "objective.weighting": _by_field("objective", names.WEIGHTINGS),
    "objective.timestep_sampling": _by_field("objective", names.TIMESTEP_SAMPLING),
    "optimizer.learning_rate_policy": _by_field(
        "optimizer", names.LEARNING_RATE_POLICIES
    ),
    "optimizer.rate_law": _by_field("optimizer", names.RATE_LAWS),
    "optimizer.schedule": _by_field("optimizer", names.LEARNING_RATE_SCHEDULES),
}
# FROZEN: fields of config.encode that only a frozen network reads. RECORDS: fields that
# encoded records depend on, which are all but the names of the networks, and those of
# config.data that say how records are read.
FROZEN = ("encode.dtype", "encode.compute_dtype")
RECORDS = (
    *(
        f"encode.{name}"
        for name in _names(fields.EncodeConfig)
        if name not in ("autoencoder", "text_encoder")
    ),
    *("data.shuffle_window", "data.reader_threads", "data.cache_gigabytes"),
)
_DEFAULTS = fields.Experiment()


def value(experiment: fields.Experiment, where: str) -> Any:
    """The value of the field "section.name"."""
    section, name = where.split(".")
    return getattr(getattr(experiment, section), name)


def unread(e: fields.Experiment) -> list[str]:
    """A sentence for each changed field that nothing in the experiment reads."""
    found: dict[str, str] = {}

    def check(field: str, why: str) -> None:
        given, default = value(e, field), value(_DEFAULTS, field)
        if given != default:
            found.setdefault(
                field,
                f"config.{field} = {given!r} is not read {why}; its default is "
                f"{default!r}",
            )

    for choice, table in READERS.items():
        chosen = value(e, choice)
        if chosen not in names.CHOICES[choice]:
            continue
        for field, readers in table.items():
            if chosen not in readers and not _records_read(e, field):
                check(
                    field,
                    f"by config.{choice} = {chosen!r}; it is for: {', '.join(readers)}",
                )
    networks = "config.encode.autoencoder or config.encode.text_encoder"
    if not e.encoded:
        for field in RECORDS:
            check(field, f"with nothing to encode: set {networks}")
    elif e.encode.autoencoder == "none" and e.reads_words:
        for field in FROZEN:
            check(field, f"without a frozen network: set {networks}")
    return list(found.values())


def _records_read(e: fields.Experiment, field: str) -> bool:
    """Whether the encoded records depend on the field, even if no denoiser reads it."""
    return field == "model.text_width" and not e.reads_words
