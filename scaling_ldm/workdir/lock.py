"""Locks: files that say which process works on a study, a run or encoded records.

A lock is a JSON file that its holder creates exclusively and removes at its end. A
network file system may have no flock. So the holder renews the file's modification time
every BEAT seconds, as a heartbeat. A lock is taken over from a holder that

- ran on this machine and is gone: no process has its number, or only one that started
  at another time;
- ran elsewhere and has had no heartbeat for STALE seconds, by the clock of the file
  system or by that of the waiting process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence

from scaling_ldm.records.errors import ConfigError, Held
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import progress
from scaling_ldm.workdir import lock_file

NAME = "lock.json"  # of the file; it is in the folder that it locks
BEAT = 20.0  # seconds between two heartbeats
STALE = 180.0  # seconds without a heartbeat after which a holder elsewhere is gone
POLL = 1.0  # seconds between two looks at a lock that another process holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, as it describes itself in its locks.

    host: name of its machine, for people.
    place: identifies the machine, or the container, whose process numbers count.
    pid: its process number there.
    start: when it started, in a unit of its machine; "": not known.
    since: when it took the lock, for people.
    command: its command line.
    """

    host: str
    place: str
    pid: int
    start: str
    since: str
    command: str

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host} since {self.since} (`{self.command}`)"
        )


def _this_process() -> Holder:
    place = []
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = [boot, os.readlink("/proc/self/ns/pid")]
    return Holder(
        host=socket.gethostname(),
        place=" ".join(place) or socket.gethostname(),
        pid=os.getpid(),
        start=_start(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        command=shlex.join(sys.argv),
    )


def _start(pid: int) -> str:
    """When a process of this machine started; "" where that is not known."""
    try:
        line = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # no /proc, or it hides what other users run
        return ""
    # The second field is the program's name in brackets; it may hold any character.
    state, *fields = line[line.rindex(")") + 1 :].split()
    if state in ("Z", "X"):
        return "ended"  # a zombie process
    return fields[18]  # field 22 of proc(5): in clock ticks since the machine started


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Held:
    """A lock's file as it is now.

    text: what is in it.
    beat: when it was renewed, by the clock of the file system.
    age: seconds since then, by the same clock.
    """

    text: str
    beat: float
    age: float


def _holder(text: str) -> Holder | None:
    """The holder; None if the file is incomplete: its writer is at work or has died."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


class Lock:
    """One lock; see `holding`.

    Args:
      path: of the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self._folder = path.absolute(), path.parent
        self._me = _this_process()
        self._text = json.dumps(dataclasses.asdict(self._me), indent=1) + "\n"
        self._first_beat: float | None = None  # of a holder elsewhere, as first seen
        self._seen = 0.0  # when that was, by the monotonic clock
        self._made: list[pathlib.Path] = []  # folders, innermost first

    def take(self) -> str:
        """Takes the lock unless another living process has it.

        Returns:
          "" if it is taken. Otherwise it is not known yet whether the holder lives, and
          a line says why; call this again later.

        Raises:
          Held: the holder lives.
          OSError: the file cannot be written.
        """
        with _registry:
            if _held.get(self.path) is self:
                return ""
            while not self._create():
                found = self._read()
                if found is None:
                    continue  # it was removed just now
                if doubt := self._doubt(found):
                    return doubt
                if not self._replace(found):
                    return f"{self._folder} is being taken over by another process"
                progress.say(
                    f"{self._folder} was in use by {_name(_holder(found.text))}, "
                    "which is gone: this process takes over"
                )
                break
            _held[self.path] = self
            _start_beating()
        return ""

    def _create(self) -> bool:
        """Creates the file; False if there is one."""
        far = isinstance(self.path, ObjectPath)  # there are no folders
        self._made += [p for p in self.path.parents if not far and not p.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock_file.create(self.path, self._text)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if far:  # there is no such bucket
                raise
            return False  # its folder was removed just now
        return True

    def _read(self) -> _Held | None:
        """The file as it is now, whoever wrote it; None if there is none."""
        try:
            text, beat = lock_file.read(self.path)
            return _Held(text=text, beat=beat, age=self._now() - beat)
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The time by the clock of the file system."""
        return lock_file.now(self.path)

    def _doubt(self, found: _Held) -> str:
        """Why it is not known yet whether the holder lives; "" if it is gone.

        Raises:
          Held: the holder lives.
        """
        holder = _holder(found.text)
        in_use = (
            f"{self._folder} is in use by {_name(holder)}. Two commands would write "
            "over each other's files: wait until it ends, or use another --workdir."
        )
        if holder is not None and holder.place == self._me.place:
            if self.path not in _held and not _lives(holder):
                return ""
            raise Held(f"{in_use} It ends with `kill {holder.pid}`.")
        if found.age > STALE:
            return ""
        way_out = (
            f"its last heartbeat is {max(found.age, 0):.0f} s old, and after "
            f"{STALE / 60:.0f} minutes without one this command takes over. If you "
            f"know that it is gone, remove {self.path}"
        )
        if self._first_beat is None:
            self._first_beat, self._seen = found.beat, time.monotonic()
        if self._first_beat == found.beat and time.monotonic() - self._seen > STALE:
            return ""  # even if the clock of the file system is wrong
        if self._first_beat != found.beat:
            raise Held(f"{in_use} It is on another machine: {way_out}.")
        who = _name(holder)
        return f"waiting to see whether {who} still uses {self._folder}: {way_out}"

    def _replace(self, found: _Held) -> bool:
        """Takes over what was found; False if another process was faster."""
        guard = self.path.with_name(f".{NAME}.taken-over")
        try:
            lock_file.create(guard, "")
        except FileExistsError:  # another process takes over now, or died doing so
            with contextlib.suppress(FileNotFoundError):
                if self._now() - lock_file.written_at(guard) > STALE:
                    guard.unlink()
            return False
        try:
            version = lock_file.version(self.path)
            now = self._read()
            if now is None or (now.text, now.beat) != (found.text, found.beat):
                return False
            lock_file.replace(self.path, self._text, version)
        except (FileNotFoundError, FileExistsError):  # it changed meanwhile
            return False
        finally:
            guard.unlink(missing_ok=True)
        return True

    def beat(self) -> None:
        """Shows that this process lives; ends it if it has lost the lock."""
        with _registry, contextlib.suppress(OSError):
            if _held.get(self.path) is not self:
                return
            try:
                version = lock_file.version(self.path, lock_file.SECONDS)
                text = lock_file.text(self.path)
            except FileNotFoundError:  # removed by hand: the first to create it has it
                if self.path.parent.exists():
                    self._create()
                return
            if text == self._text:
                lock_file.renew(self.path, self._text, version)
            else:
                del _held[self.path]
                _when_lost(f"{self._folder} was taken over by {_name(_holder(text))}")

    def release(self) -> None:
        """Removes the file, and the folders made for it if nothing else is in them."""
        with _registry, contextlib.suppress(OSError):
            if _held.get(self.path) is self:
                del _held[self.path]
                version = lock_file.version(self.path, lock_file.SECONDS)
                if lock_file.text(self.path) == self._text:
                    lock_file.remove(self.path, version)
                    for folder in self._made:
                        folder.rmdir()  # fails if it is not empty


def _lives(holder: Holder) -> bool:
    """Whether another process of this machine is the one that wrote a lock."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    return holder.pid != os.getpid() and _start(holder.pid) in ("", holder.start)


def _name(holder: Holder | None) -> str:
    return str(holder or "a process that has not said which one it is")


_held: dict[pathlib.Path, Lock] = {}  # by this process
_registry = threading.RLock()
_pause = time.sleep
_beating: threading.Thread | None = None


def _start_beating() -> None:
    global _beating
    if _beating is None:
        _beating = threading.Thread(target=_beat, name="locks", daemon=True)
        _beating.start()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        for lock in list(_held.values()):
            lock.beat()


def _end(message: str) -> None:
    print(f"stopped: {message}", file=sys.stderr, flush=True)
    os._exit(1)


_when_lost: Callable[[str], None] = _end


def when_lost(action: Callable[[str], None]) -> None:
    """Sets what happens when another process has taken over a lock of this one.

    It can happen after this process was suspended for STALE seconds, or if somebody
    removed the file. Without this call, the process ends at once.

    Args:
      action: gets a message; it must end the process, which may write nothing more.
    """
    global _when_lost
    _when_lost = action


def release_all() -> None:
    """Removes every lock of this process, which is about to end without cleaning up."""
    for lock in list(_held.values()):
        lock.release()


@contextlib.contextmanager
def holding(
    paths: Iterable[pathlib.Path],
    *,
    primary: bool = True,
    any_process: Callable[[bool], bool] = bool,
    wait: bool = False,
) -> Generator[None, None, None]:
    """Holds all these locks within the block, or none; process 0 holds a job's locks.

    Args:
      primary: whether this is process 0.
      any_process: whether a condition holds on any process of the job.
      wait: whether to wait for a holder that lives, and say so, instead of refusing.

    Raises:
      Held: another process that lives holds one of them.
      ConfigError: process 0 was refused.
      OSError: a file cannot be written.
    """
    locks = [Lock(path) for path in paths] if primary else []
    try:
        said = ""
        while True:
            said, refusal = _try(locks, wait, said)
            if any_process(refusal is not None):
                raise refusal or ConfigError("process 0 refused; its message says why")
            if not any_process(bool(said)):
                break
            _pause(POLL)
        yield
    finally:
        for lock in locks:
            lock.release()


def _try(
    locks: Sequence[Lock], wait: bool, before: str
) -> tuple[str, Exception | None]:
    """Tries to take all: ("", None) if they are taken, else (a line, the refusal).

    Args:
      before: the line of the last call; the same line is printed only once.
    """
    for lock in locks:
        try:
            doubt = lock.take()
        except Held as e:
            if not wait:
                return "", e
            doubt = f"waiting: {e}"
        except OSError as e:
            return "", e
        if doubt:
            if not before:
                progress.say(doubt)
            return doubt, None
    return "", None
