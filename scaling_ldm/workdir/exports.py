"""Weights in a folder, and the card that describes them.

    training.json     the card, beside weights that the export stage wrote: what was
                      trained and how far, what the network reads (schedule, range of
                      t, prediction, text encoder, autoencoder and its scale), the
                      SHA-256 of the weights, a digest of the words
    vocabulary.json   the words by id, if captions are words
    autoencoder/, text_encoder/   copies of these networks, if they came from a folder

A U-Net in diffusers' layout may come from elsewhere, without a card. Its identity is
then the name of its folder and the SHA-256 of its weights. How far it was trained is
unknown.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from scaling_ldm import config, records
from scaling_ldm.config.identity import SINCE
from scaling_ldm.data import encoded, vocabulary
from scaling_ldm.models import denoisers, from_config, pretrained
from scaling_ldm.models.denoisers import unet
from scaling_ldm.models.weights import files, native, published
from scaling_ldm.records import places
from scaling_ldm.training import mesh
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import scheduler_config

CARD = "training.json"
NETWORKS = ("autoencoder", "text_encoder")  # fields of config.encode

# Fields of config.model that change how a network runs, not what its weights mean.
_HOW_IT_RUNS = ("compute_dtype", "remat", "remat_policy", "attention", "unroll")
_DATA = ("shape", "text_tokens", "vocab_size", "coarse")
_DRAWS = ("sampler", "spacing", "steps", "guidance")  # fields of config.generate
# Fields of config.objective that a sampler has to know.
_LEARNT = ("schedule", "schedule_steps", "zero_terminal_snr", "prediction")


def weights_identity(experiment: config.Experiment) -> dict[str, Any]:
    """The fields that weights depend on: the network, its input and what it learnt."""
    model = [field.name for field in dataclasses.fields(config.ModelConfig)]
    named = {
        "model": [name for name in model if name not in _HOW_IT_RUNS],
        "data": _DATA,
        "objective": _LEARNT,
    }
    found = {
        f"{section}.{name}": getattr(getattr(experiment, section), name)
        for section, names in named.items()
        for name in names
    }
    return found | {
        "data.shape": list(experiment.data.shape),
        "model.time_range": list(denoisers.TIME_RANGE),
        "encode.autoencoder": pretrained.autoencoder_identity(
            experiment.encode.autoencoder
        ),
        "encode.text_encoder": pretrained.text_identity(experiment.encode.text_encoder),
    }


def write_card(
    folder: pathlib.Path,
    experiment: config.Experiment,
    model: TrainedModel,
    record: records.TrainRecord,
    loss: float,
    words: vocabulary.Vocabulary | None,
    more: Mapping[str, Any],
) -> None:
    """Writes the card of weights that are already in the folder, and their words.

    Args:
      loss: the held-out loss of these weights.
      words: by their ids; None: the network reads none.
      more: further fields, for networks of this kind only.
    """
    card = {
        "experiment": experiment.name,
        "run_id": model.run_id,
        "step": model.step,
        "recipe_hash": experiment.recipe_hash,
        "width": model.width,
        "depth": model.depth,
        "parameters": record.params,
        "pictures": record.images,
        "training_flops": model.train_flops,
        "average": model.weights,
        "pretraining_flops": record.pretraining_flops,
        "validation_loss": loss,
        **more,
        "weights_sha256": files.checksum(folder),
        "vocabulary": None if words is None else words.digest,
        "label_names": list(model.label_names),
        "computes_in": {
            "model.compute_dtype": experiment.model.compute_dtype,
            "encode.compute_dtype": experiment.encode.compute_dtype,
            "encode.dtype": experiment.encode.dtype,
        },
        "draws": {
            f"generate.{name}": getattr(experiment.generate, name) for name in _DRAWS
        },
        "reads": weights_identity(experiment),
    }
    (folder / vocabulary.FILE).unlink(missing_ok=True)
    if words is not None:
        vocabulary.write(folder / vocabulary.FILE, words)
    records.write_json(folder / CARD, card)


def words_of(folder: pathlib.Path, card: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The words that an export learnt, by id; None: it reads none, or is an older one.

    Raises:
      WeightsError: the words are missing, or differ from those of its card.
    """
    digest = card.get("vocabulary")
    if digest is None:
        return None
    found = vocabulary.read(folder / vocabulary.FILE)
    if found is None or found.digest != digest:
        said = "is missing" if found is None else "holds other words"
        raise files.WeightsError(
            f"{folder / vocabulary.FILE} {said}: without it, the ids that the network "
            "learnt have no meaning; export again"
        )
    return found.words


def read_model(experiment: config.Experiment, name: str) -> TrainedModel:
    """The model of a folder, after its files have been compared with its card.

    Args:
      name: config.generate.weights.

    Raises:
      ConfigError: there is no such folder, its weights are not those of its card, or
        they are of a network that the experiment does not describe. Every difference
        is listed.
      NewerVersion: a newer version of the library wrote the folder.
    """
    where = f"config.generate.weights = {name!r}"
    folder = places.local(name, "config.generate.weights")
    if not folder.is_dir():
        raise config.ConfigError(f"{where}: no such folder")
    if (folder / "experiment.json").exists():
        export = folder / "export"
        first = "" if export.is_dir() else "run --stages export there first, then "
        raise config.ConfigError(
            f"{where}: the working directory of a study, whose weights are in its "
            f"export folder: {first}give {str(export)!r}"
        )
    try:
        card = read_card(folder)
        layout = files.config(folder)
        if layout.get("_class_name") == published.UNET:
            return _unet(experiment, where, folder, card)
        if "experiment" in layout:
            records.version_of(layout, folder / files.CONFIG)
            return _native(experiment, where, folder, card)
    except (files.WeightsError, KeyError) as e:
        said = f"{CARD} lacks {e}" if isinstance(e, KeyError) else e
        raise config.ConfigError(f"{where}: {said}") from e
    raise config.ConfigError(
        f"{where}: its config.json is of {layout.get('_class_name', 'no known layout')}"
        f"; pictures can be drawn with what the export stage wrote of a denoiser, and "
        f"with a {published.UNET} of diffusers"
    )


def read_card(folder: pathlib.Path) -> dict[str, Any] | None:
    """The card of a folder; None where there is none.

    Raises:
      WeightsError: it describes other weights.
    """
    if not (folder / CARD).exists():
        return None
    card, checksum = files.read_json(folder / CARD), files.checksum(folder)
    records.version_of(card, folder / CARD)
    if not isinstance(card.get("reads"), dict):
        raise files.WeightsError(
            f"{folder / CARD} lacks the fields that the weights need"
        )
    if card["weights_sha256"] != checksum:
        raise files.WeightsError(
            f"the weights are not those of {CARD}: SHA-256 "
            f"{card['weights_sha256']} there, {checksum} of the file; export again"
        )
    # The values that weights were trained with if their card lacks newer fields.
    before = {".".join(field): records.to_json(value) for field, value in SINCE.items()}
    return card | {"reads": before | card["reads"]}


def _model(
    where: str,
    folder: pathlib.Path,
    card: Mapping[str, Any] | None,
    size: tuple[int, int],
    load: Callable[[], Any],
) -> TrainedModel:
    checksum = files.checksum(folder) if card is None else card["weights_sha256"]
    identity: dict[str, Any] = {
        "run_id": f"{folder.resolve().name}-{checksum[:8]}",
        "step": 0,
        "train_flops": None,
        "weights": None,
    }
    if card is not None:
        identity = {
            "run_id": card["run_id"],
            "step": card["step"],
            "train_flops": card["training_flops"],
            # Cards of 0.1.0 lack it.
            "weights": card.get("average", config.EMA),
        }

    def placed(device_mesh: jax.sharding.Mesh) -> Any:
        try:
            return mesh.place_params(device_mesh, load())
        except files.WeightsError as e:
            raise config.ConfigError(f"{where}: {e}") from e

    width, depth = size
    return TrainedModel(
        **identity,
        width=width,
        depth=depth,
        checksum=checksum,
        load=placed,
        words=None if card is None else words_of(folder, card),
        label_names=() if card is None else tuple(card.get("label_names", ())),
    )


def _refuse(where: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ConfigError that lists what is known on both sides and differs."""
    common = {key: value for key, value in wanted.items() if key in held}
    if found := encoded.differences(held, common):
        listed = "".join(f"\n  {line}" for line in found)
        raise config.ConfigError(f"{where} is not what this experiment reads:{listed}")


def _unet(
    experiment: config.Experiment,
    where: str,
    folder: pathlib.Path,
    card: Mapping[str, Any] | None,
) -> TrainedModel:
    """A UNet2DConditionModel of diffusers, of any size."""
    found = published.find(folder, experiment.data)
    cfg = found.network
    width, depth = cfg.base, len(cfg.multiples)
    here = from_config.unet_config(experiment, width, depth)
    held = {} if card is None else card["reads"]
    if card is None:
        if scheduler_config.beside(folder) is None:
            raise files.WeightsError(
                "nothing says what its network predicts, on which schedule: put the "
                f"{scheduler_config.FILE} of its pipeline in it, or in scheduler/ "
                "beside it"
            )
        if lines := scheduler_config.differences(folder, experiment):
            listed = "".join(f"\n  {line}" for line in lines)
            raise config.ConfigError(f"{where} has learnt something else:{listed}")
    _refuse(where, held | _facts(cfg), _facts(here) | weights_identity(experiment))
    return _model(where, folder, card, (width, depth), found.load)


def _facts(cfg: unet.UNetConfig) -> dict[str, Any]:
    """What diffusers' configuration says; a U-Net runs at any height and width."""
    return {
        "model.architecture": "unet",
        "heads at each width": list(cfg.level_heads),
        "model.text_width": cfg.text_width,
        "words in its vocabulary": cfg.vocab_size,
        "channels": cfg.image_shape[-1],
        "channels beside them": cfg.extra_channels,
        "widths": list(cfg.widths),
        "blocks at each": cfg.blocks,
    }


def _native(
    experiment: config.Experiment,
    where: str,
    folder: pathlib.Path,
    card: Mapping[str, Any] | None,
) -> TrainedModel:
    """A network in this library's own layout, which only its export stage writes."""
    if card is None:
        raise files.WeightsError(f"there is no {CARD} in it: export again")
    _refuse(where, card["reads"], weights_identity(experiment))
    size = card["width"], card["depth"]
    denoiser = from_config.denoiser(experiment, *size, unroll=False)

    def load() -> Any:
        with jax.set_mesh(None):
            tree = jax.eval_shape(denoiser.init, jax.random.key(0))
        return native.load(folder, tree)

    return _model(where, folder, card, size, load)
