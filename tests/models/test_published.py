"""Which network a folder holds, in every layout, and its parameters bit for bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models import from_config, positions
from scaling_ldm.models.denoisers import dit, mmdit, unet
from scaling_ldm.models.encoders import autoencoder_kl
from scaling_ldm.models.weights import autoencoder_kl as autoencoder_weights
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import mmdit as mmdit_weights
from scaling_ldm.models.weights import pixart as pixart_weights
from scaling_ldm.models.weights import published
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


def drawn(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype("f"),
        from_config.parameter_shapes(network),
    )


def test_every_layout_is_tried():
    assert FOLDERS.keys() == published.LAYOUTS.keys()


@pytest.mark.parametrize("name", FOLDERS)
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
