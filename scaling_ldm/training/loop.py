"""The training loop of one run.

The process may be killed at any moment. The next call continues from the last complete
checkpoint and reaches the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, data, records
from scaling_ldm.records.errors import CheckpointError, NonFiniteLoss, Preempted
from scaling_ldm.training import (
    checkpoint,
    costs,
    goodput,
    held_out,
    marks,
    measuring,
    mesh,
    optimizer,
    progress,
    signals,
    train_step,
)
from scaling_ldm.training.run_files import RunFiles


def checkpoint_steps(experiment: config.Experiment, spec: records.RunSpec) -> set[int]:
    """The steps of a run that are nearest to the marks of train.checkpoint_flops.

    And those of a trajectory's budgets. Their checkpoints are never removed. Marks
    beyond the end of the run have no step.
    """
    steps = {round(f / spec.flops_per_step) for f in experiment.train.checkpoint_flops}
    if spec.smaller_budgets:
        steps |= {point.steps for point in spec.points()}
    return {step for step in steps if 1 <= step <= spec.steps}


def _check_start(saved: checkpoint.Checkpoints, files: RunFiles) -> None:
    """Refuses to start from step 0 if there are checkpoints and all are damaged."""
    if mesh.any_process(bool(found := saved.set_aside())):
        names = ", ".join(path.name for path in found)
        raise CheckpointError(
            f"no checkpoint in {files.checkpoints} can be read; set aside as damaged: "
            f"{names}. Put copies back under their steps; or remove {files.folder}, "
            "and the same command trains this run from step 0"
        )


class TrainingRun:
    """One run of a plan on a mesh.

    Args:
      experiment: with the run's overrides.
      files: where the run's checkpoints and metrics are.
      sweep: shows the progress of the run.
      stop: is asked before every dispatch whether to stop.
      initial: random parameters -> those that training starts from; None: the random
        ones. It is called if there is no checkpoint to continue from.

    Attributes:
      compiled: the functions of the run's size.
      names: the arrays of a batch that the network reads.
      losses: name of the weights -> the held-out loss at the end; empty before.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        spec: records.RunSpec,
        files: RunFiles,
        device_mesh: jax.sharding.Mesh,
        sweep: progress.SweepProgress,
        stop: signals.StopSignal,
        initial: Callable[[Any], Any] | None = None,
    ) -> None:
        self._experiment, self.spec, self._files = experiment, spec, files
        self._mesh, self._sweep, self._stop = device_mesh, sweep, stop
        self._initial = initial
        self._costs = costs.RunCosts(experiment, spec, device_mesh)
        self.compiled = train_step.compile_functions(
            train_step.compiled_part(experiment), spec.width, spec.depth, device_mesh
        )
        self.names = ("x", *self.compiled.objective.conditioning)
        per_run = min(experiment.train.checkpoints_per_run, spec.steps)
        spaced = {round(spec.steps * (i + 1) / per_run) for i in range(per_run)}
        self._always_kept = checkpoint_steps(experiment, spec)
        self._save_steps = sorted((spaced | self._always_kept) - {0})
        self._marks = marks.marks_of(experiment, spec).steps
        self.losses: dict[str, float] = {}
        self._held: contextlib.ExitStack | None = None  # before the first step

    def train(
        self,
        source: data.Source,
        validation_batches: Sequence[held_out.HeldOutBatch],
    ) -> records.TrainRecord:
        """Continues from the last complete checkpoint, or starts; returns the record.

        Raises:
          Preempted: a stop was asked for; the state is saved.
          CheckpointError: a checkpoint cannot be written, or there are some and none
            can be read.
        """
        spec, cfg = self.spec, self._experiment.train
        saved = checkpoint.Checkpoints(
            self._files.checkpoints,
            spec,
            cfg.keep_checkpoints,
            progress.say,
            always=self._always_kept,
            marks=self._save_steps,
        )
        batches = data.batches(
            source,
            batch_size=spec.batch_size,
            rows=mesh.rows_of_process(self._mesh, spec.batch_size),
            prefetch=self._experiment.data.prefetch_batches,
        )
        with goodput.part("UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"):
            restored = saved.restore(self.compiled.abstract_state)
        if restored is None:
            _check_start(saved, self._files)
            step, before, restarts = 0, 0.0, 0
            with goodput.part("TRAINING_PREP"):
                state = self._first_state()
        else:
            step, state = restored.step, restored.state
            before = restored.progress.seconds
            restarts = restored.progress.restarts + 1
            batches.set_state(restored.progress.data)
            self._sweep.skip(step)
            progress.say(f"{spec.run_id} continues from step {step} of {spec.steps}")
        if mesh.is_primary():
            shown = progress.parameter_table(self.compiled.abstract_state.params)
            records.write_text(self._files.parameters, shown + "\n")
        clock = progress.RunClock(before)
        files = self._files if mesh.is_primary() else None
        log = progress.MetricLog(files, step, cfg.tensorboard, cfg.log_every_steps)
        table = measuring.RunTable(
            self._experiment,
            spec,
            files,
            self.compiled,
            validation_batches,
            step,
            self._marks,
        )
        goodput.starts_at(step)  # the log has no later steps any more
        uncond = {n: value for n, value in source.uncond.items() if n in self.names}
        with contextlib.ExitStack() as held:
            held.enter_context(contextlib.closing(saved))
            held.enter_context(contextlib.closing(log))
            self._held = held
            try:
                with goodput.part(goodput.HOST):
                    state = self._steps(
                        state, step, batches, uncond, saved, clock, log, table, restarts
                    )
                with goodput.part("UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"):
                    saved.wait()
            except NonFiniteLoss as e:
                progress.say(f"{spec.run_id} stopped: {e}")
                return self._costs.record(clock, restarts, e.step, failure=str(e))
        with goodput.part("EVAL_STEP"):
            self.losses = table.measure(spec.steps, state)
        if len(state.averages) > 1:
            said = ", ".join(f"{name} {loss:.6g}" for name, loss in self.losses.items())
            progress.say(f"{spec.run_id} validation loss: {said}")
        last = self.losses | {"smoothed training loss": float(state.smoothed_loss)}
        failure = "" if all(map(math.isfinite, last.values())) else f"{last}"
        return self._costs.record(clock, restarts, spec.steps, failure=failure)

    def _first_state(self) -> train_step.TrainState:
        """The state before the first step."""
        key = self._key("init")
        if self._initial is None:
            return self.compiled.init(key)
        # Only the parameters are kept in memory while weights are read.
        params = self._initial(self.compiled.init(key).params)
        return self.compiled.start(key, params)

    def _steps(
        self,
        state: train_step.TrainState,
        step: int,
        batches: data.Batches,
        uncond: dict[str, Any],
        saved: checkpoint.Checkpoints,
        clock: progress.RunClock,
        log: progress.MetricLog,
        table: measuring.RunTable,
        restarts: int,
    ) -> train_step.TrainState:
        """Trains from `step` to the end of the run; returns the last state.

        The metrics of a dispatch are read after the next one has started. So the device
        never waits for the host. A state is measured or saved only after the metrics of
        its last step have been read, and measured before it is saved. A save that a
        signal or the clock asks for comes at the end of the next dispatch, on every
        process.
        """
        spec, cfg = self.spec, self._experiment.train
        uncond = mesh.put(self._mesh, uncond, mesh.REPLICATED)
        numbers = optimizer.schedule_numbers(
            self._experiment.optimizer,
            spec.learning_rate,
            spec.warmup_steps,
            spec.steps,
        )
        hyper = mesh.put(self._mesh, numbers, mesh.REPLICATED)
        hyper |= {"key": self._key("steps")}
        flags = [mesh.request_flags(self._mesh, r) for r in range(signals.STOP + 1)]
        save_clock = progress.SaveClock(cfg.checkpoint_minutes)
        counts = [np.int32(n + 1) for n in range(cfg.steps_per_dispatch)]
        counts = mesh.put(self._mesh, counts, mesh.REPLICATED)
        profile = progress.StepTrace(self._files.profile, cfg.profile_steps, step)
        unread: tuple[int, int, Any] | None = None
        pauses = sorted({*self._save_steps, *self._marks})
        self._stop.save_asked = False  # earlier there was nothing to save
        while step < spec.steps:
            pause = next(s for s in pauses if s > step)
            # The chunk depends on the step alone, so a restart repeats it exactly.
            chunk = min(cfg.steps_per_dispatch, pause - step)
            with goodput.loading(unread and unread[2]["loss"]):
                batch = self._next_batch(batches, chunk)
            given = counts[chunk - 1], uncond, hyper, flags[self._request(save_clock)]
            with goodput.part("STEP"):
                state, metrics = self._dispatch(state, batch, *given)
            step += chunk
            request = signals.GO_ON
            if unread is not None:
                request = self._read_metrics(*unread, clock, log)
            unread = (step, chunk, metrics)
            profile.step(step)
            if step == pause or request:
                request = max(request, self._read_metrics(*unread, clock, log))
                unread = None
                if step in self._marks and step < spec.steps:
                    with goodput.part("EVAL_STEP"):
                        table.measure(step, state)
            if step in self._save_steps or request:
                log.flush()
                position = checkpoint.ResumeState(
                    data=batches.get_state(), seconds=clock.seconds(), restarts=restarts
                )
                said = request >= signals.SAVE_AND_SAY and step < spec.steps
                with goodput.part("UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"):
                    saved.save(step, state, position)
                    if said:
                        saved.wait()
                save_clock.restart()
                if said:
                    line = f"{spec.run_id} is saved at step {step}"
                    if request == signals.STOP:
                        raise Preempted(line)
                    progress.say(f"{line} and goes on")
            if unread is None:
                clock.resume()
        profile.close()
        return state

    def _dispatch(
        self, state: train_step.TrainState, batch: Any, count: Any, *given: Any
    ) -> tuple[train_step.TrainState, Any]:
        """Starts the next `count` steps; returns their state and metrics."""
        if self._experiment.train.steps_per_dispatch == 1:
            return self.compiled.step(state, batch, *given)
        return self.compiled.steps(state, batch, count, *given)

    def _request(self, save_clock: progress.SaveClock) -> int:
        """What this process asks of the next dispatch; the clock is process 0's."""
        if mesh.is_primary() and save_clock.due():
            save_clock.restart()  # so it asks only once
            return max(signals.SAVE, self._stop.request())
        return self._stop.request()

    def _read_metrics(
        self,
        step: int,
        chunk: int,
        metrics: Any,
        clock: progress.RunClock,
        log: progress.MetricLog,
    ) -> int:
        """Reads the metrics of a dispatch that ended at `step`, and reports them.

        Returns:
          The most urgent request of all processes.

        Raises:
          NonFiniteLoss: a loss or a gradient is not finite.
        """
        spec, cfg = self.spec, self._experiment.train
        with goodput.part("STEP"):
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
        if self._held:  # from now on a stop waits until these steps are saved
            self._held.enter_context(
                self._stop.polled(f"a checkpoint of {spec.run_id}")
            )
            self._held = None
        goodput.steps_done(step)
        self._sweep.spend(chunk, clock.lap(chunk))
        speed = clock.steps_per_second() * spec.flops_per_step
        self._sweep.show(step, spec.steps, float(losses[-1]), speed)
        every = cfg.log_every_steps
        if step // every > (step - chunk) // every or step == spec.steps:
            last = {
                name: float(np.atleast_1d(metrics[name])[chunk - 1])
                for name in self.compiled.metrics
            }
            spent = self._costs.so_far(step, speed, clock.seconds())
            log.write(step, last | spent)
        return int(metrics["request"])

    def _next_batch(self, batches: data.Batches, chunk: int) -> dict[str, jax.Array]:
        """The next batch on the devices; stacked if a dispatch takes several steps."""
        most = self._experiment.train.steps_per_dispatch
        rows = next(batches) if most == 1 else data.stack(batches, chunk, most)
        spec = mesh.BATCH if most == 1 else mesh.STACKED_BATCHES
        return mesh.put(self._mesh, {name: rows[name] for name in self.names}, spec)

    def _key(self, use: str) -> jax.Array:
        key = jax.random.fold_in(
            jax.random.key(self.spec.seed), ("init", "steps").index(use)
        )
        return jax.device_put(key, mesh.named_sharding(self._mesh, mesh.REPLICATED))
