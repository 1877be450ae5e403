"""The direction of imports: who may see whom, and who alone may see a package."""

import ast
import pathlib
import subprocess
import sys

import pytest

import scaling_ldm

ROOT = pathlib.Path(scaling_ldm.__file__).parent

# Lower layers first; a module may import its own layer (acyclically) and those below.
LAYERS = (
    {"config", "records"},
    {
        "shapes",
        "attention",
        "layers",
        "metrics",
        "flops",
        "jaxpr_ops",
        "peaks",
        "noise",
        "prediction",
        "denoisers",
        "encoders",
        "objectives",
        "samplers",
        "weights",
    },
    {
        "claim",
        "mesh",
        "optim",
        "checkpoint",
        "meters",
        "frozen",
        "data",
        "networks",
        "tasks",
        "step",
        "programs",
        "finished",
        "exported",
        "sampling",
    },
    {
        "plan",
        "encode",
        "export",
        "train",
        "generate",
        "evaluate",
        "fit",
        "minima",
        "surface",
        "laws",
        "frontier",
        "advise",
        "report",
    },
    {"study"},
    {"main"},
)
STAGES = (
    "plan",
    "encode",
    "train",
    "generate",
    "evaluate",
    "fit",
    "export",
    "advise",
    "report",
)

SOLE = {
    "ml_collections": {"config", "main", "study"},
    "absl": {"main"},
    "flax": {"denoisers", "encoders", "layers"},
    "optax": {"optim"},
    "safetensors": {"weights"},
    "huggingface_hub": {"weights"},
    "transformers": {"encoders", "weights"},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "array_record": {"data"},
    "fsspec": {"data"},
    "pyarrow": {"data"},
    "clu": {"meters"},
    "tensorboardX": {"meters"},
    "matplotlib": {"report"},
    "torch": set(),
    "diffusers": set(),
    "tensorflow": {"metrics"},
    "tensorflow_gan": {"metrics"},
}


def modules():
    return {
        path: path.relative_to(ROOT).parts[0].removesuffix(".py")
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "__init__.py" or path.parent != ROOT
    }


def imports(path):
    """(top-level package, our module or None) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == "scaling_ldm" else None


def layer(module):
    found = [i for i, members in enumerate(LAYERS) if module in members]
    assert found, f"scaling_ldm.{module} has no layer: give it one in LAYERS"
    return found[0]


def test_no_module_looks_up():
    for path, module in modules().items():
        for _, other in imports(path):
            if other and other != module:
                assert layer(other) <= layer(module), f"{path} imports {other}"


def test_imports_are_acyclic():
    edges = {}
    for path, module in modules().items():
        edges.setdefault(module, set()).update(
            other for _, other in imports(path) if other and other != module
        )
    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for other in edges.get(module, ()):
                visit(other, [*trail, module])
            done.add(module)

    for module in edges:
        visit(module, [])


def test_stages_do_not_import_one_another():
    for path, module in modules().items():
        if module in STAGES:
            others = {other for _, other in imports(path)} & set(STAGES) - {module}
            assert not others, f"{path} imports {others}"


def test_packages_have_their_sole_importers():
    for path, module in modules().items():
        for package, _ in imports(path):
            if package in SOLE:
                assert module in SOLE[package], f"{path} imports {package}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("scaling_ldm.config", ("jax",)),
        ("scaling_ldm.records", ("jax", "numpy")),
        ("scaling_ldm.fit", ("jax",)),
        ("scaling_ldm.frontier", ("jax",)),
        ("scaling_ldm.advise", ("jax",)),
        ("scaling_ldm.report", ("jax",)),
        ("scaling_ldm.study", ("jax",)),
        ("scaling_ldm.meters", ("jax",)),
        ("scaling_ldm.metrics.frechet", ("jax", "tensorflow")),
        ("scaling_ldm.samplers", ("flax", "orbax", "grain", "tensorflow")),
        ("scaling_ldm.train", ("tensorflow", "torch", "matplotlib")),
    ],
)
def test_importing_stays_light(module, absent):
    code = (
        f"import sys, {module}\n"
        f"found = [m for m in {absent!r} if m in sys.modules]\n"
        "assert not found, found\n"
        "if 'jax' in sys.modules:\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_main_has_no_logic():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 65
