"""Joins a job of several processes, and stops all of them together.

A process tells the others that it stops through the key-value store of process 0. So a
stop also reaches processes that compile or wait for a collective.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import jax

from scaling_ldm import config
from scaling_ldm.config import command_line
from scaling_ldm.training import (
    goodput,
    mesh,
    native_stderr,
    progress,
    pulse,
    xla_flags,
)

WAIT = 120.0  # seconds for which a process waits for the others at the start
# jax aborts a process that hears nothing of another one for SPARE + twice
# mesh.heartbeat_seconds. `pulse` ends it before, with a line that says whom it misses.
SPARE = 20
LEAVE = 2.5  # seconds for each of the two waits for the others at a stop
# What jax needs to know of a job that Slurm or an MPI-like launcher has started.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_TASKS = "SLURM_STEP_NUM_TASKS"
_POD = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


def start(
    cfg: config.MeshConfig,
    cluster: tuple[str | None, int | None, int | None],
    lost: Callable[[str], None],
) -> JaxJob | None:
    """Starts the devices of this process and joins its job; returns it, if any.

    Args:
      cluster: the first three arguments of `join`.
      lost: as of `join`, which also says what is raised.
    """
    with goodput.starting_devices():
        xla_flags.set_for_devices(cfg)
        mesh.start_devices(cfg)
        job = join(*cluster, lost=lost, silence=cfg.heartbeat_seconds)
        jax.devices()
    return job


def join(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    lost: Callable[[str], None],
    silence: int = config.MeshConfig.heartbeat_seconds,
) -> JaxJob | None:
    """Joins the job's processes; None if this process is the only one.

    The three flags are used if they are given. Otherwise a TPU pod or the tasks of a
    Slurm `srun` are recognised.

    Args:
      coordinator: host:port of process 0.
      processes: how many there are in the job.
      process_id: which of them this one is.
      lost: called when another process does not join within WAIT seconds, and when jax
        aborts this process: at once if process 0 is gone, and if it hears nothing of
        another one; see SPARE. The argument says what happened, or is "". The function
        must end the process.
      silence: config.mesh.heartbeat_seconds.

    Raises:
      ConfigError: some but not all of the three flags, or of the variables that
        describe a job; or a job that cannot be joined.
    """
    command_line.check_job(coordinator, processes, process_id)
    if coordinator is None and not (_slurm_tasks() or _on_a_tpu_pod()):
        return None
    if coordinator and process_id == 0:
        _check_port(coordinator)
    where = coordinator or "the address that the environment gives"
    native_stderr.hold_back()
    _on_abort(lambda: lost(""))
    with _patience(WAIT, where, lost):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                initialization_timeout=int(2 * WAIT),
                heartbeat_timeout_seconds=2 * silence + SPARE,
                shutdown_timeout_seconds=60,
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            said = " ".join(str(e).split())[:200].rstrip(".") or type(e).__name__
            raise config.ConfigError(
                f"the job at {where} cannot be joined: {said}. {_way_out(coordinator)}"
            ) from e
    return JaxJob(_client())


def _check_port(coordinator: str) -> None:
    """Refuses a port that process 0 cannot open; jaxlib 0.10 crashes there."""
    port = int(coordinator.rpartition(":")[2])
    six = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=six).close()
    except (OSError, OverflowError) as e:
        raise config.ConfigError(
            f"--coordinator={coordinator}: process 0 cannot open this port ({e}); give "
            "a free one to every process"
        ) from e


def _way_out(coordinator: str | None) -> str:
    if coordinator:
        return "Is --coordinator a free port of the host of process 0?"
    found = [name for name in (_TASKS, *_SLURM, *_POD) if name in os.environ]
    return (
        f"If this is one process alone, unset {', '.join(found)}; otherwise give "
        "--coordinator, --num_processes and --process_id"
    )


def _slurm_tasks() -> bool:
    """Whether Slurm has started several tasks of this program.

    Raises:
      ConfigError: only a part of Slurm's variables says so.
    """
    text = os.environ.get(_TASKS, "").strip()
    if text and not text.isdigit():
        raise config.ConfigError(
            f"{_TASKS}={text!r} is not a number of tasks: start them with srun, or "
            "unset it if this is one process alone"
        )
    if int(text or 1) <= 1:
        return False
    if missing := [name for name in _SLURM if not os.environ.get(name)]:
        raise config.ConfigError(
            f"{_TASKS}={text} says that this is one of {text} tasks, but "
            f"{', '.join(missing)} are not set: start them with srun; or unset "
            f"{_TASKS} if this is one process alone; or give --coordinator, "
            "--num_processes and --process_id"
        )
    return True


def _on_a_tpu_pod() -> bool:
    hosts, coordinator = (os.environ.get(name, "") for name in _POD)
    return len(hosts.split(",")) > 1 or bool(coordinator)


@contextlib.contextmanager
def _patience(
    seconds: float, where: str, lost: Callable[[str], None]
) -> Generator[None, None, None]:
    """Calls `lost` if the block takes longer, before jax aborts with a traceback."""
    told = f"waiting for the processes of this job at {where}, at most {seconds:.0f} s"
    why = (
        f"the processes of this job at {where} were not all there after {seconds:.0f} "
        "s; start the same command on every host"
    )
    timers = [
        threading.Timer(seconds / 12, progress.say, [told]),
        threading.Timer(seconds, lost, [why]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _on_abort(action: Callable[[], None]) -> None:
    """Runs `action` on SIGABRT, in the thread that aborts.

    This must be a handler of the C library. jax's coordination client aborts from a
    thread of its own, where Python's signal handlers do not run. Its callback for a
    lost process cannot be written in Python (std::bad_cast, jaxlib 0.10).
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _abort_handler)


_abort_handler: Any = None  # a reference, or the C library would call freed memory


def _client() -> Any:
    """jax's client of the job's key-value store; there is no public way to it."""
    from jax._src import distributed

    return distributed.global_state.client


class JaxJob:
    """A `signals.Job` by jax's key-value store.

    Args:
      client: of the store. A call fails if process 0 is gone.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def tell(self, signal_name: str) -> None:
        with contextlib.suppress(RuntimeError):
            name = f"{signal_name} to process {jax.process_index()}"
            self.client.key_value_set("scaling_ldm/stop", name)

    def told(self) -> str:
        try:
            return self.client.key_value_try_get("scaling_ldm/stop")
        except RuntimeError:  # no process has set the key
            return ""

    def leave(self, signal_name: str) -> None:
        if signal_name:
            self.tell(signal_name)
        else:
            number = jax.process_index()
            pulse.tell_loss(
                self.client, f"process {number} ended; its message says why"
            )
        with contextlib.suppress(RuntimeError):
            self._meet("left", LEAVE)  # so none waits in a collective for one that left
            self._meet("gone", LEAVE if jax.process_index() == 0 else 0.0)

    def finish(self) -> None:
        """Waits until every process has finished; they still hear stops."""
        self._meet("done", math.inf)

    def _meet(self, name: str, seconds: float) -> None:
        """Waits until every process has called this, but at most `seconds`."""
        folder, end = f"scaling_ldm/{name}/", time.monotonic() + seconds
        self.client.key_value_set(f"{folder}{jax.process_index()}", "")
        while time.monotonic() < end:
            if len(self.client.key_value_dir_get(folder)) == jax.process_count():
                break
            time.sleep(0.05)
