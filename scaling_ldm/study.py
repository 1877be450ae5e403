"""The stages in order over one working directory, and the exit status of each failure.

Stages are imported when they run: reading a study (fit, report) loads no accelerator
stack, and planning touches no accelerator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ml_collections

from scaling_ldm import config, records
from scaling_ldm.config import command_line
from scaling_ldm.records.errors import CheckpointError, ConfigError, Damaged, Preempted
from scaling_ldm.training import progress, signals
from scaling_ldm.workdir import lock, ownership

EXIT = {
    "done": 0,
    "defect": 1,  # as of every Python program
    "bad configuration": 2,
    "storage": 3,
    "lost a process": 4,
    "no answer": 5,  # advise recommends nothing
    "preempted, run the same command again": 75,
}
# Each error that a user can act on -> the exit status. See also `exit_status`.
STATUS: dict[type[Exception], int] = {
    ConfigError: EXIT["bad configuration"],
    Damaged: EXIT["storage"],
    OSError: EXIT["storage"],
    CheckpointError: EXIT["storage"],
    Preempted: EXIT["preempted, run the same command again"],
}
LOST = (
    "a process of this job, or the network to it, is gone; this one ends too. Start "
    "the same command on every host to continue from the last checkpoint"
)
# Stages that one command at a time runs in a workdir. Beside it, others may read it;
# and with --run, commands share the stages of ROW, each with its own row to train.
WRITING = ("plan", "encode", "train", "generate", "evaluate", "frontier", "export")
ROW = ("plan", "encode", "train")


def run(
    given: ml_collections.ConfigDict | Any,
    *,
    workdir: str | None,
    stages: Sequence[str] | None,
    only: int | None,
    cluster: tuple[str | None, int | None, int | None],
) -> int:
    """Runs the stages and returns one of EXIT's values; an error ends as one message.

    A defect is raised. In a job of several processes its traceback is printed and this
    process ends.

    Args:
      given: the experiment, as `config.resolve` takes it.
      workdir: its folder; None: runs/ and the name of the experiment.
      stages: names of stages; None: all, or those of one run.
      only: the row of the plan to train; None: every row.
      cluster: (host:port of process 0, processes, number of this process) of a job.
    """
    try:
        name = workdir or f"runs/{given.get('name', config.Experiment.name)}"
        at = pathlib.Path(name)
        experiment = config.resolve(given, ownership.unknown(at))
        names = _stages(stages, only)
        lock.when_lost(lambda why: _end(why, EXIT["bad configuration"]))
        return _Study(experiment, at, names, stages is not None, only, cluster).run()
    except (ConfigError, Damaged, OSError) as e:
        print(f"error: {_message(e)}", file=sys.stderr)
        return exit_status(e)
    except Exception as e:
        if exit_status(e) == EXIT["defect"] and not _in_a_job():
            raise
        return _stop(e)


def exit_status(error: Exception) -> int:
    """The exit status after an error; one that is in no table is a defect."""
    kind = next((kind for kind in STATUS if isinstance(error, kind)), None)
    # Saving a checkpoint fails, too, when another process is gone.
    if kind in (None, CheckpointError) and _lost_a_process(error):
        return EXIT["lost a process"]
    return STATUS[kind] if kind else EXIT["defect"]


def _lost_a_process(error: Exception) -> bool:
    """Whether an error means that another process of this job is gone."""
    if not _in_a_job():
        return False
    of_jax = sys.modules["jax"].errors.JaxRuntimeError
    raised = isinstance(error, of_jax) or isinstance(error.__cause__, of_jax)
    return raised and "RESOURCE_EXHAUSTED" not in str(error)


def _in_a_job() -> bool:
    """Whether this job has more than one process."""
    return "jax" in sys.modules and sys.modules["jax"].process_count() > 1


def _message(error: Exception) -> str:
    """What went wrong and what to do."""
    if isinstance(error, OSError):
        return records.in_one_line(error)
    remedy = "; remove it or put a copy back" if isinstance(error, Damaged) else ""
    return f"{error}{remedy}"


def _stop(error: Exception) -> int:
    """Says why the study stopped; returns the status or, in a job, ends the process."""
    status = exit_status(error)
    if status == EXIT["defect"]:
        traceback.print_exception(error)
    elif status == EXIT["lost a process"]:
        _lost(f" ({' '.join(str(error).split())[:300]})")
    else:
        progress.say(f"stopped: {error}")
    if status == EXIT["storage"]:  # orbax's threads fail as well; one message is enough
        sys.unraisablehook = lambda _: None
    if not isinstance(error, Preempted) and _in_a_job():
        _end("", status)  # the other processes do not reach the shutdown barrier
    return status


def _lost(detail: str = "") -> None:
    """Ends this process of a job that cannot go on."""
    _end(f"{LOST}{detail}", EXIT["lost a process"])


def _end(why: str, status: int) -> None:
    """Ends this process at once, whatever its threads do. why: "" if that is said."""
    if why:
        print(f"stopped: {why}", file=sys.stderr)
    lock.release_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stages(stages: Sequence[str] | None, only: int | None) -> tuple[str, ...]:
    """The stages to run, in order."""
    if stages is not None:
        return command_line.check_stages(stages)
    # With one run of a sweep the study cannot be read yet.
    return config.STAGES if only is None else ("plan", "encode", "train")


@dataclasses.dataclass
class _Study:
    """One call of the entry point."""

    experiment: config.Experiment
    workdir: pathlib.Path
    stages: tuple[str, ...]
    asked: bool  # whether the caller named the stages
    only: int | None
    cluster: tuple[str | None, int | None, int | None]
    primary: bool = True  # whether this is process 0
    mesh: ModuleType | None = None  # training.mesh, once devices are started
    status: int = EXIT["done"]
    doing: str = "the study"  # the stage that runs

    def run(self) -> int:
        """Runs the stages; returns one of EXIT's values."""
        if any(self._runs_networks(stage) for stage in self.stages):
            self._start_devices()
        self.experiment = ownership.as_made(self.experiment, self.workdir, self.stages)
        self._check_stages()
        ending = signals.ending(self.experiment.train, lambda: self.doing)
        with ending, contextlib.ExitStack() as held:
            self._own_workdir(held)
            return self._run_stages()

    def _run_stages(self) -> int:
        """Runs the stages in a workdir that is this experiment's."""
        every_stage = self.stages == config.STAGES
        if every_stage and ownership.is_complete(self.experiment, self.workdir):
            page = self.workdir / "report" / "index.html"
            name = self.experiment.name
            progress.say(f"nothing to do: {name} is finished; read {page}")
            return self.status
        self._check_evaluation()
        for stage in self.stages:
            self.doing = stage
            getattr(self, f"_{stage}")()
        if every_stage and self.primary:
            ownership.mark_complete(self.experiment, self.workdir)
        return self.status

    def _runs_networks(self, stage: str) -> bool:
        """Whether a stage needs devices."""
        depends = {
            "encode": self.experiment.encoded,
            "evaluate": self.experiment.evaluate.network != "none",
            "frontier": self.experiment.frontier.images > 0,
        }
        return depends.get(stage, stage in ("train", "generate", "export"))

    def _start_devices(self) -> None:
        from scaling_ldm.training import mesh

        mesh.start_devices(self.experiment.mesh)
        mesh.join_job(*self.cluster, lost=_lost)
        self.primary, self.mesh = mesh.is_primary(), mesh
        if not self.primary:
            progress.mute()

    def _check_stages(self) -> None:
        """Refuses what a stage cannot do (ConfigError) before anything is written."""
        asked = set(self.stages)
        if "train" in asked:
            from scaling_ldm.stages import train

            train.check(self.experiment)
        if {"train", "generate"} <= asked and self.experiment.generate.weights:
            raise ConfigError(
                "config.generate.weights are drawn from without training: add "
                "--stages generate,evaluate"
            )
        if "generate" in asked:
            from scaling_ldm.stages import generate

            generate.check(self.experiment)
        if "frontier" in asked:
            from scaling_ldm.stages import frontier

            frontier.check(self.experiment)
        if "advise" in asked:
            from scaling_ldm.stages import advise

            advise.check(self.experiment, self.workdir, "frontier" in asked)

    def _own_workdir(self, held: contextlib.ExitStack) -> None:
        """Makes the workdir this experiment's, or refuses; process 0 decides for all.

        Args:
          held: gets the lock of the workdir, if the stages need it.

        Raises:
          Held: another process works there.
          ConfigError: it holds another experiment, or is a newer version's.
          OSError: it cannot be written.
        """
        together = self.mesh.failing_together if self.mesh else lambda action: action()
        together(
            lambda: self.primary and ownership.check(self.experiment, self.workdir)
        )
        shared = ROW if self.only is not None else ()
        if {*self.stages} & {*WRITING} - {*shared}:
            paths = [self.workdir / lock.NAME]
            any_process = self.mesh.any_process if self.mesh else bool
            held.enter_context(
                lock.holding(paths, primary=self.primary, any_process=any_process)
            )
        together(
            lambda: self.primary and ownership.register(self.experiment, self.workdir)
        )

    def _check_evaluation(self) -> None:
        """Refuses what cannot be measured, before anything is trained.

        Raises:
          ConfigError: see `stages.evaluate.check`; or given weights, which have no
            checkpoints, where checkpoints of runs are asked for and no run is finished.
        """
        cfg, measures = self.experiment, {"evaluate", "frontier"} & set(self.stages)
        if cfg.evaluate.network == "none" or not measures:
            return
        from scaling_ldm.stages import evaluate
        from scaling_ldm.workdir import runs

        evaluate.check(cfg)
        if (
            "evaluate" in measures
            and cfg.evaluate.through_training
            and cfg.generate.weights
            and runs.best(self.workdir, self._specs_if_planned()) is None
        ):
            raise ConfigError(
                "config.evaluate.through_training = True with config.generate.weights "
                f"= {cfg.generate.weights!r}: a folder of weights has no checkpoints, "
                f"and no run of {self.workdir} is finished; leave one of them out"
            )

    def _asked_rows(self, rows: int) -> range:
        """The rows of the plan that are asked for."""
        if self.only is None:
            return range(rows)
        if not 0 <= self.only < rows:
            raise ConfigError(f"--run={self.only}: the plan has rows 0 to {rows - 1}")
        return range(self.only, self.only + 1)

    def _specs(self) -> list[records.RunSpec]:
        """The plan."""
        path = self.workdir / "runs.jsonl"
        if not path.exists():
            raise ConfigError(f"no plan in {self.workdir}: add plan to --stages")
        return records.read_plan(path)

    def _specs_if_planned(self) -> list[records.RunSpec]:
        """The plan; given weights can be sampled without one."""
        planned = (self.workdir / "runs.jsonl").exists()
        return self._specs() if planned or not self.experiment.generate.weights else []

    def _plan(self) -> None:
        from scaling_ldm.stages import plan

        specs = plan.plan(self.experiment, self.workdir)
        asked = self._asked_rows(len(specs))
        if self.primary:
            plan.write(specs, self.workdir)
            shown = specs[asked.start : asked.stop]
            print(plan.table(self.experiment, shown, asked.start), flush=True)
        if self.mesh:
            self.mesh.barrier("plan")

    def _encode(self) -> None:
        if self.experiment.encoded:
            from scaling_ldm.stages import encode

            encode.run(self.experiment, self.workdir)

    def _train(self) -> None:
        from scaling_ldm.stages import train

        specs = self._specs()
        asked = [(row, specs[row]) for row in self._asked_rows(len(specs))]
        done = train.run(self.experiment, self.workdir, asked, len(specs))
        failed = [r for r in done if r.status != "finished"]
        finished = len(done) - len(failed)
        progress.say(f"trained: {finished} of {len(specs)} runs finished")
        for r in failed:
            progress.say(f"  {r.run_id}: {r.status} ({r.detail})")

    def _fit(self) -> None:
        if self.primary:
            from scaling_ldm.stages import fit

            fit.run(self.experiment, self.workdir, self._specs())

    def _generate(self) -> None:
        from scaling_ldm.stages import generate

        generate.run(self.experiment, self.workdir, self._specs_if_planned())

    def _evaluate(self) -> None:
        from scaling_ldm.stages import evaluate

        if self.asked and self.experiment.evaluate.network == "none":
            progress.say(
                "evaluate measures nothing: config.evaluate.network = 'none'; set one "
                f"of {', '.join(config.FEATURE_NETWORKS[1:])}"
            )
            return
        evaluate.run(self.experiment, self.workdir, self._specs_if_planned())

    def _frontier(self) -> None:
        from scaling_ldm.stages import frontier

        if self.asked and not self.experiment.frontier.images:
            progress.say(
                "frontier measures nothing: config.frontier.images = 0; set how many "
                "pictures a cell has"
            )
            return
        frontier.run(self.experiment, self.workdir, self._specs())

    def _export(self) -> None:
        from scaling_ldm.stages import export

        export.run(self.experiment, self.workdir, self._specs())

    def _advise(self) -> None:
        if not self.primary:
            return
        from scaling_ldm.stages import advise

        found = advise.run(self.experiment, self.workdir)
        for line in advise.lines(found):
            print(line, flush=True)
        if isinstance(found, records.Refusal):
            self.status = EXIT["no answer"]

    def _report(self) -> None:
        if self.primary:
            from scaling_ldm import report

            progress.say(f"report: {report.write(self.workdir)}")
