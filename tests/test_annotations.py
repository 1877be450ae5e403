"""The annotations of the library are checked in the tests, and the check can fail."""

import pathlib
import sys

import annotations
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

import scaling_ldm
from scaling_ldm import records
from scaling_ldm.training import optimizer

SOURCE = """
from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


def product(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "D"]) -> int:
    def half(x: int):
        return x / 2

    return half("4") if len(a) == 7 else len(a)


@dataclasses.dataclass(frozen=True)
class Point:
    x: float

    def moved(self, by: float) -> str:
        return self.x + by
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "annotated_module.py").write_text(SOURCE)
    annotations.install(["annotated_module"])
    finder = sys.meta_path[0]
    sys.path.insert(0, str(folder))
    try:
        import annotated_module

        yield annotated_module
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(finder)


def test_a_wrong_argument_a_wrong_size_and_a_wrong_result_are_errors(module):
    a = np.ones((2, 3))
    assert module.product(a, np.ones(3)) == 2
    for wrong in (np.ones(4), np.ones(3, np.int32), None):
        with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
            module.product(a, wrong)
    with pytest.raises(BeartypeCallHintViolation):
        module.Point("1")
    with pytest.raises(BeartypeCallHintViolation):
        module.Point(1.0).moved(2.0)


def test_an_int_is_a_float_and_a_nested_function_is_not_checked(module):
    assert module.Point(1).x == 1
    with pytest.raises(TypeError, match="unsupported operand"):
        module.product(np.ones((7, 3)), np.ones(3))


def test_the_library_is_checked():
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError)):
        optimizer.learning_rate("1", 1.0, 2.0)
    with pytest.raises(BeartypeCallHintViolation):
        records.Interval(low="1", high=2.0, level=0.9)


def test_every_module_with_functions_is_checked_but_two():
    root = pathlib.Path(scaling_ldm.__file__).parent
    modules = {
        ".".join(("scaling_ldm", *path.relative_to(root).with_suffix("").parts))
        for path in root.rglob("*.py")
    }
    unchecked = {
        module.removesuffix(".__init__")
        for module in modules
        if not any(f"{module}.".startswith(f"{name}.") for name in annotations.CHECKED)
    }
    # An Experiment may hold wrong values until config.checks ran.
    assert unchecked == {
        "scaling_ldm",
        "scaling_ldm.main",
        "scaling_ldm.config",
        "scaling_ldm.config.fields",
        "scaling_ldm.config.fields_answers",
        "scaling_ldm.config.fields_devices",
    }
