"""What an experiment file changes: unknown fields, renamed fields, recipe hashes."""

import copy
import dataclasses
import json
import pathlib

import pytest

from scaling_ldm import config
from scaling_ldm.config import (
    command_line,
    fields,
    fields_answers,
    fields_devices,
    identity,
    names,
)
from scaling_ldm.records.errors import UnknownKey
from scaling_ldm.workdir import ownership

ROOT = pathlib.Path(__file__).parents[2]
RENAMED = [(s, field, first) for (s, field), first in identity.FIRST_NAMES.items()]
OTHER = {"time_law": "uniform", "keep_flops": (1e9, 2e9), "metric": ("fd", "loss")}


def golden_hash():
    """The recipe hash of experiments/tiny.py before any field was renamed."""
    golden = json.loads((ROOT / "tests" / "golden" / "tiny.json").read_text())
    (found,) = {run["recipe_hash"] for run in golden["plan"]}
    return found


def test_an_unknown_field_names_the_nearest():
    c = config.default()
    with pytest.raises(UnknownKey, match="^unknown key batchsize: did you mean batch_"):
        c.train.batchsize = 3
    with pytest.raises(UnknownKey, match="^unknown key trian: did you mean train"):
        c.trian.batch_size = 3
    for kind in (AttributeError, KeyError):
        with pytest.raises(kind, match="^unknown key batchsize"):
            c.train.batchsize = 3
    with pytest.raises(UnknownKey, match="^unknown key x: known: advise, compare"):
        c["x"] = 3
    with pytest.raises(UnknownKey, match="did you mean patch_size"):
        c.update({"model": {"patch_sise": 2}})
    assert not hasattr(c, "x") and c.get("x", 7) == 7
    assert config.resolve(c) == config.resolve(config.default())


def test_copies_know_their_fields_and_are_equal():
    c = config.default()
    for other in (copy.deepcopy(c), c.copy_and_resolve_references()):
        assert other == c
        with pytest.raises(UnknownKey, match="did you mean"):
            other.train.batchsize = 3


@pytest.mark.parametrize(("section", "field", "first"), RENAMED)
def test_a_renamed_field_is_set_and_read_under_its_first_name(
    section, field, first, capsys
):
    c = config.default()
    said = f"config.{section}.{first} is now config.{section}.{field}\n"
    setattr(c[section], first, OTHER[first])
    assert capsys.readouterr() == ("", said)
    assert c[section][field] == OTHER[first] == getattr(c[section], first)
    assert first not in c[section]
    capsys.readouterr()
    given = config.default().to_dict()
    given[section][first] = OTHER[first]
    del given[section][field]
    assert config.resolve(given) == config.resolve(c)
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("value", "metrics", "weights", "said"),
    [
        ("validation_loss", ("loss",), "raw", "('loss',), config.fit.weights = 'raw'"),
        ("validation_loss_ema", ("loss",), "", "('loss',), config.fit.weights = ''"),
        (
            "train_loss_smoothed",
            ("train_loss_smoothed",),
            "",
            "('train_loss_smoothed',), config.fit.weights = ''",
        ),
        ("fid", ("fid",), "", "('fid',)"),
    ],
)
def test_the_loss_that_was_fitted_is_read_under_its_first_name_and_value(
    value, metrics, weights, said, capsys
):
    said = f"config.fit.metric = {value!r} is now config.fit.metrics = {said}\n"
    c = config.default()
    c.fit.metric = value
    stored = config.default().to_dict()
    del stored["fit"]["metrics"], stored["fit"]["weights"]
    stored["fit"]["metric"] = value
    for found in (config.resolve(c), config.resolve(stored)):
        assert (found.fit.metrics, found.fit.weights) == (metrics, weights)
    assert capsys.readouterr().err == 2 * said
    flags = [f"--config.fit.metrics={metrics}"]
    if len(said.split(" = ")) > 3:
        flags.append(f"--config.fit.weights={weights}")
    for given in ([f"--config.fit.metric={value}"], ["--config.fit.metric", value]):
        assert command_line.split(given) == ("", flags)
    assert capsys.readouterr().err == 2 * said


def test_the_recipe_hash_of_tiny_is_the_one_before_the_renaming():
    tiny = config.resolve(config.load(ROOT / "experiments" / "tiny.py"))
    assert tiny.recipe_hash == golden_hash()
    other = dataclasses.replace(tiny.objective, timestep_sampling="uniform")
    assert dataclasses.replace(tiny, objective=other).recipe_hash != golden_hash()


DECIDING = [
    field for field in identity.SINCE if field in identity.unknown_to({})
]  # the others decide no number of a run


@pytest.mark.parametrize(("section", "field"), DECIDING)
def test_a_field_that_0_1_0_did_not_have_changes_no_hash_at_its_value(section, field):
    """A tuple is a list in experiment.json; another value is another recipe."""
    mine = dataclasses.asdict(config.Experiment())
    # Pictures that are split and chosen; icons are not.
    mine["data"]["source"], mine["encode"]["pictures"] = "memory", 9
    without = copy.deepcopy(mine)
    del without[section][field]
    mine[section][field] = identity.SINCE[section, field]
    assert identity.recipe_hash(mine) == identity.recipe_hash(without)
    read = json.loads(json.dumps(mine))
    assert identity.recipe_hash(read) == identity.recipe_hash(without)
    parts = (("own", (("source", "icons"),)),)
    mine[section][field] = parts if field == "parts" else "another"
    assert identity.recipe_hash(mine) != identity.recipe_hash(without)


def old(experiment):
    """What experiment.json held before the renaming."""
    found = json.loads(json.dumps(dataclasses.asdict(experiment)))
    for section, field, first in RENAMED:
        found[section][first] = found[section].pop(field)
    for section, field in identity.SINCE:
        found[section].pop(field, None)  # one that was renamed is gone
    return {
        "name": experiment.name,
        "question": experiment.question,
        "recipe_hash": experiment.recipe_hash,
        "config": found,
    }


def test_a_working_directory_made_under_old_names_is_accepted(tmp_path):
    tiny = config.resolve(config.load(ROOT / "experiments" / "tiny.py"))
    assert old(tiny)["recipe_hash"] == golden_hash()
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(old(tiny)))
    ownership.register(tiny, tmp_path)
    objective = json.loads(path.read_text())["config"]["objective"]
    assert "timestep_sampling" in objective and "time_law" not in objective
    mine = json.loads(json.dumps(dataclasses.asdict(tiny)))
    assert identity.deciding(old(tiny)["config"]) == identity.as_before(
        identity.deciding(mine)
    )


def test_what_differs_from_an_old_directory_is_said_in_names_of_today(tmp_path):
    tiny = config.resolve(config.load(ROOT / "experiments" / "tiny.py"))
    (tmp_path / "experiment.json").write_text(json.dumps(old(tiny)))
    objective = dataclasses.replace(tiny.objective, timestep_sampling="uniform")
    with pytest.raises(config.ConfigError) as e:
        ownership.register(dataclasses.replace(tiny, objective=objective), tmp_path)
    assert str(e.value).splitlines()[1:] == [
        "  config.objective.timestep_sampling: 'logit_normal' there, 'uniform' here"
    ]


def test_every_field_has_a_comment_and_every_choice_is_a_field():
    """The config reference of the documentation is made from them."""
    lines = [
        line
        for module in (fields, fields_answers, fields_devices)
        for line in pathlib.Path(module.__file__).read_text().splitlines()
    ]
    for section in dataclasses.fields(config.Experiment):
        if section.default_factory is dataclasses.MISSING:
            continue
        for field in dataclasses.fields(section.default_factory):
            start = lines.index(f"class {section.type}:")
            at = next(
                i
                for i in range(start, len(lines))
                if lines[i].startswith(f"    {field.name}: ")
            )
            comment = "  # " in lines[at] or lines[at - 1].startswith("    # ")
            assert comment, f"{section.name}.{field.name}"
    for where, known in names.CHOICES.items():
        section, name = where.split(".")
        assert getattr(getattr(config.Experiment(), section), name) in known
