"""The recipe hash stays what it was; fields that came later leave it as it is."""

import dataclasses
import json
import pathlib

import pytest

from scaling_ldm import config, records, study
from scaling_ldm.config import identity
from scaling_ldm.workdir import exit_status, ownership

ROOT = pathlib.Path(__file__).parents[2]
HASHES = json.loads((ROOT / "tests" / "config" / "recipe_hashes.json").read_text())
MADE = ROOT / "tests" / "data" / "workdirs"
LATER = ("optimizer", "lookahead")  # a field that no version has yet
BEFORE, DEFAULT = (), (0.5,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterOptimizer(config.OptimizerConfig):
    """The optimizer of a later version, whose new field is on by default."""

    lookahead: tuple[float, ...] = DEFAULT


LaterOptimizer.__name__ = config.OptimizerConfig.__name__  # files hold the name


def with_lookahead(experiment, value=DEFAULT):
    """The experiment in a version that has the new field."""
    optimizer = LaterOptimizer(**vars(experiment.optimizer), lookahead=value)
    return dataclasses.replace(experiment, optimizer=optimizer)


@pytest.fixture
def tiny(tiny):
    """The small experiment, resolved."""
    return config.resolve(tiny)


@pytest.fixture
def later(monkeypatch):
    """The table of a version that has the new field."""
    monkeypatch.setitem(identity.SINCE, LATER, BEFORE)


@pytest.fixture
def made(tiny, tmp_path):
    """A working directory of 0.1.0."""
    ownership.register(tiny, tmp_path)
    path = tmp_path / "experiment.json"
    held = json.loads(path.read_text())
    for key in ("version", "seal", "made_by", "made_without"):
        del held[key]
    path.write_text(json.dumps(held, indent=1) + "\n")
    return tmp_path


PUBLISHED = {"autoencoder_f4", "quick_frontier", "quickstart", "tiny"}


@pytest.mark.parametrize("name", HASHES)
def test_the_hash_of_an_experiment_of_0_1_0_is_what_it_was(name, monkeypatch):
    """In its older directories; where numbers are published, in new ones, too."""
    monkeypatch.setattr(config.files.importlib.util, "find_spec", lambda _: None)
    given = config.load(ROOT / "experiments" / f"{name}.py")
    then = config.resolve(given, identity.unknown_to({}))
    assert then.optimizer.averages == ("ema",)
    assert then.recipe_hash == HASHES[name]
    kept = config.resolve(given).optimizer.averages
    assert kept == (
        ("ema",) if name in PUBLISHED else config.OptimizerConfig().averages
    )
    assert (config.resolve(given).recipe_hash == HASHES[name]) == (name in PUBLISHED)


def test_every_field_since_0_1_0_has_a_line():
    """What is in no example of 0.1.0 has a value with which all is as before."""
    path = MADE / "0.1.0" / "workdir" / "experiment.json"
    then = json.loads(path.read_text())["config"]
    now = records.to_json(config.Experiment())
    came = {
        (section, field)
        for section, part in now.items()
        if isinstance(part, dict)
        for field in part.keys() - then.get(section, {}).keys() - {"record"}
    }
    assert came == set(identity.SINCE)
    for section, field in came:
        kind = type(getattr(getattr(config.Experiment(), section), field))
        assert type(identity.SINCE[section, field]) is kind


def test_fields_that_decide_no_number_leave_finished_directories_finished():
    """They are no part of what complete.json compares while they have their default."""
    today = dataclasses.asdict(config.Experiment())
    for section in ("mesh", "compile"):
        left = identity.as_before(today).get(section, {})
        assert {(section, name) for name in left}.isdisjoint(identity.SINCE)


def test_a_later_field_changes_no_hash_while_it_behaves_as_before(tiny, later):
    assert with_lookahead(tiny, BEFORE).recipe_hash == tiny.recipe_hash
    assert with_lookahead(tiny).recipe_hash != tiny.recipe_hash


def test_without_a_line_it_would_change_the_hash(tiny):
    assert with_lookahead(tiny, BEFORE).recipe_hash != tiny.recipe_hash


def test_a_later_section_changes_no_hash_either(monkeypatch):
    """Its last field takes the section with it."""
    before = dataclasses.asdict(config.Experiment())
    monkeypatch.setitem(identity.SINCE, ("news", "a"), 1)
    monkeypatch.setitem(identity.SINCE, ("news", "b"), (2,))
    today = before | {"news": {"a": 1, "b": (2,)}}
    assert identity.recipe_hash(today) == identity.recipe_hash(before)
    today["news"]["b"] = ()
    assert identity.recipe_hash(today) != identity.recipe_hash(before)


def test_an_older_directory_goes_on_with_the_values_of_then(tiny, made, later, capsys):
    today = with_lookahead(tiny)
    for _ in range(2):  # it is written with the new field, and continued again
        found = ownership.register(today, made)
        assert found == with_lookahead(tiny, BEFORE)
        assert found == ownership.as_made(today, made)
        assert found.recipe_hash == tiny.recipe_hash
        said = f"{made} was made by 0.1.0: config.optimizer.lookahead = () as then\n"
        assert capsys.readouterr().err == said
    held = records.read_json(made / "experiment.json")
    assert held["version"] == records.SCHEMA
    assert held["made_by"] == "0.1.0"
    assert held["made_without"] == ["optimizer.lookahead"]
    assert held["config"]["optimizer"]["lookahead"] == []


def test_what_is_set_in_an_older_directory_is_not_replaced(tiny, made, later):
    with pytest.raises(config.ConfigError) as e:
        ownership.register(with_lookahead(tiny, (0.25,)), made)
    assert str(e.value).splitlines()[1:] == [
        "  config.optimizer.lookahead: [] there, [0.25] here"
    ]
    with pytest.raises(config.ConfigError) as e:
        ownership.register(
            dataclasses.replace(with_lookahead(tiny), name="other"), made
        )
    assert "holds another experiment: 'tiny'" in str(e.value)


def test_a_new_directory_begins_with_the_default(tiny, tmp_path, later, capsys):
    today = with_lookahead(tiny)
    for _ in range(2):
        assert ownership.as_made(today, tmp_path) == today
        assert ownership.register(today, tmp_path) == today
    with pytest.raises(config.ConfigError, match="lookahead: .0.5. there, .. here"):
        ownership.register(with_lookahead(tiny, BEFORE), tmp_path)
    assert capsys.readouterr().err == ""


def test_values_of_then_that_do_not_fit_are_refused(tiny, made, later, monkeypatch):
    def needs_it(experiment):
        lookahead = getattr(experiment.optimizer, "lookahead", BEFORE)
        return [] if lookahead else ["config.fit.seed needs lookahead"]

    monkeypatch.setattr(config.files.checks, "problems_of", needs_it)
    with pytest.raises(config.ConfigError, match="seed needs lookahead"):
        ownership.as_made(with_lookahead(tiny), made)


def test_a_field_that_decides_no_numbers_keeps_its_value(tiny, made, monkeypatch):
    """Only the recipe of an older directory is held."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class LaterFit(config.FitConfig):
        weighted: bool = True

    monkeypatch.setitem(identity.SINCE, ("fit", "weighted"), False)
    today = dataclasses.replace(tiny, fit=LaterFit(**vars(tiny.fit)))
    assert ownership.register(today, made) == today


def test_the_stages_use_the_values_of_then(tiny, made, later, monkeypatch, capsys):
    monkeypatch.setattr(config, "resolve", lambda *_: with_lookahead(tiny))
    asked = {"stages": ("plan",), "only": None, "cluster": (None, None, None)}
    assert study.run(None, workdir=str(made), **asked) == exit_status.EXIT["done"]
    plan = records.read_jsonl(made / "runs.jsonl")
    assert {spec.recipe_hash for spec in plan} == {tiny.recipe_hash}
    assert "lookahead = () as then" in capsys.readouterr().err


def test_an_older_directory_goes_on_with_its_ema_and_its_decay(tiny, tmp_path, capsys):
    """Under a file that sets ema_decay and, as in 0.1.0, names no averages."""
    optimizer = dataclasses.replace(tiny.optimizer, ema_decay=0.5)
    ownership.register(dataclasses.replace(tiny, optimizer=optimizer), tmp_path / "w")
    path = tmp_path / "w" / "experiment.json"
    held = json.loads(path.read_text())
    del held["version"], held["seal"], held["made_by"], held["made_without"]
    del held["config"]["optimizer"]["averages"]
    path.write_text(json.dumps(held))
    given = config.to_config_dict(tiny)
    given.optimizer.averages = config.OptimizerConfig().averages
    given.optimizer.ema_decay = 0.5
    asked = {"stages": ("plan",), "only": None, "cluster": (None, None, None)}
    for _ in range(2):
        status = study.run(given, workdir=str(tmp_path / "w"), **asked)
        assert status == exit_status.EXIT["done"]
        said = "was made by 0.1.0: config.optimizer.averages = ('ema',) as then"
        assert said in capsys.readouterr().err
    again = json.loads(path.read_text())
    assert again["recipe_hash"] == held["recipe_hash"]
    assert again["config"]["optimizer"]["averages"] == ["ema"]
    status = study.run(given, workdir=str(tmp_path / "new"), **asked)
    assert status == exit_status.EXIT["bad configuration"]
    said = capsys.readouterr().err
    assert "ema_decay = 0.5 is not read" in said
    assert "To keep that average, set config.optimizer.averages = ('ema',)" in said


def test_a_finished_older_directory_stays_finished(tiny, made, later):
    ownership.mark_complete(tiny, made)
    assert ownership.is_complete(with_lookahead(tiny, BEFORE), made)
    assert not ownership.is_complete(with_lookahead(tiny), made)


def test_a_directory_of_a_newer_version_is_refused(tiny, made, capsys):
    path = made / "experiment.json"
    path.write_text(json.dumps({"version": "0.9.0", "nothing": "known"}))
    asked = {"stages": ("plan",), "only": None, "cluster": (None, None, None)}
    given = config.to_config_dict(tiny)
    status = study.run(given, workdir=str(made), **asked)
    assert status == exit_status.EXIT["bad configuration"]
    assert capsys.readouterr().err == (
        f"error: {path} was written by scaling_ldm 0.9.0 or later; this is "
        f"{records.SCHEMA}: install a newer one\n"
    )
    assert not (made / "runs.jsonl").exists()
