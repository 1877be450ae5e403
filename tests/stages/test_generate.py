"""Pictures of a finished run: their order, their files, and continuing."""

import dataclasses
import io
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from scaling_ldm import config, data, records
from scaling_ldm.stages import generate, plan, train
from scaling_ldm.training import inference, mesh, progress
from scaling_ldm.workdir import sample_grid, samples


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """(experiment, workdir, specs) of one trained run; 20 pictures, 8 a file."""
    workdir = tmp_path_factory.mktemp("generate")
    given = tiny.copy_and_resolve_references()
    given.generate.images, given.generate.batch_size = 20, 8
    given.generate.steps = 2
    given.plan.steps, given.plan.budgets_flops, given.plan.minimum_steps = 4, (), 2
    experiment = config.resolve(given)
    specs = plan.plan(experiment)
    plan.write(specs, workdir)
    train.run(experiment, workdir, list(enumerate(specs)), len(specs))
    return experiment, workdir, specs


def shards(workdir):
    return sorted((workdir / "samples" / "shards").iterdir())


def formatted(experiment, form):
    return dataclasses.replace(
        experiment, generate=dataclasses.replace(experiment.generate, format=form)
    )


@pytest.mark.parametrize("form", config.PICTURE_FORMATS)
def test_every_form_holds_the_same_pictures_in_order(finished, form):
    experiment, workdir, specs = finished
    record = generate.run(formatted(experiment, form), workdir, specs)
    assert (record.images, len(record.captions)) == (20, 20)
    images = np.concatenate(list(samples.read_images(workdir)))
    assert images.shape == (20, 8, 8, 3) and images.dtype == np.uint8
    assert [len(np.load(path)) for path in shards(workdir)] == [8, 8, 4]
    np.testing.assert_array_equal(np.load(workdir / record.images_file), images)
    with tarfile.open(workdir / "samples" / "images.tar") as tar:
        names = tar.getnames()
        assert names[:2] == [f"000000.{form}", "000000.txt"] and len(names) == 40
        for i in (0, 7, 8, 19):
            data = tar.extractfile(f"{i:06d}.{form}").read()
            picture = Image.open(io.BytesIO(data))
            assert picture.format == form.upper()
            np.testing.assert_array_equal(np.asarray(picture), images[i])
            words = tar.extractfile(f"{i:06d}.txt").read().decode()
            assert words == record.captions[i]
    (path,) = (workdir / "samples").glob("grid.*")  # the other format's is gone
    picture = Image.open(path)
    assert (path.suffix, picture.format) == (f".{form}", form.upper())
    wanted = sample_grid.draw(images, record.captions)
    np.testing.assert_array_equal(np.asarray(picture), wanted)


def test_held_out_pictures_of_the_same_captions_are_beside_the_samples(finished):
    experiment, workdir, specs = finished
    record = generate.run(experiment, workdir, specs)
    _, source = data.sources(experiment, workdir)
    assert list(record.captions) == source.captions(np.arange(20))
    real = np.load(workdir / record.real_file)
    x = source.rows(np.arange(20))["x"]
    np.testing.assert_array_equal(real, inference.pixels(x))
    drawn = np.load(workdir / record.images_file)
    assert real.shape == drawn.shape and (real != drawn).any()
    picture = np.asarray(Image.open(workdir / "samples" / "real.png"))
    np.testing.assert_array_equal(picture, sample_grid.draw(real, record.captions))
    assert record.labels == ()  # this network reads none


def test_a_picture_without_a_caption_is_known_by_its_label(finished):
    experiment, workdir, specs = finished
    record = generate.run(experiment, workdir, specs)
    few = {"captions": ("a cat", " ", ""), "labels": (3, 4, 5)}
    named = dataclasses.replace(record, **few)
    assert named.titles() == ["a cat", "label 4", "label 5"]
    unread = dataclasses.replace(record, captions=("a cat", ""), labels=())
    assert unread.titles() == ["a cat", ""]


def test_a_missing_shard_is_drawn_again_to_the_same_bytes_and_no_other(
    finished, monkeypatch
):
    experiment, workdir, specs = finished
    generate.run(experiment, workdir, specs)
    before = {path: path.read_bytes() for path in shards(workdir)}
    kept = {path: path.stat().st_mtime_ns for path in before}
    gone = shards(workdir)[1]
    gone.unlink()
    (workdir / "samples" / "record.json").unlink()
    drawn = []
    images = inference.PictureSampler.images
    monkeypatch.setattr(
        inference.PictureSampler,
        "images",
        lambda self, rows, how: drawn.append(list(rows)) or images(self, rows, how),
    )
    generate.run(experiment, workdir, specs)
    assert drawn == [list(range(8, 16))]
    assert {path: path.read_bytes() for path in shards(workdir)} == before
    for path in before:
        assert (path.stat().st_mtime_ns == kept[path]) == (path != gone)


def test_a_shard_lost_after_the_stage_is_drawn_again(finished, monkeypatch):
    """Even if the record and the grid are still there."""
    experiment, workdir, specs = finished
    first = generate.run(experiment, workdir, specs)
    samples = workdir / "samples"
    forms = [samples / name for name in ("grid.png", "images.npy", "images.tar")]
    before = {path: path.read_bytes() for path in [*shards(workdir), *forms]}
    for path in (shards(workdir)[1], *forms[1:]):
        path.unlink()
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    assert generate.run(experiment, workdir, specs) == first  # seconds are of all
    assert said[0] == (
        f"samples of {specs[0].run_id} are not all there: what is missing is drawn"
    )
    assert {path: path.read_bytes() for path in before} == before
    said.clear()
    generate.run(experiment, workdir, specs)
    assert said == [f"samples of {specs[0].run_id} are there already"]


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "changed"])
@pytest.mark.parametrize(
    "name",
    ["images.npy", "images.tar", "real.npy", "grid.png", "real.png", "record.json"],
)
def test_what_is_made_of_the_shards_is_made_again(finished, monkeypatch, name, gone):
    """As if another study's file had been put in its place: each one is whole."""
    experiment, workdir, specs = finished
    first = generate.run(experiment, workdir, specs)
    folder = workdir / "samples"
    path = folder / name
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    if gone:
        path.unlink()
    elif name == "record.json":
        other = dataclasses.replace(first, captions=("of", "others"))
        path.write_text(records.dumps(other))
    else:
        path.write_bytes(before[path][::-1])
    drawn, said = [], []
    monkeypatch.setattr(
        inference.PictureSampler, "images", lambda *given: drawn.append(given)
    )
    monkeypatch.setattr(progress, "say", said.append)
    again = generate.run(experiment, workdir, specs)
    assert dataclasses.replace(again, seconds=first.seconds) == first and not drawn
    after = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    own = {folder / "record.json", folder / "checksums.json"}  # they have seconds
    assert {p: after[p] for p in before.keys() - own} == {
        p: before[p] for p in before.keys() - own
    }
    if not (gone and name in ("record.json", "grid.png")):  # the stage had not ended
        assert said[0] == (
            f"{name} in {folder}: gone, or not as written; made again of the shards"
        )
    said.clear()
    generate.run(experiment, workdir, specs)
    assert said == [f"samples of {specs[0].run_id} are there already"]


def test_finished_pictures_are_left_alone_and_others_settings_replace_them(
    finished, monkeypatch
):
    experiment, workdir, specs = finished
    first = generate.run(experiment, workdir, specs)
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    assert generate.run(experiment, workdir, specs) == first
    assert said == [f"samples of {specs[0].run_id} are there already"]
    fewer = dataclasses.replace(
        experiment,
        generate=dataclasses.replace(experiment.generate, images=5, guidance=1.5),
    )
    said.clear()
    second = generate.run(fewer, workdir, specs)
    first_, *others = said
    assert first_ == (
        "generate  removes 3 finished shards of other pictures (images: 20 there, 5 "
        "now; guidance: 3.0 there, 1.5 now; in a shard: 8 there, 5 now)"
    )
    assert not any("removes" in line for line in others)
    assert second.flops / 5 == pytest.approx(first.flops / 20) and second.flops > 0
    assert second.images == 5 and [len(np.load(p)) for p in shards(workdir)] == [5]
    assert records.loads((workdir / "samples" / "record.json").read_text()) == second


@pytest.mark.parametrize("held", [None, "", "{", '"settings"', "[1]"])
def test_settings_that_cannot_be_read_are_unknown(tmp_path, monkeypatch, held):
    folder, said = tmp_path / "samples", []
    monkeypatch.setattr(progress, "say", said.append)
    generate._remove_other_pictures(folder, {"images": 1, "each": 1}, "")
    assert said == []  # nothing is removed where nothing was
    records.write_text(folder / "shards" / "00000.npy", "a picture")
    generate._remove_other_pictures(folder, {"images": 1, "each": 1}, "")
    assert said == [] and shards(tmp_path) != []  # the same settings
    if held is None:
        (folder / "settings.json").unlink()
    else:
        (folder / "settings.json").write_text(held)
    generate._remove_other_pictures(folder, {"images": 2, "each": 1}, "")
    (line,) = said
    assert line == (
        "generate  removes 1 finished shard of other pictures (of unknown settings)"
    )
    assert shards(tmp_path) == []


def test_nothing_of_other_pictures_is_left_beside_new_settings(tmp_path):
    """If the stage were stopped now, they would be taken for the new pictures."""
    folder = tmp_path / "samples"
    generate._remove_other_pictures(folder, {"images": 1, "each": 1}, "")
    names = "grid.png grid.webp images.npy images.tar real.npy real.png record.json"
    for name in names.split():
        records.write_text(folder / name, "of other pictures")
    records.write_text(folder / "shards" / "00000.npy", "of other pictures")
    records.write_text(folder / "notes.txt", "the user's")
    generate._remove_other_pictures(folder, {"images": 2, "each": 1}, "")
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert left == {"settings.json", "notes.txt"}


def test_a_shard_of_other_pictures_is_refused_and_named(finished):
    experiment, workdir, specs = finished
    generate.run(experiment, workdir, specs)
    first, second, _ = shards(workdir)
    kept = first.read_bytes()
    assert len(kept) == len(second.read_bytes())
    for other in (second.read_bytes(), kept[:-1] + bytes([kept[-1] ^ 1])):
        first.write_bytes(other)
        # Under a finished study, in one that goes on, and where they are measured.
        with pytest.raises(records.Damaged, match="00000.npy holds other pictures"):
            generate.run(experiment, workdir, specs)
        record = workdir / "samples" / "record.json"
        held = record.read_bytes()
        record.unlink()
        with pytest.raises(records.Damaged, match="00000.npy holds other pictures"):
            generate.run(experiment, workdir, specs)
        record.write_bytes(held)
        with pytest.raises(records.Damaged, match="00000.npy holds other pictures"):
            list(samples.read_images(workdir))
    first.unlink()
    generate.run(experiment, workdir, specs)
    assert first.read_bytes() == kept


def test_pictures_of_another_study_with_the_same_settings_are_not_taken(
    finished, monkeypatch
):
    experiment, workdir, specs = finished
    generate.run(experiment, workdir, specs)
    path = workdir / "samples" / "checksums.json"
    held = records.read_json(path)
    other = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, seed=7)
    )
    model = samples.model_to_sample(experiment, workdir, specs)
    assert samples.are_of(workdir, samples.origin(experiment, model))
    assert not samples.are_of(workdir, samples.origin(other, model))
    records.write_json(path, {"of": "another study", "shards": held["shards"]})
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    generate.run(experiment, workdir, specs)
    assert "(of another study or other weights)" in said[0]
    again = records.read_json(path)
    assert [again[k] for k in ("of", "shards")] == [held[k] for k in ("of", "shards")]
    # The record has the seconds of this call.
    differ = {k for k, v in again["files"].items() if held["files"][k] != v}
    assert again["files"].keys() == held["files"].keys() and differ <= {"record.json"}
    path.unlink()  # as of 0.1.0
    said.clear()
    generate.run(experiment, workdir, specs)
    assert said == [f"samples of {specs[0].run_id} are there already"]


def test_another_format_is_written_without_drawing_anything(finished, monkeypatch):
    experiment, workdir, specs = finished
    first = generate.run(experiment, workdir, specs)
    monkeypatch.setattr(
        inference.PictureSampler, "images", lambda *_: pytest.fail("drawn")
    )
    # Two pictures, with what is around them.
    largest = 2 * max(sample_grid.cell(8, 8)) + 1
    monkeypatch.setattr(generate, "LARGEST_WEBP", largest)
    assert generate.run(formatted(experiment, "webp"), workdir, specs) == first
    grid = np.asarray(Image.open(workdir / "samples" / "grid.webp"))
    images = np.load(workdir / first.images_file)
    assert len(images) == 20
    wanted = sample_grid.draw(images[:4], first.captions[:4])
    np.testing.assert_array_equal(grid, wanted)
    assert generate.run(experiment, workdir, specs) == first
    assert (workdir / "samples" / "grid.png").exists()


def test_the_first_alone_are_shown(finished, monkeypatch):
    experiment, workdir, specs = finished
    whole = generate.run(experiment, workdir, specs)
    monkeypatch.setattr(generate, "SHOWN", 11)
    record = generate.run(formatted(experiment, "webp"), workdir, specs)
    assert (record.images, record.captions) == (20, whole.captions[:11])
    shown = np.load(workdir / record.images_file)
    drawn = np.concatenate(list(samples.read_images(workdir)))
    np.testing.assert_array_equal(shown, drawn[:11])
    with tarfile.open(workdir / "samples" / "images.tar") as tar:
        assert len(tar.getnames()) == 40
    grid = np.asarray(Image.open(workdir / "samples" / "grid.webp"))
    np.testing.assert_array_equal(grid, sample_grid.draw(shown, record.captions))
    assert len(np.load(workdir / record.real_file)) == 11


def test_nothing_to_draw_from_is_said(finished, tmp_path, monkeypatch):
    experiment, workdir, specs = finished
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    assert generate.run(experiment, tmp_path, specs) is None
    model = dataclasses.replace(experiment.model, architecture="autoencoder_kl")
    pixels = dataclasses.replace(experiment, model=model)
    assert generate.run(pixels, workdir, specs) is None
    assert said == [
        "no finished run to sample from",
        "no samples: an autoencoder generates nothing by itself",
    ]


def test_a_sampler_that_cannot_be_used_is_refused_by_its_fields(tiny):
    given = tiny.copy_and_resolve_references()
    given.generate.sampler, given.generate.spacing = "ddim", "linspace"
    with pytest.raises(config.ConfigError) as caught:
        generate.check(config.resolve(given))
    assert str(caught.value).startswith(
        "config.generate cannot sample with sampler 'ddim', spacing 'linspace' and "
        "steps = 50: "
    )


def test_a_write_cut_off_between_tar_and_grid_is_done_again(finished, monkeypatch):
    experiment, workdir, specs = finished
    generate.run(experiment, workdir, specs)
    with monkeypatch.context() as patch:
        patch.setattr(sample_grid, "draw", lambda *_: pytest.fail("killed here"))
        with pytest.raises(BaseException, match="killed here"):
            generate.run(formatted(experiment, "webp"), workdir, specs)
    generate.run(experiment, workdir, specs)
    with tarfile.open(workdir / "samples" / "images.tar") as tar:
        assert tar.getnames()[0] == "000000.png"


@pytest.mark.parametrize("form", config.PICTURE_FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 5, 3), (64, 33, 3)])
def test_files_give_back_every_byte(form, shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, shape, np.uint8)
    smooth = np.broadcast_to(np.arange(shape[1], dtype=np.uint8)[:, None], shape)
    for image in (noise, np.ascontiguousarray(smooth)):
        picture = Image.open(io.BytesIO(generate.encoded(image, form)))
        assert (picture.format, picture.mode) == (form.upper(), "RGB")
        assert np.asarray(picture).tobytes() == image.tobytes()


@pytest.mark.parametrize("batch", [3, 16])
def test_a_picture_depends_on_its_position_alone(finished, batch):
    experiment, workdir, specs = finished
    device_mesh = mesh.build(experiment.mesh, {})
    model = samples.model_to_sample(experiment, workdir, specs)
    with jax.set_mesh(device_mesh):
        draw = inference.PictureSampler(experiment, workdir, model, device_mesh, batch)
        together = draw.images(np.arange(20), experiment.generate)
        alone = draw.images(np.array([13, 2]), experiment.generate)
    generate.run(experiment, workdir, specs)
    stored = np.concatenate(list(samples.read_images(workdir)))
    for got, wanted in ((together, stored), (alone, stored[[13, 2]])):
        assert np.abs(got.astype(int) - wanted).max() <= 1  # where it is rounded


def test_steps_and_guidance_share_one_program_and_are_counted(finished):
    experiment, workdir, specs = finished
    device_mesh = mesh.build(experiment.mesh, {})
    model = samples.model_to_sample(experiment, workdir, specs)
    with jax.set_mesh(device_mesh):
        draw = inference.PictureSampler(experiment, workdir, model, device_mesh, 8)
        costs = [
            draw.cost(dataclasses.replace(experiment.generate, steps=steps))
            for steps in (2, 4)
        ]
    assert [cost.nfe for cost in costs] == [4, 8]  # guidance: two evaluations a step
    assert costs[1].flops == 2 * costs[0].flops > 0
    assert costs[0].decoder_flops == 0


def with_captions(experiment, *captions, **settings):
    own = dataclasses.replace(experiment.generate, captions=captions, **settings)
    return dataclasses.replace(experiment, generate=own)


@pytest.mark.filterwarnings("ignore:.*has not learnt")
def test_captions_of_ones_own_are_drawn_in_turn(finished, monkeypatch):
    experiment, workdir, specs = finished
    held_out = generate.run(experiment, workdir, specs)
    before = np.concatenate(list(samples.read_images(workdir)))
    captions = held_out.captions
    own = with_captions(experiment, captions[0].upper(), captions[3] + "!")
    record = generate.run(own, workdir, specs)
    said = [captions[0].upper(), captions[3] + "!"]
    assert list(record.captions) == said * 10
    assert record.own_captions == tuple(said) and held_out.own_captions == ()
    # No real picture has these captions.
    assert record.real_file == "" and held_out.real_file
    assert not list((workdir / "samples").glob("real.*"))
    after = np.concatenate(list(samples.read_images(workdir)))
    # Positions 0 and 3 have the words and the noise that they had.
    assert [bool((a == b).all()) for a, b in zip(before, after, strict=True)][:4] == [
        True,
        False,
        False,
        True,
    ]
    assert generate.run(own, workdir, specs) == record  # nothing is drawn again
    again = generate.run(experiment, workdir, specs)
    assert again.captions == captions  # and not those of one's own


def test_what_cannot_be_drawn_for_captions_of_ones_own_is_refused(finished):
    experiment, workdir, specs = finished
    with pytest.raises(config.ConfigError, match="captions: 'xyzzy': .* none of its w"):
        generate.run(with_captions(experiment, "xyzzy"), workdir, specs)
    given = config.to_config_dict(experiment)
    given.generate.captions = ("a red star",)
    given.evaluate.network = "lite0"
    with pytest.raises(
        config.ConfigError, match="held-out pictures have other captions"
    ):
        config.resolve(given)
    given.evaluate.network, given.generate.captions = "none", ("a", " ")
    with pytest.raises(config.ConfigError, match="a caption is empty"):
        config.resolve(given)


def test_settings_of_before_there_were_own_captions_are_todays(finished):
    experiment, workdir, specs = finished
    generate.run(experiment, workdir, specs)
    path = workdir / "samples" / "settings.json"
    assert "own_captions" not in records.read(path)
    (workdir / "samples" / "record.json").unlink()
    kept = {p: p.stat().st_mtime_ns for p in shards(workdir)}
    generate.run(experiment, workdir, specs)
    assert {p: p.stat().st_mtime_ns for p in shards(workdir)} == kept
