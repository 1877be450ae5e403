"""Tables of time: where the seconds of a study and of each of its runs went."""

from __future__ import annotations

from scaling_ldm.records import goodput
from scaling_ldm.report import format as fmt
from scaling_ldm.report.study import Study
from scaling_ldm.report.table import Column, Row, Table, cell, text

_CAPTION = (
    "Wall time of process 0 while it trained, by the names of ml-goodput-measurement. "
    "STEP is the useful time; the steps of a lost attempt that were done again are not "
    "in it."
)


def whole(study: Study) -> Table:
    """The parts of the time of all runs together."""
    found = goodput.total(map(goodput.of_run, study.attempts.values()))
    rows: list[Row] = []
    if study.attempts:
        rows = [
            {"part": name, "what": what, "seconds": found.seconds[name]}
            | {"share": _share(found.seconds[name], found.total)}
            for name, what in goodput.PARTS.items()
        ]
    columns = (
        text("part", "part"),
        text("what the process does", "what"),
        cell("time", "seconds", fmt.duration),
        cell("share", "share", _percent),
    )
    total = {"part": "all", "what": "", "seconds": found.total, "share": 1.0}
    caption = (
        f"{_CAPTION} {_number(found.attempts, 'attempt')} of "
        f"{_number(len(study.attempts), 'run')}; {_number(found.lost_steps, 'step')} "
        f"done again; {_number(found.compiled, 'program')} compiled, of these "
        f"{found.cache_hits} read from the compilation cache."
    )
    return Table("goodput", caption, rows, columns, total if rows else None)


def runs(study: Study) -> Table:
    """The parts of the time of each run that a process has worked at."""
    rows: list[Row] = []
    for run_id, attempts in study.attempts.items():
        found, last = goodput.of_run(attempts), attempts[-1]
        row = {"run_id": run_id, "attempts": found.attempts, "seconds": found.total}
        row |= {"goodput": found.share, "lost_steps": found.lost_steps}
        row |= {name: found.seconds[name] for name in goodput.PARTS}
        row |= {"compiled": found.compiled, "cache_hits": found.cache_hits}
        row |= {"processes": last.processes, "devices": last.devices}
        slowest, own, data = goodput.slowest(last) or (None, None, None)
        row |= {"slowest_process": slowest, "its_host_share": own}
        rows.append(row | {"its_data_share": data})
    columns = (
        text("run", "run_id"),
        cell("attempts", "attempts", fmt.count),
        cell("time", "seconds", fmt.duration),
        cell("goodput", "goodput", _percent),
        *(_seconds(name) for name in goodput.PARTS),
        cell("steps done again", "lost_steps", fmt.count),
        cell("programs compiled", "compiled", fmt.count),
        cell("from the cache", "cache_hits", fmt.count),
        cell("processes", "processes", fmt.count),
        cell("slowest process", "slowest_process", fmt.count),
        cell("its own time", "its_host_share", _percent),
        cell("its wait for data", "its_data_share", _percent),
    )
    caption = (
        f"{_CAPTION} Goodput is the share of STEP. The slowest process of the last "
        "attempt is the one with the most time of its own between steps; beside it, "
        "the share of that and of its waits for data in the time of the steps."
    )
    return Table("goodput_runs", caption, rows, columns)


def _seconds(part: str) -> Column:
    """The time of a part; nothing where it took none."""
    return cell(part, part, lambda x: fmt.duration(x) if x else fmt.NONE)


def _number(count: int, thing: str) -> str:
    return f"{fmt.count(count)} {thing}{'s' * (count != 1)}"


def _share(part: float, all_parts: float) -> float | None:
    return part / all_parts if all_parts else None


def _percent(x: float | None) -> str:
    return fmt.NONE if x is None else f"{100 * x:.1f}%"
