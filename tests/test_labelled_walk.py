"""The walk of docs/own_pictures.md: labelled files, one command, pictures of one's own.

Everything is done as a user does it: the entry point in a process of its own, a stop in
the middle of training, the same command again, and `scaling_ldm.load` of the export.
"""

import ast
import shlex

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import scaling_ldm
from scaling_ldm import config, data, records, study
from scaling_ldm.data import icon_set, icons
from tests.picture_layouts import png, tar
from tests.processes import ROOT, MainProcess

CLASSES = "apple boat cat dog egg fish goat hat ink jar".split()  # by name
PICTURES, HELD_OUT = 600, 120
STEPS, DRAWN = 300, 32
# What the walk is not about is kept small; every step is said, so that one is seen.
SMALL = {
    "evaluate.input_size": "64",
    "evaluate.bootstrap": "4",
    "train.steps_per_dispatch": "1",
    "train.log_every_steps": "1",
    "train.show_every_seconds": "0.0",
}


def settings_of(study_name, path):
    """Flags of the page's command for runs/NAME, with pictures of the test."""
    lines = (ROOT / "docs" / "own_pictures.md").read_text("utf-8").splitlines()
    (line,) = [line for line in lines if f"--workdir runs/{study_name} " in line]
    words = shlex.split(line)
    stages = words[words.index("--stages") + 1]
    pairs = [w.removeprefix("--config.").split("=", 1) for w in words if "=" in w]
    return dict(pairs) | SMALL | {"data.path": path}, stages


@pytest.fixture(scope="module")
def paintings():
    """(class, uint8 [32, 32, 3]) of each picture: ten shapes in colours and places."""
    shapes = icon_set.load().levels(5000 + 97 * np.arange(len(CLASSES))) / 15
    colours = np.array(list(icons.PALETTE.values()), np.float64)
    rng = np.random.default_rng(0)
    found = []
    for i in range(PICTURES):
        fore, back = colours[rng.choice(len(colours), 2, replace=False)]
        shape = np.roll(shapes[i % len(CLASSES)], rng.integers(-3, 4, 2), (0, 1))
        image = back + (fore - back) * shape[..., None]
        found.append((i % len(CLASSES), np.round(image).astype(np.uint8)))
    return found


def sentence(name):
    return f"a picture of one {name}"


def write_folders(root, paintings):
    for i, (k, image) in enumerate(paintings):
        (root / CLASSES[k]).mkdir(parents=True, exist_ok=True)
        (root / CLASSES[k] / f"{i:04d}.png").write_bytes(png(image))
    return str(root)


def write_shards(root, paintings):
    for shard in range(2):
        members = []
        for i, (k, image) in list(enumerate(paintings))[shard::2]:
            members.append((f"{i:04d}.png", png(image)))
            members.append((f"{i:04d}.txt", sentence(CLASSES[k]).encode()))
        tar(root / f"shard-{shard:05d}.tar", members)
    return f"{root}/shard-{{00000..00001}}.tar"


def walk(workdir, settings, stages):
    """The command, stopped in its first run and given again; (first, second) output."""
    command = ("--config=experiments/tiny.py", f"--workdir={workdir}")
    command += (f"--stages={stages}",)
    command += tuple(f"--config.{name}={text}" for name, text in settings.items())
    process = MainProcess(*command)
    process.wait_for("  step 20/")
    process.popen.terminate()
    first = process.end(study.EXIT["preempted, run the same command again"])
    assert not (workdir / "samples").exists()
    second = MainProcess(*command).end()
    assert "Traceback" not in first + second
    return first, second


def experiment_of(settings):
    c = config.load("experiments/tiny.py")
    for name, text in settings.items():
        section, field = name.split(".")
        is_text = isinstance(c[section][field], str)
        c[section][field] = text if is_text else ast.literal_eval(text)
    return config.resolve(c)


def assert_walked(first, second, workdir, kind):
    """What holds of either set; kind: what the split counts, labels or captions."""
    said = f"{HELD_OUT} of {PICTURES} pictures are held out by picture"
    assert f"{said}: a share of 0.2 of each of {len(CLASSES)} {kind}" in first
    assert f"{PICTURES} pictures, 0 bad records" in first
    step = int(first.split("is saved at step ")[1].split()[0])
    assert 20 <= step < STEPS
    assert f"continues from step {step} of {STEPS}" in second
    assert "trained: 2 of 2 runs finished" in second
    drawn = np.load(workdir / "samples" / "images.npy")
    assert drawn.shape == (DRAWN, 16, 16, 3) and drawn.dtype == np.uint8
    assert drawn.std() > 5  # a picture, not one grey
    assert (workdir / "report" / "index.html").exists()
    values = {}
    for found in records.read_evaluations(workdir):
        assert found.images == DRAWN
        values[found.metric] = found.value
    assert values.keys() == {"fd_lite0", "fd_lite0_real", "fd_lite0_noise"}
    assert 0 < values["fd_lite0_real"] < values["fd_lite0"] < np.inf
    assert values["fd_lite0_real"] < values["fd_lite0_noise"] < np.inf
    for metric, value in values.items():
        shown = f"{metric} {value:.4g}"
        assert shown in second, shown


def assert_pictures(drawn, count):
    assert drawn.shape == (count, 16, 16, 3) and drawn.dtype == np.uint8
    assert len({picture.tobytes() for picture in drawn}) == count


@pytest.mark.slow
def test_folders_of_classes_train_a_network_that_is_asked_for_a_label(
    paintings, tmp_path
):
    workdir = tmp_path / "w"
    path = write_folders(tmp_path / "pictures", paintings)
    settings, stages = settings_of("labelled", path)
    first, second = walk(workdir, settings, stages)
    assert_walked(first, second, workdir, "labels")
    for source in data.sources(experiment_of(settings), workdir):
        every = np.arange(len(source))
        labels = source.rows(every)["label"]
        assert [CLASSES[k] for k in labels] == source.captions(every)
        assert_array_equal(np.bincount(labels), len(source) // len(CLASSES))
    model = scaling_ldm.load(workdir / "export")
    assert model.label_names == tuple(CLASSES)
    assert scaling_ldm.load(workdir).label_names == tuple(CLASSES)
    drawn = model.sample(labels=["cat", CLASSES[9]], n=2, steps=4)
    assert_pictures(drawn, 4)
    # The same noise, another label: the network reads it.
    other = model.sample(labels=[3], n=2, steps=4)
    assert (model.sample(labels=[2], n=2, steps=4) == drawn[:2]).mean() > 0.99
    assert (other != drawn[:2]).any()
    with pytest.raises(ValueError, match="did you mean 'cat'. known: apple, boat, cat"):
        model.sample(labels="catt")


@pytest.mark.slow
def test_shards_with_captions_train_a_network_that_is_asked_in_words(
    paintings, tmp_path
):
    workdir = tmp_path / "w"
    path = write_shards(tmp_path / "shards", paintings)
    settings, stages = settings_of("captioned", path)
    first, second = walk(workdir, settings, stages)
    assert_walked(first, second, workdir, "captions")
    for source in data.sources(experiment_of(settings), workdir):
        captions = source.captions(np.arange(len(source)))
        names, counts = np.unique(captions, return_counts=True)
        assert names.tolist() == [sentence(name) for name in CLASSES]
        assert_array_equal(counts, len(source) // len(CLASSES))
    model = scaling_ldm.load(workdir / "export")
    drawn = model.sample("one cat", n=4, steps=4)  # no caption of the set
    assert_pictures(drawn, 4)
    assert (model.sample("one jar", n=4, steps=4) != drawn).any()
