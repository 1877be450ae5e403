"""The walk of docs/own_pictures.md: labelled files, one command, pictures of one's own.

Everything is done as a user does it: the entry point in a process of its own, a stop in
the middle of training, the same command again, and `scaling_ldm.load` of the export.
Once with 600 pictures and small networks, and once, marked study, as the page says it:
10,000 pictures and a study with laws.
"""

import ast
import dataclasses
import shlex

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import scaling_ldm
from scaling_ldm import config, data, records
from scaling_ldm.workdir import exit_status
from tests.processes import ROOT, MainProcess
from tools import make_pictures

CLASSES = make_pictures.CLASSES
# What the walk is not about is kept small; every step is said, so that one is seen.
SMALL = {
    "evaluate.input_size": "64",
    "evaluate.bootstrap": "4",
    "train.steps_per_dispatch": "1",
    "train.log_every_steps": "1",
    "train.show_every_seconds": "0.0",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is walked through, and what has to come out.

    Attributes:
      command: behind the name of the working directory in the page's command.
      flags: instead of the page's.
      fraction: share of the pictures that is held out.
      side: pixels of what is drawn.
      budgets: 0 where there are no laws.
      seen: what is said when the command is stopped.
      least_step: at which it is stopped.
    """

    pictures: int
    command: str
    flags: dict
    fraction: float
    drawn: int
    side: int
    runs: int
    budgets: int
    seen: str
    least_step: int


TRY = Size(
    pictures=600,
    command="",
    flags=SMALL,
    fraction=0.2,
    drawn=32,
    side=16,
    runs=2,
    budgets=0,
    seen="  step 20/",
    least_step=20,
)
STUDY = Size(
    pictures=10_000,
    command="_study",
    flags={},
    fraction=0.1,
    drawn=500,
    side=32,
    runs=20,
    budgets=4,
    seen="  step ",
    least_step=1,
)
SIZES = pytest.mark.parametrize(
    "size",
    [
        pytest.param(TRY, id="600", marks=pytest.mark.slow),
        pytest.param(STUDY, id="10000", marks=pytest.mark.study),
    ],
)


def settings_of(study_name, path, size):
    """Flags of the page's command for runs/NAME, with pictures of the test."""
    lines = (ROOT / "docs" / "own_pictures.md").read_text("utf-8").splitlines()
    name = study_name + size.command
    (line,) = [line for line in lines if f"--workdir runs/{name} " in line]
    words = shlex.split(line)
    stages = words[words.index("--stages") + 1]
    pairs = [w.removeprefix("--config.").split("=", 1) for w in words if "=" in w]
    experiment = words[words.index("--config") + 1]
    return experiment, dict(pairs) | size.flags | {"data.path": path}, stages


def walk(workdir, experiment, settings, stages, seen):
    """The command, stopped in its first run and given again; (first, second) output."""
    command = (f"--config={experiment}", f"--workdir={workdir}")
    command += (f"--stages={stages}",)
    command += tuple(f"--config.{name}={text}" for name, text in settings.items())
    process = MainProcess(*command)
    process.wait_for(seen, timeout=900)
    process.popen.terminate()
    first = process.end(exit_status.EXIT["preempted, run the same command again"])
    assert not (workdir / "samples").exists()
    second = MainProcess(*command).end(timeout=3600)
    assert "Traceback" not in first + second
    return first, second


def experiment_of(path, settings):
    c = config.load(path)
    for name, text in settings.items():
        section, field = name.split(".")
        is_text = isinstance(c[section][field], str)
        c[section][field] = text if is_text else ast.literal_eval(text)
    return config.resolve(c)


def assert_walked(first, second, workdir, kind, size):
    """What holds of either set; kind: what the split counts, labels or captions."""
    held_out = round(size.fraction * size.pictures)
    said = f"{held_out:,} of {size.pictures:,} pictures are held out by picture"
    share = f"a share of {size.fraction} of each of {len(CLASSES)} {kind}"
    assert f"{said}: {share}" in first
    assert f"{size.pictures:,} pictures, 0 bad records" in first
    step = int(first.split("is saved at step ")[1].split()[0])
    assert step >= size.least_step
    assert f"continues from step {step} of" in second
    assert f"trained: {size.runs} of {size.runs} runs finished" in second
    drawn = np.load(workdir / "samples" / "images.npy")
    assert drawn.shape == (min(size.drawn, 256), size.side, size.side, 3)
    assert drawn.dtype == np.uint8
    assert drawn.std() > 5  # a picture, not one grey
    assert (workdir / "report" / "index.html").exists()
    values = {}
    for found in records.read_evaluations(workdir):
        assert found.images == size.drawn
        values[found.metric] = found.value
    assert values.keys() == {"fd_lite0", "fd_lite0_real", "fd_lite0_noise"}
    assert 0 < values["fd_lite0_real"] < values["fd_lite0"] < np.inf
    assert values["fd_lite0_real"] < values["fd_lite0_noise"] < np.inf
    for metric, value in values.items():
        shown = f"{metric} {value:.4g}"
        assert shown in second, shown


def assert_laws(workdir, size):
    """A study has laws, or says of each why not; what is tried has no budgets."""
    path = workdir / "laws.json"
    assert path.exists() == bool(size.budgets)
    if size.budgets:
        found = records.loads(path.read_text())
        assert len(found.parabolas) == size.budgets
        assert found.laws.keys() == {"N_opt", "D_opt", "L_opt"}
        assert not found.excluded  # every run has a number


def assert_pictures(drawn, count, size):
    assert drawn.shape == (count, size.side, size.side, 3)
    assert drawn.dtype == np.uint8
    assert len({picture.tobytes() for picture in drawn}) == count


@SIZES
def test_folders_of_classes_train_a_network_that_is_asked_for_a_label(size, tmp_path):
    workdir = tmp_path / "w"
    path, _ = make_pictures.write(tmp_path / "walk", size.pictures)
    experiment, settings, stages = settings_of("labelled", path, size)
    first, second = walk(workdir, experiment, settings, stages, size.seen)
    assert_walked(first, second, workdir, "labels", size)
    assert_laws(workdir, size)
    for source in data.sources(experiment_of(experiment, settings), workdir):
        every = np.arange(len(source))
        labels = source.rows(every)["label"]
        assert [CLASSES[k] for k in labels] == source.captions(every)
        assert_array_equal(np.bincount(labels), len(source) // len(CLASSES))
    model = scaling_ldm.load(workdir / "export")
    assert model.label_names == tuple(CLASSES)
    assert scaling_ldm.load(workdir).label_names == tuple(CLASSES)
    drawn = model.sample(labels=["cat", CLASSES[9]], n=2, steps=4)
    assert_pictures(drawn, 4, size)
    # The same noise, another label: the network reads it.
    other = model.sample(labels=[3], n=2, steps=4)
    assert (model.sample(labels=[2], n=2, steps=4) == drawn[:2]).mean() > 0.99
    assert (other != drawn[:2]).any()
    with pytest.raises(ValueError, match="did you mean 'cat'. known: apple, bell, cat"):
        model.sample(labels="catt")


@SIZES
def test_shards_with_captions_train_a_network_that_is_asked_in_words(size, tmp_path):
    workdir = tmp_path / "w"
    _, path = make_pictures.write(tmp_path / "walk", size.pictures)
    experiment, settings, stages = settings_of("captioned", path, size)
    first, second = walk(workdir, experiment, settings, stages, size.seen)
    assert_walked(first, second, workdir, "captions", size)
    assert_laws(workdir, size)
    for source in data.sources(experiment_of(experiment, settings), workdir):
        captions = source.captions(np.arange(len(source)))
        names, counts = np.unique(captions, return_counts=True)
        assert names.tolist() == list(map(make_pictures.caption, CLASSES))
        assert_array_equal(counts, len(source) // len(CLASSES))
    model = scaling_ldm.load(workdir / "export")
    drawn = model.sample("one cat", n=4, steps=4)  # no caption of the set
    assert_pictures(drawn, 4, size)
    assert (model.sample("one key", n=4, steps=4) != drawn).any()
