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
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "architecture.md"


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
def imports(path):
    """(package, our folder or None, our module or None) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        full = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in full:
            parts = name.split(".")
            ours = parts[0] == "scaling_ldm"
            found.append(
                (parts[0], parts[1], ".".join(parts[1:3]))
                if ours
                else (parts[0], "", "")
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


def test_no_two_modules_import_each_other():
    edges = {}
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        edges[name] = {
            ".".join(target.split(".")) for _, _, target in imports(path) if target
        }
    for name, targets in edges.items():
        for target in targets:
            assert name not in edges.get(target, ()), f"{name} <-> {target}"


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


def test_every_folder_says_what_it_may_import():
    for folder in FOLDERS:
        path = ROOT / folder / "__init__.py"
        if path.exists():
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "May import" in text, f"{path} does not say what it may import"


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


def test_files_and_functions_are_short():
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 400, path
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
    ("scaling_ldm.report", ("jax", "flax", "matplotlib.pyplot")),
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
