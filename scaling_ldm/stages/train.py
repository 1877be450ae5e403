"""RunSpec -> TrainRecord for every run that has none yet."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import jax

from scaling_ldm import config, data, records
from scaling_ldm.training import held_out, loop, mesh, progress, signals
from scaling_ldm.workdir import lock, runs


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    numbered: Sequence[tuple[int, records.RunSpec]],
    planned: int,
) -> list[records.TrainRecord]:
    """Trains the given runs, skipping those that have a record.

    Args:
      numbered: (number in the plan, spec) of the runs to train.
      planned: how many runs the whole plan has.

    Returns:
      The records of `numbered`, old and new. A run with a non-finite loss has one too.

    Raises:
      Preempted: SIGTERM arrived; the state is saved, and the same command continues.
      Held: another process trains one of the runs that have no record.
      ConfigError: batch sizes and devices do not fit.
      CheckpointError: a checkpoint cannot be written.
    """
    with lock.holding(
        (
            runs.run_files(workdir, spec.run_id).folder / lock.NAME
            for _, spec in numbered
            if runs.read_record(workdir, spec.run_id) is None
        ),
        primary=mesh.is_primary(),
        any_process=mesh.any_process,
    ):
        return _run(experiment, workdir, numbered, planned)


def _run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    numbered: Sequence[tuple[int, records.RunSpec]],
    planned: int,
) -> list[records.TrainRecord]:
    """See `run`; the runs without a record are locked."""
    done = _records(workdir, numbered)
    missing = [(k, spec) for k, spec in numbered if spec.run_id not in done]
    if not missing:
        return [done[spec.run_id] for _, spec in numbered]
    device_mesh = mesh.build(
        experiment.mesh,
        {
            "config.train.batch_size": experiment.train.batch_size,
            "config.validation.batch_size": experiment.validation.batch_size,
        },
    )
    train_source, validation_source = data.sources(experiment, workdir)
    _check_data_identity(workdir, train_source)
    sweep = progress.SweepProgress(
        planned,
        [
            progress.RemainingRun(
                size=(spec.width, spec.depth),
                steps=spec.steps,
                flops_per_step=spec.flops_per_step,
            )
            for _, spec in missing
        ],
        experiment.train.show_every_seconds,
    )
    validation_batches: list[held_out.HeldOutBatch] = []
    with jax.set_mesh(device_mesh), signals.StopSignal(experiment.train) as stop:
        for number, spec in missing:
            sweep.begin(
                number,
                f"{spec.budget_flops:.2g} FLOPs  {spec.width} x {spec.depth}",
            )
            files = runs.run_files(workdir, spec.run_id)
            training = loop.TrainingRun(
                experiment, spec, files, device_mesh, sweep, stop
            )
            if not validation_batches:
                validation_batches = held_out.held_out_batches(
                    experiment, device_mesh, validation_source, training.names
                )
            record = training.train(train_source, validation_batches)
            if mesh.is_primary():
                runs.write_record(workdir, record)
            mesh.barrier(f"record-{spec.run_id}")
            done[spec.run_id] = record
            sweep.end()
            if record.status == "finished":
                sweep.result(record.validation_loss_ema)
    return [done[spec.run_id] for _, spec in numbered]


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
    """Refuses, before anything is planned, what these devices cannot train well.

    On a CPU, a convolution's gradient in a loop would be some thirty times slower than
    outside of it: XLA's CPU compiler keeps layouts there for which it has no fast
    kernel (jax issue 12868).

    Raises:
      ConfigError: several steps in a dispatch of a convolutional network on a CPU.
    """
    steps, name = experiment.train.steps_per_dispatch, experiment.model.architecture
    if steps > 1 and name in config.CONVOLUTIONAL and jax.default_backend() == "cpu":
        raise config.ConfigError(
            f"config.train.steps_per_dispatch = {steps}: on a CPU the gradient of "
            f"{name}'s convolutions is some thirty times slower in a loop; set it to 1"
        )


def _check_data_identity(workdir: pathlib.Path, source: object) -> None:
    """Ties a workdir to the records that its first run read, in data.json.

    Args:
      source: a `data.Source`. One without `identity` is described by the recipe.

    Raises:
      ConfigError: the first run read other records; one study has one set of them.
    """
    identity = getattr(source, "identity", None)
    if identity is None:
        return
    path, digest = workdir / "data.json", records.digest(identity)
    if not path.exists():
        if mesh.is_primary():
            content = {"digest": digest, "identity": identity}
            records.write_text(path, json.dumps(content, indent=1) + "\n")
    elif json.loads(path.read_text())["digest"] != digest:
        raise config.ConfigError(
            f"the runs in {workdir} read other records than these (its data.json says "
            "which): use another --workdir"
        )
    mesh.barrier("data")
