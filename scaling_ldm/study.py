"""The stages in order over one working directory.

Exit statuses are in `workdir/exit_status.py`.

Stages are imported when they run: reading a study (fit, report) loads no accelerator
stack, and planning touches no accelerator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ml_collections

from scaling_ldm import config, records
from scaling_ldm.config import command_line
from scaling_ldm.records import places
from scaling_ldm.records.errors import ConfigError, Damaged, LocalOnly, Preempted
from scaling_ldm.training import progress, signals
from scaling_ldm.workdir import ending, exit_status, lock, missing, ownership

LOST = (
    "a process of this job, or the network to it, is gone; this one ends too. Start "
    "the same command on every host to continue from the last checkpoint"
)
# Stages that only one command at a time may run in a workdir; others may read it
# meanwhile. With --run, commands share the stages of ROW: each trains its own row.
READING = ("fit", "report", "compare", "advise")
WRITING = tuple(s for s in command_line.STAGES if s not in READING)
ROW = ("plan", "encode", "train")


def run(
    given: ml_collections.ConfigDict | Any,
    *,
    workdir: str | None,
    stages: Sequence[str] | None,
    only: str | None,
    cluster: tuple[str | None, int | None, int | None],
    list_missing: bool = False,
) -> int:
    """Runs the stages, and returns the exit status; an error ends as one message.

    A defect is raised. In a job of several processes its traceback is printed and this
    process ends.

    Args:
      given: the experiment, as `config.resolve` takes it.
      workdir: its folder; None: runs/ and the name of the experiment.
      stages: names of stages; None: all, or those of one run.
      only: the rows of the plan to train, as "3" or "7,0-2"; None: every row.
      cluster: (host:port of process 0, processes, number of this process) of a job.
      list_missing: print number and run_id of each row without a record, and no more.
    """
    try:
        name = workdir or command_line.default_workdir(given)
        at = places.place(name, "--workdir")
        experiment = config.resolve(given, ownership.unknown(at))
        if list_missing:
            command_line.check_alone(stages, only, *cluster)
            missing.show(experiment, at)
            return exit_status.EXIT["done"]
        command_line.check_job(*cluster)
        asked = command_line.rows(only)
        names = command_line.stages_to_run(stages, asked)
        lock.when_lost(
            lambda why: ending.now(why, exit_status.EXIT["bad configuration"])
        )
        signals.configure(experiment.train)
        named = stages is not None
        return _Study(experiment, at, names, named, asked, cluster).run()
    except Exception as e:
        if exit_status.of(e) == exit_status.EXIT["defect"] and not ending.in_a_job():
            raise
        return _stop(e)


def _stop(error: Exception) -> int:
    """Says why the study stopped; returns the status or, in a job, ends the process."""
    status = exit_status.of(error)
    if isinstance(error, (ConfigError, Damaged, LocalOnly, OSError)):
        print(f"error: {ending.message(error)}", file=sys.stderr)
    elif status == exit_status.EXIT["defect"]:
        traceback.print_exception(error)
    elif status == exit_status.EXIT["lost a process"]:
        _lost(because=" ".join(str(error).split())[:300])
    else:
        progress.say(f"stopped: {error}")
    if status == exit_status.EXIT["storage"]:
        # orbax's threads and coroutines fail as well; one message is enough.
        sys.unraisablehook = lambda _: None
        warnings.filterwarnings("ignore", "coroutine .* never awaited", RuntimeWarning)
    if ending.in_a_job():  # its processes may not meet in jax's shutdown barrier
        signal_name = "a stop" if isinstance(error, Preempted) else ""
        leave = functools.partial(signals.leave, signal_name)
        ending.now("", status, leave, held=not signal_name)
    return status


def _lost(why: str = LOST, because: str = "") -> None:
    """Ends this process of a job that cannot go on."""
    if heard := signals.current().heard:  # the job was stopped, no process was lost
        _stopped(heard)
    why = f"{LOST} ({because})" if because else why or LOST
    ending.now(why, exit_status.EXIT["lost a process"])


def listen() -> None:
    """Hears signals to stop from now on, for a program that only runs a study."""
    signals.listen(_stopped)


def _stopped(heard: str) -> None:
    """Ends this process at once: a signal was heard while there is nothing to save."""
    doing = signals.current().doing
    progress.say(
        f"stopped: {heard} in {doing}; what is finished is kept: the same "
        "command continues"
    )
    progress.mute()  # the main thread goes on for a moment
    status = exit_status.EXIT["preempted, run the same command again"]
    ending.now("", status, functools.partial(signals.leave, heard))


@dataclasses.dataclass
class _Study:
    """One call of the entry point."""

    experiment: config.Experiment
    workdir: pathlib.Path
    stages: tuple[str, ...]
    asked: bool  # whether the caller named the stages
    only: Sequence[range] | None
    cluster: tuple[str | None, int | None, int | None]
    primary: bool = True  # whether this is process 0
    mesh: ModuleType | None = None  # training.mesh, once devices are started
    status: int = exit_status.EXIT["done"]
    job: Any = None  # the jobs.JaxJob that this process has joined

    def run(self) -> int:
        """Runs the stages; returns the exit status."""
        if any(self._runs_networks(stage) for stage in self.stages):
            self._start_devices()
        self.experiment = ownership.as_made(self.experiment, self.workdir, self.stages)
        self._check_stages()
        signals.configure(self.experiment.train, self.job)
        with contextlib.ExitStack() as held:
            if self.mesh:
                self._watch(held)
            self._own_workdir(held)
            self._run_stages()
            signals.finish()
        return self.status

    def _watch(self, held: contextlib.ExitStack) -> None:
        """Has a thread look, until `held` ends, whether this job goes on."""
        from scaling_ldm.training import watchdog

        lost = functools.partial(_lost, LOST)
        held.enter_context(watchdog.watching(self.experiment.mesh, self.job, lost))

    def _run_stages(self) -> None:
        """Runs the stages in a workdir that is this experiment's."""
        every_stage = self.stages == config.STAGES
        if every_stage and ownership.is_complete(self.experiment, self.workdir):
            page = self.workdir / "report" / "index.html"
            name = self.experiment.name
            progress.say(f"nothing to do: {name} is finished; read {page}")
            return
        self._check_evaluation()
        if "plan" not in self.stages and (self.workdir / "runs.jsonl").exists():
            self._check_rows(self._specs())
        for stage in self.stages:
            signals.current().doing = stage
            getattr(self, f"_{stage}")()
        if every_stage and self.primary:
            ownership.mark_complete(self.experiment, self.workdir)

    def _runs_networks(self, stage: str) -> bool:
        """Whether a stage needs devices."""
        cfg = self.experiment.evaluate
        depends = {
            "plan": self.experiment.plan.probe,
            "encode": self.experiment.encoded,
            "evaluate": cfg.network != "none" or len(cfg.held_out) > 0,
            "frontier": self.experiment.frontier.images > 0,
        }
        return depends.get(stage, stage in ("train", "generate", "export"))

    def _uses_denoisers(self, stage: str) -> bool:
        """Whether a stage needs devices for networks that are trained, or were."""
        return stage not in ("encode", "export") and self._runs_networks(stage)

    def _start_devices(self) -> None:
        from scaling_ldm.training import jobs, kernel_check, mesh

        self.job = jobs.start(self.experiment.mesh, self.cluster, _lost)
        if any(self._uses_denoisers(stage) for stage in self.stages):
            model = self.experiment.model
            mesh.failing_together(lambda: kernel_check.check(model))
        self.primary, self.mesh = mesh.is_primary(), mesh
        if not self.primary:
            progress.mute()

    def _check_stages(self) -> None:
        """Refuses what a stage cannot do (ConfigError) before anything is written."""
        places.check_fields(self.workdir, self.experiment.train)
        more: dict[str, tuple[Any, ...]] = {
            "train": (),
            "generate": ("train" in self.stages,),
            "frontier": (),
            "compile": (),
            "compare": (self.workdir, "plan" in self.stages),
            "advise": (self.workdir, self.stages),
        }
        for name in (name for name in more if name in self.stages):
            stage = importlib.import_module(f"scaling_ldm.stages.{name}")
            stage.check(self.experiment, *more[name])

    def _own_workdir(self, held: contextlib.ExitStack) -> None:
        """Makes the workdir this experiment's, or refuses; process 0 decides for all.

        Its lock is entered into `held`, if the stages need it.

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
        if self.mesh:
            self.mesh.keep_compiled(self.experiment.mesh, self.workdir)

    def _check_evaluation(self) -> None:
        """Refuses what cannot be measured (ConfigError), before anything is trained."""
        cfg, measures = self.experiment, {"evaluate", "frontier"} & set(self.stages)
        if cfg.evaluate.network == "none" or not measures:
            return
        from scaling_ldm.stages import evaluate

        evaluate.check(cfg)
        if "evaluate" in measures:
            specs = self._specs_if_planned() if cfg.generate.weights else []
            evaluate.check_checkpoints(cfg, self.workdir, specs)

    def _check_rows(self, specs: Sequence[records.RunSpec]) -> None:
        """Refuses what cannot run here (ConfigError) before anything is encoded."""
        if {"generate", "export"} & set(self.stages):
            from scaling_ldm.workdir import runs

            runs.check_run_to_sample(self.experiment, specs)
        if self.mesh and "train" in self.stages:
            from scaling_ldm.stages import train

            asked = [*command_line.asked_rows(specs, self.only).values()]
            train.check_rows(self.experiment, self.workdir, asked, self.stages)

    def _specs(self) -> list[records.RunSpec]:
        """The plan."""
        if not (self.workdir / "runs.jsonl").exists():
            raise ConfigError(f"no plan in {self.workdir}: add plan to --stages")
        return records.read_plan(self.workdir)

    def _specs_if_planned(self) -> list[records.RunSpec]:
        """The plan; given weights can be sampled without one."""
        planned = (self.workdir / "runs.jsonl").exists()
        return self._specs() if planned or not self.experiment.generate.weights else []

    def _plan(self) -> None:
        from scaling_ldm.stages import plan
        from scaling_ldm.workdir import plan_table

        specs = plan.plan(self.experiment, self.workdir)
        asked = command_line.asked_rows(specs, self.only)
        if self.primary:
            plan.write(specs, self.workdir)
            plan_table.show(self.experiment, self.workdir, asked)
        if self.mesh:
            self.mesh.barrier("plan")
        if self.experiment.plan.probe:
            from scaling_ldm.training import probe

            probe.run(self.experiment, [*asked.values()])
        self._check_rows(specs)

    def _encode(self) -> None:
        if self.experiment.encoded:
            from scaling_ldm.stages import encode

            encode.run(self.experiment, self.workdir)

    def _train(self) -> None:
        from scaling_ldm.stages import train

        specs = self._specs()
        asked = [*command_line.asked_rows(specs, self.only).items()]
        share = self.only is not None and len(asked) > 1
        train.run(self.experiment, self.workdir, asked, len(specs), share=share)

    def _fit(self) -> None:
        if self.primary:
            from scaling_ldm.stages import fit

            fit.run(self.experiment, self.workdir, self._specs())

    def _generate(self) -> None:
        from scaling_ldm.stages import generate

        generate.run(self.experiment, self.workdir, self._specs_if_planned())

    def _evaluate(self) -> None:
        from scaling_ldm.stages import evaluate

        if self.asked and not self._runs_networks("evaluate"):
            progress.say(
                "evaluate measures nothing: config.evaluate.network = 'none'; set one "
                f"of {', '.join(config.FEATURE_NETWORKS[1:])}, or evaluate.held_out"
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

    def _compile(self) -> None:
        if self.primary:
            from scaling_ldm.stages import compile

            rows = [*command_line.asked_rows(self._specs(), self.only).values()]
            compile.run(self.experiment, self.workdir, rows)

    def _compare(self) -> None:
        if not self.primary:
            return
        from scaling_ldm.report import comparison_page
        from scaling_ldm.stages import compare

        found = compare.run(self.experiment, self.workdir)
        progress.say(f"comparison: {comparison_page.write(self.workdir)}")
        if all(isinstance(one, records.Refusal) for one in found):
            self.status = exit_status.EXIT["no answer"]

    def _advise(self) -> None:
        if not self.primary:
            return
        from scaling_ldm.stages import advise

        def planned(e: config.Experiment) -> list[records.RunSpec]:
            plan = importlib.import_module("scaling_ldm.stages.plan")
            return plan.plan(e, self.workdir)

        found = advise.run(self.experiment, self.workdir, planned)
        for line in advise.lines(found):
            print(line, flush=True)
        if isinstance(found, records.Refusal):
            self.status = exit_status.EXIT["no answer"]

    def _report(self) -> None:
        if self.primary:
            from scaling_ldm import report

            published = self.experiment.report.published
            progress.say(f"report: {report.write(self.workdir, published)}")
