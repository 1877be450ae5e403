"""What is a run's own while it trains, alone or beside others in a pack."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.records.errors import CheckpointError, NonFiniteLoss
from scaling_ldm.training import (
    branches,
    checkpoint,
    costs,
    goodput,
    marks,
    measuring,
    mesh,
    optimizer,
    progress,
    train_step,
)
from scaling_ldm.training.run_files import RunFiles


def checkpoint_steps(experiment: config.Experiment, spec: records.RunSpec) -> set[int]:
    """The steps of a run that are nearest to the marks of train.checkpoint_flops.

    And those of a trajectory's budgets, and where branches leave a trunk. Their
    checkpoints are never removed. Marks beyond the end of the run have no step.
    """
    steps = {round(f / spec.flops_per_step) for f in experiment.train.checkpoint_flops}
    steps |= set(spec.branch_steps)
    if spec.smaller_budgets:
        steps |= {point.steps for point in spec.points()}
    return {step for step in steps if 1 <= step <= spec.steps}


class Member:
    """One run: its files, its marks, its log and where it stands.

    Args:
      experiment: with the run's overrides.
      files: where the run's checkpoints and metrics are.
      initial: random parameters -> those that training starts from; None: the random
        ones. It is called if there is no checkpoint to continue from.

    Attributes:
      first: the step from which the run starts or continues.
      restored: what the checkpoint says that it continues from; None: there was none.
      losses: name of the weights -> the held-out loss at the end; empty before.
      failure: the loss that is not finite and ended the run; None: none did.
      record: of the run, once it is over.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        spec: records.RunSpec,
        files: RunFiles,
        initial: Callable[[Any], Any] | None = None,
    ) -> None:
        self.experiment, self.spec, self.files = experiment, spec, files
        self._initial = initial
        per_run = min(experiment.train.checkpoints_per_run, spec.steps)
        spaced = {round(spec.steps * (i + 1) / per_run) for i in range(per_run)}
        always_kept = checkpoint_steps(experiment, spec)
        self.save_steps = sorted((spaced | always_kept) - {0})
        self.marks = marks.marks_of(experiment, spec).steps
        self.first = 0
        self.restored: checkpoint.ResumeState | None = None
        self.losses: dict[str, float] = {}
        self.failure: NonFiniteLoss | None = None
        self.record: records.TrainRecord | None = None
        self._always_kept = always_kept

    def open(
        self,
        compiled: train_step.CompiledFunctions,
        device_mesh: jax.sharding.Mesh,
        held: contextlib.ExitStack,
    ) -> train_step.TrainState:
        """Opens the files until `held` ends; returns the state to go on from.

        Raises:
          CheckpointError: there are checkpoints, and none can be read.
        """
        spec, cfg = self.spec, self.experiment.train
        self._saved = checkpoint.Checkpoints(
            self.files.checkpoints,
            spec,
            cfg.keep_checkpoints,
            progress.say,
            always=self._always_kept,
            marks=self.save_steps,
        )
        held.enter_context(contextlib.closing(self._saved))
        with goodput.part("UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"):
            restored = self._saved.restore(compiled.abstract_state)
            if restored is None:
                self._check_start()
                restored = branches.start(spec, self.files, compiled.abstract_state)
        before, self.restarts, self._shared = 0.0, 0, 0
        if restored is None:
            with goodput.part("TRAINING_PREP"):
                state = self._first_state(compiled, device_mesh)
        else:
            self.first, state = restored.step, restored.state
            self.restored = restored.progress
            before = restored.progress.seconds
            self.restarts = restored.progress.restarts + 1
            self._shared = restored.progress.shared_steps
            progress.say(
                f"{spec.run_id} continues from step {self.first} of {spec.steps}"
            )
        if mesh.is_primary():
            shown = progress.parameter_table(compiled.abstract_state.params)
            records.write_text(self.files.parameters, shown + "\n")
        self._clock = progress.RunClock(before)
        self._costs = costs.RunCosts(self.experiment, spec, device_mesh)
        files = self.files if mesh.is_primary() else None
        # A branch that leaves its trunk has no lines of the steps before.
        every = cfg.log_every_steps if self.first > self._shared else 0
        self._log = progress.MetricLog(files, self.first, cfg.tensorboard, every)
        held.enter_context(contextlib.closing(self._log))
        own = [mark for mark in self.marks if mark > self._shared]
        self._table = measuring.RunTable(self.experiment, spec, files, self.first, own)
        return state

    def _check_start(self) -> None:
        """Refuses to start from step 0 if all checkpoints are damaged."""
        if mesh.any_process(bool(found := self._saved.set_aside())):
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"no checkpoint in {self.files.checkpoints} can be read; set aside as "
                f"damaged: {names}. Put copies back under their steps; or remove "
                f"{self.files.folder}, and the same command trains this run from step 0"
            )

    def _first_state(
        self, compiled: train_step.CompiledFunctions, device_mesh: jax.sharding.Mesh
    ) -> train_step.TrainState:
        """The state before the first step."""
        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        key = jax.device_put(self.key("init"), whole)
        if self._initial is None:
            return compiled.init(key)
        # Only the parameters are kept in memory while weights are read.
        params = self._initial(compiled.init(key).params)
        return compiled.start(key, params)

    def key(self, use: str) -> jax.Array:
        """The key of all that is drawn at the start, "init", or in "steps"."""
        return jax.random.fold_in(
            jax.random.key(self.spec.seed), ("init", "steps").index(use)
        )

    def numbers(self) -> dict[str, np.float32]:
        """The numbers of the run's schedule."""
        spec = self.spec
        return optimizer.schedule_numbers(
            self.experiment.optimizer, spec.learning_rate, spec.warmup_steps, spec.steps
        )

    @property
    def pauses(self) -> set[int]:
        """The steps at which a dispatch ends: where it is saved, measured or over."""
        return {self.first, *self.save_steps, *self.marks}

    def trains_at(self, step: int) -> bool:
        """Whether the run takes the step after this one."""
        return self.first <= step < self.spec.steps and self.failure is None

    def goes_on(self, step: int) -> bool:
        """Whether the run has steps to take after this one, now or later."""
        return step < self.spec.steps and self.failure is None

    def has_reached(self, step: int) -> bool:
        """Whether the run, in good health, took the step that ends here."""
        return self.first < step <= self.spec.steps and self.failure is None

    def read(
        self, step: int, chunk: int, metrics: Mapping[str, np.ndarray]
    ) -> tuple[float | None, float, float]:
        """Reads the metrics of a dispatch that ended at `step`, and logs them.

        Args:
          metrics: of the run, [steps] each.

        Returns:
          Seconds of the dispatch, None if that included compilation; the last loss; the
          speed in FLOPs a second.

        Raises:
          NonFiniteLoss: a loss or a gradient is not finite; it is `failure`, too.
        """
        spec, cfg = self.spec, self.experiment.train
        losses, norms = metrics["loss"][:chunk], metrics["gradient_norm"][:chunk]
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not finite.all():
            bad = int(np.argmin(finite))
            self.failure = NonFiniteLoss(
                step - chunk + bad + 1,
                f"loss {losses[bad]}, gradient norm {norms[bad]}",
            )
            raise self.failure
        took = self._clock.lap(chunk)
        speed = self._clock.steps_per_second() * spec.flops_per_step
        every = cfg.log_every_steps
        if step // every > (step - chunk) // every or step == spec.steps:
            last = {name: float(found[chunk - 1]) for name, found in metrics.items()}
            spent = self._costs.so_far(step, speed, self._clock.seconds())
            self._log.write(step, last | spent)
        return took, float(losses[-1]), speed

    def measured(self, step: int, found: measuring.Measured) -> None:
        """Writes what was measured after a step."""
        losses = self._table.write(step, found)
        if step == self.spec.steps:
            self.losses = losses

    def save(self, step: int, state: train_step.TrainState, data: Any) -> None:
        """Begins a checkpoint.

        Args:
          state: of this run.
          data: the state of the data iterator.

        Raises:
          CheckpointError: it cannot be written.
        """
        self._log.flush()
        position = checkpoint.ResumeState(
            data=data,
            seconds=self._clock.seconds(),
            restarts=self.restarts,
            shared_steps=self._shared,
        )
        self._saved.save(step, state, position)

    def wait(self) -> None:
        """Returns when everything saved is on disk (CheckpointError: it is not)."""
        self._saved.wait()

    def resume(self) -> None:
        """Steps continue after a save or a measurement, which is none of their time."""
        self._clock.resume()

    def end(self, found: measuring.Measured | None) -> None:
        """The run is over: makes its record.

        Args:
          found: what was measured at its end; it is not read if the run failed before.
        """
        spec = self.spec
        if self.failure is not None:
            progress.say(f"{spec.run_id} stopped: {self.failure}")
            steps, why = self.failure.step, str(self.failure)
        else:
            if len(self.losses) > 2:  # of several averages
                said = ", ".join(f"{n} {loss:.6g}" for n, loss in self.losses.items())
                progress.say(f"{spec.run_id} validation loss: {said}")
            assert found is not None
            last = self.losses | {"smoothed training loss": found.smoothed}
            finite = all(math.isfinite(value) for value in last.values())
            steps, why = spec.steps, "" if finite else f"{last}"
        self.record = self._costs.record(
            self._clock, self.restarts, steps, failure=why, shared=self._shared
        )
