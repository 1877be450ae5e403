"""Which files of a folder are its weights, and which types of tensors are read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import files, layout
from scaling_ldm.records.errors import WeightsError

TENSORS = {"a": np.arange(3, dtype="f"), "b": np.ones((2, 2), "f")}
STEMS = ("model", "diffusion_pytorch_model", "sd-vae-ft-mse", "ae")


def in_parts(folder, stem, variant="", index=True):
    """The tensors in two files, with or without their index."""
    names = [f"{stem}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, (key, value) in zip(names, TENSORS.items(), strict=True):
        layout.save({key: value}, folder / name)
    if index:
        places = dict(zip(TENSORS, names, strict=True))
        path = folder / f"{stem}.safetensors.index{variant}.json"
        path.write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("variant", ["", ".fp16", ".bf16"])
@pytest.mark.parametrize("kind", ["one file", "an index", "parts"])
def test_every_usual_form_of_a_folder_is_read(stem, variant, kind, tmp_path):
    if kind == "one file":
        layout.save(TENSORS, tmp_path / f"{stem}{variant}.safetensors")
    else:
        in_parts(tmp_path, stem, variant, index=kind == "an index")
    found = layout.load(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert_array_equal(found[name], value)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_an_index_names_its_parts(variant, tmp_path):
    places = {name: f"part_{name}.safetensors" for name in TENSORS}
    for name, place in places.items():
        layout.save({name: TENSORS[name]}, tmp_path / place)
    with pytest.raises(WeightsError, match="several checkpoints, part_a.safetensors, "):
        files.stored(tmp_path)
    index = tmp_path / f"model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert layout.load(tmp_path).keys() == layout.load(index).keys() == TENSORS.keys()


def test_full_precision_and_usual_names_go_first(tmp_path):
    halves = {name: value.astype(np.float16) for name, value in TENSORS.items()}
    for name in ("model.fp16", "ae", "diffusion_pytorch_model.non_ema"):
        layout.save(halves, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match="several checkpoints, ae.safetensors, diff"):
        files.stored(tmp_path)
    in_parts(tmp_path, "diffusion_pytorch_model")
    assert layout.load(tmp_path)["a"].dtype == np.float32
    layout.save({"c": TENSORS["a"]}, tmp_path / "model.safetensors")
    assert layout.load(tmp_path).keys() == {"c"}


def test_parts_that_are_not_all_there_are_refused(tmp_path):
    in_parts(tmp_path, "model", index=False)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="00002-of-00002.*not all the parts"):
        files.stored(tmp_path)
    layout.save(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"\['b'\] are in an earlier part"):
        files.stored(tmp_path)


def test_a_file_that_is_not_there_is_told_what_is(tmp_path):
    layout.save(TENSORS, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no such file; .* holds other.safetensors"):
        files.stored(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no such file, and no folder"):
        files.stored(tmp_path / "no" / "model.safetensors")


def test_an_autoencoder_under_another_name(tmp_path):
    config = autoencoder_kl.AutoencoderConfig(
        channels=(8,), blocks=1, groups=4, middle_attention=False
    )
    shapes = autoencoder_weights.pairs(config)
    params = autoencoder_weights.read(
        {pair.name: np.ones(pair.theirs, "f") for pair in shapes}, config
    )
    autoencoder_weights.save(params, tmp_path, config)
    weights = tmp_path / autoencoder_weights.WEIGHTS
    weights.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert autoencoder_weights.load(tmp_path)[0] == config


def raw(path, kind, width, names=("a", "b")):
    """A safetensors file of zeros, of a type that numpy may not have."""
    header, at = {}, 0
    for name in names:
        end = at + TENSORS[name].size * width
        shape = list(TENSORS[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


PAIRS = [layout.vector((name,), name, value.shape) for name, value in TENSORS.items()]


@pytest.mark.parametrize(
    ("kind", "width"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("U8", 1), ("I64", 8), ("BOOL", 1)],
)
def test_types_that_are_no_parameters_are_refused_by_name(kind, width, tmp_path):
    path = tmp_path / "model.safetensors"
    raw(path, kind, width)
    with pytest.raises(WeightsError, match="type .* of a and 1 more: .* float32") as e:
        layout.read(PAIRS, files.stored(path), "a network's", np.float32)
    said = {"I8": "int8", "U8": "uint8", "I64": "int64", "BOOL": "bool"}
    assert f"type {said.get(kind, kind)} of a" in str(e.value)
    if kind.startswith("F8"):
        with pytest.raises(WeightsError, match=f"{path}: a is {kind}; parameters are"):
            layout.load(path)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_floats_become_float32(dtype, tmp_path):
    tensors = {name: value.astype(dtype) for name, value in TENSORS.items()}
    layout.save(tensors, tmp_path / "model.safetensors")
    found = layout.read(PAIRS, files.stored(tmp_path), "it", np.float32)
    for name, value in TENSORS.items():
        assert found[name].dtype == np.float32
        assert_array_equal(found[name], value)


def test_views_are_saved_in_the_order_in_which_they_are_read(tmp_path):
    x = np.arange(12, dtype="f").reshape(3, 4)
    views = {
        "reversed": x[:, ::-1],
        "transposed": x.T,
        "every second": x[::2],
        "repeated": np.broadcast_to(x[0], (5, 4)),
        "number": x[1, 1],
    }
    layout.save(views, tmp_path / "x.safetensors")
    read = layout.load(tmp_path / "x.safetensors")
    assert read.keys() == views.keys()
    for name, view in views.items():
        assert_array_equal(read[name], view, err_msg=name)
