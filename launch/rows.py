"""The rows of a plan that a launcher starts, and the command of each.

Every launcher has the flags of `parser`. It asks the entry point which rows are missing
(`--list_missing`), so an experiment that does not fit the working directory is refused
before anything is started. Overrides (`--config.x=y`) are given to every command as
they are. `--dry-run` prints what would be done as a shell script, and does nothing.
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence

import yaml

from scaling_ldm import records
from scaling_ldm.config import command_line, names
from scaling_ldm.records import places
from scaling_ldm.records.errors import ConfigError
from scaling_ldm.workdir import exit_status

PREEMPTED = exit_status.EXIT["preempted, run the same command again"]
LOST = exit_status.EXIT["lost a process"]
REFUSED = exit_status.EXIT["bad configuration"]
# After these the same command ends in the same way: nothing starts it again.
HOPELESS = sorted(
    {*exit_status.EXIT.values()} - {exit_status.EXIT["done"], LOST, PREEMPTED}
)
FILES = pathlib.Path("launched")  # what launchers write, below the current folder
PORT = 8476  # of process 0, where nothing else says how processes find one another


def parser(about: str) -> argparse.ArgumentParser:
    """The flags of every launcher.

    Args:
      about: the launcher's docstring; its first line is shown by --help.
    """
    made = argparse.ArgumentParser(
        description=about.splitlines()[0],
        epilog="--config.SECTION.FIELD=VALUE is given to every run.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--config", required=True, help="experiment file, as of the entry point")
    add("--workdir", required=True, help="folder of the study, with its plan")
    add("--workdir_there", help="the same folder as the jobs see it, if it differs")
    add("--rows", help="only these of the missing rows, as in 0-9,12")
    add(
        "--name",
        help="begins the names of jobs. Every study needs another one: what is called "
        "so is taken for this study's, and may be deleted when it is over (default: "
        "the folder's name and eight letters and digits that stand for its place)",
    )
    add("--dry-run", "--dry_run", action="store_true", help="print, start nothing")
    return made


def parse(made: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The flags of a launcher; `overrides` holds every `--config.x=y`, whole.

    A word that is no flag ends the launcher with status 2, with the name of the nearest
    one, and so does a URL that has lost a slash.
    """
    try:
        path, rest = command_line.split(words)
    except ConfigError as e:
        made.error(str(e))
    ours = re.compile(r"--?(no)?config\.")
    overrides = [word for word in rest if ours.match(word)]
    others = [word for word in rest if not ours.match(word) and word != "--"]
    given = [*([f"--config={path}"] if path else []), *others]
    flags, unknown = made.parse_known_args(given)
    if unknown:
        known = [
            f"--{name.replace('_', dash)}" for name in vars(flags) for dash in "_-"
        ]
        wrong = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        hint = names.did_you_mean(wrong, known).strip()
        made.error(
            f"not known: {shlex.join(unknown)}; {hint or '--help shows the flags'}"
        )
    flags.overrides = overrides
    flags.workdir_there = flags.workdir_there or flags.workdir
    try:
        for where in (flags.workdir, flags.workdir_there):
            places.scheme(where)
    except ConfigError as e:
        made.error(str(e))
    return flags


def folder_name(flags: argparse.Namespace) -> str:
    """runs/My_Study -> my-study; it begins with a letter."""
    there = flags.workdir_there
    path = absolute(there) if there == flags.workdir else there
    last = re.sub(r"[^a-z0-9]+", "-", posixpath.basename(path.rstrip("/")).lower())
    return re.sub(r"^[^a-z]+", "", last).strip("-") or "study"


def name_of_study(flags: argparse.Namespace, volumes: Mapping[str, str] = {}) -> str:
    """--name, or one that no study in another place has.

    It leaves room for the number of a row in the 40 characters that some services take.

    Args:
      volumes: the name of each volume, by the folder in which jobs see it.
    """
    if flags.name:
        return flags.name
    where = "\0".join(_where(flags, volumes))
    digest = hashlib.sha256(where.encode()).hexdigest()[:8]
    return f"{folder_name(flags)[:24].rstrip('-')}-{digest}"


def _where(flags: argparse.Namespace, volumes: Mapping[str, str]) -> Sequence[str]:
    """Texts that are those of one study alone.

    They are the URL; or the volume and the path in it; or, where the file system of the
    jobs is not known, the path on this machine, and the one that the jobs see.
    """
    there, here = flags.workdir_there, absolute(flags.workdir)
    if _is_url(there):
        return [absolute(there)]
    path = posixpath.normpath(there)
    for folder in sorted(map(posixpath.normpath, volumes), key=len, reverse=True):
        if path == folder or path.startswith(f"{folder.rstrip('/')}/"):
            names = {posixpath.normpath(f): name for f, name in volumes.items()}
            return [names[folder], posixpath.relpath(path, folder)]
    return [here] if there == flags.workdir else [here, path]


def _is_url(path: str) -> bool:
    return places.scheme(path) not in ("", "file")


def command(flags: argparse.Namespace, python: str = "python") -> list[str]:
    """The entry point for the study; the flags that say what to do are added to it."""
    start = [python, "-m", "scaling_ldm.main", "--config", flags.config]
    return [*start, "--workdir", flags.workdir_there, *flags.overrides]


def train(flags: argparse.Namespace, row: int | str, python: str = "python") -> list:
    """The command that trains one row."""
    return [*command(flags, python), "--stages", "train", "--run", str(row)]


def missing(flags: argparse.Namespace) -> list[int]:
    """The rows without a record, of those asked for."""
    found = listed(flags)
    if not flags.rows:
        return found
    wanted = numbers(flags.rows, planned(flags))
    return [row for row in found if row in wanted]


def planned(flags: argparse.Namespace) -> int:
    """How many rows the plan has; `listed` has refused a directory without one."""
    return len(records.read_plan(places.place(flags.workdir)))


def listed(flags: argparse.Namespace) -> list[int]:
    """The rows that --list_missing prints; its refusal ends the launcher as well."""
    here = argparse.Namespace(**{**vars(flags), "workdir_there": flags.workdir})
    asked = subprocess.run(
        [*command(here, sys.executable), "--list_missing"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if asked.returncode:
        sys.exit(asked.returncode)
    return [int(line.split()[0]) for line in asked.stdout.splitlines()]


def told(ask: Sequence[str], dry_run: bool) -> str:
    """What a command prints that asks a scheduler for its jobs and changes nothing.

    Where it is not installed, or fails in a dry run, no job is known, and a line says
    so. Otherwise a failure ends the launcher: jobs might be started twice.
    """
    if shutil.which(ask[0]):
        asked = subprocess.run(ask, stdout=subprocess.PIPE, text=True)
        if not asked.returncode:
            return asked.stdout
        if not dry_run:
            print(f"error: {shlex.join(ask)} failed", file=sys.stderr)
            sys.exit(1)
    print(f"{ask[0]} gives no jobs: what is started is not left out", file=sys.stderr)
    return ""


def pairs(text: str) -> list[tuple[str, str]]:
    """(NAME, STATE) of each line; "" where it says no state."""
    return [
        (name, state.strip())
        for name, _, state in (line.partition(" ") for line in text.splitlines())
    ]


def left(
    named: Mapping[str, int], there: Mapping[str, str], over: Collection[str]
) -> dict[str, int]:
    """The rows, by the name of their job, whose job is not there or is over.

    Args:
      over: states in which a job does nothing any more.
    """
    kept = {n: row for n, row in named.items() if there.get(n) in (None, *over)}
    if at_work := [row for n, row in named.items() if n not in kept]:
        print(f"already started: {ranges(at_work)}", file=sys.stderr)
    return kept


def say_and_check(rows: Sequence[int]) -> None:
    """Says which rows are started; ends the launcher if there are none."""
    print(f"{len(rows)} rows to start: {ranges(rows) or 'none'}", file=sys.stderr)
    if not rows:
        sys.exit(exit_status.EXIT["done"])


def numbers(text: str, planned: int) -> set[int]:
    """ "0-2,7" -> {0, 1, 2, 7}; anything else ends the launcher with status 2.

    Args:
      planned: how many rows the plan has; a row that it has not is refused.
    """
    try:
        asked = command_line.rows(text, "rows") or ()
    except ConfigError as e:
        refuse(str(e))
    for some in asked:
        if some.stop > planned:
            refuse(f"--rows={text}: the last row of the plan is {planned - 1}")
    return {row for some in asked for row in some}


def ranges(rows: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    parts: list[list[int]] = []
    for row in sorted(rows):
        if parts and row == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], row]
        else:
            parts.append([row])
    return ",".join("-".join(map(str, part)) for part in parts)


def name_of(flags: argparse.Namespace, row: int, longest: int) -> str:
    """The name of a row's job, as Kubernetes and Google Cloud allow names.

    A name is not cut: two jobs could then have the same one.
    """
    name = f"{flags.name}-{row}"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
        refuse(
            f"the job of row {row} would be called {name!r}: give a --name of "
            "lower-case letters, digits and '-' that begins with a letter, so that it "
            f"has at most {longest} characters with the row"
        )
    return name


def refuse(why: str) -> None:
    """Ends the launcher with status 2."""
    print(f"error: {why}", file=sys.stderr)
    sys.exit(REFUSED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """A command that starts jobs, and the files that it reads, by name in FILES."""

    command: Sequence[str]
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def start(starts: Iterable[Start], dry_run: bool) -> int:
    """Writes the files and runs the commands, one after the other, or prints them.

    Returns:
      0, or 1 if a command failed; the ones after it are still run.
    """
    failed = 0
    for one in starts:
        if dry_run:
            print(_as_shell(one))
            continue
        for name, text in one.files.items():
            FILES.mkdir(exist_ok=True)
            (FILES / name).write_text(text, encoding="utf-8")
        try:
            status = subprocess.run(one.command).returncode
        except FileNotFoundError:
            refuse(f"{one.command[0]} is not installed; --dry-run shows the commands")
        failed += status != 0
        if status:
            print(f"{one.command[0]} ended with {status}", file=sys.stderr)
    return int(failed > 0)


def _as_shell(one: Start) -> str:
    lines = []
    for name, text in one.files.items():
        end = "END"
        while end in text.splitlines():
            end += "_"
        path = shlex.quote(str(FILES / name))
        lines += [f"mkdir -p {FILES}", f"cat >{path} <<'{end}'", text + end]
    return "\n".join([*lines, shlex.join(one.command)])


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and a value that comes twice in full."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(*documents: Mapping) -> str:
    """The documents as YAML, keys in the given order."""
    return yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True
    )


def absolute(path: str) -> str:
    """A path without links and dots, as this machine sees it; or the URL."""
    return path.rstrip("/") if _is_url(path) else os.path.realpath(places.place(path))
