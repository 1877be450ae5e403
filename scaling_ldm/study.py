"""The stages in order over one workdir, and what each failure tells the caller.

Stages are imported when asked for: reading a study (fit, report) loads no accelerator
stack, and planning touches no accelerator.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from scaling_ldm import config, records
from scaling_ldm.records.errors import Preempted
from scaling_ldm.workdir import ownership

EXIT = {
    "done": 0,
    "bad configuration": 2,
    "storage": 3,
    "lost a process": 4,
    "no answer": 5,  # advise: nothing can be recommended; 1 is Python's, of a defect
    "preempted, run the same command again": 75,
}


LOST = (
    "a process of this job, or the network to it, is gone; this one ends too. Start "
    "the same command on every host to continue from the last checkpoint"
)


@contextlib.contextmanager
def _ending_at_sigterm(stage: str) -> Iterator[None]:
    """Ends the stage at once: what it has finished is kept, the same command goes on.

    Raises:
      Preempted: SIGTERM arrived.
    """

    def stop(*_: Any) -> None:
        raise Preempted(f"{stage} stops; what it has finished is kept")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_line(error: BaseException) -> str:
    """An error's message without quotes inside quotes and line breaks."""
    text = str(error.args[0] if error.args else error)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]  # the repr of a message
    unknown = isinstance(error, (AttributeError, KeyError))  # ml_collections'
    text = ("unknown key in --config: " if unknown else "") + text
    return " ".join(text.replace("\\'", "'").replace("\\n", " ").split())


def run(
    given: ml_collections.ConfigDict | Any,
    *,
    workdir: str | None,
    stages: Sequence[str] | None,
    only: int | None,
    cluster: tuple[str | None, int | None, int | None],
) -> int:
    """Runs the stages and returns one of EXIT's values; errors end as one message."""
    from scaling_ldm.training import progress

    try:
        experiment = config.resolve(given)
        names = _stages(stages, only)
        folder = pathlib.Path(workdir or f"runs/{experiment.name}")
        asked = stages is not None
        return _Study(experiment, folder, names, asked, only, cluster).run()
    except config.ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT["bad configuration"]
    except records.Damaged as e:
        print(f"error: {e}; remove it or put a copy back", file=sys.stderr)
        return EXIT["storage"]
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or ''}", file=sys.stderr)
        return EXIT["storage"]
    except Exception as e:
        code = _known(e)
        if code is None and not _in_a_job():
            raise
        if code is None:
            traceback.print_exc()
        elif code == EXIT["lost a process"]:
            _lost(f" ({one_line(e)[:300]})")
        else:
            progress.say(f"stopped: {e}")
        if code == EXIT["storage"]:  # nothing after the message: orbax's threads die
            sys.unraisablehook = lambda _: None
        if code != EXIT["preempted, run the same command again"] and _in_a_job():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 1)  # the others will not come to the goodbye of the job
        return code


def _lost(detail: str = "") -> None:
    """Ends this process of a job that cannot go on."""
    sys.stdout.flush()
    print(f"stopped: {LOST}{detail}", file=sys.stderr, flush=True)
    os._exit(EXIT["lost a process"])


def _known(error: Exception) -> int | None:
    """The exit status of an error that a user can act on; None for a defect."""
    kind = type(error).__name__
    if kind == "Preempted":
        return EXIT["preempted, run the same command again"]
    kinds = {kind, type(error.__cause__).__name__}
    if "JaxRuntimeError" in kinds and _in_a_job():
        if "RESOURCE_EXHAUSTED" not in str(error):
            return EXIT["lost a process"]
    if kind == "CheckpointError":
        return EXIT["storage"]
    return None


def _in_a_job() -> bool:
    """Whether there are other processes."""
    return "jax" in sys.modules and sys.modules["jax"].process_count() > 1


def _stages(stages: Sequence[str] | None, only: int | None) -> tuple[str, ...]:
    if stages is None:  # one run of a sweep: the study is read when all are there
        return ("plan", "encode", "train") if only is not None else config.STAGES
    known = (*config.STAGES, *config.STAGES_ON_REQUEST)
    unknown = [s for s in stages if s not in known]
    if unknown or not stages:
        raise config.ConfigError(
            f"--stages: {', '.join(unknown) or 'none'} unknown; "
            f"known: {', '.join(known)}"
        )
    return tuple(s for s in known if s in stages)


class _Study:
    """One call of the entry point.

    Args:
      asked: the stages are those that the caller named, not all of them by default.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        stages: tuple[str, ...],
        asked: bool,
        only: int | None,
        cluster: tuple[str | None, int | None, int | None],
    ) -> None:
        self.experiment, self.workdir, self.stages = experiment, workdir, stages
        self.asked, self.only, self.cluster = asked, only, cluster
        self.primary, self.joined = True, False
        self.status = EXIT["done"]

    def run(self) -> int:
        """Runs the stages; returns one of EXIT's values."""
        from scaling_ldm.training import progress

        runs_networks = {
            "train": True,
            "generate": True,
            "export": True,
            "encode": self.experiment.encoded,
            "evaluate": self.experiment.evaluate.network != "none",
            "frontier": self.experiment.frontier.images > 0,
        }
        if any(runs_networks.get(stage) for stage in self.stages):
            self._start_devices()
        if "train" in self.stages:
            from scaling_ldm.stages import train

            train.check(self.experiment)
        if "generate" in self.stages:
            from scaling_ldm.stages import generate

            if self.experiment.generate.weights and "train" in self.stages:
                raise config.ConfigError(
                    "config.generate.weights are drawn from without training: add "
                    "--stages generate,evaluate"
                )
            generate.check(self.experiment)
        if "frontier" in self.stages:
            from scaling_ldm.stages import frontier

            frontier.check(self.experiment)
        if "advise" in self.stages:
            from scaling_ldm.stages import advise

            made = "frontier" in self.stages
            advise.check(self.experiment, self.workdir, made)
        self._claim_workdir()
        if self.stages == config.STAGES and ownership.is_complete(
            self.experiment, self.workdir
        ):
            progress.say(
                f"nothing to do: {self.experiment.name} is finished; read "
                f"{self.workdir / 'report' / 'index.html'}"
            )
            return self.status
        if runs_networks["evaluate"] and {"evaluate", "frontier"} & set(self.stages):
            from scaling_ldm.stages import evaluate

            evaluate.check(self.experiment)
        if runs_networks["evaluate"] and "evaluate" in self.stages:
            self._check_through_training()
        for stage in self.stages:
            measuring = stage in ("generate", "evaluate", "frontier")
            with _ending_at_sigterm(stage) if measuring else contextlib.nullcontext():
                getattr(self, f"_{stage}")()
        if self.stages == config.STAGES and self.primary:
            ownership.mark_complete(self.experiment, self.workdir)
        return self.status

    def _check_through_training(self) -> None:
        """Refuses given weights alone where checkpoints of runs are asked for, too.

        Raises:
          ConfigError: no run of this workdir is finished.
        """
        from scaling_ldm.workdir import runs as runs_lib

        cfg = self.experiment
        if not (cfg.evaluate.through_training and cfg.generate.weights):
            return
        if runs_lib.best(self.workdir, self._runs()) is None:
            raise config.ConfigError(
                "config.evaluate.through_training = True with config.generate.weights "
                f"= {cfg.generate.weights!r}: a folder of weights has no checkpoints, "
                f"and no run of {self.workdir} is finished; leave one of them out"
            )

    def _start_devices(self) -> None:
        from scaling_ldm.training import mesh, progress

        mesh.start_devices(self.experiment.mesh)
        mesh.join_job(*self.cluster, lost=_lost)
        self.primary, self.joined = mesh.is_primary(), True
        if not self.primary:
            progress.mute()

    def _claim_workdir(self) -> None:
        """Makes the workdir this experiment's, or refuses; one process decides for all.

        Raises:
          ConfigError: it holds another experiment.
        """
        refusal: Exception | None = None
        if self.primary:
            try:
                ownership.register(self.experiment, self.workdir)
            except (config.ConfigError, OSError) as e:
                refusal = e
        if self.joined:
            from scaling_ldm.training import mesh

            if mesh.any_process(refusal is not None) and refusal is None:
                refusal = config.ConfigError("process 0 refused and says why")
        if refusal is not None:
            raise refusal

    def _plan(self) -> None:
        from scaling_ldm.stages import plan

        rows = plan.plan(self.experiment)
        shown, first = rows, 0
        if self.only is not None:
            self._check_row(len(rows))
            shown, first = rows[self.only : self.only + 1], self.only
        if self.primary:
            plan.write(rows, self.workdir)
            print(plan.table(self.experiment, shown, first), flush=True)
        if self.joined:
            from scaling_ldm.training import mesh

            mesh.barrier("plan")

    def _check_row(self, rows: int) -> None:
        if not 0 <= self.only < rows:
            raise config.ConfigError(
                f"--run={self.only}: the plan has rows 0 to {rows - 1}"
            )

    def _specs(self) -> list[records.RunSpec]:
        path = self.workdir / "runs.jsonl"
        if not path.exists():
            raise config.ConfigError(f"no plan in {self.workdir}: add plan to --stages")
        return records.read_jsonl(path)

    def _runs(self) -> list[records.RunSpec]:
        """The plan; given weights can be sampled without one."""
        planned = (self.workdir / "runs.jsonl").exists()
        return self._specs() if planned or not self.experiment.generate.weights else []

    def _encode(self) -> None:
        if self.experiment.encoded:
            from scaling_ldm.stages import encode

            encode.run(self.experiment, self.workdir)

    def _train(self) -> None:
        from scaling_ldm.stages import train
        from scaling_ldm.training import progress

        numbered = list(enumerate(self._specs()))
        runs = len(numbered)
        if self.only is not None:
            self._check_row(runs)
            numbered = [numbered[self.only]]
        done = train.run(self.experiment, self.workdir, numbered, runs)
        failed = [r for r in done if r.status != "finished"]
        progress.say(f"trained: {len(done) - len(failed)} of {runs} runs finished")
        for r in failed:
            progress.say(f"  {r.run_id}: {r.status} ({r.detail})")

    def _fit(self) -> None:
        if not self.primary:
            return
        from scaling_ldm.stages import fit

        fit.run(self.experiment, self.workdir, self._specs())

    def _generate(self) -> None:
        from scaling_ldm.stages import generate

        generate.run(self.experiment, self.workdir, self._runs())

    def _evaluate(self) -> None:
        from scaling_ldm.stages import evaluate
        from scaling_ldm.training import progress

        if self.asked and self.experiment.evaluate.network == "none":
            known = ", ".join(config.FEATURE_NETWORKS[1:])
            progress.say(
                "evaluate measures nothing: config.evaluate.network = 'none'; set one "
                f"of {known}"
            )
            return
        evaluate.run(self.experiment, self.workdir, self._runs())

    def _frontier(self) -> None:
        from scaling_ldm.stages import frontier
        from scaling_ldm.training import progress

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
        if not self.primary:
            return
        from scaling_ldm import report
        from scaling_ldm.training import progress

        progress.say(f"report: {report.write(self.workdir)}")
