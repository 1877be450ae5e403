"""Checks the library's annotations at every call, by beartype and jaxtyping.

jaxtyping has an import hook too. It also decorates nested functions, anew at every call
of the function around them, and compiles two checkers for each. With it, the tests of
the evaluate stage took four times as long. So this hook decorates the functions of a
module and the methods of its classes, once.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.machinery
import inspect
import sys
import typing

import beartype
import jaxtyping

# Packages whose annotations are checked at every call in the tests.
CHECKED = [
    # Not config.fields: an Experiment may hold wrong values until config.checks ran.
    "scaling_ldm.config.axes",
    "scaling_ldm.config.checks",
    "scaling_ldm.config.command_line",
    "scaling_ldm.config.experiment_dict",
    "scaling_ldm.config.files",
    "scaling_ldm.config.identity",
    "scaling_ldm.config.init_from",
    "scaling_ldm.config.mix",
    "scaling_ldm.config.names",
    "scaling_ldm.config.nested",
    "scaling_ldm.config.objective_kind",
    "scaling_ldm.config.optimizer_checks",
    "scaling_ldm.config.questions",
    "scaling_ldm.config.ranges",
    "scaling_ldm.config.rate_laws",
    "scaling_ldm.config.reads",
    "scaling_ldm.config.run_names",
    "scaling_ldm.config.shapes",
    "scaling_ldm.data",
    "scaling_ldm.diffusion",
    "scaling_ldm.evaluation",
    "scaling_ldm.flops",
    "scaling_ldm.frontier",
    "scaling_ldm.laws",
    "scaling_ldm.metrics",
    "scaling_ldm.models",
    "scaling_ldm.records",
    "scaling_ldm.report",
    "scaling_ldm.stages",
    "scaling_ldm.study",
    "scaling_ldm.training",
    "scaling_ldm.workdir",
]
# An int may be given where float is written, as type checkers have it (PEP 484).
_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


_on = True


@contextlib.contextmanager
def unchecked():
    """Nothing is checked inside; for tests that give what would be refused."""
    global _on
    _on = False
    try:
        yield
    finally:
        _on = True


def check(function):
    """The function, with its annotations checked; a dataclass, with its fields checked.

    Sizes that have one name in several arguments must be equal.
    """
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function):
            init = function.__init__
            # An inherited field is annotated with names of its own module.
            with contextlib.suppress(NameError):
                init.__annotations__ |= typing.get_type_hints(function)
            function.__init__ = check(init)
        return function
    checked = _beartype(function)
    if _has_arrays(function):
        checked = jaxtyping.jaxtyped(checked, typechecker=None)

    @functools.wraps(function)
    def either(*args, **kwargs):
        __tracebackhide__ = True
        return (checked if _on else function)(*args, **kwargs)

    return either


def _has_arrays(function):
    """Whether its annotations have arrays of jaxtyping; True if they are not known."""
    try:
        kinds = list(typing.get_type_hints(function).values())
    except NameError:
        return True
    for kind in kinds:
        if inspect.isclass(kind) and issubclass(kind, jaxtyping.AbstractArray):
            return True
        kinds.extend(typing.get_args(kind))
    return False


class _Decorate(ast.NodeTransformer):
    """Puts `check` next to each function and around each class."""

    def visit_ClassDef(self, node):
        self.generic_visit(node)
        node.decorator_list.insert(0, self._check(node))
        return node

    def visit_FunctionDef(self, node):
        node.decorator_list.append(self._check(node))
        return node  # functions inside are left as they are

    def _check(self, node):
        call = ast.parse("__import__('annotations').check", mode="eval").body
        for part in ast.walk(call):
            ast.copy_location(part, node)
        return call


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if not any(f"{name}.".startswith(f"{package}.") for package in self.packages):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(
            spec.loader, importlib.machinery.SourceFileLoader
        ):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install(packages):
    """Modules of these packages are checked that are imported from now on."""
    sys.meta_path.insert(0, _Finder(packages))
