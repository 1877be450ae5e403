"""The public names: imported when asked for, light, and known to type checkers."""

import ast
import pathlib
import subprocess
import sys

import pytest

import scaling_ldm

# Imported by some stages, and slow to import or in need of a device.
HEAVY = (
    "clu",
    "grain",
    "matplotlib",
    "optax",
    "orbax",
    "tensorboardX",
    "tensorflow",
    "torch",
    "transformers",
)


def imported_by(code):
    """Names of the modules that are loaded after the code ran in a fresh process."""
    code += (
        "\nimport sys"
        "\nif 'jax' in sys.modules:"
        "\n    from jax._src import xla_bridge"
        "\n    assert not xla_bridge.backends_are_initialized()"
        "\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_none_of_its_folders():
    loaded = imported_by("import scaling_ldm; dir(scaling_ldm)")
    assert {name for name in loaded if name.startswith("scaling_ldm.")} == set()
    assert not {"jax", "numpy", *HEAVY} & loaded


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("noise", "samplers"), id="two", marks=pytest.mark.slow),
        pytest.param(
            ("flops", "fit", "frontier", "denoisers", "encoders", "weights", "metrics"),
            id="more",
            marks=pytest.mark.slow,
        ),
        pytest.param(tuple(scaling_ldm.PUBLIC), id="all"),
    ],
)
def test_public_names_load_no_heavy_package_and_touch_no_device(names):
    loaded = imported_by(f"from scaling_ldm import {', '.join(names)}")
    assert {scaling_ldm.PUBLIC[name] for name in names} <= loaded
    assert not set(HEAVY) & loaded


@pytest.mark.parametrize("name", scaling_ldm.PUBLIC)
def test_a_public_name_is_its_module_and_is_listed(name):
    assert getattr(scaling_ldm, name).__name__ == scaling_ldm.PUBLIC[name]
    assert name in dir(scaling_ldm) and name in scaling_ldm.__all__


@pytest.mark.parametrize("name", scaling_ldm.FUNCTIONS)
def test_a_public_function_is_that_of_its_module_and_is_listed(name):
    function = getattr(scaling_ldm, name)
    assert (function.__module__, function.__name__) == (
        scaling_ldm.FUNCTIONS[name],
        name,
    )
    assert name in dir(scaling_ldm) and name in scaling_ldm.__all__


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(
        AttributeError, match="no attribute 'sampler'; it has averages, config, "
    ):
        _ = scaling_ldm.sampler


def test_type_checkers_see_the_same_names():
    tree = ast.parse(pathlib.Path(scaling_ldm.__file__).read_text())
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("scaling_ldm")
        for alias in node.names
    }
    functions = {n: f"{module}.{n}" for n, module in scaling_ldm.FUNCTIONS.items()}
    assert seen == scaling_ldm.PUBLIC | functions
