"""Records: one JSON line each, read back equal, or refused."""

import json
import math

import pytest

from scaling_ldm import records


def interval(x):
    return records.Interval(low=x - 1, high=x + 1, level=0.9)


def parabola(**changes):
    values = dict(
        budget_flops=1e18,
        points=7,
        curvature=0.1,
        n_opt=1e6,
        d_opt=1e9,
        l_opt=0.5,
        n_opt_interval=interval(1e6),
        d_opt_interval=interval(1e9),
        l_opt_interval=interval(0.5),
        rmse=1e-3,
    )
    return records.Parabola(**(values | changes))


def test_nested_records_round_trip(tmp_path):
    refusal = records.Refusal(what="x", reason="y", detail="z")
    path = tmp_path / "a" / "r.jsonl"
    records.write_jsonl(path, [parabola(), refusal])
    assert records.read_jsonl(path) == [parabola(), refusal]
    assert list(path.parent.iterdir()) == [path]  # no temporary left behind


def test_non_finite_numbers_are_standard_json_and_come_back():
    line = records.dumps(parabola(curvature=math.inf, rmse=math.nan))
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
    back = records.loads(line)
    assert back.curvature == math.inf
    assert math.isnan(back.rmse)


def test_strings_that_look_like_numbers_stay_strings():
    refusal = records.Refusal(what="nan", reason="inf", detail="-inf")
    assert records.loads(records.dumps(refusal)) == refusal


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"record": "Interva", "low": 1}', "unknown record 'Interva'"),
        ('{"record": "Interval", "low": 1, "high": 2}', r"missing \['level'\]"),
        (
            '{"record": "Interval", "low": 1, "high": 2, "level": 0.9, "mean": 1}',
            r"unknown \['mean'\]",
        ),
        ("{", "not a record"),
    ],
)
def test_foreign_lines_are_refused_with_their_place(tmp_path, line, said):
    path = tmp_path / "r.jsonl"
    path.write_text(records.dumps(interval(2.0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=said) as e:
        records.read_jsonl(path)
    assert f"{path}:2" in str(e.value)


def test_digest_is_stable_and_order_free():
    assert records.digest({"a": 1, "b": (2.5, "x")}) == "d8d7111d14e08d03"
    assert records.digest({"b": [2.5, "x"], "a": 1}) == "d8d7111d14e08d03"
    assert records.digest({"a": 2, "b": (2.5, "x")}) != "d8d7111d14e08d03"


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def cut_off(file):
        file.write(b"half")
        raise OSError("no room")

    path = tmp_path / "folder" / "file"
    records.write_file(path, lambda file: file.write(b"whole"))
    with pytest.raises(OSError, match="no room"):
        records.write_file(path, cut_off)
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]
