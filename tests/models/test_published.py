"""Which network a folder holds, in every layout, and its parameters bit for bit."""

import dataclasses
import functools
import json

import jax
import numpy as np
import published_configurations as configurations
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models import from_config, positions
from scaling_ldm.models.denoisers import dit, mmdit, presets, unet
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.encoders import presets as encoder_presets
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import layout, published, torch_file
from scaling_ldm.models.weights import mmdit as mmdit_weights
from scaling_ldm.models.weights import pixart as pixart_weights
from scaling_ldm.models.weights import unet as unet_weights
from scaling_ldm.records.errors import WeightsError

DIT = dit.DiTConfig(
    architecture="adaln_zero",
    width=16,
    depth=2,
    heads=2,
    image_shape=(4, 4, 3),
    patch_size=2,
    classes=5,
    grid=dit_weights.GRID,
    out_channels=6,
)
SD3 = mmdit.MMDiTConfig(
    width=16,
    depth=2,
    heads=2,
    image_shape=(4, 4, 3),
    patch_size=2,
    text_tokens=3,
    text_width=6,
    pooled_width=5,
    grid=positions.PositionGrid(columns_first=True, step=0.5, table=4),
    out_channels=3,
)
# Name -> (network, how it is saved in a folder, what its config.json says).
FOLDERS = {
    "DiTTransformer2DModel": (
        dataclasses.replace(DIT, time_ends=1, mlp_epsilon=1e-5),
        lambda params, path, network: dit_weights.save(
            params, path, network, "diffusers"
        ),
        dit_weights.to_config,
    ),
    "PixArtTransformer2DModel": (
        dataclasses.replace(
            DIT, architecture="cross_attention", classes=0, text_tokens=3, text_width=6
        ),
        pixart_weights.save,
        pixart_weights.to_config,
    ),
    "SD3Transformer2DModel": (SD3, mmdit_weights.save, mmdit_weights.to_config),
    "FluxTransformer2DModel": (
        dataclasses.replace(
            SD3,
            depth=1,
            single_depth=2,
            guidance=True,
            qk_norm="rms",
            positions="rope",
            grid=positions.PositionGrid(),
            rope_axes=(4, 2, 2),
        ),
        mmdit_weights.save,
        mmdit_weights.to_config,
    ),
    "UNet2DConditionModel": (
        unet.UNetConfig(
            base=32,
            heads=2,
            image_shape=(4, 4, 3),
            text_tokens=3,
            text_width=8,
            multiples=(1,),
            blocks=1,
        ),
        unet_weights.save,
        unet_weights.to_config,
    ),
    "AutoencoderKL": (
        autoencoder_kl.AutoencoderConfig(
            channels=(8, 8), blocks=1, groups=4, middle_attention=False
        ),
        None,
        None,
    ),
}


@functools.cache
def drawn(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("f"),
        from_config.parameter_shapes(network),
    )


def test_every_layout_is_tried():
    older = {"Transformer2DModel"}  # in tests of its own
    assert FOLDERS.keys() == published.LAYOUTS.keys() - older


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_what_diffusers_called_both_transformers(name, tmp_path):
    network, _, to_config = FOLDERS[name]
    older = to_config(network) | {
        "_class_name": "Transformer2DModel",
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(older))
    assert published.find(tmp_path, network).network == network
    path.write_text(json.dumps(older | {"norm_type": "layer_norm"}))
    with pytest.raises(WeightsError, match="norm_type 'layer_norm'; known: ada_norm_z"):
        published.find(tmp_path, network)


# At night: of PixArt's blocks and of SD3's there is a larger kind by day.
AT_NIGHT = ("PixArtTransformer2DModel", "SD3Transformer2DModel")


def some_by_day(names):
    return [
        pytest.param(name, marks=pytest.mark.slow if name in AT_NIGHT else ())
        for name in names
    ]


@pytest.mark.parametrize("name", some_by_day(FOLDERS))
def test_a_folder_says_what_it_holds(name, tmp_path):
    network, save, to_config = FOLDERS[name]
    params = drawn(network)
    if save is None:
        autoencoder_weights.save(params, tmp_path, network)
    else:
        save(params, tmp_path / "model.safetensors", network)
        (tmp_path / "config.json").write_text(json.dumps(to_config(network)))
    found = published.find(tmp_path, network)
    assert found.network == network
    jax.tree.map(assert_array_equal, found.load(), params)


@pytest.mark.parametrize("name", configurations.CONFIGURATIONS)
def test_a_published_configuration_is_read_as_its_preset(name):
    preset, changes = configurations.READ_AS[name]
    theirs = configurations.read(configurations.CONFIGURATIONS[name], preset.config)
    assert theirs == dataclasses.replace(preset.config, **changes)


def test_every_preset_is_read_from_a_published_configuration():
    """Paper A's U-Nets and the other sizes of DiT and T5 are of the same kinds."""
    read = [preset for preset, _ in configurations.READ_AS.values()]
    everything = {**presets.PIXARTS, **presets.MMDITS, **encoder_presets.AUTOENCODERS}
    everything |= encoder_presets.PRESETS | encoder_presets.DINOV2
    assert [name for name, preset in everything.items() if preset not in read] == []


# A setting that shapes do not show, of each network -> another value.
OTHERWISE = {
    "DiTTransformer2DModel": ("mlp_epsilon", 1e-6),
    "PixArtTransformer2DModel": ("heads", 4),
    "SD3Transformer2DModel": ("heads", 4),
    "FluxTransformer2DModel": ("rope_axes", (2, 4, 2)),
    "UNet2DConditionModel": ("heads", (4,)),
}


@pytest.mark.parametrize("name", some_by_day(OTHERWISE))
def test_weights_are_not_read_into_other_settings_than_those_beside_them(
    name, tmp_path
):
    network, save, to_config = FOLDERS[name]
    file = tmp_path / "model.safetensors"
    save(drawn(network), file, network)
    module = {
        "DiTTransformer2DModel": dit_weights,
        "PixArtTransformer2DModel": pixart_weights,
        "UNet2DConditionModel": unet_weights,
    }.get(name, mmdit_weights)
    field, value = OTHERWISE[name]
    other = dataclasses.replace(network, **{field: value})
    kind = ("diffusers",) if module is dit_weights else ()
    module.load(file, other, *kind)  # nothing says otherwise
    (tmp_path / "config.json").write_text(json.dumps(to_config(network)))
    module.load(file, network, *kind)
    for place in (file, tmp_path):
        with pytest.raises(WeightsError, match=f"config.json says {field} = .*, not "):
            module.load(place, other, *kind)
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    module.load(file, other, *kind)


def test_heads_for_each_resolution_go_both_ways(tmp_path):
    network = unet.UNetConfig(
        base=32,
        heads=(1, 2),
        image_shape=(4, 4, 3),
        text_tokens=3,
        text_width=8,
        multiples=(1, 2),
        blocks=1,
    )
    said = unet_weights.to_config(network)
    assert said["attention_head_dim"] == [1, 2]
    assert unet_weights.from_config(said, 3)[0] == network
    same = unet_weights.from_config(said | {"attention_head_dim": [2, 2]}, 3)[0]
    assert same == dataclasses.replace(network, heads=2)
    with pytest.raises(WeightsError, match=r"heads \[1, 2, 4\] and widths \[32, 64\]"):
        unet_weights.from_config(said | {"attention_head_dim": [1, 2, 4]}, 3)


def test_heads_of_a_size_that_is_not_published_are_asked_for(tmp_path):
    path = tmp_path / "dit.safetensors"
    dit_weights.save(drawn(DIT), path, DIT, "official")
    like = dataclasses.replace(DIT, heads=4)
    found = published.find(path, like)
    assert found.network.heads == 4 and found.unsaid == ("network.heads",)


def test_a_published_size_is_not_read_with_other_heads(tmp_path, monkeypatch):
    path = tmp_path / "dit.safetensors"
    dit_weights.save(drawn(DIT), path, DIT, "official")
    assert presets.DIT_HEADS == {
        (preset.config.width, preset.config.depth): preset.config.heads
        for preset in presets.DITS.values()
    }
    monkeypatch.setitem(presets.DIT_HEADS, (DIT.width, DIT.depth), DIT.heads)
    found = published.find(path, dataclasses.replace(DIT, heads=4))
    assert found.network.heads == 2 and found.unsaid == ()


def test_which_state_dict_of_a_training_checkpoint_is_read_is_said(
    tmp_path, monkeypatch
):
    path = tmp_path / "0050000.pt"
    tensors = layout.write(
        dit_weights.pairs(DIT, "official"),
        drawn(DIT),
        dit_weights.fixed(DIT, "official"),
    )
    for key, others, said in (
        ("ema", ("model",), "'ema' of 0050000.pt, not model"),
        ("model", (), "'model' of 0050000.pt"),
        ("", (), ""),
    ):
        given = torch_file.StateDict(tensors, key, others)
        monkeypatch.setattr(torch_file, "state_dict", lambda *_, given=given: given)
        found = published.find(path, DIT)
        assert found.part == said
        jax.tree.map(assert_array_equal, found.load(), drawn(DIT))


def test_a_file_of_dits_authors_says_all_but_the_heads(tmp_path):
    path = tmp_path / "dit.safetensors"
    params = drawn(DIT)
    dit_weights.save(params, path, DIT, "official")
    like = dataclasses.replace(DIT, width=32, depth=1, image_shape=(8, 8, 3))
    found = published.find(path, like)
    assert found.network == DIT
    jax.tree.map(assert_array_equal, found.load(), params)


def test_what_is_no_layout_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(WeightsError, match="is of Other; known: UNet2DConditionModel"):
        published.find(tmp_path, DIT)
    (tmp_path / "config.json").unlink()
    unet_weights.save(
        drawn(FOLDERS["UNet2DConditionModel"][0]),
        tmp_path / "model.safetensors",
        FOLDERS["UNet2DConditionModel"][0],
    )
    with pytest.raises(WeightsError, match="has no config.json and not the tensors of"):
        published.find(tmp_path, DIT)
