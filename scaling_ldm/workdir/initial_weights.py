"""Finds the weights that training starts from, and checks whether they fit.

They are those of a run, of an export, or published ones. Their parameters must have the
names and shapes of the network that is trained, and their network must have its
settings. config.train.init_exceptions names what may differ. Any other difference is
refused, and the message lists all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.config import identity, init_from
from scaling_ldm.data import encoded, vocabulary
from scaling_ldm.models import from_config
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import files, native, published, transfer
from scaling_ldm.records import places
from scaling_ldm.records.errors import CheckpointError, WeightsError
from scaling_ldm.training import checkpoint, mesh, progress
from scaling_ldm.training.trained_model import TrainedModel
from scaling_ldm.workdir import exports, init_record, runs, scheduler_config

_FIELD = "config.train.init_from"

WORDS = "entry/word_embedding"  # the parameter that is a table of words
# What published weights have learnt, and only the file of a scheduler says.
OBJECTIVE = ("objective.prediction", "objective.schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights to start from.

    checksum: their identity: the SHA-256 of a file or, for a run, a digest of the
      checkpoint's checksum.
    flops: training FLOPs spent on them, including those of the weights that they
      started from; None: unknown.
    network: config of their network.
    load(device_mesh) -> the parameters, sharded as in training.
    facts: what they learnt, and of which latents and captions; {}: unknown.
    unsaid: paths of settings that the weights do not say, as in `transfer.fit`.
    place: of a published denoiser, beside which is what it has learnt; else None.
    part: which of several state dicts of a file they are; "": the only one.
    words: the words that they learnt, by id; None: none, or unknown.
    """

    checksum: str
    flops: float | None
    network: Any
    load: Callable[[Any], Any]
    facts: Mapping[str, Any]
    unsaid: tuple[str, ...] = ()
    part: str = ""
    words: tuple[str, ...] | None = None
    place: pathlib.Path | None = None


def find(experiment: config.Experiment) -> InitialWeights:
    """The weights of config.train.init_from; their values are not read yet.

    Raises:
      ConfigError: they are not there, or cannot be read here.
      NewerVersion: a newer version of the library wrote them.
    """
    given = experiment.train.init_from
    where = f"config.train.init_from = {given!r}"
    try:
        if (run := init_from.parsed(given)) is not None:
            return _of_run(where, run)
        return _of_place(experiment, where, places.local(given, _FIELD))
    except (WeightsError, CheckpointError) as e:
        raise config.ConfigError(f"{where}: {e}") from e


def is_there(experiment: config.Experiment) -> bool:
    """Whether there is still a directory or file that config.train.init_from names.

    Raises:
      ConfigError: it is a URL of what is not supported there, as in `find`.
    """
    run = init_from.parsed(given := experiment.train.init_from)
    if run is None:
        return places.local(given, _FIELD).exists()
    return places.place(run.workdir, _FIELD).expanduser().exists()


def identified(
    experiment: config.Experiment, workdir: pathlib.Path
) -> config.Experiment:
    """The experiment with the identity of its weights in train.init_checksum.

    If the weights are gone, it is the identity that the directory records.

    Raises:
      ConfigError: they are neither there nor recorded, or differ from
        train.init_checksum.
    """
    given = experiment.train.init_from
    if not is_there(experiment):
        known = init_record.recorded(experiment, workdir)
        if known is None:
            raise config.ConfigError(
                f"config.train.init_from = {given!r}: no such folder or file"
            )
        return known
    return init_record.with_checksum(experiment, find(experiment).checksum, given)


def record(experiment: config.Experiment, workdir: pathlib.Path) -> None:
    """Records the identity of the weights in the directory."""
    if init_record.read(workdir) is None and is_there(experiment):
        found = find(experiment)
        cfg = experiment.train
        init_record.write(workdir, cfg.init_from, found.checksum, found.flops)


def _of_run(where: str, run: init_from.RunWeights) -> InitialWeights:
    found = find_run(where, run, _FIELD)
    own, spec, model = found.experiment, found.spec, found.model
    saved = checkpoint.saved_identity(
        runs.run_files(found.workdir, spec.run_id).checkpoints, model.step
    )
    spent, before = model.step * spec.flops_per_step, spec.pretraining_flops
    return InitialWeights(
        checksum=records.digest([saved, model.weights]),
        flops=None if before is None else float(spent + before),
        network=from_config.network_config(own, spec.width, spec.depth),
        load=model.load,
        facts=_facts(exports.weights_identity(own)),
        words=model.words,
    )


class FoundRun(NamedTuple):
    """Weights of a run of any working directory.

    experiment: of the run, with its overrides.
    """

    workdir: pathlib.Path
    experiment: config.Experiment
    spec: records.RunSpec
    model: TrainedModel


def find_run(where: str, run: init_from.RunWeights, what: str) -> FoundRun:
    """The weights of a run that is over; their values are not read yet.

    Args:
      where: the beginning of messages.
      run: if its run_id is "", config.generate.run or the best finished run.
      what: what names its working directory, for the message about a URL.

    Raises:
      ConfigError: there is no such run, it has no such checkpoint, or no run is the
        best one.
    """
    folder = places.place(run.workdir, what).expanduser()
    source = _experiment_of(where, folder)
    planned = (folder / "runs.jsonl").exists()
    specs = records.read_plan(folder) if planned else []
    by_name = {spec.run_id: spec for spec in specs}
    if not run.run_id:
        spec = runs.run_to_sample(source, folder, specs)
        if spec is None:
            raise config.ConfigError(f"{where}: no run of {folder} is finished")
    elif run.run_id not in by_name:
        raise config.ConfigError(
            f"{where}: no run {run.run_id!r} in {folder}; it has {', '.join(by_name)}"
        )
    else:
        spec = by_name[run.run_id]
    # Opening a folder of checkpoints would remove a checkpoint that is being written.
    if runs.read_record(folder, spec.run_id) is None:
        raise config.ConfigError(f"{where}: {spec.run_id} is not over yet")
    step = spec.steps if run.step is None else run.step
    there = runs.checkpoint_steps(folder, spec)
    if step not in there:
        raise config.ConfigError(
            f"{where}: {spec.run_id} has no checkpoint of step {step}; it has "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    model = runs.trained_model(source, folder, spec, step, run.weights or None)
    own = config.with_overrides(source, spec.overrides)
    return FoundRun(folder, own, spec, model)


def _experiment_of(where: str, folder: pathlib.Path) -> config.Experiment:
    """The experiment of another working directory."""
    path = folder / "experiment.json"
    if not path.exists():
        raise config.ConfigError(
            f"{where}: {folder} is not the working directory of a study"
        )
    held = records.read_experiment(path)
    return _resolved_again(held["config"] | {"name": held["name"]})


def _resolved_again(held: Mapping[str, Any]) -> config.Experiment:
    """An experiment from a file that this or an older version wrote."""
    known = vars(config.Experiment())
    sections = {
        name: {k: v for k, v in value.items() if k != "record"}
        if isinstance(value, Mapping)
        else value
        for name, value in identity.filled(held).items()
        if name in known
    }
    return config.resolve(sections)


def _of_place(
    experiment: config.Experiment, where: str, path: pathlib.Path
) -> InitialWeights:
    """Weights in a folder or a file."""
    if (path / "experiment.json").exists():
        raise config.ConfigError(
            f"{where} is the working directory of a study; name one of its runs, as in "
            f"{path}#RUN_ID, or give its export folder"
        )
    study = path.parent.parent
    if path.parent.name == "runs" and (study / "experiment.json").exists():
        raise config.ConfigError(
            f"{where}: the folder of a run; name the run as {study}#{path.name}"
        )
    if not path.exists():
        raise config.ConfigError(f"{where}: no such folder or file")
    card = exports.read_card(path) if path.is_dir() else None
    flops, facts, words = None, {}, None
    more: dict[str, Any] = {}
    if card is not None:
        words = exports.words_of(path, card)
        spent, before = card["training_flops"], card.get("pretraining_flops", 0.0)
        flops = None if spent is None or before is None else spent + before
        facts = _facts(card["reads"])
    layout = files.config(path) if (path / files.CONFIG).exists() else {}
    if "experiment" in layout:
        records.version_of(layout, path / files.CONFIG)
        held = dict(layout["experiment"])
        # The network does not need the file of the user's own objective.
        held["objective"] = {
            k: v
            for k, v in held["objective"].items()
            if k not in ("kind", "folder", "digest")
        }
        source = _resolved_again(held)
        size = layout["width"], layout["depth"]
        network = from_config.network_config(source, *size)
        shapes = from_config.parameter_shapes(network)
        load = functools.partial(native.load, path, shapes)
    else:
        width, depth = experiment.plan.sizes[0]
        like = from_config.network_config(experiment, width, depth)
        found = published.find(path, like)
        network, load = found.network, found.load
        more = {"unsaid": found.unsaid, "part": found.part}
        if card is None and not isinstance(network, autoencoder_kl.AutoencoderConfig):
            more["place"] = path
            if scheduler_config.beside(path) is None:
                more["unsaid"] += OBJECTIVE

    def placed(device_mesh: Any) -> Any:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), load())
        return mesh.place_params(device_mesh, params)

    torch = path.is_file() and path.suffix != ".safetensors"
    checksum = files.sha256(path) if torch else files.checksum(path)
    return InitialWeights(
        checksum=checksum,
        flops=flops,
        network=network,
        load=placed,
        facts=facts,
        **more,
        words=words,
    )


def _facts(reads: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that neither the parameters nor the network's settings show.

    Args:
      reads: as `exports.weights_identity` gives it.
    """
    return {k: v for k, v in reads.items() if k.startswith(("objective.", "encode."))}


def check(experiment: config.Experiment, specs: Iterable[records.RunSpec]) -> None:
    """Refuses weights that do not fit the runs of a plan.

    Raises:
      ConfigError: for each size, all that differs.
    """
    found, bad = find(experiment), {}
    for spec in specs:
        own = config.with_overrides(experiment, spec.overrides)
        key = from_config.network_config(own, spec.width, spec.depth)
        if key not in bad:
            bad[key] = f"{spec.width} x {spec.depth}", _fit(found, own, spec).problems
    lines = [
        f"\n  {name}: {line}" for name, problems in bad.values() for line in problems
    ]
    if lines:
        raise config.ConfigError(
            f"config.train.init_from = {experiment.train.init_from!r} does not fit the "
            "network that is trained; name what may differ in "
            f"config.train.init_exceptions:{''.join(lines)}"
        )


def load(
    own: config.Experiment,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
    fresh: Any,
    words: vocabulary.Vocabulary | None = None,
) -> Any:
    """The parameters that a run starts from, sharded as in training.

    Args:
      own: the experiment of the run.
      fresh: newly initialised parameters.
      words: whose ids the run reads; None: it reads features.

    Raises:
      ConfigError: the weights are gone, have changed since the plan, or do not fit.
    """
    cfg = own.train
    if not is_there(own):
        raise config.ConfigError(
            f"config.train.init_from = {cfg.init_from!r}: no such folder or file, and "
            f"{spec.run_id} has no checkpoint to continue from"
        )
    check(own, [dataclasses.replace(spec, overrides={})])
    found = find(own)
    init_record.with_checksum(own, found.checksum, cfg.init_from)
    _say_what_differs(spec, found, own)
    fit = _fit(found, own, spec)
    if found.words is not None and fit.treated.get(WORDS) != "new":
        try:
            there = vocabulary.Vocabulary(found.words)
            vocabulary.refuse_others(there, words, f"{cfg.init_from!r}")
        except config.ConfigError as e:
            raise config.ConfigError(
                f"config.train.init_from: {e}; to learn them anew, add "
                f"'{WORDS}=new' to config.train.init_exceptions"
            ) from e
    return transfer.transferred(fit, found.load(device_mesh), fresh)


def _fit(
    found: InitialWeights, own: config.Experiment, spec: records.RunSpec
) -> transfer.Fit:
    exceptions = [init_from.exception(given) for given in own.train.init_exceptions]
    network = from_config.network_config(own, spec.width, spec.depth)
    theirs, ours = map(from_config.parameter_shapes, (found.network, network))
    return transfer.fit(found.network, network, theirs, ours, exceptions, found.unsaid)


def _say_what_differs(
    spec: records.RunSpec, found: InitialWeights, own: config.Experiment
) -> None:
    """Says which weights they are, and how their training differs.

    Such a difference may be intended, so it is no error.
    """
    if found.part:
        progress.say(f"{spec.run_id} starts from {found.part}")
    here = _facts(exports.weights_identity(own))
    common = {name: here[name] for name in found.facts if name in here}
    other = encoded.differences(found.facts, common)
    if found.place is not None:
        other += scheduler_config.differences(found.place, own)
    if other:
        progress.say(f"{spec.run_id} starts from weights of {'; '.join(other)}")
