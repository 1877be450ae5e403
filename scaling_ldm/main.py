"""Flags -> Experiment -> the stages asked for, in order; no logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from scaling_ldm import config, study

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file; override any field with --config.section.field=x."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the study lives. Default: runs/<experiment name>."
)
_STAGES = flags.DEFINE_list(
    "stages",
    None,
    f"Some of {','.join((*config.STAGES, *config.STAGES_ON_REQUEST))}, run in that "
    "order. Default: all but export, advise; with --run, plan, encode and train.",
)
_RUN = flags.DEFINE_integer("run", None, "Only this row of the plan (from 0).")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this job.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is.")
_BAD = (ValueError, LookupError, AttributeError, ImportError, OSError, flags.Error)


def main(_: Sequence[str]) -> int:
    """Runs the study; returns the process's exit status (see `study.EXIT`)."""
    logging.set_verbosity(
        logging.FATAL
    )  # ours: progress.say; libraries' errors: raised
    return study.run(
        _CONFIG.value,
        workdir=_WORKDIR.value,
        stages=_STAGES.value,
        only=_RUN.value,
        cluster=(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
    )


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses flags; a bad one is one line, not a traceback."""
    try:
        config.check_flag(arguments)
        left = flags.FLAGS(config.today_flags(arguments))
        if len(left) > 1:
            raise flags.Error(f"what is {' '.join(left[1:])!r}?")
        if _CONFIG.value is None:
            raise flags.Error("which experiment? give --config=experiments/tiny.py")
        return left
    except _BAD as e:
        print(f"error: {study.one_line(e)}", file=sys.stderr)
        sys.exit(study.EXIT["bad configuration"])


def run() -> None:
    """The console script."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
