"""Records: one JSON line each, read back equal, or refused."""

import json
import math
import pathlib

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
    refusal = records.Refusal(quantity="x", reason="y", detail="z")
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
    refusal = records.Refusal(quantity="nan", reason="inf", detail="-inf")
    assert records.loads(records.dumps(refusal)) == refusal


# Lines of the first version, which had one text `what` in place of three fields.
OLD = '{"record": "Refusal", "what": "%s", "reason": "r", "detail": "d"}'


@pytest.mark.parametrize(
    ("what", "quantity", "budget", "group"),
    [
        ("isoFLOP minimum at 1.6e+09 FLOPs", "isoFLOP minimum", 1.6e9, ""),
        ("power law of N_opt against budget_flops", "N_opt", None, ""),
        ("prediction of L_opt at 2e+11 FLOPs", "L_opt held out", 2e11, ""),
        (
            "parametric surface E + A/N^alpha + B/D^beta",
            "parametric surface",
            None,
            "",
        ),
        ("4M over 2M (dpm)", "crossing", None, "4M over 2M, dpm"),
        (
            "64 x 3 over 40 x 2 (all samplers, seconds)",
            "crossing",
            None,
            "64 x 3 over 40 x 2, all samplers, seconds",
        ),
        ("advice within 0.001 s", "advice within 0.001 s", None, ""),
    ],
)
def test_a_refusal_of_the_first_version_is_read(what, quantity, budget, group):
    found = records.loads(OLD % what)
    assert found == records.Refusal(
        quantity=quantity, budget_flops=budget, group=group, reason="r", detail="d"
    )
    assert records.loads(records.dumps(found)) == found


def test_laws_of_the_first_version_are_read():
    """`first_version_laws.json` is a file as that version wrote it."""
    path = pathlib.Path(__file__).parent / "first_version_laws.json"
    (found,) = records.read_jsonl(path)
    assert [p.budget_flops for p in found.parabolas] == [1.6e9, 2.4e9, 3.6e9]
    assert {p.quantity for p in found.parabolas} == {"isoFLOP minimum"}
    assert found.parabolas[0].detail.startswith("vertex at 1274 parameters")
    assert {name: law.quantity for name, law in found.laws.items()} == {
        name: name for name in ("N_opt", "D_opt", "L_opt")
    }
    assert found.parametric.quantity == "parametric surface"


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
