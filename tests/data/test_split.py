"""Which pictures are held out: the rules, near-duplicates, labels, and refusals."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from scaling_ldm import config, data, records
from scaling_ldm.data import (
    encoded,
    near_duplicates,
    pictures,
    shards,
    split,
    stored_split,
)
from scaling_ldm.evaluation import reference
from scaling_ldm.records import measurements
from scaling_ldm.stages import encode
from scaling_ldm.training import survey as survey_stage

CFG = config.DataConfig(source="memory")


def survey(captions, labels=None, thumbnails=None, said=None):
    """A survey of pictures that do not look alike, unless thumbnails are given."""
    n = len(captions)
    if thumbnails is None:
        thumbnails = np.random.default_rng(0).integers(0, 256, (n, 192), np.uint8)
    return split.Survey(
        size=n,
        positions=np.arange(n),
        captions=np.array([split.caption_key(c) for c in captions], np.uint64),
        labels=np.full(n, split.NO_LABEL) if labels is None else np.array(labels),
        thumbnails=thumbnails,
        said=np.full(n, split.NOT_SAID) if said is None else np.array(said),
    )


def by(cfg=CFG, **fields):
    return dataclasses.replace(cfg, **fields)


@pytest.mark.parametrize("labelled", [True, False])
def test_few_captions_are_split_by_picture(labelled):
    """Ten captions of many pictures: each is on both sides, in its share."""
    kinds = np.arange(2000) % 10
    found = survey([f"a {k}" for k in kinds], kinds if labelled else None)
    got = split.decide(found, CFG)
    assert got.by == "picture"
    counts = np.bincount(kinds[got.held_out], minlength=10)
    assert counts.tolist() == [10] * 10
    # They are a sample, not the darkest ones.
    assert 100 < found.thumbnails[got.held_out, 0].mean() < 155
    assert "100 of 2,000 pictures are held out by picture" in split.in_words(
        got.summary
    )


def test_the_order_and_the_number_of_others_do_not_matter():
    """A picture's thumbnail decides, so files may get other names and places."""
    found = survey(["a"] * 500)
    order = np.random.default_rng(1).permutation(500)
    other = dataclasses.replace(found, thumbnails=found.thumbnails[order])
    first, second = (
        split.decide(s, by(validation_fraction=0.1)) for s in (found, other)
    )
    assert np.array_equal(first.held_out[order], second.held_out)
    more = split.decide(found, by(validation_fraction=0.2))
    assert more.held_out.sum() == 100 and more.held_out[first.held_out].all()


def test_many_captions_are_split_by_their_hash():
    captions = [f"thing {i} of many" for i in range(1500)]
    names = np.random.default_rng(0).permutation([*captions, *captions])
    got = split.decide(survey(names), CFG)
    assert got.by == "caption"
    want = [split.held_out(name, 0.05) for name in names]
    assert got.held_out.tolist() == want and sum(want) > 100


def test_names_of_classes_are_few_captions_however_many_there_are():
    labels = np.arange(900) // 3
    found = survey([f"class {k}" for k in labels], labels)
    assert split.decide(found, by(validation_minimum=0)).by == "picture"
    assert (
        split.decide(
            survey([f"class {k}" for k in labels]), by(validation_minimum=0)
        ).by
        == "caption"
    )


@pytest.mark.parametrize(
    ("distinct", "each", "many"),
    [(199, 1, False), (200, 1, True), (200, 20, True), (200, 21, False)],
)
def test_captions_are_many_if_some_can_be_held_out_and_few_share_one(
    distinct, each, many
):
    captions = [f"thing {i}" for i in range(distinct)] * each
    found = survey(captions, thumbnails=np.zeros((len(captions), 192), np.uint8))
    assert split._are_many(found, 0.05) == many


def jpeg(image, side, quality):
    out = io.BytesIO()
    Image.fromarray(image).resize((side, side)).save(out, "JPEG", quality=quality)
    return np.asarray(Image.open(out).convert("RGB"))


def smooth(count):
    """Pictures with shapes of many sizes, [count, 64, 64, 3]."""
    rng = np.random.default_rng(3)
    found = np.zeros((count, 64, 64, 3))
    for side in (2, 4, 8, 16):
        for image in found:
            grid = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image += np.asarray(grid.resize((64, 64), Image.Resampling.BICUBIC)) / 4
    return found.astype(np.uint8)


def test_copies_of_other_sizes_and_formats_are_near_duplicates():
    images = smooth(60)
    kinds = ((64, 60), (48, 90), (80, 60))
    copies = [jpeg(image, *kinds[i % 3]) for i, image in enumerate(images)]
    thumbs = np.stack([near_duplicates.thumbnail(x) for x in [*images, *copies]])
    group = near_duplicates.near_duplicates(thumbs)
    assert np.array_equal(group[:60], group[60:])
    assert len(np.unique(group)) == 60
    other = near_duplicates.near_duplicates(np.stack([thumbs[0], thumbs[0] ^ 16]))
    assert other[0] != other[1]


@pytest.mark.parametrize("captions", ["many", "one"])
def test_near_duplicates_are_on_one_side(captions):
    rng = np.random.default_rng(2)
    some = rng.integers(8, 248, (400, 192), np.uint8)
    thumbnails = np.concatenate([some, some + rng.integers(0, 5, some.shape, np.uint8)])
    said = [f"thing {i}" if captions == "many" else "a thing" for i in range(800)]
    least = by(validation_minimum=10)
    got = split.decide(survey(said, thumbnails=thumbnails), least)
    assert got.by == ("caption" if captions == "many" else "picture")
    assert np.array_equal(got.held_out[:400], got.held_out[400:])
    assert got.near == 800 and not got.straddling and got.held_out.any()


@pytest.mark.parametrize("captions", ["many", "one"])
def test_a_group_that_is_larger_than_the_share_is_trained_on(captions):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        thumbnails = rng.integers(0, 256, (200, 192), np.uint8)
        thumbnails[80:] = thumbnails[0]
        said = [f"{seed} {i}" if captions == "many" else "a thing" for i in range(200)]
        cfg = by(validation_fraction=0.5, validation_minimum=20)
        got = split.decide(survey(said, thumbnails=thumbnails), cfg)
        assert not got.held_out[80:].any() and not got.held_out[0]


def test_every_label_is_trained_on_and_measured():
    """By caption, a label with few captions could be wholly on one side."""
    labels = [*range(100, 140)] * 2 + [7] * 900
    captions = [f"thing {i}" for i in range(980)]
    plain = np.array([split.held_out(c, 0.2) for c in captions])
    lost = [k for k in range(100, 140) if plain[np.array(labels) == k].all()]
    unseen = [k for k in range(100, 140) if not plain[np.array(labels) == k].any()]
    assert lost and unseen
    got = split.decide(survey(captions, labels), by(validation_fraction=0.2))
    assert got.by == "caption"
    kept = set(np.array(labels)[~got.held_out]), set(np.array(labels)[got.held_out])
    assert kept[0] == kept[1] == set(labels)


@pytest.mark.parametrize(
    ("given", "fields", "said"),
    [
        (survey(["a"] * 400), {}, r"^20 of 400 .* by picture; .*_minimum = 50: raise "),
        (
            survey(["a"] * 400, [0] * 399 + [1]),
            {"validation_fraction": 0.3},
            r"no held-out picture has the label 1 \(1\)",
        ),
        (
            survey(["a"] * 200, [0, 1] * 100, said=[0, 1] * 100),
            {},
            r"no held-out picture has the label 0 \(100\)",
        ),
        (survey(["a"] * 60, said=[1] * 60), {}, "every picture is held out"),
    ],
)
def test_a_validation_set_that_says_little_is_refused(given, fields, said):
    with pytest.raises(config.ConfigError, match=said):
        split.decide(given, by(**fields))


def test_a_set_with_a_split_of_its_own_keeps_it():
    thumbnails = np.random.default_rng(0).integers(0, 256, (120, 192), np.uint8)
    thumbnails[1] = thumbnails[0]
    said = [0, 1] * 60
    got = split.decide(survey(["a"] * 120, thumbnails=thumbnails, said=said), CFG)
    assert (got.by, got.held_out.tolist()) == ("set", [bool(x) for x in said])
    assert "1 of them have a near-duplicate in training" in split.in_words(got.summary)


def test_a_split_is_stored_and_checked():
    got = split.decide(survey([f"thing {i}" for i in range(1200)]), CFG)
    got = dataclasses.replace(got, size=1300, positions=np.arange(1200) + 100)
    stored = json.loads(json.dumps(split.to_json(got)))
    again = split.from_json(stored, got.summary, "here")
    assert [again.side(i) for i in (0, 100, 1299)] == [
        None,
        got.held_out[0],
        got.held_out[-1],
    ]
    assert again.summary == got.summary
    stored["held_out"] = stored["positions"]
    with pytest.raises(records.Damaged, match="here is not the split of the records"):
        split.from_json(stored, got.summary, "here")
    with pytest.raises(records.Damaged, match="here holds no split"):
        split.from_json({}, got.summary, "here")


# --- Sets of pictures, and their records


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def experiment(**sections):
    c = config.default()
    c.data.source, c.data.path = "memory", "test_split"
    c.data.shape, c.encode.text_encoder = (8, 8, 3), "vocabulary"
    c.encode.records_per_shard = 50
    for section, values in sections.items():
        c[section].update(values)
    return config.resolve(c)


@pytest.fixture(scope="module", autouse=True)
def in_memory():
    kinds = np.arange(240) % 4
    names = [f"a {k}" for k in kinds]
    pictures.memory(images_of(240), names, kinds.tolist(), name="test_split")
    pictures.memory(images_of(60, 1), names[:60], kinds[:60].tolist(), name="other")


def test_pictures_are_chosen_at_random_by_the_seed():
    def chosen(**encode):
        e = experiment(encode=encode)
        return pictures.chosen(e, pictures.of_experiment(e)).tolist()

    found = chosen(pictures=40)
    assert found == chosen(pictures=40) == sorted(set(found)) and len(found) == 40
    assert found != list(range(40)) and max(found) > 150
    assert chosen(pictures=40, choose="first") == list(range(40))
    assert chosen() == chosen(pictures=500) == list(range(240))
    e = experiment(encode={"pictures": 40}, data={"seed": 1})
    assert pictures.chosen(e, pictures.of_experiment(e)).tolist() != found
    e = experiment(encode={"pictures": 40}, data={"validation_path": "other"})
    both = pictures.chosen(e, pictures.of_experiment(e)).tolist()
    assert both == [*found, *range(240, 300)]


def test_ones_own_split_is_held_out():
    e = experiment(data={"validation_path": "other"})
    found = pictures.of_experiment(e)
    assert [found.read(i).held_out for i in (0, 239, 240, 299)] == [False] * 2 + [
        True
    ] * 2
    assert np.array_equal(found.read(240).image, images_of(60, 1)[0])
    assert found.identity != pictures.open_pictures("memory", "test_split").identity
    with pytest.raises(config.ConfigError, match="'picture' with .*validation_path: "):
        experiment(data={"validation_path": "other", "split_by": "picture"})
    with pytest.raises(config.ConfigError, match="are also those to train on"):
        pictures.of_experiment(experiment(data={"validation_path": "test_split"}))


def test_labels_of_folders_are_those_of_training(tmp_path):
    for name in ("train/ant/1", "train/bee/2", "train/cat/3", "val/cat/4"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images_of(1, int(name[-1]))[0]).save(path)
    given = {"source": "image_folder", "path": str(tmp_path / "train")}
    e = experiment(data=given | {"validation_path": str(tmp_path / "val")})
    last = pictures.of_experiment(e).read(3)
    assert (last.caption, last.label, last.held_out) == ("cat", 2, True)
    (tmp_path / "val/cat").rename(tmp_path / "val/dog")
    with pytest.raises(config.ConfigError, match="its folder dog is not a class of"):
        pictures.of_experiment(e)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    encode.run(experiment(data={"validation_fraction": 0.25}), folder)
    return folder


def test_records_know_their_split(workdir):
    e = experiment(data={"validation_fraction": 0.25})
    train, validation = data.sources(e, workdir)
    assert (len(train), len(validation)) == (180, 60)
    for source, count in ((train, 45), (validation, 15)):
        rows = source.rows(np.arange(len(source)))
        assert np.bincount(rows["label"]).tolist() == [count] * 4
    names = {path.name for path in (workdir / "encoded").iterdir()}
    assert shards.SPLIT in names and not [n for n in names if n.startswith("survey")]
    line = "60 of 240 pictures are held out by picture: a share of 0.25 of each of 4"
    assert stored_split.lines(e, workdir)[0].startswith(line)
    path = workdir / "split.json"
    told = json.loads(path.read_text())["held_out"]
    assert told[""].startswith(line)
    written = path.read_bytes()
    path.write_bytes(b"\xff" + written)
    stored_split.write(workdir, told, {"": 180})
    assert path.read_bytes() == written


def test_an_identity_that_is_none_does_not_choose_another_split(workdir, tmp_path):
    for name in (shards.SPLIT, shards.IDENTITY):
        (tmp_path / name).write_bytes((workdir / "encoded" / name).read_bytes())
    assert stored_split.read_split(str(tmp_path)) is not None
    (tmp_path / shards.IDENTITY).write_text("{}")
    with pytest.raises(records.Damaged, match=f"{shards.IDENTITY} lacks source"):
        stored_split.read_split(str(tmp_path))


def test_real_pictures_are_those_that_the_records_hold_out(workdir):
    e = experiment(data={"validation_fraction": 0.25})
    chosen = stored_split.read_split(str(workdir / "encoded"))
    batches = list(reference.held_out(e, (16, 16), 100, chosen=chosen))
    images, behind = batches[0]
    assert np.array_equal(images, images_of(240)[chosen.held_out])
    assert behind == 240
    rest = list(reference.held_out(e, (16, 16), 100, 120, chosen))
    assert len(rest[0][0]) == chosen.held_out[120:].sum()
    fewer = dataclasses.replace(chosen, size=239)
    with pytest.raises(config.ConfigError, match="holds 240 pictures, and the records"):
        list(reference.held_out(e, (16, 16), 100, chosen=fewer))


def test_before_encoding_the_rule_is_said_and_a_refusal_comes_first(tmp_path):
    e = experiment()
    (line,) = stored_split.lines(e, tmp_path)
    assert line.startswith("held out is a share of 0.05: by the set's own split if")
    with pytest.raises(config.ConfigError, match="12 of 240 .*validation_minimum = 50"):
        encode.run(e, tmp_path)
    assert not list((tmp_path / "encoded").glob("shard*"))


class Stopped(Exception):
    """Stands for the end of the process."""


class Counted:
    """A set of pictures that counts what is read, and ends at the last one."""

    def __init__(self, found, last):
        self._found, self._last = found, last
        self.read_at, self.identity = [], found.identity

    def __len__(self):
        return len(self._found)

    def read(self, index):
        self.read_at.append(index)
        if len(self.read_at) == self._last:
            raise Stopped
        return self._found.read(index)


def test_a_stopped_survey_goes_on_with_the_next_block(tmp_path):
    e = experiment(data={"validation_fraction": 0.25})
    found, store = pictures.of_experiment(e), shards.Store(str(tmp_path))
    tmp_path.joinpath("survey-00003.npz").write_bytes(b"cut off")

    def look(last):
        counted = Counted(found, last)
        given = counted, np.arange(240), store, pictures.Tally(allowed=0)
        try:
            return survey_stage.run(e, *given), counted.read_at
        except Stopped:
            return None, counted.read_at

    assert look(120)[0] is None
    assert {p.name for p in tmp_path.iterdir()} >= {f"survey-0000{n}.npz" for n in "01"}
    got, read = look(0)
    assert sorted(set(read)) == list(range(100, 240))
    assert got.summary == stored_summary(e, tmp_path / "whole")
    survey_stage.remove(store)
    assert not list(tmp_path.glob("survey*"))


class Broken(Counted):
    """A set without a readable picture."""

    def read(self, index):
        self.read_at.append(index)
        raise pictures.BadRecord(f"{index}.png", "it is empty")


def test_a_survey_of_bad_records_ends_after_the_first_block(tmp_path):
    e = experiment()
    broken = Broken(pictures.of_experiment(e), 0)
    given = broken, np.arange(240), shards.Store(str(tmp_path))
    with pytest.raises(config.ConfigError, match="bad, more than the accepted"):
        survey_stage.run(e, *given, pictures.Tally(allowed=0.01, minimum=10))
    assert max(broken.read_at) < 50


def stored_summary(e, folder):
    encode.run(e, folder)
    return stored_split.read_summary(str(folder / "encoded"))


def test_older_records_keep_the_split_that_they_have():
    e = experiment(encode={"pictures": 40})
    now = encoded.identity(e)
    new = ("split_by", "validation", "validation_split", "choose", "seed")
    older = {k: v for k, v in now.items() if k not in new}
    assert not encoded.differences(older, now)
    assert encoded.differences(now, now) == []
    asked = encoded.identity(experiment(data={"split_by": "picture"}))
    assert encoded.differences(older | {"pictures": 0}, asked) == [
        "split_by: 'caption_alone' there, 'picture' here"
    ]
    own = encoded.identity(experiment(data={"validation_path": "other"}))
    assert encoded.differences(older | {"pictures": 0}, own) == [
        "validation: None there, 'given' here"
    ]


def test_begun_older_records_go_on_by_the_hash_of_each_caption(tmp_path):
    e = experiment(encode={"pictures": 40}, data={"validation_minimum": 0})
    cfg = {"pictures": 40, "choose": "first"}
    alone = {"split_by": "caption_alone", "validation_minimum": 0}
    encode.run(experiment(encode=cfg, data=alone), tmp_path / "a")
    path = tmp_path / "a" / "encoded"
    held = json.loads((path / shards.IDENTITY).read_text())
    for key in ("split_by", "validation", "choose"):
        del held[key]
    store = shards.Store(str(tmp_path / "b" / "encoded"))
    (tmp_path / "b" / "encoded").mkdir(parents=True)
    store.write_json(shards.IDENTITY, held)
    encode.run(e, tmp_path / "b")
    for name in (shards.shard_name(0), shards.IDENTITY):
        mine = json.loads(path.joinpath(name).read_text()) if "json" in name else None
        got = (tmp_path / "b" / "encoded" / name).read_bytes()
        assert (
            got == path.joinpath(name).read_bytes()
            if mine is None
            else (json.loads(got) == held)
        )
    assert stored_split.read_split(str(tmp_path / "b" / "encoded")) is None
    (line,) = stored_split.lines(e, tmp_path / "b")
    assert "as before version 0.2" in line


def test_losses_on_another_split_have_another_protocol():
    def protocol(**given):
        e = records.to_json(dataclasses.asdict(experiment(data=given)))
        return measurements.loss_protocol("loss", e, {})

    found = [
        protocol(),
        protocol(split_by="caption_alone"),
        protocol(split_by="picture"),
        protocol(validation_path="other"),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == 4
    assert protocol(validation_path="a") == protocol(validation_path="b")
    assert (
        experiment().recipe_hash
        != experiment(data={"split_by": "caption_alone"}).recipe_hash
    )
    paths = [experiment(data={"validation_path": p}).recipe_hash for p in "ab"]
    assert paths[0] == paths[1] != experiment().recipe_hash
