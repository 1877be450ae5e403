"""Records: one JSON line each, read back equal, or refused."""

import dataclasses
import json
import math
import pathlib
import re

import pytest
from damages import unsealed

from scaling_ldm import records
from scaling_ldm.data import shards
from scaling_ldm.records import files, upgrade, whole_files

ROOT = pathlib.Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("then", "metric", "weights"),
    [
        ("validation_loss_ema", "loss", "ema"),
        ("validation_loss", "loss", "raw"),
        ("train_loss_smoothed", "train_loss_smoothed", "raw"),
        ("my_own_loss", "my_own_loss", ""),
    ],
)
def test_laws_of_the_first_version_are_read(then, metric, weights):
    """`first_version_laws.json` is a file as that version wrote it."""
    path = pathlib.Path(__file__).parent / "first_version_laws.json"
    line = path.read_text().replace('"validation_loss_ema"', f'"{then}"')
    found = records.loads(line)
    assert (found.metric, found.weights, found.protocol_hash) == (metric, weights, "")
    assert [p.budget_flops for p in found.parabolas] == [1.6e9, 2.4e9, 3.6e9]
    assert {p.quantity for p in found.parabolas} == {"isoFLOP minimum"}
    assert found.parabolas[0].detail.startswith("vertex at 1274 parameters")
    assert {name: law.quantity for name, law in found.laws.items()} == {
        name: name for name in ("N_opt", "D_opt", "L_opt")
    }
    assert found.parametric.quantity == "parametric surface"


def test_the_new_names_of_fields_are_said_once(capfd):
    upgrade._say_once.cache_clear()
    path = pathlib.Path(__file__).parent / "first_version_laws.json"
    for _ in range(2):
        records.loads(path.read_text())
    assert sorted(capfd.readouterr().err.splitlines()) == [
        "a FitResult of 0.1.0: metric is now metric and weights",
        "a Refusal of 0.1.0: what is now quantity, budget_flops and group",
    ]
    records.loads(records.dumps(records.loads(path.read_text())))
    assert capfd.readouterr().err == ""


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


def test_only_the_outermost_object_says_its_version():
    value = json.loads(records.dumps(parabola()))
    assert value.pop("version") == records.SCHEMA
    assert len(value.pop("seal")) == 16
    assert "version" not in json.dumps(value) and "seal" not in json.dumps(value)
    assert records.from_json(value) == parabola()
    line = records.dumps({"a": parabola()})
    assert line.count("version") == line.count("seal") == 1
    assert records.loads(line) == {"a": parabola()}
    for key in ("version", "seal"):
        with pytest.raises(ValueError, match=f"'{key}' is of a file's schema"):
            records.dumps({key: 3})


@pytest.mark.parametrize("n", [1.0, 17, 1e300, float("nan"), "ü", (1, 2.5), None])
def test_what_is_written_is_read_with_its_seal(tmp_path, n):
    records.write_json(tmp_path / "a.json", {"b": {"z": n, "a": n}, "9": n, "10": n})
    held = records.read_json(tmp_path / "a.json", "b")
    assert records.unstamped(held, "") == json.loads(
        json.dumps(records.to_json({"b": {"z": n, "a": n}, "9": n, "10": n}))
    )


def test_keys_that_are_numbers_are_sealed_as_they_are_read():
    held = json.loads(json.dumps(records.stamped({"c": {2: 0, 11: 1}})))
    assert records.version_of(held, "here") == records.SCHEMA


def test_no_bit_of_a_line_changes_unnoticed():
    whole = dataclasses.replace(interval(0.25), high=31.5)
    line = records.dumps(whole).encode()
    for at in range(len(line)):
        for bit in range(8):
            changed = bytearray(line)
            changed[at] ^= 1 << bit
            try:
                found = records.loads(bytes(changed))
            except (records.Damaged, records.NewerVersion):
                continue
            assert found == whole  # a letter of a key of the seal, or of white space


def test_a_changed_file_is_named_and_one_without_a_seal_is_read(tmp_path):
    path = tmp_path / "a.json"
    records.write_json(path, {"a": 125})
    path.write_text(path.read_text().replace("125", "124"))
    with pytest.raises(records.Damaged, match="was changed after it was written") as e:
        records.read_json(path)
    assert str(path) in str(e.value)
    path.write_bytes(unsealed(path.read_bytes()))
    assert records.read_json(path)["a"] == 124
    lines = tmp_path / "a.jsonl"
    records.write_jsonl(lines, [interval(1.0), interval(2.0)])
    lines.write_text(lines.read_text().replace('high": 3.0', 'high": 2.0'))
    with pytest.raises(records.Damaged, match=r"a.jsonl:2: .*changed after it was"):
        records.read_jsonl(lines)


def test_a_json_file_says_its_version(tmp_path):
    path = tmp_path / "a.json"
    records.write_json(path, {"a": (1, 2)})
    held = records.read_json(path)
    assert held["version"] == records.SCHEMA
    assert records.unstamped(held, path) == {"a": [1, 2]}
    for text, said in (("[1]", "is not a JSON object"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(records.Damaged, match=said) as e:
            records.read_json(path)
        assert str(path) in str(e.value)


def test_a_file_of_a_newer_version_names_the_version_that_it_needs(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = records.dumps(interval(1.0)).replace(records.SCHEMA, "12.0.0")
    path.write_text(line + "\n")
    said = (
        f"{path} was written by scaling_ldm 12.0.0 or later; this is "
        f"{records.SCHEMA}: install a newer one"
    )
    for read in (records.read_jsonl, records.read, records.read_json):
        with pytest.raises(records.NewerVersion) as e:
            read(path)
        assert str(e.value) == said
        assert e.value.needed == "12.0.0"


@pytest.mark.parametrize("version", ["0.1.7", "2", "0.1", 1, None, ["0.1.0"]])
def test_a_version_that_never_was_is_damage(version):
    value = json.loads(records.dumps(interval(1.0))) | {"version": version}
    with pytest.raises(records.Damaged, match="known are 0.1.0"):
        records.loads(json.dumps(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterInterval(records.Interval):
    """An interval with fields that came to it later."""

    method: str = "residuals"
    draws: tuple[int, ...] = dataclasses.field(default_factory=tuple)


def test_a_new_field_with_a_default_is_read_from_an_older_file(monkeypatch):
    monkeypatch.setitem(files._RECORDS, "Interval", LaterInterval)
    fields = {"record": "Interval", "low": 1.0, "high": 2.0, "level": 0.9}
    found = records.loads(json.dumps(fields))
    assert found == LaterInterval(low=1.0, high=2.0, level=0.9)
    nested = records.loads(json.dumps({"inside": [fields]}))
    assert nested == {"inside": (found,)}
    # Of the same schema, by a build before the fields; a seal shows what was removed.
    assert records.loads(json.dumps(fields | {"version": records.SCHEMA})) == found
    sealed = json.loads(records.dumps(found))
    with pytest.raises(records.Damaged, match="seal"):
        records.loads(json.dumps({k: v for k, v in sealed.items() if k != "draws"}))
    with pytest.raises(records.Damaged, match=r"missing \['level'\]"):
        records.loads(json.dumps({k: v for k, v in fields.items() if k != "level"}))
    with pytest.raises(records.Damaged, match=r"unknown \['mean'\]"):
        records.loads(json.dumps(fields | {"mean": 1.0}))


def test_an_old_record_goes_through_every_later_version(monkeypatch):
    """The functions of one version apply to its files and to older ones, in turn."""
    monkeypatch.setattr(upgrade, "VERSIONS", ("0.1.0", "0.2.0", "0.3.0"))
    monkeypatch.setattr(upgrade, "SCHEMA", "0.3.0")
    table = {
        "0.1.0": {"Span": lambda f: f | {"record": "Interval", "high": f["low"] + 1}},
        "0.2.0": {"Interval": lambda f: f | {"level": f["high"] / 4}},
    }
    monkeypatch.setattr(upgrade, "UPGRADES", table)
    wanted = records.Interval(low=1, high=2, level=0.5)
    span = {"record": "Span", "low": 1}
    assert records.loads(json.dumps(span)) == wanted
    second = {"version": "0.2.0", "record": "Interval", "low": 1, "high": 2}
    assert records.loads(json.dumps(second)) == wanted
    assert records.loads(json.dumps({"deep": [span]})) == {"deep": (wanted,)}
    with pytest.raises(records.Damaged, match="unknown record 'Span'"):
        records.loads(json.dumps({"version": "0.3.0", **span}))


def test_the_package_is_not_older_than_its_schema():
    found = re.search(r'version="(\d+)\.(\d+)\.(\d+)', (ROOT / "setup.py").read_text())
    assert tuple(map(int, found.groups())) >= upgrade._order(records.SCHEMA)
    assert sorted(upgrade.VERSIONS, key=upgrade._order) == list(upgrade.VERSIONS)
    assert set(upgrade.UPGRADES) <= set(upgrade.VERSIONS[:-1])
    said = {step: set(names) for step, names in upgrade.RENAMED.items()}
    assert said == {step: set(names) for step, names in upgrade.UPGRADES.items()}


def test_a_process_that_ends_leaves_no_half_of_a_file(tmp_path):
    def cut_off(file):
        file.write(b"half")
        assert len(list(tmp_path.iterdir())) == 1
        whole_files.remove_unfinished()
        assert list(tmp_path.iterdir()) == []
        raise SystemExit

    with pytest.raises(SystemExit):
        records.write_file(tmp_path / "a", cut_off)
    with pytest.raises(SystemExit), shards.Store(str(tmp_path)).replace("a") as shard:
        with shard.open("wb") as file:
            cut_off(file)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_two_rows_of_one_run_is_damaged(tmp_path):
    tiny = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"
    specs = records.read_plan(tiny)
    records.write_jsonl(tmp_path / "runs.jsonl", [*specs, specs[1]])
    with pytest.raises(records.Damaged, match=f"the first is {specs[1].run_id}"):
        records.read_plan(tmp_path)
    records.write_jsonl(tmp_path / "runs.jsonl", specs)
    assert records.read_plan(tmp_path) == specs
