"""Collectives of a compiled program, read from its text (optimised HLO).

A collective in the body of a loop runs once per turn. The number of turns stands beside
the loop, or is the constant that its counter is compared with. If neither is there, one
turn is counted, and the result says so.

On TPUs one collective may be spread over several operations, in each of which its text
stands again. It is counted where it starts.
"""

import collections
import math
import re
from collections.abc import Iterator

from scaling_ldm.records import COLLECTIVES, Collective

# Types whose names do not say their bits.
_BITS = {"pred": 8, "token": 0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\((.*)$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# A loop of JAX counts from 0 while the counter is less than a constant.
_COUNTER = re.compile(r" compare\((.*?)\), direction=LT")
_CONSTANT = re.compile(r"^\s+%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
# A collective that is under way in a fusion, or ends there, has started before.
_STARTS, _ENDS, _UNDER_WAY = (
    '"AsyncCollectiveStart"',
    '"AsyncCollectiveDone"',
    "async_collective_fusion",
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


def collectives(text: str) -> list[Collective]:
    """The collectives of a program by kind and type, the most bytes first.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.

    Raises:
      ValueError: the text has no entry computation.
    """
    bodies, entry = _computations(text)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    nbytes: collections.Counter[tuple[str, str]] = collections.Counter()
    uncertain: set[tuple[str, str]] = set()

    def run(name: str, times: int, known: bool) -> None:
        started_before = _started_before(name, bodies[name])
        for line in bodies[name]:
            for kind, dtype, size in () if started_before else _of(line):
                counts[kind, dtype] += times
                nbytes[kind, dtype] += times * size
                uncertain.update([(kind, dtype)] * (not known))
            for called, turns in _calls(line, bodies):
                if called in bodies:
                    run(called, times * (turns or 1), known and turns is not None)

    run(entry, 1, True)
    found = [
        Collective(
            kind=kind,
            dtype=dtype,
            count=count,
            nbytes=nbytes[kind, dtype],
            at_least=(kind, dtype) in uncertain,
        )
        for (kind, dtype), count in counts.items()
    ]
    return sorted(found, key=lambda one: (-one.nbytes, one.kind, one.dtype))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEAD.match(line):
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return bodies, entry


def _started_before(name: str, lines: list[str]) -> bool:
    """Whether the collective of this computation is one that was started before."""
    text = "\n".join(lines)
    return _ENDS in text or (name.startswith(_UNDER_WAY) and _STARTS not in text)


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int | None]]:
    """The computations that an operation runs, and how often; None: not known."""
    named = dict(_CALLED.findall(line))
    for what, name in named.items():
        yield name, _turns(line, named, bodies) if what == "body" else 1
    if branches := _BRANCHES.search(line):
        for name in branches[1].split(","):
            yield name.strip().lstrip("%"), 1


def _turns(
    line: str, named: dict[str, str], bodies: dict[str, list[str]]
) -> int | None:
    if stated := _TURNS.search(line):
        return int(stated[1])
    condition = bodies.get(named.get("condition", ""), [])
    root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
    if not (compared := _COUNTER.search(root)):
        return None
    for text in condition:
        if constant := _CONSTANT.match(text):
            if constant[1] in re.findall(r"[\w.\-]+", compared[1]):
                return int(constant[2])
    return None


def _of(line: str) -> Iterator[tuple[str, str, int]]:
    """(kind, type, bytes) of each array of a collective, if the line is one."""
    match = _COLLECTIVE.search(line)
    if not match:
        return
    shapes, kind, start = match[1], match[2], match[3]
    if start and kind != "all-reduce":  # (what goes in, what comes out, ...)
        shapes = _second(shapes)
    for dtype, sizes in _ARRAY.findall(shapes):
        size = _nbytes(dtype, sizes)
        if kind == "reduce-scatter":
            size *= _group_size(line)
        yield kind, dtype, size


def _second(shapes: str) -> str:
    """The second entry of a tuple of shapes; of several arrays it is a tuple again."""
    level, entries = 0, [""]
    for character in re.sub(r"/\*.*?\*/", "", shapes).strip()[1:-1]:
        level += (character in "([{") - (character in ")]}")
        if character == "," and not level:
            entries.append("")
        else:
            entries[-1] += character
    return entries[1]


def _nbytes(dtype: str, sizes: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def _group_size(line: str) -> int:
    """How many devices take part together."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if not named:
        raise ValueError(f"no groups of devices in {line.strip()[:200]!r}")
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", named[2]))
