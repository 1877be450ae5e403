"""RunSpec -> TrainRecord: the one training loop; it can be killed at any moment."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm import checkpoint, config, mesh, meters, peaks, records
from scaling_ldm import data as data_lib
from scaling_ldm import step as step_lib
from scaling_ldm.objectives import validation


class Preempted(Exception):
    """A stop was asked for (SIGTERM); everything is saved."""


class Stop:
    """Whether this process was asked to stop. Installs a SIGTERM handler."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled functions of one size on one mesh, and what they take."""

    functions: step_lib.Functions
    state: step_lib.TrainState  # abstract, with shardings
    init: Any
    step: Any  # one optimizer step
    steps: Any  # `steps_per_dispatch` of them in one call
    errors: Any


@functools.lru_cache(maxsize=64)
def compile_for(
    experiment: config.Experiment,
    width: int,
    depth: int,
    device_mesh: jax.sharding.Mesh,
) -> Program:
    """Jitted functions, compiled at first use; runs of one size share them."""
    unroll = experiment.model.unroll
    functions = step_lib.build(
        experiment,
        width,
        depth,
        unroll=unroll == "always"
        or (unroll == "auto" and jax.default_backend() == "cpu"),
    )
    abstract = step_lib.abstract_state(functions)
    placed = mesh.shardings(device_mesh, abstract)
    whole = mesh.named(device_mesh, mesh.WHOLE)

    def step(
        state: step_lib.TrainState, batch: Any, null: Any, hyper: Any, stop: jax.Array
    ) -> tuple[step_lib.TrainState, Any]:
        state, metrics = functions.step(state, batch, null, hyper)
        return state, metrics | {"stop": stop.sum()}

    def steps(
        state: step_lib.TrainState, batches: Any, null: Any, hyper: Any, stop: jax.Array
    ) -> tuple[step_lib.TrainState, Any]:
        def body(state: step_lib.TrainState, batch: Any) -> tuple[Any, Any]:
            return functions.step(state, batch, null, hyper)

        state, metrics = jax.lax.scan(body, state, batches)
        return state, metrics | {"stop": stop.sum()}

    return Program(
        functions=functions,
        state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            placed,
        ),
        init=jax.jit(functions.init, out_shardings=placed),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, whole)),
        steps=jax.jit(steps, donate_argnums=0, out_shardings=(placed, whole)),
        errors=jax.jit(functions.errors, out_shardings=whole),
    )


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
        meters.say(f"{len(numbered) - len(missing)} of {len(numbered)} runs are done")
    if not missing:
        return list(done.values())
    device_mesh = mesh.build(
        experiment.mesh,
        {
            "config.train.batch_size": experiment.train.batch_size,
            "config.validation.batch_size": experiment.validation.batch_size,
        },
    )
    train_data, validation_data = data_lib.sources(experiment.data)
    sweep = meters.Sweep(
        runs,
        [spec.planned_flops for _, spec in missing],
        experiment.train.show_every_seconds,
    )
    stop = Stop()
    held_out: list[HeldOutBatch] = []
    with jax.set_mesh(device_mesh):
        for number, spec in missing:
            sweep.begin(
                number,
                f"{spec.budget_flops:.2g} FLOPs  {spec.width} x {spec.depth}",
            )
            job = _Job(experiment, workdir, spec, device_mesh, sweep, stop)
            if not held_out:
                held_out = held_out_batches(
                    experiment, device_mesh, validation_data, job.names
                )
            done[spec.run_id] = record = job.train(train_data, held_out)
            sweep.end()
            sweep.result(record.validation_loss_ema)
    return list(done.values())


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


class NonFiniteLoss(Exception):
    """Training left the finite numbers; nothing was saved since."""


class _Job:
    """One run: what stays the same while it trains."""

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        spec: records.RunSpec,
        device_mesh: jax.sharding.Mesh,
        sweep: meters.Sweep,
        stop: Stop,
    ) -> None:
        self.experiment, self.spec, self.mesh = experiment, spec, device_mesh
        self.sweep, self.stop = sweep, stop
        self.folder = folder_of(workdir, spec)
        self.program = compile_for(experiment, spec.width, spec.depth, device_mesh)
        self.names = ("x", *self.program.functions.denoiser.conditioning)
        per_run = experiment.train.checkpoints_per_run
        self.marks = sorted(
            {round(spec.steps * (i + 1) / per_run) for i in range(per_run)} - {0}
        )

    def train(
        self, train_data: data_lib.Source, held_out: Sequence[HeldOutBatch]
    ) -> records.TrainRecord:
        """Continues from the last good checkpoint, or starts; returns the record."""
        spec = self.spec
        checkpoints = checkpoint.Checkpoints(
            self.folder / "checkpoints",
            spec,
            self.experiment.train.keep_checkpoints,
            meters.say,
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
            self.sweep.skip(step * spec.flops_per_step)
            meters.say(f"{spec.run_id} continues from step {step} of {spec.steps}")
        clock = meters.Clock(before)
        log = meters.MetricLog(
            self.folder if mesh.is_primary() else None,
            step,
            self.experiment.train.tensorboard,
        )
        failure = ""
        try:
            state = self._loop(state, step, batches, checkpoints, clock, log, restarts)
            checkpoints.wait()
        except NonFiniteLoss as e:
            failure = str(e)
            meters.say(f"{spec.run_id} stopped: {failure}")
        finally:
            log.close()
            checkpoints.close()
        return self._finish(state, clock, restarts, failure, held_out)

    def _loop(
        self,
        state: step_lib.TrainState,
        step: int,
        batches: data_lib.Batches,
        checkpoints: checkpoint.Checkpoints,
        clock: meters.Clock,
        log: meters.MetricLog,
        restarts: int,
    ) -> step_lib.TrainState:
        """Steps until the run is over.

        Metrics of a dispatch are looked at after the next one is under way, so the
        device never waits for the host; a state is saved only once the metrics of its
        last step have been looked at.
        """
        spec, cfg = self.spec, self.experiment.train
        null = mesh.put(self.mesh, self._null(), mesh.WHOLE)
        hyper = mesh.put(
            self.mesh,
            {
                "peak": np.float32(spec.learning_rate),
                "warmup": np.float32(spec.warmup_steps),
            },
            mesh.WHOLE,
        ) | {"key": self._key("steps")}
        flags = [mesh.flag(self.mesh, value) for value in (0, 1)]
        profile = meters.Profile(self.folder / "profile", cfg.profile_steps, step)
        unseen: tuple[int, int, Any] | None = None
        while step < spec.steps:
            mark = next(m for m in self.marks if m > step)
            # The chunk depends on the step alone, so a restart repeats it exactly.
            chunk = cfg.steps_per_dispatch
            if step % chunk or step + chunk > mark:
                chunk = 1
            batch = self._batch(batches, chunk)
            advance = self.program.step if chunk == 1 else self.program.steps
            state, metrics = advance(state, batch, null, hyper, flags[self.stop.asked])
            step += chunk
            stopping = unseen is not None and self._look(*unseen, clock, log)
            unseen = (step, chunk, metrics)
            profile.step(step)
            if step == mark or stopping:
                stopping |= self._look(*unseen, clock, log)
                unseen = None
                log.flush()
                progress = checkpoint.Progress(
                    data=batches.get_state(), seconds=clock.seconds(), restarts=restarts
                )
                checkpoints.save(step, state, progress)
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
        clock: meters.Clock,
        log: meters.MetricLog,
    ) -> bool:
        """Accounts for a dispatch that ended at `step`; whether a stop was asked for.

        Raises:
          NonFiniteLoss: its loss or gradient is not finite.
        """
        spec, cfg = self.spec, self.experiment.train
        metrics = jax.device_get(metrics)
        losses = np.atleast_1d(metrics["loss"])
        norms = np.atleast_1d(metrics["gradient_norm"])
        finite = np.isfinite(losses) & np.isfinite(norms)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFiniteLoss(
                f"loss {losses[bad]}, gradient norm {norms[bad]} at step "
                f"{step - chunk + bad + 1}; lower the learning rate or clip harder"
            )
        self.sweep.spend(chunk * spec.flops_per_step, clock.lap(chunk))
        speed = clock.steps_per_second() * spec.flops_per_step
        self.sweep.show(step, spec.steps, float(losses[-1]), speed)
        every = cfg.log_every_steps
        if step // every > (step - chunk) // every or step == spec.steps:
            utilisation, _ = self._mfu(speed)
            log.write(
                step,
                {
                    "loss": float(losses[-1]),
                    "loss_smoothed": float(np.atleast_1d(metrics["loss_smoothed"])[-1]),
                    "gradient_norm": float(norms[-1]),
                    "learning_rate": float(np.atleast_1d(metrics["learning_rate"])[-1]),
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
        if chunk == 1:
            rows = next(batches)
            spec = mesh.BATCH
        else:
            rows = data_lib.stack(batches, chunk)
            spec = mesh.BATCHES
        return mesh.put(self.mesh, {name: rows[name] for name in self.names}, spec)

    def _null(self) -> dict[str, np.ndarray]:
        null = data_lib.null_condition(
            self.experiment.data, self.experiment.model.classes
        )
        return {name: null[name] for name in self.names if name != "x"}

    def _key(self, use: str) -> jax.Array:
        key = jax.random.fold_in(
            jax.random.key(self.spec.seed), ("init", "steps").index(use)
        )
        return jax.device_put(key, mesh.named(self.mesh, mesh.WHOLE))

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

    def _finish(
        self,
        state: step_lib.TrainState,
        clock: meters.Clock,
        restarts: int,
        failure: str,
        held_out: Sequence[HeldOutBatch],
    ) -> records.TrainRecord:
        """Measures the final weights and writes the record."""
        spec = self.spec
        steps = int(state.step)
        losses = {"raw": math.nan, "ema": math.nan}
        if not failure:
            losses["raw"] = self._validate(state.params, held_out)
            losses["ema"] = self._validate(state.ema, held_out)
            if not all(map(math.isfinite, losses.values())):
                failure = f"validation loss {losses}"
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
            validation_loss=losses["raw"],
            validation_loss_ema=losses["ema"],
            train_loss_smoothed=float(state.smoothed_loss),
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

    def _validate(self, params: Any, held_out: Sequence[HeldOutBatch]) -> float:
        """The validation loss: mean over samples, in float64."""
        errors = [
            np.asarray(
                self.program.errors(params, b.batch, b.times, b.indices, b.key),
                np.float64,
            )[: b.samples]
            for b in held_out
        ]
        return float(np.mean(np.concatenate(errors)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """One batch of the validation set on the devices; the same for every run."""

    batch: Any
    times: jax.Array
    indices: jax.Array
    key: jax.Array
    samples: int  # rows that count; the rest fill the last batch


def held_out_batches(
    experiment: config.Experiment,
    device_mesh: jax.sharding.Mesh,
    source: data_lib.Source,
    names: Sequence[str],
) -> list[HeldOutBatch]:
    """The whole validation set, with each sample's time and noise index."""
    cfg = experiment.validation
    times = validation.stratified_times(
        cfg.samples,
        location=experiment.objective.time_location,
        scale=experiment.objective.time_scale,
        seed=cfg.seed,
    )
    rows = mesh.rows_of_process(device_mesh, cfg.batch_size)
    key = jax.device_put(jax.random.key(cfg.seed), mesh.named(device_mesh, mesh.WHOLE))
    batches = []
    for start in range(0, cfg.samples, cfg.batch_size):
        index = np.arange(start, start + cfg.batch_size, dtype=np.int32) % cfg.samples
        mine = index[rows]
        given = source.rows(mine.astype(np.int64))
        batches.append(
            HeldOutBatch(
                batch=mesh.put(device_mesh, {name: given[name] for name in names}),
                times=mesh.put(device_mesh, times[mine]),
                indices=mesh.put(device_mesh, mine),
                key=key,
                samples=min(cfg.batch_size, cfg.samples - start),
            )
        )
    return batches
