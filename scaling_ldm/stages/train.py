"""RunSpec -> TrainRecord: the one training loop; it can be killed at any moment."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm import data as data_lib
from scaling_ldm.flops import peaks
from scaling_ldm.records.errors import NonFiniteLoss, Preempted
from scaling_ldm.training import checkpoint, mesh, train_step
from scaling_ldm.training import held_out as held_out_lib
from scaling_ldm.training import progress as progress_lib


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    numbered: Sequence[tuple[int, records.RunSpec]],
    runs: int,
) -> list[records.TrainRecord]:
    """Trains the given runs, skipping those that have a record.

    Args:
      numbered: (number in the plan, spec) of the runs to train.
      runs: how many the whole plan has.

    Returns:
      The records of `numbered`, old and new. A run with a non-finite loss has one too.

    Raises:
      Preempted: SIGTERM arrived; the state is saved, the same command continues.
      ConfigError: batch sizes and devices do not fit.
      CheckpointError: a checkpoint cannot be written.
    """
    done = {spec.run_id: read_record(workdir, spec) for _, spec in numbered}
    missing = [(k, spec) for k, spec in numbered if done[spec.run_id] is None]
    if len(missing) < len(numbered):
        progress_lib.say(
            f"{len(numbered) - len(missing)} of {len(numbered)} runs are done"
        )
    for record in done.values():
        if record is not None and record.status != "finished":
            progress_lib.say(
                f"{record.run_id} is skipped: {record.status}, {record.detail} "
                f"(remove runs/{record.run_id} to try it again)"
            )
    if not missing:
        return list(done.values())
    device_mesh = mesh.build(
        experiment.mesh,
        {
            "config.train.batch_size": experiment.train.batch_size,
            "config.validation.batch_size": experiment.validation.batch_size,
        },
    )
    train_data, validation_data = data_lib.sources(experiment, workdir)
    _same_data(workdir, train_data)
    sweep = progress_lib.SweepProgress(
        runs,
        [
            progress_lib.RemainingRun(
                size=(spec.width, spec.depth),
                steps=spec.steps,
                flops_per_step=spec.flops_per_step,
            )
            for _, spec in missing
        ],
        experiment.train.show_every_seconds,
    )
    held_out: list[held_out_lib.HeldOutBatch] = []
    with jax.set_mesh(device_mesh), mesh.StopSignal() as stop:
        for number, spec in missing:
            sweep.begin(
                number,
                f"{spec.budget_flops:.2g} FLOPs  {spec.width} x {spec.depth}",
            )
            job = _Job(experiment, workdir, spec, device_mesh, sweep, stop)
            if not held_out:
                held_out = held_out_lib.held_out_batches(
                    experiment, device_mesh, validation_data, job.names
                )
            done[spec.run_id] = record = job.train(train_data, held_out)
            sweep.end()
            if record.status == "finished":
                sweep.result(record.validation_loss_ema)
    return list(done.values())


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is planned, what these devices cannot train well.

    A loop would be some thirty times slower than its body: there, XLA's CPU compiler
    keeps layouts of a convolution's gradient for which it has no fast kernel (jax issue
    12868).
    """
    steps, name = experiment.train.steps_per_dispatch, experiment.model.architecture
    if steps > 1 and name in config.CONVOLUTIONAL and jax.default_backend() == "cpu":
        raise config.ConfigError(
            f"config.train.steps_per_dispatch = {steps}: on a CPU the gradient of "
            f"{name}'s convolutions is some thirty times slower in a loop; set it to 1"
        )


def _same_data(workdir: pathlib.Path, source: data_lib.Source) -> None:
    """Ties a workdir to the records that its first run read.

    Raises:
      ConfigError: its runs read other records; two kinds cannot be one study.
    """
    identity = getattr(source, "identity", None)
    if identity is None:
        return
    path, digest = workdir / "data.json", records.digest(identity)
    if not path.exists():
        if mesh.is_primary():
            held = {"digest": digest, "identity": identity}
            records.write_text(path, json.dumps(held, indent=1) + "\n")
    elif json.loads(path.read_text())["digest"] != digest:
        raise config.ConfigError(
            f"the runs in {workdir} read other records than these (its data.json says "
            "which): use another --workdir"
        )
    mesh.barrier("data")


def kept_steps(experiment: config.Experiment, spec: records.RunSpec) -> set[int]:
    """The steps nearest to the marks of train.checkpoint_flops that a run reaches."""
    steps = {round(f / spec.flops_per_step) for f in experiment.train.checkpoint_flops}
    return {step for step in steps if 1 <= step <= spec.steps}


def folder_of(workdir: pathlib.Path, spec: records.RunSpec) -> pathlib.Path:
    """Where a run keeps its checkpoints, metrics and record."""
    return workdir / "runs" / spec.run_id


def read_record(
    workdir: pathlib.Path, spec: records.RunSpec
) -> records.TrainRecord | None:
    """The record of a finished run, or None.

    Raises:
      ConfigError: the record is of another recipe.
    """
    path = folder_of(workdir, spec) / "record.json"
    if not path.exists():
        return None
    record = records.loads(path.read_text())
    if (record.recipe_hash, record.steps_planned) != (spec.recipe_hash, spec.steps):
        raise config.ConfigError(
            f"{path} holds a run of another experiment (recipe {record.recipe_hash}, "
            f"{record.steps_planned} steps; wanted {spec.recipe_hash}, {spec.steps}): "
            "use another --workdir"
        )
    return record


class _Job:
    """One run: what stays the same while it trains."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        spec: records.RunSpec,
        device_mesh: jax.sharding.Mesh,
        sweep: progress_lib.SweepProgress,
        stop: mesh.StopSignal,
    ) -> None:
        self.experiment, self.spec, self.mesh = experiment, spec, device_mesh
        self.sweep, self.stop = sweep, stop
        self.folder = folder_of(workdir, spec)
        self.program = train_step.compile_functions(
            experiment, spec.width, spec.depth, device_mesh
        )
        self.names = ("x", *self.program.functions.objective.conditioning)
        self.uncond: dict[str, np.ndarray] = {}
        per_run = experiment.train.checkpoints_per_run
        spaced = {round(spec.steps * (i + 1) / per_run) for i in range(per_run)}
        self.kept = kept_steps(experiment, spec)
        self.marks = sorted((spaced | self.kept) - {0})

    def train(
        self, train_data: data_lib.Source, held_out: Sequence[held_out_lib.HeldOutBatch]
    ) -> records.TrainRecord:
        """Continues from the last good checkpoint, or starts; returns the record."""
        spec = self.spec
        self.uncond = {
            name: value
            for name, value in train_data.uncond.items()
            if name in self.names
        }
        checkpoints = checkpoint.Checkpoints(
            self.folder / "checkpoints",
            spec,
            self.experiment.train.keep_checkpoints,
            progress_lib.say,
            self.kept,
        )
        batches = data_lib.batches(
            train_data,
            batch_size=spec.batch_size,
            rows=mesh.rows_of_process(self.mesh, spec.batch_size),
            prefetch=self.experiment.data.prefetch_batches,
        )
        restored = checkpoints.restore(self.program.state)
        if restored is None:
            step, before, restarts = 0, 0.0, 0
            state = self.program.init(self._key("init"))
        else:
            step, state = restored.step, restored.state
            before = restored.progress.seconds
            restarts = restored.progress.restarts + 1
            batches.set_state(restored.progress.data)
            self.sweep.skip(step)
            progress_lib.say(
                f"{spec.run_id} continues from step {step} of {spec.steps}"
            )
        if mesh.is_primary():
            overview = progress_lib.parameter_table(self.program.state.params)
            records.write_text(self.folder / "parameters.txt", overview + "\n")
        clock = progress_lib.RunClock(before)
        log = progress_lib.MetricLog(
            self.folder if mesh.is_primary() else None,
            step,
            self.experiment.train.tensorboard,
        )
        with contextlib.closing(checkpoints), contextlib.closing(log):
            try:
                state = self._loop(
                    state, step, batches, checkpoints, clock, log, restarts
                )
                checkpoints.wait()
            except NonFiniteLoss as e:
                progress_lib.say(f"{spec.run_id} stopped: {e}")
                return self._record(clock, restarts, e.step, failure=str(e))
        losses = {
            "validation_loss": held_out_lib.validation_loss(
                self.program, state.params, held_out
            ),
            "validation_loss_ema": held_out_lib.validation_loss(
                self.program, state.ema, held_out
            ),
            "train_loss_smoothed": float(state.smoothed_loss),
        }
        failure = "" if all(map(math.isfinite, losses.values())) else f"{losses}"
        return self._record(clock, restarts, spec.steps, failure=failure, **losses)

    def _loop(
        self,
        state: train_step.TrainState,
        step: int,
        batches: data_lib.Batches,
        checkpoints: checkpoint.Checkpoints,
        clock: progress_lib.RunClock,
        log: progress_lib.MetricLog,
        restarts: int,
    ) -> train_step.TrainState:
        """Steps until the run is over.

        Metrics of a dispatch are looked at after the next one is under way, so the
        device never waits for the host; a state is saved only once the metrics of its
        last step have been looked at.
        """
        spec, cfg = self.spec, self.experiment.train
        uncond = mesh.put(self.mesh, self.uncond, mesh.REPLICATED)
        hyper = mesh.put(
            self.mesh,
            {
                "peak": np.float32(spec.learning_rate),
                "warmup": np.float32(spec.warmup_steps),
            },
            mesh.REPLICATED,
        ) | {"key": self._key("steps")}
        flags = [mesh.stop_flags(self.mesh, value) for value in (0, 1)]
        counts = [np.int32(n + 1) for n in range(cfg.steps_per_dispatch)]
        counts = mesh.put(self.mesh, counts, mesh.REPLICATED)
        profile = progress_lib.Profile(self.folder / "profile", cfg.profile_steps, step)
        unseen: tuple[int, int, Any] | None = None
        while step < spec.steps:
            mark = next(m for m in self.marks if m > step)
            # The chunk depends on the step alone, so a restart repeats it exactly.
            chunk = min(cfg.steps_per_dispatch, mark - step)
            batch, stop = self._batch(batches, chunk), flags[self.stop.asked]
            if cfg.steps_per_dispatch == 1:
                state, metrics = self.program.step(state, batch, uncond, hyper, stop)
            else:
                state, metrics = self.program.steps(
                    state, batch, counts[chunk - 1], uncond, hyper, stop
                )
            step += chunk
            stopping = unseen is not None and self._look(*unseen, clock, log)
            unseen = (step, chunk, metrics)
            profile.step(step)
            if step == mark or stopping:
                stopping |= self._look(*unseen, clock, log)
                unseen = None
                log.flush()
                progress = checkpoint.ResumeState(
                    data=batches.get_state(), seconds=clock.seconds(), restarts=restarts
                )
                checkpoints.save(step, state, progress)
                clock.resume()
                if stopping and step < spec.steps:
                    checkpoints.wait()
                    raise Preempted(f"{spec.run_id} is saved at step {step}")
        profile.close()
        return state

    def _look(
        self,
        step: int,
        chunk: int,
        metrics: Any,
        clock: progress_lib.RunClock,
        log: progress_lib.MetricLog,
    ) -> bool:
        """Accounts for a dispatch that ended at `step`; whether a stop was asked for.

        Raises:
          NonFiniteLoss: its loss or gradient is not finite.
        """
        spec, cfg = self.spec, self.experiment.train
        metrics = jax.device_get(metrics)
        losses = np.atleast_1d(metrics["loss"])[:chunk]
        norms = np.atleast_1d(metrics["gradient_norm"])[:chunk]
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFiniteLoss(
                step - chunk + bad + 1,
                f"loss {losses[bad]}, gradient norm {norms[bad]}",
            )
        self.sweep.spend(chunk, clock.lap(chunk))
        speed = clock.steps_per_second() * spec.flops_per_step
        self.sweep.show(step, spec.steps, float(losses[-1]), speed)
        every = cfg.log_every_steps
        if step // every > (step - chunk) // every or step == spec.steps:
            utilisation, _ = self._mfu(speed)
            log.write(
                step,
                {
                    "loss": float(losses[-1]),
                    "loss_smoothed": float(
                        np.atleast_1d(metrics["loss_smoothed"])[chunk - 1]
                    ),
                    "gradient_norm": float(norms[-1]),
                    "learning_rate": float(
                        np.atleast_1d(metrics["learning_rate"])[chunk - 1]
                    ),
                    "flops": step * spec.flops_per_step,
                    "hardware_flops": step * spec.hardware_flops_per_step,
                    "six_nd": self._six_nd(step),
                    "images": step * spec.batch_size,
                    "tokens": step * spec.tokens // spec.steps,
                    "flops_per_second": speed,
                    "mfu": utilisation,
                    "seconds": clock.seconds(),
                },
            )
        return bool(metrics["stop"])

    def _batch(self, batches: data_lib.Batches, chunk: int) -> Any:
        most = self.experiment.train.steps_per_dispatch
        rows = next(batches) if most == 1 else data_lib.stack(batches, chunk, most)
        spec = mesh.BATCH if most == 1 else mesh.STACKED_BATCHES
        return mesh.put(self.mesh, {name: rows[name] for name in self.names}, spec)

    def _key(self, use: str) -> jax.Array:
        key = jax.random.fold_in(
            jax.random.key(self.spec.seed), ("init", "steps").index(use)
        )
        return jax.device_put(key, mesh.named_sharding(self.mesh, mesh.REPLICATED))

    def _six_nd(self, steps: int) -> float:
        spec = self.spec
        return 6.0 * spec.params_without_embeddings * spec.tokens * steps / spec.steps

    def _mfu(self, flops_per_second: float) -> tuple[float | None, str]:
        device = self.mesh.devices.flat[0]
        return peaks.mfu(
            flops_per_second,
            device.device_kind,
            self.mesh.size,
            self.experiment.model.compute_dtype,
        )

    def _record(
        self,
        clock: progress_lib.RunClock,
        restarts: int,
        steps: int,
        *,
        failure: str,
        validation_loss: float = math.nan,
        validation_loss_ema: float = math.nan,
        train_loss_smoothed: float = math.nan,
    ) -> records.TrainRecord:
        """Writes the record of a run that ended after `steps` steps."""
        spec = self.spec
        speed = clock.steps_per_second() * spec.flops_per_step
        utilisation, reason = self._mfu(speed)
        record = records.TrainRecord(
            run_id=spec.run_id,
            study=spec.study,
            status="non_finite_loss" if failure else "finished",
            detail=failure,
            budget_flops=spec.budget_flops,
            flops=float(steps * spec.flops_per_step),
            hardware_flops=float(steps * spec.hardware_flops_per_step),
            six_nd=self._six_nd(steps),
            params=spec.params,
            params_without_embeddings=spec.params_without_embeddings,
            width=spec.width,
            depth=spec.depth,
            steps=steps,
            steps_planned=spec.steps,
            images=steps * spec.batch_size,
            tokens=steps * spec.tokens // spec.steps,
            validation_loss=validation_loss,
            validation_loss_ema=validation_loss_ema,
            train_loss_smoothed=train_loss_smoothed,
            seconds=clock.seconds(),
            device=self.mesh.devices.flat[0].device_kind,
            devices=self.mesh.size,
            flops_per_second=speed,
            mfu=utilisation,
            mfu_reason=reason,
            restarts=restarts,
            seed=spec.seed,
            learning_rate=spec.learning_rate,
            recipe_hash=spec.recipe_hash,
        )
        if mesh.is_primary():
            records.write_text(self.folder / "record.json", records.dumps(record))
        mesh.barrier(f"record-{spec.run_id}")
        return record
