"""Writes the pages of docs/ that repeat the code: fields, records and public names.

    python tools/build_pages.py

The pages are committed, so that they can be read without building the site. A test
compares them with what this script writes. Run it after changing a field of an
experiment, a record, or a public name.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator

from record_meanings import MEANINGS

from scaling_ldm import FUNCTIONS, PUBLIC, config
from scaling_ldm.config import identity as config_identity
from scaling_ldm.config import names as config_names
from scaling_ldm.config import reads

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTICE = (
    "<!-- Written by tools/build_pages.py from the code. Change the code, then run it. "
    "-->\n"
)
RECORD_MODULES = (
    "runs",
    "goodput",
    "measurements",
    "laws",
    "rate_laws",
    "comparison",
    "frontier",
    "compiled",
)
# Packages whose modules are public too, and the modules that others of the same package
# share. Any other package hands on everything public by its own __all__.
OPEN_PACKAGES = ("denoisers", "encoders", "losses", "metrics", "weights")
SHARED_MODULES = {
    "denoisers": ("blocks", "transformer_parts"),
    "encoders": ("blocks", "convolutions", "features"),
    "weights": ("batch_norm", "blocks", "files", "layout", "stacks"),
}
# What a public function returns, as (module, class).
RETURNED = {"load": (("scaling_ldm.training.loaded_model", "LoadedModel"),)}
SINGLE_MODULES = {"flops": ("peaks",), "records": ("errors",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentedField:
    """One field of a dataclass as its source text says it."""

    name: str
    type: str
    default: str  # empty where there is none
    comment: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentedClass:
    """One dataclass as its source text says it."""

    name: str
    doc: str
    fields: tuple[DocumentedField, ...]


def dataclasses_of(path: pathlib.Path) -> list[DocumentedClass]:
    """The dataclasses of a module, with the comments of their fields.

    A field's comment stands behind it, or on lines of its own above it.
    """
    source = path.read_text(encoding="utf-8")
    trailing: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            whole = not source.splitlines()[line - 1][:column].strip()
            (alone if whole else trailing)[line] = token.string.lstrip("# ").rstrip()
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        rows = []
        for entry in node.body:
            if not isinstance(entry, ast.AnnAssign):
                continue
            lines, above = [], entry.lineno - 1
            while above in alone:
                lines.insert(0, alone[above])
                above -= 1
            inside = range(entry.lineno, entry.end_lineno + 1)
            lines += [trailing[n] for n in inside if n in trailing]
            rows.append(
                DocumentedField(
                    name=ast.unparse(entry.target),
                    type=ast.unparse(entry.annotation),
                    default=ast.unparse(entry.value) if entry.value else "",
                    comment=" ".join(lines),
                )
            )
        if rows:
            doc = ast.get_docstring(node) or ""
            found.append(DocumentedClass(name=node.name, doc=doc, fields=tuple(rows)))
    return found


def _names(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _with_names(comment: str, choices: Iterable[str] | None) -> str:
    """A comment in which the name of a table is replaced by the table's names."""

    def names_of(match: re.Match[str]) -> str:
        value = getattr(config_names, match[0], None)
        if isinstance(value, (tuple, dict)):
            return _names(value)
        return str(value) if value is not None else match[0]

    shown = re.sub(r"\b[A-Z][A-Z0-9_]{4,}\b", names_of, comment)
    listed = [name for name in choices or () if f"`{name}`" in shown]
    if choices is None or len(listed) > 1:
        return shown
    return f"{shown}{'; ' if shown else ''}one of {_names(choices)}"


def _conditions(field: str) -> list[str]:
    """When the field is read, a clause for each choice that decides it."""
    found = []
    for choice, table in reads.READERS.items():
        every = tuple(config_names.CHOICES[choice])
        others = [name for name in every if name not in table.get(field, every)]
        if choice == field or not others:
            continue
        if len(others) < len(every) / 2:
            found.append(f"Not read with `{choice}` = {_names(others)}")
        else:
            found.append(f"Read only with `{choice}` = {_names(table[field])}")
    return found


def _section(section: str, found: DocumentedClass) -> list[str]:
    """The part of docs/config.md about the fields of one section."""
    wheres = [f"{section}.{field.name}" for field in found.fields]
    clauses = [_conditions(where) for where in wheres]
    common = [
        clause
        for clause in dict.fromkeys(itertools.chain(*clauses))
        if sum(clause in each for each in clauses) > len(wheres) / 2
    ]
    out = [f"## config.{section}\n"]
    if common:
        said = " and ".join(c[0].lower() + c[1:] for c in common)
        out.append(f"Unless a row says otherwise, a field here is {said}.\n")
    out.append("| field | type | default | meaning |\n|---|---|---|---|")
    for field, where, each in zip(found.fields, wheres, clauses, strict=True):
        parts = [_with_names(field.comment, config_names.CHOICES.get(where))]
        parts += [clause for clause in each if clause not in common]
        if common and not each:
            parts.append("Always read")
        meaning = ". ".join(part.rstrip(".") for part in parts if part)
        cells = (f"`{field.name}`", f"`{field.type}`", f"`{field.default}`")
        out.append("| " + " | ".join(_cell(c) for c in (*cells, meaning)) + " |")
    out.append("")
    return out


def config_page() -> str:
    """docs/config.md: every field of an experiment."""
    out = ["# Config reference\n\n" + NOTICE]
    out.append(
        "An experiment is a file with a function `get_config()`, which returns "
        "`scaling_ldm.config.default()` with a few fields changed. Every field can be "
        "set from the command line, too: `--config.train.batch_size=512`. A tuple is "
        "written in quotes: `--config.data.shape='(8, 8, 4)'`.\n\n"
        "An unknown field, a wrong type or a value out of range is refused before "
        "anything runs, and one message lists all such problems. A field that was "
        "changed but that nothing reads under the chosen architecture, schedule, "
        'source and so on is refused as well. The column "meaning" says which choices '
        "read it.\n"
    )
    classes = {
        found.name: found
        for module in ("fields", "fields_answers", "fields_devices")
        for found in dataclasses_of(ROOT / f"scaling_ldm/config/{module}.py")
    }
    experiment = classes.pop("Experiment")
    sections = [f for f in experiment.fields if f.type in classes]
    out.append("| section | what it decides |\n|---|---|")
    first = {
        "data": "where pictures and captions come from, and their shape",
        "encode": "frozen networks that turn pictures and captions into records",
        "model": "which network, apart from its size",
        "objective": "noise schedule, prediction, weighting, distribution of t",
        "optimizer": "learning rate, AdamW, clipping, averages",
        "plan": "budgets and sizes: which runs there are, and their stated hardware",
        "train": "batch size, seed, checkpoints, logs",
        "validation": "the held-out loss that is fitted",
        "mesh": "devices: copies and shards of the parameters",
        "generate": "which pictures to draw, from which weights",
        "evaluate": "which numbers of image quality to measure",
        "frontier": "the grid of samplers, steps and guidances",
        "advise": "a question about a sampler, or about a run to train",
        "compile": "devices that are not here, and what is compiled for them",
        "fit": "which metrics and which size the laws are about",
        "compare": "whose laws are held against each other",
        "report": "published laws that the report shows",
    }
    for section in sections:
        said = first[section.name]
        out.append(f"| [`config.{section.name}`](#config{section.name}) | {said} |")
    out.append(
        "\n`config.name` names the study and its default working directory; "
        "`config.question` is printed at the head of the report.\n"
    )
    for section in sections:
        out += _section(section.name, classes[section.type])
    out.append("## Renamed fields\n")
    out.append(
        "An old name is still read, with a line that says the new one. Working "
        "directories made under the old name continue.\n"
    )
    out.append("| old name | name today |\n|---|---|")
    for (section, field), old in config_identity.FIRST_NAMES.items():
        out.append(f"| `{section}.{old}` | `{section}.{field}` |")
    out.append("\n## Stages\n")
    out.append(
        f"`--stages` takes some of {_names(config.STAGES)}, which are the default, "
        f"and {_names(config.STAGES_ON_REQUEST)}, which run only when they are named. "
        "They always run in this order.\n"
    )
    return "\n".join(out)


def meaning(record: str, field: DocumentedField) -> str:
    """What a field of a record means: its comment, else a row of MEANINGS."""
    own = MEANINGS.get(f"{record}.{field.name}", MEANINGS.get(field.name, ""))
    return field.comment or own


def records_page() -> str:
    """docs/records.md: every record and its fields."""
    out = ["# Records\n\n" + NOTICE]
    out.append(
        "A record is a frozen dataclass of `scaling_ldm.records`. In a file it is one "
        "JSON object with its class name under `record`. Tuples are lists. A number "
        "that is not finite is the string `nan`, `inf` or `-inf`. The outermost "
        "object says the version of its schema under `version`. "
        "`scaling_ldm.records.loads` reads one line, `read_jsonl` a file. "
        "[Files of a working directory](files.md) says which file holds which record.\n"
    )
    for module in RECORD_MODULES:
        path = ROOT / f"scaling_ldm/records/{module}.py"
        for found in dataclasses_of(path):
            out.append(f"## {found.name}\n")
            out.append(f"{found.doc}\n")
            out.append("| field | type | meaning |\n|---|---|---|")
            for field in found.fields:
                kind = field.type
                kind += f" = {field.default}" if field.default else ""
                cells = (f"`{field.name}`", f"`{kind}`", meaning(found.name, field))
                out.append("| " + " | ".join(_cell(c) for c in cells) + " |")
            out.append("")
    return "\n".join(out)


def members(module: str) -> list[str]:
    """The public names of a module: its __all__, else what it defines, in order.

    A module without __all__ documents its functions and classes, not its constants.
    """
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = (node.name for node in body if isinstance(node, kinds))
    return [name for name in found if not name.startswith("_")]


def submodules(name: str) -> list[str]:
    """The modules of a public package that are public too."""
    if name not in OPEN_PACKAGES:
        return list(SINGLE_MODULES.get(name, ()))
    folder = ROOT / PUBLIC[name].replace(".", "/")
    found = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
    return [module for module in found if module not in SHARED_MODULES.get(name, ())]


def documented_modules() -> Iterator[tuple[str, str]]:
    """(public name, module) of everything that the API reference shows."""
    for name, module in sorted(PUBLIC.items()):
        yield name, module
        for submodule in submodules(name):
            yield name, f"{module}.{submodule}"


def api_pages() -> dict[str, str]:
    """Path below docs/ -> text: a page per public name, and their index."""
    pages: dict[str, list[str]] = {}
    for name, module in documented_modules():
        lines = pages.setdefault(f"api/{name}.md", [f"# {name}\n\n{NOTICE}"])
        top = module == PUBLIC[name]
        if not top:
            shown = module.removeprefix(PUBLIC[name] + ".")
            lines.append(f"## {name}.{shown}\n")
        else:
            lines.append(f"`from scaling_ldm import {name}` (it is `{module}`)\n")
        listed = members(module)
        shown = [member for member in listed if not member.isupper()]
        lines.append(f"::: {module}")
        lines.append("    options:")
        lines.append(f"      heading_level: {2 if top else 3}")
        lines.append("      members:" if shown else "      members: []")
        lines += [f"        - {member}" for member in shown]
        lines.append("")
        for member in (member for member in listed if member.isupper()):
            lines.append(f"::: {module}.{member}")
            lines.append("    options:")
            lines.append(f"      heading_level: {2 if top else 3}")
            lines.append("      show_root_heading: true")
            lines.append("      show_root_toc_entry: true")
            lines.append("")
    for name, module in sorted(FUNCTIONS.items()):
        lines = pages.setdefault(f"api/{name}.md", [f"# {name}\n\n{NOTICE}"])
        lines.append(f"`scaling_ldm.{name}` (it is in `{module}`)\n")
        for path, member in ((module, name), *RETURNED.get(name, ())):
            lines.append(f"::: {path}\n    options:\n      heading_level: 2")
            lines.append(f"      members:\n        - {member}\n")
    index = ["# Public names\n\n" + NOTICE]
    index.append(
        "These names can be imported from `scaling_ldm`. Each is loaded when it is "
        "asked for. What these pages do not show is private and may change without a "
        "notice.\n"
    )
    index.append("| name | module | what it is |\n|---|---|---|")
    for name, module in sorted((PUBLIC | FUNCTIONS).items()):
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        line = " ".join(doc.split("\n\n")[0].split())
        index.append(f"| [`{name}`]({name}.md) | `{module}` | {_cell(line)} |")
    pages["api/index.md"] = [*index, ""]
    return {path: "\n".join(lines) for path, lines in pages.items()}


def pages() -> dict[pathlib.Path, str]:
    """Every generated page: where it is, and its text."""
    found = {DOCS / "config.md": config_page(), DOCS / "records.md": records_page()}
    return found | {DOCS / path: text for path, text in api_pages().items()}


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
