"""Opens what was trained, here or elsewhere, as a model that draws pictures.

import scaling_ldm
model = scaling_ldm.load("runs/quickstart")
pictures = model.sample("a red bicycle on white", n=4)
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from scaling_ldm import config, data, records
from scaling_ldm.config import init_from
from scaling_ldm.data import encoded, icons, vocabulary
from scaling_ldm.diffusion import samplers
from scaling_ldm.models import denoisers, from_config, pretrained
from scaling_ldm.models.weights import files, native, published
from scaling_ldm.records import places
from scaling_ldm.records.errors import CheckpointError, WeightsError
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import captions, inference, mesh
from scaling_ldm.training.loaded_model import LoadedModel
from scaling_ldm.training.objective import diffusion_objective
from scaling_ldm.workdir import exports, initial_weights, pipelines
from scaling_ldm.workdir.pipelines import Elsewhere

_WHAT = "what load opens"  # in messages about URLs


def load(
    place: str | os.PathLike,
    *,
    autoencoder: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
) -> LoadedModel:
    """Opens a trained model, with the words, schedule and networks it was trained with.

    The weights are put on the first device of this process. The text encoder and the
    autoencoder are opened when they are first used.

    Args:
      place: a folder that the stage export wrote; a working directory, for the run
        that the stage generate takes (the best finished one, unless
        config.generate.run names another); WORKDIR/runs/RUN_ID, or
        WORKDIR#RUN_ID[@STEP][:WEIGHTS] as in `config.train.init_from`, for a run of
        it; or a folder of diffusers with a model_index.json.
      autoencoder, text_encoder: where they are now, as a folder, a hub id or a name, if
        they have moved since training. They must be the networks of training; for a
        folder of diffusers this is not checked, because it does not name them.

    Raises:
      ConfigError: there is nothing that can be opened, or files do not belong together.
      NewerVersion: a newer version of the library wrote it.
    """
    text = os.fspath(place)
    where = f"load({text!r})"
    elsewhere = {"autoencoder": autoencoder, "text_encoder": text_encoder}
    try:
        return _opened(where, text, elsewhere)
    except (WeightsError, CheckpointError, records.Damaged) as e:
        raise config.ConfigError(f"{where}: {e}") from e


def _opened(where: str, text: str, elsewhere: Elsewhere) -> LoadedModel:
    folder = places.place(text, _WHAT).expanduser()
    if not folder.is_dir():
        run = init_from.parsed(text)
        if run is None:
            raise config.ConfigError(f"{where}: no such folder")
        return _of_run(where, run, elsewhere)
    if (folder / exports.CARD).exists():
        if isinstance(folder, ObjectPath):
            raise config.ConfigError(
                f"{where}: an export in a store; copy it to a local folder"
            )
        try:
            return _of_export(where, folder, elsewhere)
        except KeyError as e:
            raise config.ConfigError(f"{where}: {exports.CARD} lacks {e}") from e
    # A working directory comes first: it, too, may be in a folder called runs.
    candidates = [(folder, "")]
    if folder.parent.name == "runs":
        candidates.append((folder.parent.parent, folder.name))
    for workdir, run_id in candidates:
        if (workdir / "experiment.json").exists():
            run = init_from.RunWeights(
                workdir=str(workdir), run_id=run_id, step=None, weights=""
            )
            return _of_run(where, run, elsewhere)
    if (folder / pipelines.INDEX).exists():
        return pipelines.load(where, folder, elsewhere)
    raise config.ConfigError(
        f"{where}: neither an export ({exports.CARD}), nor a working directory "
        f"(experiment.json), nor a folder of diffusers ({pipelines.INDEX})"
    )


def _of_run(where: str, run: init_from.RunWeights, elsewhere: Elsewhere) -> LoadedModel:
    found = initial_weights.find_run(where, run, _WHAT)
    own, spec, model = found.experiment, found.spec, found.model
    _check_kind(where, own)
    network = from_config.denoiser(own, spec.width, spec.depth, unroll=False)
    device_mesh = mesh.build(config.MeshConfig(), {}, jax.local_devices()[:1])
    with jax.set_mesh(device_mesh):
        params = jax.device_get(model.load(device_mesh))
    words = None
    if "text" in network.conditioning and own.reads_words:
        if model.words is not None:
            words = vocabulary.Vocabulary(model.words)
        else:  # an older version did not keep them
            words = vocabulary.of(data.sources(own, found.workdir)[0])
    about = {
        "run_id": spec.run_id,
        "step": model.step,
        "weights": model.weights,
        "label_names": model.label_names,  # (): an older version did not keep them
    }
    held = _networks_of(found.workdir)
    return _model(own, network, params, words, spec.run_id, about, held, elsewhere)


def _networks_of(workdir: pathlib.Path) -> dict[str, Any]:
    """The identities of the networks that encoded what runs were trained on."""
    path = workdir / "data.json"
    identity = records.read_json(path).get("identity") if path.exists() else None
    if isinstance(identity, Mapping) and identity.get("parts"):
        identity = next(iter(identity["parts"].values()))
    return dict(identity) if isinstance(identity, Mapping) else {}


def _of_export(where: str, folder: pathlib.Path, elsewhere: Elsewhere) -> LoadedModel:
    card = exports.read_card(folder)
    assert card is not None
    reads = card["reads"]
    # Cards of 0.1.0 do not say how their study draws: as config.generate's defaults.
    more = card.get("computes_in", {}), card.get("draws", {})
    experiment = _described({**reads, **more[0], **more[1]})
    _check_kind(where, experiment)
    wanted = list(denoisers.TIME_RANGE)
    if reads.get("model.time_range", wanted) != wanted:
        raise config.ConfigError(
            f"{where}: its network takes t in {reads['model.time_range']}, those of "
            f"this version in {wanted}"
        )
    layout = files.config(folder)
    size = card["width"], card["depth"]
    if layout.get("_class_name") == published.UNET:
        found = published.find(folder, experiment.data)
        network = denoisers.u_net(found.network)
        params = found.load()
    else:
        network = from_config.denoiser(experiment, *size, unroll=False)
        shapes = from_config.parameter_shapes(
            from_config.network_config(experiment, *size)
        )
        params = native.load(folder, shapes)
    words = None
    if "text" in network.conditioning and experiment.reads_words:
        words = _words_of_export(where, folder, card, layout)
    # A copy in the export comes first.
    nearby = {
        name: folder / name for name in exports.NETWORKS if (folder / name).is_dir()
    }
    held = {name: reads.get(f"encode.{name}") for name in exports.NETWORKS}
    given = {name: value for name, value in elsewhere.items() if value is not None}
    about = {
        k: v for k, v in card.items() if k not in ("reads", "computes_in", "draws")
    }
    name = card["run_id"]
    return _model(experiment, network, params, words, name, about, held, nearby | given)


def _words_of_export(
    where: str,
    folder: pathlib.Path,
    card: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> vocabulary.Vocabulary | None:
    found = exports.words_of(folder, card)
    if found is not None:
        return vocabulary.Vocabulary(found)
    # An export of an older version. Painted icons have the words that the config says.
    old = layout.get("experiment", {}).get("data", {})
    if old.get("source") in config.ENDLESS and not old.get("mix"):
        return icons.build_vocabulary(old["vocab_size"], old["validation_fraction"])
    raise config.ConfigError(
        f"{where}: an older version wrote it without the words that its network has "
        "learnt: export again from the working directory"
    )


def _described(fields: Mapping[str, Any]) -> config.Experiment:
    """An experiment of "section.field" -> value; other fields have their defaults."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in records.from_json(dict(fields)).items():
        section, field = key.split(".")
        if isinstance(value, Mapping):  # the identity of a network
            value = value["name"]
        sections.setdefault(section, {})[field] = value
    default = config.Experiment()
    return dataclasses.replace(
        default,
        **{
            section: dataclasses.replace(
                old := getattr(default, section),
                **{k: v for k, v in values.items() if hasattr(old, k)},
            )
            for section, values in sections.items()
        },
    )


def _check_kind(where: str, experiment: config.Experiment) -> None:
    if experiment.model.architecture == "autoencoder_kl":
        raise config.ConfigError(
            f"{where} is an autoencoder, which draws nothing by itself; "
            "pretrained.autoencoder(FOLDER) opens its export"
        )


def _model(
    experiment: config.Experiment,
    network: denoisers.Denoiser,
    params: Any,
    words: vocabulary.Vocabulary | None,
    name: str,
    about: Mapping[str, Any],
    held: Mapping[str, Any],
    elsewhere: Elsewhere,
) -> LoadedModel:
    """Puts the parts together.

    Args:
      held: identities of the autoencoder and the text encoder of the training.
      elsewhere: where they are, if not where config.encode says.
    """
    objective = diffusion_objective(experiment.objective)
    cfg = experiment.encode

    def place(field: str) -> str:
        given = elsewhere.get(field)
        return getattr(cfg, field) if given is None else os.fspath(given)

    def opened(field: str, load: Callable[..., Any]) -> Any:
        try:
            found = load(place(field), cfg.compute_dtype)
        except config.ConfigError as e:
            raise config.ConfigError(
                f"{name} needs its {field}: {e}; say where it is, with "
                f"load(..., {field}=FOLDER)"
            ) from e
        wanted, here = {field: held.get(field)}, {field: found.identity}
        if wanted[field] and (lines := encoded.differences(wanted, here)):
            raise config.ConfigError(
                f"{name} was trained with another {field}: {'; '.join(lines)}"
            )
        return found

    reader: captions.CaptionReader | None = None
    if "text" in network.conditioning:
        reader = captions.reader(
            experiment,
            words,
            functools.partial(opened, "text_encoder", pretrained.text_encoder),
        )
    latents = cfg.autoencoder != "none"
    H, W, C = experiment.data.shape
    return LoadedModel(
        name=name,
        denoise=samplers.denoiser(
            network,
            objective.schedule,
            prediction=objective.prediction,
            params=jax.device_put(params, jax.local_devices()[0]),
        ),
        shape=(H, W, C),
        conditioning=network.conditioning,
        classes=experiment.model.classes,
        label_names=tuple(about.get("label_names", ())),
        about=about,
        drawing=inference.options(experiment.generate),
        _captions=reader,
        _autoencoder=functools.partial(opened, "autoencoder", pretrained.autoencoder)
        if latents
        else None,
    )
