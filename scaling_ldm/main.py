"""Flags -> experiment -> the stages asked for, in order. This file has no logic."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # while modules load, a stop waits for `run`
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

from absl import app, flags, logging
from ml_collections import config_flags

from scaling_ldm import config, study
from scaling_ldm.config import command_line
from scaling_ldm.workdir import exit_status

flags.DEFINE_list("stages", None, command_line.FLAGS["stages"])
flags.DEFINE_boolean("list_missing", False, command_line.FLAGS["list_missing"])
for _name in ("workdir", "run", "coordinator"):
    flags.DEFINE_string(_name, None, command_line.FLAGS[_name])
for _name in ("num_processes", "process_id"):
    flags.DEFINE_integer(_name, None, command_line.FLAGS[_name])


def main(_: list[str]) -> int:
    """Runs the study; returns the exit status (see `exit_status.EXIT`)."""
    logging.set_verbosity(logging.FATAL)  # our own lines come from progress.say
    given = flags.FLAGS
    return study.run(
        given.config,
        workdir=given.workdir,
        stages=given.stages,
        only=given.run,
        cluster=(given.coordinator, given.num_processes, given.process_id),
        list_missing=given.list_missing,
    )


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags; a bad one ends with a message, not with a traceback."""
    if text := command_line.help_text(arguments, flags.FLAGS.get_help):
        print(text)
        sys.exit(exit_status.EXIT["done"])
    try:
        given = flags.FLAGS.read_flags_from_files(arguments[1:], force_gnu=False)
        path, rest = command_line.split(given)
        experiment = config.load(path) if path else config.default()
        config_flags.DEFINE_config_dict("config", experiment, sys_argv=rest)
        left = flags.FLAGS([arguments[0], *rest])
        command_line.check_left(path, left[1:], flags.FLAGS.stages)
        return left
    except (config.ConfigError, flags.Error) as e:
        print(f"error: {command_line.said_of(e)}", file=sys.stderr)
    sys.exit(exit_status.EXIT["bad configuration"])


def run() -> None:
    """The console script."""
    study.listen()
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
