"""Parts of the training stream: their forms, what is refused, and the recipe."""

import json

import pytest
from processes import run_main

from scaling_ldm import config
from scaling_ldm.config import mix

MIX = {"own": 0.8, "prior": 0.2}
PARTS = {
    "own": {"source": "image_folder", "path": "photos", "captions": "txt"},
    "prior": {"source": "icons", "encode.pictures": 9},
}


def resolved(tiny, shares=MIX, parts=PARTS, **others):
    given = tiny.to_dict()
    given["encode"]["text_encoder"] = "vocabulary"
    given["data"] |= {"mix": shares, "parts": parts}
    for where, value in others.items():
        section, name = where.split("__")
        given[section][name] = value
    return config.resolve(given)


def refusal(tiny, *given, **others):
    with pytest.raises(config.ConfigError) as e:
        resolved(tiny, *given, **others)
    return str(e.value)


def test_a_mapping_and_pairs_are_the_same(tiny):
    """Of mappings, tuples, and the lists of a JSON file."""
    e = resolved(tiny, {"own": 4, "prior": 1})
    assert e.data.mix == (("own", 4.0), ("prior", 1.0))
    assert dict(e.data.parts)["prior"] == (("source", "icons"), ("encode.pictures", 9))
    assert resolved(tiny, e.data.mix, e.data.parts) == e
    c = tiny.copy_and_resolve_references()
    c.encode.text_encoder = "vocabulary"
    c.data.mix, c.data.parts = {"own": 4, "prior": 1}, PARTS
    assert config.resolve(c) == e
    again = json.loads(json.dumps(config.to_config_dict(e).to_dict()))
    assert config.resolve(again) == e
    assert e.encoded and hash(e)


def test_a_part_is_the_experiment_with_its_own_fields(tiny):
    others = {"data__split": "test", "data__path": "here", "encode__path": "gs://b/r/"}
    parts = {"prior": PARTS["prior"], "own": {"captions": "title"}}
    e = resolved(tiny, MIX, parts, data__source="tfds", **others)
    own, prior = mix.parts(e).values()
    assert (own.data.source, own.data.path, own.data.split) == ("tfds", "here", "test")
    assert own.data.captions == "title" and own.encode.pictures == 0
    assert own.encode.path == "gs://b/r/own" and own.data.shape == e.data.shape
    # Another source takes none of the fields that say how one is opened.
    assert (prior.data.path, prior.data.split) == ("", config.DataConfig().split)
    assert prior.encode.pictures == 9 and prior.encode.path == "gs://b/r/prior"
    plain = config.resolve(tiny)
    assert mix.parts(plain) == {"": plain}


def test_the_recipe_knows_the_mix_and_not_its_places(tiny):
    e = resolved(tiny)
    plain = config.resolve(tiny)
    assert len({e.recipe_hash, plain.recipe_hash}) == 2
    moved = {
        "prior": PARTS["prior"] | {"encode.path": "else"},
        "own": dict(reversed((PARTS["own"] | {"path": "elsewhere"}).items())),
    }
    assert resolved(tiny, MIX, moved).recipe_hash == e.recipe_hash
    fewer = PARTS | {"prior": {"source": "icons", "encode.pictures": 8}}
    for other in (
        resolved(tiny, MIX, fewer),
        resolved(tiny, {"own": 0.7, "prior": 0.3}),
        resolved(tiny, validation__part="prior"),
    ):
        assert other.recipe_hash != e.recipe_hash
    alone = {"own": {"path": "photos"}, "prior": {"path": "others"}}
    folder = {"data__source": "image_folder"}
    assert (
        resolved(tiny, MIX, alone, **folder).recipe_hash
        == resolved(tiny, MIX, {}, data__path="both", **folder).recipe_hash
    )


def test_held_out_pictures_are_of_one_part_or_of_all(tiny):
    assert mix.held_out_parts(resolved(tiny)) == ["own"]
    prior = resolved(tiny, validation__part="prior")
    assert mix.held_out_parts(prior) == ["prior"]
    assert mix.held_out_part(prior).data.source == "icons"
    every = resolved(tiny, validation__part="mix")
    assert mix.held_out_parts(every) == ["own", "prior"]
    said = {mix.described(e) for e in (prior, every, resolved(tiny))}
    assert "prior (icons) 0" in said and len(said) == 3
    assert "own (image_folder), prior (icons) in shares 0.8 : 0.2 0" in said
    assert mix.described(config.resolve(tiny)) == "icons 0"


def part(name, **own):
    return (MIX, PARTS | {name: own})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("own",), "mix = 'own': must be {name: share}"),
        (({"own": "much", "prior": 1},), r"mix\['own'\] must be float"),
        (({"own": 1.0, "prior": 0.0},), "shares must be positive"),
        (({"own": 1.0, "prior": float("inf")},), "inf: must be finite"),
        (({"own": 1.0, "prior": 1e-9},), "no share may be below 1e-06"),
        (({"own": 1.0}, {"own": PARTS["own"]}), "at least two parts"),
        (((("own", 1.0), ("own", 2.0), ("prior", 1.0)),), "each once"),
        (({"own": 1.0, "prior": 1, "a/b": 1}, PARTS), "be called 'a/b'"),
        (({"own": 1.0, "prior": 1, "mix": 1}, PARTS), "be called 'mix'"),
        (
            (MIX, PARTS | {"pior": {}}),
            r"parts\['pior'\]: config.data.mix has own, prior",
        ),
        (({}, PARTS), r"parts\['own'\]: config.data.mix has no parts"),
        ((MIX, "own"), "parts = 'own': must be {name: {field: value}}"),
        ((MIX, {"own": 3}), "must be {name: {field: value}}"),
        (part("own", sourse="icons"), r"\['own'\]: sourse is no field.*mean source\?"),
        (part("own", shape=(8, 8, 3)), "shape is no field of a part"),
        (part("own", source=3), r"parts\['own'\]: source must be str"),
        (
            part("own", source="folder"),
            r"parts\['own'\]: config.data.source = 'folder'",
        ),
        (
            part("own", source="image_folder"),
            r"parts\['own'\]: config.data.path is not",
        ),
        (part("prior", source="icons"), r"\['prior'\]: config.encode.pictures = 0"),
        (
            part("prior", source="icons", path="x"),
            r"parts\['prior'\]: config.data.path = 'x' is not read",
        ),
        (
            (MIX, {n: own | {"encode.path": "r/"} for n, own in PARTS.items()}),
            "own and prior have the same encode.path, r: each",
        ),
        (
            (MIX, (("own", ()), ("own", ()), ("prior", ()))),
            r"\['own'\]: .* given twice",
        ),
    ],
)
def test_a_mix_that_cannot_be_is_refused_by_name(tiny, given, said):
    with pytest.raises(config.ConfigError, match=said):
        resolved(tiny, *given)


def test_fields_beside_the_mix_are_refused_by_name(tiny):
    said = refusal(tiny, data__path="photos")
    assert "config.data.path = 'photos' is not read: every part" in said
    said = refusal(tiny, validation__part="pior")
    assert "validation.part = 'pior': config.data.mix has own, prior, mix" in said
    said = refusal(tiny, {}, {}, validation__part="own")
    assert "validation.part = 'own': config.data.mix has no parts" in said
    measured = {"evaluate__network": "lite0", "validation__part": "mix"}
    assert "real pictures are those of one part" in refusal(tiny, **measured)
    resolved(tiny, evaluate__network="lite0", validation__part="prior")


def test_what_is_wrong_with_every_part_is_said_once(tiny):
    said = refusal(tiny, model__text_width=-1)
    assert said.count("text_width") == 1 and "config.data.parts" not in said


@pytest.mark.slow  # test_axes.py gives pairs on the command line by day
def test_a_mix_from_the_command_line(tmp_path):
    flags = (
        "--config=experiments/tiny.py",
        f"--workdir={tmp_path / 'w'}",
        "--stages=plan",
        '--config.data.mix=(("a", 3), ("b", 1.0))',
        '--config.data.parts=(("b", (("encode.pictures", 30),)),)',
        "--config.encode.pictures=20",
        "--config.encode.text_encoder=vocabulary",
    )
    run_main(*flags)
    held = json.loads((tmp_path / "w" / "experiment.json").read_text())["config"]
    assert held["data"]["mix"] == [["a", 3.0], ["b", 1.0]]
    assert held["data"]["parts"] == [["b", [["encode.pictures", 30]]]]
