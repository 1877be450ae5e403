"""The direction of imports, as the tables of docs/architecture.md have it."""

import ast
import builtins
import functools
import pathlib
import re
import subprocess
import sys

import pytest

import scaling_ldm

ROOT = pathlib.Path(scaling_ldm.__file__).parent
PROJECT = pathlib.Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "architecture.md"


def table(heading):
    """The rows of the table below a heading, each a list of cells."""
    text = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if "|" in line]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell):
    return re.findall(r"`(\w+)`", cell)


FOLDERS = {
    names(folder)[0]: names(allowed)
    for _, folder, _, allowed in table("The table of folders")
}
SOLE = {
    package: set(names(places))
    for packages, places in table("Who alone imports a package")
    for package in names(packages)
}


def modules():
    """Every module of the library and its folder at the top."""
    return {
        path: path.relative_to(ROOT).parts[0].removesuffix(".py")
        for path in sorted(ROOT.rglob("*.py"))
        if path.parent != ROOT or path.name != "__init__.py"
    }


@functools.cache
def imported(path):
    """The full name of every import in a file: package.module.name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def full_names(path):
    """What a file imports of the library, without the library's own name."""
    ours = "scaling_ldm."
    return [name.removeprefix(ours) for name in imported(path) if name.startswith(ours)]


def imports(path):
    """(package, our folder or "", our module or "") of every import in a file."""
    found = []
    for name in imported(path):
        package, *parts = name.split(".")
        ours = package == "scaling_ldm"
        found.append(
            (package, parts[0], ".".join(parts[:2]))
            if ours
            else (name.split(".")[0], "", "")
        )
    return found


def test_the_table_names_every_folder_and_no_other():
    assert list(FOLDERS) and set(FOLDERS) == set(modules().values())
    assert len(FOLDERS) <= 16


def test_every_row_names_earlier_rows_alone():
    before = []
    for folder, allowed in FOLDERS.items():
        assert set(allowed) <= set(before), f"{folder} may import a row below it"
        before.append(folder)


def test_every_import_stands_in_the_table():
    for path, folder in modules().items():
        for _, other, _ in imports(path):
            if other and other != folder:
                assert other in FOLDERS[folder], f"{path} imports {other}"


def test_every_row_of_the_table_is_used():
    used = {folder: set() for folder in FOLDERS}
    for path, folder in modules().items():
        used[folder] |= {other for _, other, _ in imports(path)}
    for folder, allowed in FOLDERS.items():
        assert set(allowed) <= used[folder], f"{folder}: {set(allowed) - used[folder]}"


def module_name(path):
    """Within the library; that of a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges_between(known):
    """Each module or package -> those that its imports name.

    `from a.b import c` names a.b.c where that is a module, and else a.b.
    """
    edges = {}
    for name, path in known.items():
        edges[name] = set()
        for target in full_names(path):
            while target and target not in known:
                target = target.rpartition(".")[0]
            edges[name] |= {target} - {"", name}
    return edges


def test_no_two_modules_import_each_other():
    known = {module_name(path): path for path in modules()}
    edges = edges_between(known)
    assert "diffusion.samplers.time_grid" in edges["diffusion.samplers.planning"]
    for name, targets in edges.items():
        for target in targets:
            assert name not in edges[target], f"{name} <-> {target}"


def test_stages_do_not_import_one_another():
    for path, folder in modules().items():
        if folder == "stages" and path.name != "__init__.py":
            others = [m for _, other, m in imports(path) if other == "stages"]
            assert not others, f"{path} imports {others}"


def test_packages_have_their_sole_importers():
    for path, folder in modules().items():
        for package, _, _ in imports(path):
            if package in SOLE:
                assert folder in SOLE[package], f"{path} imports {package}"


def said_to_import(text):
    """The folders in "records, flops (peaks)" or in "every folder but report"."""
    if text.startswith("every folder but"):
        return {*FOLDERS} - {*re.findall(r"\w+", text), "stages"}
    if text == "the standard library alone":
        return set()
    return set(re.findall(r"\w+", re.sub(r"\(.*?\)", "", text)))


def test_every_folder_says_what_it_may_import():
    for folder in FOLDERS:
        path = ROOT / folder / "__init__.py"
        if path.exists():
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            said = re.search(r"May\s+import:\s+([^.;]*)", text)
            assert said, f"{path} does not say what it may import"
            assert said_to_import(said[1]) == set(FOLDERS[folder]), path


def test_no_class_name_stands_for_two_things():
    found = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert node.name not in found, (
                    f"{path}, {found[node.name]}: {node.name}"
                )
                found[node.name] = path


def test_every_exception_class_is_in_records():
    """So that each has one place, and its exit status is looked up by class."""
    ours = {
        node.name
        for node in ast.parse((ROOT / "records" / "errors.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    built_in = {
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert "ConfigError" in ours
    for path in modules():
        if path == ROOT / "records" / "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                found = {
                    base
                    for base in bases
                    if base in ours | built_in
                    or base.endswith(("Error", "Exception", "Warning"))
                }
                assert not found, f"{path}: {node.name} is an exception"


# Each folder -> the most lines of a file.
LENGTHS = {ROOT: 400, PROJECT / "tests": 800, PROJECT / "tools": 400}


@pytest.mark.parametrize("folder", LENGTHS, ids=lambda folder: folder.name)
def test_files_and_functions_are_short(folder):
    paths = sorted(folder.rglob("*.py"))
    assert paths
    for path in paths:
        text = path.read_text()
        assert text.count("\n") <= LENGTHS[folder], path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                arguments = given.posonlyargs + given.args + given.kwonlyargs
                assert len(arguments) <= 12, f"{path}: {node.name}"
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name}"


# Each is imported after those before it; what it alone would load is loaded, too.
LIGHT = [
    ("scaling_ldm.records", ("jax", "numpy")),
    ("scaling_ldm.config", ("jax",)),
    ("scaling_ldm.laws.fit", ("jax", "flax", "matplotlib")),
    ("scaling_ldm.frontier", ("jax",)),
    ("scaling_ldm.stages.advise", ("jax",)),
    ("scaling_ldm.stages.fit", ("jax",)),
    ("scaling_ldm.stages.compare", ("jax",)),
    ("scaling_ldm.report", ("jax", "flax", "matplotlib.pyplot")),
    ("scaling_ldm.report.comparison_page", ("jax", "flax", "matplotlib.pyplot")),
    ("scaling_ldm.study", ("jax",)),
    ("scaling_ldm.training.progress", ("jax",)),
    ("scaling_ldm.flops.peaks", ("jax",)),
    ("scaling_ldm.metrics.frechet", ("jax", "tensorflow")),
    ("scaling_ldm.diffusion.samplers", ("flax", "orbax", "grain", "tensorflow")),
]
OTHERS = ("transformers", "torch", "tensorflow", "huggingface_hub")
TRAINING = [
    *(
        (f"scaling_ldm.models.weights.{m}", OTHERS)
        for m in ("hub", "t5", "clip", "bert")
    ),
    ("scaling_ldm.models.encoders.tokenizers", OTHERS),
    ("scaling_ldm.stages.train", ("tensorflow", "torch", "matplotlib")),
]


@pytest.mark.parametrize(
    "imports",
    [LIGHT, TRAINING],
    ids=["light", "training"],
)
def test_importing_stays_light(imports):
    code = (
        "import importlib, sys\n"
        f"for module, absent in {imports!r}:\n"
        "    importlib.import_module(module)\n"
        "    found = [m for m in absent if m in sys.modules]\n"
        "    assert not found, (module, found)\n"
        "if 'jax' in sys.modules:\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_main_has_no_logic():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 65
