"""The flags of the command line: their help, and what is wrong with the given ones."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from scaling_ldm.config import identity, names
from scaling_ldm.config.experiment_dict import given_as, say_renamed, unknown
from scaling_ldm.config.fields import Experiment
from scaling_ldm.records.errors import ConfigError

STAGES = (*names.STAGES, *names.STAGES_ON_REQUEST)
# Each flag -> its help text.
FLAGS = {
    "config": "Experiment file. --config.SECTION.FIELD=VALUE changes one field of it.",
    "workdir": "Folder of the study, or gs://BUCKET/FOLDER, or s3:// for gs://. "
    "Default: runs/ and the name of the experiment.",
    "stages": f"Some of {', '.join(STAGES)}, as in --stages=plan,encode. They run in "
    f"this order. Default: all but {', '.join(names.STAGES_ON_REQUEST)}; with "
    "--run: plan, encode and train.",
    "list_missing": "Print ROW RUN_ID of each row of the plan without a record, and do "
    "nothing else.",
    "run": "Train only these rows of the plan (from 0), in this order, as in 3 or "
    "7,0-2. Of several rows, those that another command trains are left out.",
    "coordinator": "host:port of process 0 of a job of several processes.",
    "num_processes": "Number of processes of this job.",
    "process_id": "Number of this process in the job (from 0).",
}
EXAMPLE = "python -m scaling_ldm.main --config experiments/tiny.py --workdir runs/tiny"


def help_text(arguments: Sequence[str], of_libraries: Callable[[], str]) -> str:
    """What --help or --helpfull shows, or "" if neither is given.

    Args:
      of_libraries: gives the help on every flag, for --helpfull.
    """
    asked = {"-h", "-help", "-?", "--help", "--helpshort", "--helpfull"}
    if not asked & set(arguments):
        return ""
    lines = ["Plans, trains and reads a scaling study.", "", "Example:", f"  {EXAMPLE}"]
    lines += ["", "Flags:"]
    for name, text in FLAGS.items():
        lines += textwrap.wrap(
            f"--{name}: {text}",
            88,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
    if "--helpfull" in arguments:
        return "\n".join([*lines, "", of_libraries()])
    return "\n".join([*lines, "", "--helpfull adds the flags of absl and others."])


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits arguments into the experiment file ("": none is given) and the rest.

    In the rest, every `--config.SECTION.FIELD` has the current name of the field. Of a
    field that is given twice, only the last value is kept.

    Raises:
      ConfigError: a field does not exist, or is given without a value.
    """
    path, others, arguments = "", [], list(arguments)
    fields: dict[str, str] = {}
    while arguments:
        argument = arguments.pop(0)
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            path = value if equals else (arguments or [""]).pop(0)
        elif match := re.match(r"(--?(?:no)?config\.)(.*)", flag):
            if where := _first_values(match[2]):
                value = value if equals else (arguments or [""]).pop(0)
                for name, current in given_as(*where, value.strip("'\"")).items():
                    fields[f"{where[0]}.{name}"] = str(current)
                continue
            name = _field(match[2])
            if "no" in match[1][:4] or isinstance(_default(name), bool):
                others.append(match[1] + name + equals + value)
                continue
            if not equals and not arguments:
                raise ConfigError(f"--config.{name}: give --config.{name}=VALUE")
            fields[name] = value if equals else arguments.pop(0)
        else:
            others.append(argument)
    return path, [*(f"--config.{n}={v}" for n, v in fields.items()), *others]


def _default(where: str) -> Any:
    """The default of the field "section.name", or of "name"."""
    section, _, name = where.partition(".")
    found = getattr(Experiment(), section)
    return getattr(found, name) if name else found


def _first_values(where: str) -> identity.Field | None:
    """The current field, if "section.name" is an old one that had other values."""
    return next(
        (
            (section, field)
            for section, field in identity.FIRST_VALUES
            if where == f"{section}.{identity.FIRST_NAMES[section, field]}"
        ),
        None,
    )


def _field(where: str) -> str:
    """The current name of the field "section.name".

    Raises:
      ConfigError: there is no such field.
    """
    for (section, field), first in identity.FIRST_NAMES.items():
        if where == f"{section}.{first}":
            say_renamed(section, field)
            return f"{section}.{field}"
    section, dot, name = where.partition(".")
    known = vars(Experiment())
    if section not in known:
        raise ConfigError(unknown(section, list(known), "config."))
    if not dataclasses.is_dataclass(known[section]):  # name, question
        if dot:
            raise ConfigError(unknown(where, [section], "config."))
        return where
    if not dot:
        raise ConfigError(
            f"config.{where} is a section: give --config.{where}.FIELD=VALUE"
        )
    if name not in vars(known[section]):
        raise ConfigError(
            unknown(name, list(vars(known[section])), f"config.{section}.")
        )
    return where


def check_stages(given: Sequence[str]) -> tuple[str, ...]:
    """The given stages in the order in which they run.

    Raises:
      ConfigError: no stage, or unknown ones; names the nearest.
    """
    known = f"known: {', '.join(STAGES)}"
    if unknown := [stage for stage in given if stage not in STAGES]:
        said = names.did_you_mean(unknown, STAGES)
        raise ConfigError(f"--stages: {', '.join(unknown)} unknown; {said}{known}")
    if not given:
        raise ConfigError(f"--stages: none given; {known}")
    return tuple(stage for stage in STAGES if stage in given)


def rows(text: str | None, flag: str = "run") -> list[range] | None:
    """ "7,0-2" -> rows 7, and 0 to 2, of the plan; None where the flag is not given.

    Raises:
      ConfigError: it is anything else.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        pairs = [part.partition("-") for part in text.split(",")]
        found = [range(int(a), int(b or a) + 1) for a, _, b in pairs]
        if all(found):  # 5-2 has no rows
            return found
    raise ConfigError(f"--{flag}={text}: must be rows of the plan, as in 0-9,12")


def asked_rows(every: Sequence[Any], only: Sequence[range] | None) -> dict[int, Any]:
    """The rows of a plan that --run asks for, by number; None: all of them.

    Raises:
      ConfigError: the plan has no such row.
    """
    found = dict(enumerate(every))
    if only is None:
        return found
    last = len(found) - 1
    for some in only:
        if some.stop - 1 > last:
            raise ConfigError(f"--run={some.stop - 1}: the plan has rows 0 to {last}")
    return {number: found[number] for some in only for number in some}


def stages_to_run(
    given: Sequence[str] | None, only: Sequence[range] | None
) -> tuple[str, ...]:
    """The stages in order: those given, or all, or those of one run of the plan.

    Raises:
      ConfigError: see `check_stages`.
    """
    if given is not None:
        return check_stages(given)
    # One run of a sweep does not complete the study, so nothing is fitted yet.
    return names.STAGES if only is None else ("plan", "encode", "train")


def default_workdir(given: Any) -> str:
    """Where a study is unless --workdir says it.

    Args:
      given: the experiment, as `config.resolve` takes it.
    """
    name = given.get("name", Experiment.name)
    studies = given.get("compare", {}).get("studies", ())
    if name == Experiment.name and len(studies) > 0:
        first, *others = [re.split(r"[/\\]", str(s).rstrip("/"))[-1] for s in studies]
        name = "_".join([*others, "against", first])
    return f"runs/{name}"


def check_alone(*others: object) -> None:
    """Refuses --list_missing beside flags that run something (ConfigError)."""
    if any(value is not None for value in others):
        raise ConfigError(
            "--list_missing runs nothing: leave out --stages, --run, --coordinator, "
            "--num_processes and --process_id"
        )


def check_job(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> None:
    """Checks the three flags of a job of several processes.

    Raises:
      ConfigError: some but not all of them, or values that no job has.
    """
    given = (coordinator, processes, process_id)
    if coordinator is None or processes is None or process_id is None:
        if given == (None, None, None):
            return
        raise ConfigError(
            "--coordinator, --num_processes and --process_id belong together; got "
            + ", ".join(map(repr, given))
        )
    if not re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/]+):\d{1,5}", coordinator):
        raise ConfigError(f"--coordinator={coordinator}: must be host:port")
    if processes < 1:
        raise ConfigError(f"--num_processes={processes}: must be at least 1")
    if not 0 <= process_id < processes:
        raise ConfigError(
            f"--process_id={process_id}: a job of --num_processes={processes} has the "
            f"processes 0 to {processes - 1}"
        )


def said_of(error: Exception) -> str:
    """One line about a bad flag; of one that does not exist, the nearest."""
    name = getattr(error, "flagname", "")  # of absl's error for an unknown flag
    if not name:
        return _of_a_number(f"{error}")
    close = names.nearest(name, FLAGS)
    hint = f"did you mean --{close}?" if close else "--help shows the flags"
    return f"unknown flag --{name}: {hint}"


def _of_a_number(said: str) -> str:
    """The message about a flag; of one that is no number, in plain words.

    absl gives no more of such a flag than a text of its own: "flag --NAME=VALUE: why".
    """
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", said, re.DOTALL)
    kind = type(_default(match[1])) if match else None
    if match is None or kind not in (int, float):
        return said
    number = "a whole number" if kind is int else "a number"
    return f"--config.{match[1]}: must be {number}, got {match[2]!r}"


def check_left(
    path: str, words: Sequence[str], stages: Sequence[str] | None = None
) -> None:
    """Checks the words that are left when all flags are parsed.

    Args:
      path: the experiment file; "": none. A comparison of other studies needs none.
      words: what is left.
      stages: those that are named.

    Raises:
      ConfigError: no experiment file is given, or words that belong to no flag.
    """
    if words:
        near = [names.nearest(word, STAGES) for word in words]
        meant = ",".join(stage for stage in near if stage)
        hint = "--help shows the flags"
        if None not in near:
            hint = f"did you mean --stages={meant}?"
        raise ConfigError(f"{' '.join(words)!r} is no flag; {hint}")
    if not path and [*(stages or ())] != ["compare"]:
        raise ConfigError(
            "no experiment is given: add --config=FILE, as in "
            "--config=experiments/tiny.py"
        )
