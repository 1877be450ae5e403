"""The train stage: trains every run of the plan that has no record yet."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from scaling_ldm import config, data, records
from scaling_ldm.config import axes, run_names
from scaling_ldm.data import label_names, vocabulary
from scaling_ldm.records.errors import Held
from scaling_ldm.training import (
    capacity,
    goodput,
    held_out,
    loop,
    marks,
    members,
    mesh,
    objective,
    objective_checks,
    packing,
    progress,
    run_files,
    signals,
)
from scaling_ldm.workdir import initial_weights, lock, missing, plan_table, runs


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    numbered: Sequence[tuple[int, records.RunSpec]],
    planned: int,
    share: bool = False,
) -> list[records.TrainRecord]:
    """Trains the given runs, skipping those that have a record.

    Args:
      numbered: (number in the plan, spec) of the runs to train.
      planned: how many runs the whole plan has.
      share: whether other commands may have some of these runs: each is trained by the
        command that comes first, and left out by the others. In a job of several
        processes it has no effect.

    Returns:
      The records of `numbered`, old and new. A run with a non-finite loss has one too.

    Raises:
      Preempted: a signal to stop arrived; the state is saved, and the same command
        continues.
      Held: another process trains one of the runs that have no record.
      ConfigError: batch sizes and devices do not fit.
      CheckpointError: a checkpoint cannot be written.
    """
    share = share and jax.process_count() == 1
    with _locked(workdir, [] if share else missing.rows(workdir, numbered)):
        done = _run(experiment, workdir, numbered, planned, share)
    failed = [r for r in done if r.status != "finished"]
    finished = len(done) - len(failed)
    progress.say(f"trained: {finished} of {planned} runs finished")
    for r in failed:
        progress.say(f"  {r.run_id}: {r.status} ({r.detail})")
    return done


def _locked(
    workdir: pathlib.Path, rows: Sequence[tuple[int, records.RunSpec]]
) -> contextlib.AbstractContextManager[None]:
    """Holds the locks of runs within a block (Held: another process trains one)."""
    return lock.holding(
        (runs.run_files(workdir, spec.run_id).folder / lock.NAME for _, spec in rows),
        primary=mesh.is_primary(),
        any_process=mesh.any_process,
    )


def _run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    numbered: Sequence[tuple[int, records.RunSpec]],
    planned: int,
    share: bool,
) -> list[records.TrainRecord]:
    """See `run`; the runs without a record are locked, or are when their turn comes."""
    done = _records(workdir, numbered)
    left = [(k, spec) for k, spec in numbered if spec.run_id not in done]
    if not left:
        return [done[spec.run_id] for _, spec in numbered]
    together, device_mesh = _mesh(experiment, left)
    inputs = _Inputs(workdir, device_mesh)
    for _, spec in left:  # refuse what does not fit before anything is trained
        inputs.check(config.with_overrides(experiment, spec.overrides), spec)
    if line := marks.line(
        [
            marks.marks_of(config.with_overrides(experiment, spec.overrides), spec)
            for _, spec in left
        ]
    ):
        progress.say(line)
    specs = [spec for _, spec in left]
    pictures = data.training_pictures(experiment, workdir)
    for line in plan_table.repeated(experiment, specs, pictures):
        progress.say(f"caution: {line}")
    if line := packing.line(together, mesh.runs_of(device_mesh)):
        progress.say(line)
    sweep = progress.SweepProgress(
        planned,
        [
            progress.RemainingRun(
                size=(pack[0][1].width, pack[0][1].depth),
                steps=max(spec.steps for _, spec in pack),
                flops_per_step=pack[0][1].flops_per_step,
            )
            for pack in together
        ],
        experiment.train.show_every_seconds,
    )
    with jax.set_mesh(device_mesh):
        for pack in together:
            sweep.begin([number for number, _ in pack], _title(pack))
            try:
                with _locked(workdir, pack if share else []):
                    # Another command may have trained some of them meanwhile.
                    specs = [spec for _, spec in missing.rows(workdir, pack)]
                    trained = _trained(inputs, experiment, specs, sweep)
            except Held:
                if not share:
                    raise
                trained = []
            sweep.end(begun=bool(trained))
            for member in trained:
                assert (record := member.record) is not None
                done[record.run_id] = record
                if record.status == "finished":
                    loss = member.losses[member.experiment.optimizer.averages[0]]
                    sweep.result(loss, record.run_id if len(pack) > 1 else "")
    return [done[spec.run_id] for _, spec in numbered if spec.run_id in done]


def _title(pack: Sequence[tuple[int, records.RunSpec]]) -> str:
    """The budget, the size and the overrides of a run; what they share in a pack."""
    specs = [spec for _, spec in pack]
    budgets = sorted({spec.budget_flops for spec in specs})
    said = "-".join(f"{budget:.2g}" for budget in budgets[:: len(budgets) - 1 or 1])
    shared = [
        run_names.value_text(value)
        for name, value in specs[0].overrides.items()
        if all(spec.overrides[name] == value for spec in specs)
    ]
    return "  ".join((f"{said} FLOPs", f"{specs[0].width} x {specs[0].depth}", *shared))


def _trained(
    inputs: _Inputs,
    experiment: config.Experiment,
    specs: Sequence[records.RunSpec],
    sweep: progress.SweepProgress,
) -> list[members.Member]:
    """Trains runs side by side, or one alone or none, and writes their records."""
    if not specs:
        return []
    files = {s.run_id: runs.run_files(inputs.workdir, s.run_id) for s in specs}
    writes = {name: f if mesh.is_primary() else None for name, f in files.items()}
    device_mesh, stop, first = inputs.mesh, signals.current(), specs[0].run_id
    devices = mesh.devices_of_run(device_mesh)
    with goodput.attempt(first, writes[first], devices) as ledger:
        for spec in specs[1:]:
            ledger.add(spec.run_id, writes[spec.run_id])
        with goodput.part("TRAINING_PREP"):
            found = []
            for spec in specs:
                own = config.with_overrides(experiment, spec.overrides)
                initial = inputs.initial(own, spec)
                found.append(members.Member(own, spec, files[spec.run_id], initial))
            own = found[0].experiment
            training = loop.TrainingRun(found, device_mesh, sweep, stop)
            source, held_out_source = inputs.sources(own)
            for spec in specs:
                _write_names(files[spec.run_id], spec, training.names, source)
            batches = inputs.validation(own, held_out_source, training.names)

        def ended(member: members.Member) -> None:
            record = member.record
            assert record is not None
            if mesh.is_primary():
                runs.write_record(inputs.workdir, record)
            mesh.barrier(f"record-{record.run_id}")
            ledger.close(record.run_id, record.status)

        training.train(source, batches, ended)
    return found


def _write_names(
    files: run_files.RunFiles,
    spec: records.RunSpec,
    names: Sequence[str],
    source: data.Source,
) -> None:
    """Writes the words and the names of labels that a run reads, if it reads some."""
    read = vocabulary.read_by(names, source)
    if mesh.is_primary() and read and not files.vocabulary.exists():
        vocabulary.write(files.vocabulary, read, spec.recipe_hash)
    named = label_names.read_by(names, source)
    if mesh.is_primary() and named and not files.label_names.exists():
        label_names.write(files.label_names, named, spec.recipe_hash)


def _mesh(
    experiment: config.Experiment, rows: packing.Rows
) -> tuple[list[packing.Rows], jax.sharding.Mesh]:
    """The packs of runs and their mesh; batch sizes must fit it (ConfigError)."""
    together, places = packing.choose(experiment, rows)
    sizes = {spec.batch_size: spec.run_id for _, spec in rows}
    return together, mesh.build(
        experiment.mesh,
        {
            "config.train.batch_size" + f" of {run_id}" * (len(sizes) > 1): size
            for size, run_id in sizes.items()
        }
        | {"config.validation.batch_size": experiment.validation.batch_size}
        | {"config.train.microbatch": experiment.train.microbatch},
        runs=places,
    )


def check_rows(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
    stages: Collection[str],
) -> None:
    """Refuses, before anything is encoded, rows that these devices cannot train.

    Args:
      specs: the rows; those that have a record are not trained.
      stages: those that will run.

    Raises:
      ConfigError: the mesh or a batch size does not fit the devices, or the memory of
        a host or device is too small.
    """
    left = [s for s in specs if runs.read_record(workdir, s.run_id) is None]
    if left:
        _, built = _mesh(experiment, [*enumerate(left)])
        capacity.check(experiment, left, stages, built.shape["fsdp"])


class _Inputs:
    """The sources and validation sets of runs; runs that read the same share them."""

    def __init__(self, workdir: pathlib.Path, device_mesh: jax.sharding.Mesh) -> None:
        self.workdir, self.mesh = workdir, device_mesh
        self._sources: dict[Any, tuple[data.Source, data.Source]] = {}
        self._held_out: dict[Any, list[held_out.HeldOutBatch]] = {}
        self._fit: set[Any] = set()  # sources that have been checked

    def sources(self, own: config.Experiment) -> tuple[data.Source, data.Source]:
        """The training source and the validation source of a run's experiment."""
        key = own.model.classes, own.model.text_width
        if key not in self._sources:
            found = data.sources(own, self.workdir)
            _check_data_identity(self.workdir, found[0])
            self._sources[key] = found
        return self._sources[key]

    def initial(
        self, own: config.Experiment, spec: records.RunSpec
    ) -> Callable[[Any], Any] | None:
        """Random parameters -> those that a run starts from; None: the random ones."""
        if not own.train.init_from:
            return None
        known = vocabulary.of(self.sources(own)[0])
        return functools.partial(
            initial_weights.load, own, spec, self.mesh, words=known
        )

    def check(self, own: config.Experiment, spec: records.RunSpec) -> None:
        """Refuses a run whose sources lack what its objective reads, or other words."""
        learnt = objective.build(own, spec.width, spec.depth, unroll=False)
        files = runs.run_files(self.workdir, spec.run_id)
        vocabulary.refuse_others(
            vocabulary.read(files.vocabulary, spec.recipe_hash),
            vocabulary.read_by(learnt.conditioning, self.sources(own)[0]),
            f"{spec.run_id} in {self.workdir}",
        )
        label_names.refuse_others(
            label_names.read(files.label_names, spec.recipe_hash),
            label_names.read_by(learnt.conditioning, self.sources(own)[0]),
            f"{spec.run_id} in {self.workdir}",
        )
        for source in self.sources(own):
            key = id(source), learnt.conditioning
            if key not in self._fit:
                objective_checks.check_source(own, learnt, source)
                self._fit.add(key)

    def validation(
        self, own: config.Experiment, source: data.Source, names: Sequence[str]
    ) -> list[held_out.HeldOutBatch]:
        """The validation set of a run; the objective decides its times."""
        key = own.objective, tuple(names)
        if key not in self._held_out:
            self._held_out[key] = held_out.held_out_batches(
                own, self.mesh, source, names
            )
        return self._held_out[key]


def _records(
    workdir: pathlib.Path, numbered: Sequence[tuple[int, records.RunSpec]]
) -> dict[str, records.TrainRecord]:
    """The records that exist, by run_id; says how many, and which runs failed."""
    done: dict[str, records.TrainRecord] = {}
    for _, spec in numbered:
        record = runs.read_record_of(workdir, spec)
        if record is not None:
            done[spec.run_id] = record
    if done:
        progress.say(f"{len(done)} of {len(numbered)} runs are done")
    for record in done.values():
        if record.status != "finished":
            progress.say(
                f"{record.run_id} is skipped: {record.status}, {record.detail} "
                f"(remove runs/{record.run_id} to try it again)"
            )
    return done


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is planned, settings that are very slow on this device.

    On a CPU, a convolution's gradient in a loop would be some thirty times slower than
    outside of it: XLA's CPU compiler keeps layouts there for which it has no fast
    kernel (jax issue 12868).

    Raises:
      ConfigError: several steps in a dispatch, or several passes in a step, of a
        convolutional network on a CPU.
    """
    cfg = experiment.train
    loops = {"steps_per_dispatch": (cfg.steps_per_dispatch, 1)}
    loops["microbatch"] = (cfg.microbatch, 0)
    packed = experiment.mesh.runs > 1  # their steps are always in a loop
    for name in {one.model.architecture for one in axes.variants(experiment)}:
        slow = name in config.CONVOLUTIONAL and jax.default_backend() == "cpu"
        for field, (value, best) in loops.items():
            if value > best and slow:
                raise config.ConfigError(
                    f"config.train.{field} = {value}: on a CPU the gradient of "
                    f"{name}'s convolutions is some thirty times slower in a loop; set "
                    f"it to {best}"
                )
        if packed and name in config.CONVOLUTIONAL and jax.default_backend() == "cpu":
            raise config.ConfigError(
                f"config.mesh.runs = {experiment.mesh.runs}: runs side by side take "
                "their steps in a loop, and on a CPU the gradient of "
                f"{name}'s convolutions is some thirty times slower there; set it to 1"
            )


def _check_data_identity(workdir: pathlib.Path, source: object) -> None:
    """Ties a workdir to the records that its first run read, in data.json.

    Args:
      source: a `data.Source`. One without `identity` is described by the recipe.

    Raises:
      ConfigError: the first run read other records; a study has one set of records.
    """
    identity = getattr(source, "identity", None)
    if identity is None:
        return
    path, digest = workdir / "data.json", records.digest(identity)
    if not path.exists():
        if mesh.is_primary():
            records.write_json(path, {"digest": digest, "identity": identity})
    elif records.read_json(path, "digest")["digest"] != digest:
        raise config.ConfigError(
            f"the runs in {workdir} read other records than these (its data.json says "
            "which): use another --workdir"
        )
    mesh.barrier("data")
