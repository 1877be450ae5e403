"""The range of every number of an experiment, and names: walked, not listed."""

import dataclasses
import math
import pathlib
import time

import jax
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.config import command_line, files, ranges

PAIRS = {"data.mix", "data.parts", "plan.axes", "plan.axes_only"}
# The type of an element of each tuple that is empty by default.
EMPTY = {
    "report.published": str,
    "compare.studies": str,
    "compare.groups": str,
    "compare.budgets": float,
    "train.checkpoint_flops": float,
    "optimizer.rate_law_constants": float,
    "optimizer.rate_law_at": float,
    "train.init_exceptions": str,
    "generate.captions": str,
    "fit.protocols": str,
    "evaluate.held_out": str,
}


def _fields():
    """(section, name, default) of every field but those of pairs."""
    for section, part in vars(config.Experiment()).items():
        if dataclasses.is_dataclass(part):
            for name, value in vars(part).items():
                if f"{section}.{name}" not in PAIRS:
                    yield section, name, value


def _holding(number, value, where):
    """`value` with one of its numbers replaced; None: it has none of this type."""
    if isinstance(value, tuple):
        if not value:
            return (number,) if EMPTY[where] is type(number) else None
        first = _holding(number, value[0], where)
        return None if first is None else (first, *value[1:])
    return number if type(value) is type(number) else None


def _said(section, name, value):
    """What is refused, or "" if all is well."""
    c = config.default().to_dict()
    c[section][name] = value
    try:
        config.resolve(c)
    except config.ConfigError as e:
        return str(e)
    return ""


def _with(number):
    """("section.name", what is said) of every field with one of its numbers changed."""
    for section, name, default in _fields():
        where = f"{section}.{name}"
        value = _holding(number, default, where)
        if value is not None:
            yield where, _said(section, name, value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_field_takes_a_number_that_is_not_finite(number):
    found = dict(_with(number))
    assert len(found) > 30 and "frontier.guidances" in found
    for where, said in found.items():
        assert f"config.{where} = {number}: must be finite" in said, where


def test_no_field_takes_an_int_that_is_no_float():
    assert "must be finite" in _said("optimizer", "eps", 10**400)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "mix", {"own": math.nan, "prior": 1.0}),
        ("plan", "axes", {"optimizer.learning_rate": (1e-3, math.inf)}),
        ("plan", "axes", {"train.seed,optimizer.eps": ((0, math.nan), (1, 1e-8))}),
    ],
)
def test_pairs_have_finite_numbers(section, name, value):
    assert "must be finite" in _said(section, name, value)


def test_every_whole_number_has_an_upper_end():
    """A number that is too large for int32 is refused with the largest one."""
    found = dict(_with(2**63))
    assert len(found) > 35 and "plan.sizes" in found
    for where, said in found.items():
        assert f"config.{where} = " in said, where
        assert (
            "at most 2147483647" in said
            or "must lie in" in said
            or ("at most 1099511627776" in said)
        ), said


@pytest.mark.parametrize("number", [1e39, -1e39, 1e-39])
def test_what_a_device_computes_with_is_a_float32(number):
    """np.float32 makes 1e39 infinite, and a device that has no denormals 1e-39 zero."""
    found = dict(_with(number))
    for where in ("optimizer.eps", "objective.time_scale", "frontier.guidances"):
        lines = found[where].splitlines()
        (line,) = [line for line in lines if "a float32 is 0, or between" in line]
        assert f"config.{where} = " in line and str(number) in line
    assert "float32" not in found["plan.expected_coef"]  # of the host alone


@pytest.mark.parametrize("n", [*range(1, 200), 2**20, 3 * 2**16])
def test_divisors_are_all_of_them(n):
    assert ranges.divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        (
            "plan",
            {"sizes": ((2 * 10**9 + 3, 1),)},
            "common divisors of all widths: 1, ",
        ),
        (
            "train",
            {"batch_size": 2**31 - 1, "microbatch": 7},
            "does not divide config.train.batch_size = 2147483647; nearest: 1 or",
        ),
        (
            "data",
            {"shape": (10**6, 10**6, 3)},
            "a network has a table of at most 16,777,216",
        ),
    ],
)
def test_sizes_that_cannot_be_held_are_refused_at_once(section, changed, said):
    """Without a loop up to the number, and without an array of it."""
    c = config.default().to_dict()
    c[section].update(changed)
    begin = time.process_time()
    with pytest.raises(config.ConfigError) as refused:
        config.resolve(c)
    assert said in str(refused.value)
    assert time.process_time() - begin < 5


def test_seeds_are_those_that_the_generator_tells_apart():
    seeds = [where for where, _ in _with(1) if where.endswith(".seed")]
    assert len(seeds) == 6
    for where in seeds:
        section, name = where.split(".")
        assert "must lie in [0, 4294967295]" in _said(section, name, 2**32), where
        assert "must lie in [0, 4294967295]" in _said(section, name, -1), where
        assert "must lie in" not in _said(section, name, ranges.LARGEST_SEED), where
    first, again = (jax.random.key_data(jax.random.key(s)) for s in (0, 2**32))
    np.testing.assert_array_equal(first, again)  # why


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../up", "a/b", "a\\b", "/tmp", ".hidden", "a\n", "a" * 201],
)
def test_a_name_is_the_name_of_a_folder(name):
    c = config.default()
    c.name = name
    with pytest.raises(config.ConfigError, match="the name of a folder"):
        config.resolve(c)


@pytest.mark.parametrize("name", ["tiny", "study of 2026, v1.2", "étude", "a..b"])
def test_names_of_folders_are_names(name):
    c = config.default()
    c.name = name
    assert config.resolve(c).name == name


def test_of_a_field_that_is_given_twice_the_last_value_is_taken():
    _, rest = command_line.split(
        [
            "--config.plan.budgets_flops=(1e9,)",
            "--run=3",
            "--config.plan.budgets_flops",
            "(2e9, 3e9)",
            "--config.train.seed=1",
            "--config.train.seed=2",
        ]
    )
    assert rest == [
        "--config.plan.budgets_flops=(2e9, 3e9)",
        "--config.train.seed=2",
        "--run=3",
    ]
    with pytest.raises(config.ConfigError, match=r"give --config\.train\.seed=VALUE"):
        command_line.split(["--config.train.seed"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("127.0.0.1:1", None, 0), "belong together"),
        (("127.0.0.1", 2, 0), "must be host:port"),
        (("host:1", 0, 0), "--num_processes=0: must be at least 1"),
        (("host:1", 2, 2), "has the processes 0 to 1"),
        (("host:1", 2, -1), "has the processes 0 to 1"),
    ],
)
def test_flags_of_a_job_are_checked(flags, said):
    with pytest.raises(config.ConfigError, match=said):
        command_line.check_job(*flags)


def test_rows_of_the_plan_as_text():
    assert command_line.rows(None) is None
    assert command_line.rows("3") == [range(3, 4)]
    assert command_line.rows("7,0-2") == [range(7, 8), range(3)]
    assert command_line.rows("0-99999999999999999999")[0].stop == 10**20
    for wrong in ("", "x", "-1", "2-", "5-2", "1,,2", "1.0"):
        with pytest.raises(config.ConfigError, match="must be rows of the plan"):
            command_line.rows(wrong)


def test_flags_of_a_job_that_fit():
    command_line.check_job(None, None, None)
    command_line.check_job("host.domain:1234", 2, 1)
    command_line.check_job("[::1]:1234", 1, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config():\n    return {}\n", "returns dict, not a config"),
        ("get_config = 3\n", r"defines no get_config\(\)"),
        ("import sys\n\n\ndef get_config():\n    sys.exit('no')\n", "SystemExit: no"),
        ("def get_config(size):\n    return size\n", "TypeError: get_config"),
    ],
)
def test_an_experiment_file_that_gives_no_config(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(config.ConfigError, match=said) as e:
        config.load(tmp_path / "mine.py")
    assert "mine.py" in str(e.value) and "config/files.py" not in str(e.value)


def test_lines_of_the_library_are_no_lines_of_an_experiment(tmp_path):
    """Not even where the file lies above the library."""
    (tmp_path / "mine.py").write_text("def get_config(size):\n    return size\n")
    with pytest.raises(config.ConfigError) as e:
        config.load(tmp_path / "mine.py")
    above = pathlib.Path(files.__file__).parents[2] / "mine.py"
    assert "files.py" not in files._failure(e.value.__cause__, above)
