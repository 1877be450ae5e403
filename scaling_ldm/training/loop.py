"""The training loop, of one run or of several that train side by side.

The process may be killed at any moment. The next call continues from the last complete
checkpoints and reaches the same weights, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import data
from scaling_ldm.records.errors import NonFiniteLoss, Preempted
from scaling_ldm.training import (
    goodput,
    held_out,
    measuring,
    members,
    mesh,
    progress,
    signals,
    train_step,
)


class TrainingRun:
    """Runs of a plan on a mesh, one for each of its slots; a run alone has one.

    All of them read the same batches. A slot may be empty. A run whose loss is not
    finite ends, and so does one that has all its steps; the others go on.

    Args:
      runs: they share a size, a batch size and a compiled step (`compiled_part`).
      device_mesh: with at least as many slots as runs.
      sweep: shows the progress of the runs.
      stop: is asked before every dispatch whether to stop.

    Attributes:
      compiled: the functions of the runs' size.
      names: the arrays of a batch that the network reads.
      spec: of the first run.
    """

    def __init__(
        self,
        runs: Sequence[members.Member],
        device_mesh: jax.sharding.Mesh,
        sweep: progress.SweepProgress,
        stop: signals.StopSignal,
    ) -> None:
        self.runs, self._mesh, self._sweep, self._stop = runs, device_mesh, sweep, stop
        self._experiment, self.spec = runs[0].experiment, runs[0].spec
        self.compiled = train_step.compile_functions(
            train_step.compiled_part(self._experiment),
            self.spec.width,
            self.spec.depth,
            device_mesh,
        )
        self.names = ("x", *self.compiled.objective.conditioning)
        self._packed = mesh.RUNS in device_mesh.axis_names
        self._stacked = self._packed or self._experiment.train.steps_per_dispatch > 1
        self._held: contextlib.ExitStack | None = None  # before the first step
        self._counts: dict[tuple[int, ...], jax.Array] = {}

    def train(
        self,
        source: data.Source,
        validation_batches: Sequence[held_out.HeldOutBatch],
        ended: Callable[[members.Member], None],
    ) -> None:
        """Continues each run from its last complete checkpoint, or starts it.

        Args:
          ended: is called with each run when it is over and has a record. Runs that end
            before others are recorded before these go on.

        Raises:
          Preempted: a stop was asked for; the states are saved.
          CheckpointError: a checkpoint cannot be written, or there are some and none
            can be read.
        """
        self._ended, self._validation = ended, validation_batches
        batches = data.batches(
            source,
            batch_size=self.spec.batch_size,
            rows=mesh.rows_of_process(self._mesh, self.spec.batch_size),
            prefetch=self._experiment.data.prefetch_batches,
        )
        with contextlib.ExitStack() as held:
            state = self._first_state(held)
            step = self._jump(batches)
            self._sweep.skip(step)
            for run in self.runs:  # their logs have no later steps any more
                goodput.starts_at(run.first, run.spec.run_id)
            uncond = {n: value for n, value in source.uncond.items() if n in self.names}
            self._held = held
            with goodput.part(goodput.HOST):
                state = self._steps(state, step, batches, uncond)
            with goodput.part("UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"):
                for run in self.runs:
                    if run.failure is None:
                        run.wait()
        self._end([run for run in self.runs if run.record is None], state)

    def _first_state(self, held: contextlib.ExitStack) -> train_step.TrainState:
        """The state that training goes on from; the runs' files are open until `held`.

        An empty slot holds the first run's state and takes no step.
        """
        slots, state = self.compiled.slots, None
        for slot, run in enumerate(self.runs):
            own = run.open(self.compiled, self._mesh, held)
            if state is None:
                state = slots.spread(own)
            else:
                state = slots.insert(state, self._slot(slot), own)
        assert state is not None
        return state

    def _jump(self, batches: data.Batches) -> int:
        """The first step of the runs that go on, where the batches are from now on."""
        left = [run for run in self.runs if run.failure is None] or self.runs
        first = min(left, key=lambda run: run.first)
        if first.restored is not None:
            batches.set_state(first.restored.data)
        return first.first

    def _end(self, runs: Sequence[members.Member], state: Any) -> None:
        """Records runs that are over."""
        found = {}
        if any(run.failure is None for run in runs):
            with goodput.part("EVAL_STEP"):
                found = self._measured(state)
                for run in runs:
                    if run.failure is None:
                        run.measured(run.spec.steps, found[run.spec.run_id])
        for run in runs:
            run.end(found.get(run.spec.run_id))
            self._ended(run)

    def _measured(self, state: Any) -> dict[str, measuring.Measured]:
        """What each run's weights measure, by run_id."""
        found = measuring.of_state(self.compiled, self._validation, state)
        names = [run.spec.run_id for run in self.runs]
        return dict(zip(names, found, strict=False))  # slots may be empty

    def _steps(
        self,
        state: train_step.TrainState,
        step: int,
        batches: data.Batches,
        uncond: dict[str, Any],
    ) -> train_step.TrainState:
        """Trains from `step` to the end of all runs; returns the last state.

        The metrics of a dispatch are read after the next one has started. So the device
        never waits for the host. A state is measured or saved only after the metrics of
        its last step have been read, and measured before it is saved. A save that a
        signal or the clock asks for comes at the end of the next dispatch, on every
        process.
        """
        cfg, runs = self._experiment.train, self.runs
        uncond = mesh.put(self._mesh, uncond, mesh.REPLICATED)
        hyper = self._hyper()
        flags = [mesh.request_flags(self._mesh, r) for r in range(signals.STOP + 1)]
        save_clock = progress.SaveClock(cfg.checkpoint_minutes)
        profile = progress.StepTrace(runs[0].files.profile, cfg.profile_steps, step)
        unread: tuple[int, int, Any] | None = None
        pauses = sorted(set().union(*(run.pauses for run in runs)))
        self._stop.save_asked = False  # earlier there was nothing to save
        while any(run.goes_on(step) for run in runs):
            self._end_early(step, state)
            if not any(run.trains_at(step) for run in runs):
                step, unread = self._jump(batches), None
            pause = next(s for s in pauses if s > step)
            # The chunk depends on the step alone, so a restart repeats it exactly.
            chunk = min(cfg.steps_per_dispatch, pause - step)
            with goodput.loading(unread and unread[2]["loss"]):
                batch = self._next_batch(batches, chunk)
            given = uncond, hyper, flags[self._request(save_clock)]
            with goodput.part("STEP"):
                if self._stacked:
                    given = self._count(step, chunk), *given
                    state, metrics = self.compiled.steps(state, batch, *given)
                else:
                    state, metrics = self.compiled.step(state, batch, *given)
            step += chunk
            request = signals.GO_ON
            if unread is not None:
                request = self._read_metrics(*unread)
            unread = (step, chunk, metrics)
            profile.step(step)
            if step == pause or request:
                request = max(request, self._read_metrics(*unread))
                unread = None
                self._measure(step, state)
            if self._save(step, state, batches, request):
                save_clock.restart()
            if unread is None:
                for run in runs:
                    run.resume()
        profile.close()
        return state

    def _end_early(self, step: int, state: Any) -> None:
        """Records the runs that are over while others go on."""
        over = [run for run in self.runs if run.record is None]
        over = [run for run in over if not run.goes_on(step)]
        if not over:
            return
        with goodput.part("UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"):
            for run in over:
                run.wait()
        self._end(over, state)
        for run in self.runs:
            run.resume()

    def _measure(self, step: int, state: Any) -> None:
        """Measures the runs that have a mark at this step before their end."""
        due = [run for run in self.runs if run.has_reached(step) and step in run.marks]
        due = [run for run in due if step < run.spec.steps]
        if due:
            with goodput.part("EVAL_STEP"):
                found = self._measured(state)
                for run in due:
                    run.measured(step, found[run.spec.run_id])

    def _save(self, step: int, state: Any, batches: data.Batches, request: int) -> bool:
        """Saves the runs that have a checkpoint at this step, or all, if asked for.

        Returns:
          Whether there were any.

        Raises:
          Preempted: the request is to stop, and it is done.
        """
        due = [run for run in self.runs if run.has_reached(step)]
        due = [run for run in due if request or step in run.save_steps]
        if not due and not request:
            return False
        said = request >= signals.SAVE_AND_SAY
        said = said and any(run.goes_on(step) for run in self.runs)
        with goodput.part("UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"):
            for run in due:
                own = self.compiled.slots.pick(state, self._slot(self.runs.index(run)))
                run.save(step, own, batches.get_state())
            if said:
                for run in due:
                    run.wait()
        if not said:
            return True
        lines = [f"{run.spec.run_id} is saved at step {step}" for run in due]
        if request == signals.STOP:
            raise Preempted("; ".join(lines) or "there was nothing new to save")
        for line in lines:
            progress.say(f"{line} and goes on")
        return True

    def _hyper(self) -> dict[str, Any]:
        """The numbers and keys of the runs, as a step takes them."""
        numbers = [run.numbers() for run in self.runs]
        keys = [run.key("steps") for run in self.runs]
        if not self._packed:
            spec = mesh.REPLICATED
            hyper, key = mesh.put(self._mesh, numbers[0], spec), keys[0]
        else:
            spec, empty = mesh.PACKED, mesh.runs_of(self._mesh) - len(self.runs)
            numbers += [numbers[0]] * empty
            stacked = {n: np.stack([one[n] for one in numbers]) for n in numbers[0]}
            hyper = mesh.put(self._mesh, stacked, spec)
            key = jax.numpy.stack(keys + [keys[0]] * empty)
        place = mesh.named_sharding(self._mesh, spec)
        return hyper | {"key": jax.device_put(key, place)}

    def _slot(self, number: int) -> jax.Array:
        return mesh.put(self._mesh, np.int32(number), mesh.REPLICATED)

    def _count(self, step: int, chunk: int) -> jax.Array:
        """How many of the next `chunk` steps each slot takes: all or none."""
        if not self._packed:
            counts: tuple[int, ...] = (chunk,)
            value, spec = np.array(chunk, np.int32), mesh.REPLICATED
        else:
            taken = [chunk * run.trains_at(step) for run in self.runs]
            counts = *taken, *[0] * (mesh.runs_of(self._mesh) - len(taken))
            value, spec = np.array(counts, np.int32), mesh.PACKED
        if counts not in self._counts:
            self._counts[counts] = mesh.put(self._mesh, value, spec)
        return self._counts[counts]

    def _request(self, save_clock: progress.SaveClock) -> int:
        """What this process asks of the next dispatch; the clock is process 0's."""
        if mesh.is_primary() and save_clock.due():
            save_clock.restart()  # so it asks only once
            return max(signals.SAVE, self._stop.request())
        return self._stop.request()

    def _read_metrics(self, step: int, chunk: int, metrics: Any) -> int:
        """Reads the metrics of a dispatch that ended at `step`, and reports them.

        A run with a loss or a gradient that is not finite has failed from now on.

        Returns:
          The most urgent request of all processes.
        """
        with goodput.part("STEP"):
            metrics = jax.device_get(metrics)
        request = int(np.max(metrics["request"]))
        seen = []
        for slot, run in enumerate(self.runs):
            if not run.trains_at(step - chunk):
                continue
            own = {
                name: np.reshape(metrics[name], (mesh.runs_of(self._mesh), -1))[slot]
                for name in self.compiled.metrics
            }
            with contextlib.suppress(NonFiniteLoss):
                seen.append(run.read(step, chunk, own))
        if not seen:
            return request
        if self._held:  # from now on a stop waits until these steps are saved
            name = self.spec.run_id
            self._held.enter_context(self._stop.polled(f"a checkpoint of {name}"))
            self._held = None
        goodput.steps_done(step)
        laps = [took for took, _, _ in seen if took is not None]
        self._sweep.spend(chunk, max(laps, default=None))
        last = max(run.spec.steps for run in self.runs)
        speed = sum(speed for _, _, speed in seen)
        self._sweep.show(step, last, seen[0][1], speed)
        return request

    def _next_batch(self, batches: data.Batches, chunk: int) -> dict[str, jax.Array]:
        """The next batch on the devices; stacked if a dispatch takes several steps."""
        most = self._experiment.train.steps_per_dispatch
        rows = data.stack(batches, chunk, most) if self._stacked else next(batches)
        spec = mesh.STACKED_BATCHES if self._stacked else mesh.BATCH
        return mesh.put(self._mesh, {name: rows[name] for name in self.names}, spec)
