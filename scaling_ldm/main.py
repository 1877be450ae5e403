"""Flags -> experiment -> the stages asked for, in order. This file has no logic."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":  # while modules load, a stop waits for `run`
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

from absl import app, flags, logging
from ml_collections import config_flags

from scaling_ldm import config, study
from scaling_ldm.config import command_line

_HELP = command_line.FLAGS
_WORKDIR = flags.DEFINE_string("workdir", None, _HELP["workdir"])
_STAGES = flags.DEFINE_list("stages", None, _HELP["stages"])
_RUN = flags.DEFINE_integer("run", None, _HELP["run"])
_COORDINATOR = flags.DEFINE_string("coordinator", None, _HELP["coordinator"])
_PROCESSES = flags.DEFINE_integer("num_processes", None, _HELP["num_processes"])
_PROCESS = flags.DEFINE_integer("process_id", None, _HELP["process_id"])


def main(_: Sequence[str]) -> int:
    """Runs the study; returns the exit status of the process (see `study.EXIT`)."""
    # Our lines come from progress.say; errors of libraries arrive as exceptions.
    logging.set_verbosity(logging.FATAL)
    return study.run(
        flags.FLAGS.config,
        workdir=_WORKDIR.value,
        stages=_STAGES.value,
        only=_RUN.value,
        cluster=(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
    )


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses the flags; a bad one ends with a message, not with a traceback."""
    if text := command_line.help_text(arguments, flags.FLAGS.get_help):
        print(text)
        sys.exit(study.EXIT["done"])
    try:
        given = flags.FLAGS.read_flags_from_files(arguments[1:], force_gnu=False)
        path, rest = command_line.split(given)
        experiment = config.load(path) if path else config.default()
        config_flags.DEFINE_config_dict("config", experiment, sys_argv=rest)
        left = flags.FLAGS([arguments[0], *rest])
        command_line.check_left(path, left[1:])
        return left
    except flags.UnrecognizedFlagError as e:
        error = command_line.unknown_flag(e.flagname)
    except (config.ConfigError, flags.Error) as e:
        error = str(e)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(study.EXIT["bad configuration"])


def run() -> None:
    """The console script."""
    study.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
