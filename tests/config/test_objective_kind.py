"""Which objective an experiment has, and that a user's own is part of its recipe."""

import dataclasses
import json
import pathlib

import pytest

from scaling_ldm import config
from scaling_ldm.config import objective_kind, reads
from scaling_ldm.training import objective

OWN = "def build(config, width, depth, unroll):\n    return {}\n"


def resolved(tiny, kind, folder="", **fields):
    c = tiny.copy_and_resolve_references()
    c.objective.kind, c.objective.folder = kind, str(folder)
    for where, value in fields.items():
        section, name = where.split("__")
        c[section][name] = value
    return config.resolve(c)


def refusal(*given, **fields):
    with pytest.raises(config.ConfigError) as e:
        resolved(*given, **fields)
    return str(e.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(OWN)
    return tmp_path


def test_every_objective_has_a_function_and_every_network_one_objective():
    assert objective.OBJECTIVES.keys() == config.OBJECTIVES.keys()
    trained = [name for names in config.OBJECTIVES.values() for name in names]
    assert sorted(trained) == sorted(config.ARCHITECTURES)


def test_auto_follows_the_network(tiny):
    plain = config.resolve(tiny)
    assert (plain.objective.kind, plain.objective_kind) == ("auto", "denoising")
    model = dataclasses.replace(plain.model, architecture="autoencoder_kl")
    other = dataclasses.replace(plain, model=model)
    assert other.objective_kind == "reconstruction"


def test_a_network_and_an_objective_that_do_not_fit_are_refused(tiny):
    said = refusal(tiny, "reconstruction")
    assert (
        "config.objective.kind = 'reconstruction' does not train config.model."
        "architecture = 'in_context'; it trains: autoencoder_kl" in said
    )
    said = refusal(tiny, "denoisin")
    assert "known: auto, denoising, reconstruction (did you mean 'denoising'?)" in said


def test_own_files_are_beside_the_experiment_file(tiny, folder):
    e = resolved(tiny, "own/mine.py:build", folder)
    assert e.objective.kind == e.objective_kind == "mine.py:build"
    assert objective_kind.source(e.objective) == folder / "own" / "mine.py"
    again = config.resolve(json.loads(json.dumps(config.to_config_dict(e).to_dict())))
    assert again == e


def test_load_says_where_the_experiment_file_is(folder):
    (folder / "e.py").write_text(
        "from scaling_ldm import config\n\n\ndef get_config():\n"
        "    c = config.default()\n    c.objective.kind = 'own/mine.py:build'\n"
        "    return c\n"
    )
    e = config.resolve(config.load(folder / "e.py"))
    assert e.objective.folder == str((folder / "own").resolve())
    c = config.load(folder / "e.py")
    c.objective.kind = "auto"
    assert config.resolve(c) == config.resolve(config.default())


def test_the_recipe_has_the_name_and_the_text_but_not_the_place(tiny, folder):
    first = resolved(tiny, "own/mine.py:build", folder)
    assert first.recipe_hash != config.resolve(tiny).recipe_hash
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "mine.py").write_text(OWN)
    moved = resolved(tiny, "mine.py:build", folder / "elsewhere")
    assert moved.recipe_hash == first.recipe_hash
    (folder / "own" / "mine.py").write_text(OWN + "\n# another\n")
    changed = resolved(tiny, "own/mine.py:build", folder)
    assert changed.recipe_hash != first.recipe_hash
    (folder / "own" / "other.py").write_text(OWN)
    renamed = resolved(tiny, "own/other.py:build", folder)
    assert renamed.recipe_hash != first.recipe_hash


def test_a_text_that_is_not_the_recipes_is_refused(tiny, folder):
    e = resolved(tiny, "own/mine.py:build", folder)
    path = folder / "own" / "mine.py"
    path.write_text(OWN + "\n")
    with pytest.raises(config.ConfigError, match="the file has changed"):
        config.resolve(config.to_config_dict(e))
    with pytest.raises(config.ConfigError, match="changed since the command started"):
        objective.build(e, 16, 2, unroll=False)


def test_a_module_is_found_by_its_name(tiny, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "own" / "__init__.py").write_text("")
    e = resolved(tiny, "own.mine:build")
    assert e.objective.kind == "own.mine:build"
    assert e.objective.digest == objective_kind.digest(folder / "own" / "mine.py")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("own/none.py:build", "there is no file"),
        ("own/mine.py:1", "must be FILE.py:FUNCTION beside the experiment file"),
        (":build", "must be FILE.py:FUNCTION beside the experiment file"),
        ("no_such_package.objectives:build", "there is no module"),
    ],
)
def test_what_is_not_there_is_refused(tiny, folder, kind, why):
    assert why in refusal(tiny, kind, folder)


def test_a_digest_without_a_file_means_nothing(tiny):
    assert "is not read by" in refusal(tiny, "auto", objective__digest="ab")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def build(config, width, depth, unroll):\n    return 3\n", "gives int"),
        ("build = 3\n", "defines no function build"),
        ("1 / 0\n", r"fails: ZeroDivisionError"),
    ],
)
def test_a_file_that_gives_no_objective_is_refused(tiny, folder, text, why):
    (folder / "own" / "mine.py").write_text(text)
    e = resolved(tiny, "own/mine.py:build", folder)
    with pytest.raises(config.ConfigError, match=why):
        objective.build(e, 16, 2, unroll=False)


@pytest.mark.parametrize("name", reads.WHICH)
def test_an_objective_is_no_axis(tiny, name):
    c = tiny.copy_and_resolve_references()
    c.plan.axes = {f"objective.{name}": ("denoising", "auto")}
    with pytest.raises(config.ConfigError, match=f"{name} cannot be an axis"):
        config.resolve(c)


def test_the_example_is_an_experiment_of_its_own():
    root = pathlib.Path(__file__).parents[2] / "experiments"
    e = config.resolve(config.load(root / "tiny_teacher.py"))
    assert e.objective_kind == "teacher_l1.py:build"
