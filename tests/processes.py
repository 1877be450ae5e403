"""The entry point in a process of its own: start it, wait for a line, stop it."""

import os
import pathlib
import socket
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[1]
MAIN = (sys.executable, "-m", "scaling_ldm.main")
HANGING = (sys.executable, str(ROOT / "tests" / "hanging.py"))


def run_main(*arguments, expect=0, timeout=600, **environment):
    """Runs the entry point to its end; returns (standard output, standard error)."""
    done = subprocess.run(
        [*MAIN, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout, done.stderr


class MainProcess:
    """The entry point while it runs; its output is collected line by line.

    Args:
      arguments: of the entry point.
      first: shell commands that run before it in the same process.
      program: what is started.
    """

    def __init__(self, *arguments, first="", program=MAIN):
        command = [*program, *map(str, arguments)]
        self.popen = subprocess.Popen(
            ["bash", "-c", f'{first} exec "$@"', "bash", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines, self._open = [], True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self):
        with self.popen.stdout as output:
            for line in output:
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._open = False
            self._changed.notify_all()

    @property
    def output(self):
        return "".join(list(self.lines))

    def wait_for(self, text, timeout=300):
        """Returns when a line holds the text; the end of the process is a failure."""

        def seen():
            return any(text in line for line in self.lines)

        with self._changed:
            self._changed.wait_for(lambda: seen() or not self._open, timeout)
            assert seen(), f"no {text!r} in\n{self.output[-4000:]}"

    def kill(self):
        """SIGKILL; returns when the process is gone."""
        self.popen.kill()
        self.popen.wait()
        self._thread.join(5)

    def end(self, expect=0, timeout=300):
        """The output of the whole process, once it has ended with this status."""
        status = self.popen.wait(timeout)
        self._thread.join(5)
        assert status == expect, f"exit {status}\n{self.output[-4000:]}"
        return self.output


def start_job(processes, *arguments, hang=None):
    """Starts the processes of one job on this machine.

    Args:
      hang: (number of a process, a file) that stands still while the file is there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    number, file = hang or (None, None)
    return [
        MainProcess(
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={processes}",
            f"--process_id={i}",
            *arguments,
            program=(*HANGING, str(file)) if i == number else MAIN,
        )
        for i in range(processes)
    ]
