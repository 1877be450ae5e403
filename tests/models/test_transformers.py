"""MMDiT, FLUX, and the options of the transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm import flops
from scaling_ldm.config import names
from scaling_ldm.models import attention, denoisers, positions
from scaling_ldm.models.denoisers import dit, mmdit, presets
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import layout
from scaling_ldm.models.weights import mmdit as mmdit_weights
from scaling_ldm.models.weights import pixart as pixart_weights

BATCH = 2
SD3 = mmdit.MMDiTConfig(
    width=16,
    depth=2,
    heads=2,
    image_shape=(4, 8, 3),
    patch_size=2,
    mlp_ratio=4,
    activation="gelu",
    text_tokens=3,
    text_width=6,
    time_width=256,
    vocab_size=0,
    dtype=jnp.float32,
    remat="none",
    unroll=False,
    pooled_width=5,
    grid=positions.PositionGrid(columns_first=True, step=0.5, table=8),
)
FLUX = dataclasses.replace(
    SD3,
    depth=1,
    single_depth=2,
    guidance=True,
    qk_norm="rms",
    positions="rope",
    grid=positions.PositionGrid(),
)
DIT = dit.DiTConfig(
    architecture="adaln_zero",
    width=16,
    depth=2,
    heads=2,
    image_shape=(4, 4, 3),
    patch_size=2,
    mlp_ratio=4,
    activation="gelu",
    text_tokens=0,
    text_width=0,
    time_width=256,
    vocab_size=0,
    classes=5,
    dtype=jnp.float32,
    remat="none",
    unroll=False,
    grid=positions.PositionGrid(columns_first=True),
    out_channels=6,
)
PIXART = dataclasses.replace(
    DIT, architecture="cross_attention", text_tokens=3, text_width=6, classes=0
)


def drawn(spec, scale=0.3):
    """Random parameters without compiling an initialiser."""
    init = dit.init if isinstance(spec, dit.DiTConfig) else mmdit.init
    shapes = jax.eval_shape(lambda: init(spec, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.normal(scale=scale, size=s.shape).astype("f"), shapes
    )


def inputs(spec):
    rng = np.random.default_rng(1)
    cond = {
        "text": rng.normal(size=(BATCH, spec.text_tokens, spec.text_width)),
        "pooled": rng.normal(size=(BATCH, 5)),
        "guidance": np.asarray([0.5, 3.0]),
    }
    cond = {name: value.astype("f") for name, value in cond.items()}
    cond["label"] = np.asarray([1, 5])
    cond["mask"] = np.ones((BATCH, spec.text_tokens), bool)
    x = rng.normal(size=(BATCH, *spec.image_shape)).astype("f")
    return x, np.asarray([0.2, 0.9], "f"), cond


# ------------------------------------ positions ------------------------------------


@pytest.mark.parametrize("axes", [(4, 6, 6), (8, 8), (16,)])
def test_rotary_scores_tell_relative_positions_only(axes):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 3, 16)), "f") for _ in "qk")

    def score(at_q, at_k):
        tables = (positions.rope_table(np.asarray([at]), axes) for at in (at_q, at_k))
        turned = [positions.rotate(x, t) for x, t in zip((q, k), tables, strict=True)]
        return np.einsum("btkh,btkh->k", *turned)

    for axis in range(len(axes)):
        here, there, shift = (np.zeros(len(axes)) for _ in range(3))
        here[axis], there[axis], shift[axis] = 2, 7, 11
        want = score(here, there)
        assert_allclose(score(here + shift, there + shift), want, rtol=1e-4, atol=1e-5)
        assert np.abs(score(here, there + shift) - want).max() > 0.1
        assert np.abs(score(there, here) - want).max() > 0.1
    still = np.zeros((1, len(axes)))
    assert_array_equal(positions.rotate(q, positions.rope_table(still, axes)), q)


def test_rotary_positions_of_text_and_image():
    table = positions.image_rope(2, 3, (4, 6, 6), before=5)
    assert table.shape == (2, 11, 8)
    assert_array_equal(table[0, :5], 1.0)  # text is not rotated
    assert_array_equal(table[1, :5], 0.0)
    assert_array_equal(table[1, 5:, :2], 0.0)  # and the index axis rotates nothing
    assert_allclose(table[1, 5 + 4, 2], np.sin(1), rtol=1e-6)  # row 1, column 1
    assert_allclose(table[1, 5 + 2, 5], np.sin(2), rtol=1e-6)  # row 0, column 2
    assert positions.rope_axes(128, 3) == (16, 56, 56)  # FLUX
    for width in (6, 8, 16, 24, 32, 64, 72, 96):
        axes = positions.rope_axes(width, 3)
        assert sum(axes) == width and not any(size % 2 for size in axes)


def test_orders_of_the_fixed_table_are_the_same_features():
    rows = positions.grid_positions(positions.PositionGrid(), 3, 4, 16)
    columns = positions.grid_positions(
        positions.PositionGrid(columns_first=True), 3, 4, 16
    )
    quarter = np.split(np.asarray(rows), 4, axis=-1)
    want = np.concatenate([quarter[i] for i in (3, 2, 1, 0)], axis=-1)
    assert_allclose(columns, want, atol=1e-6)
    whole = positions.grid_positions(
        positions.PositionGrid(columns_first=True, step=0.5, table=8), 8, 8, 16
    ).reshape(8, 8, 16)
    middle = positions.grid_positions(
        positions.PositionGrid(columns_first=True, step=0.5, table=8), 2, 4, 16
    )
    assert_allclose(middle.reshape(2, 4, 16), whole[3:5, 2:6])
    with pytest.raises(ValueError, match="9 x 2 patches exceed a table of 8 x 8"):
        positions.grid_positions(positions.PositionGrid(table=8), 9, 2, 16)


@pytest.mark.parametrize(
    "spec",
    [pytest.param(DIT, id="dit"), pytest.param(SD3, id="sd3", marks=pytest.mark.slow)],
)
def test_positions_matter_as_chosen(spec):
    """Without positions, a permutation of the patches would permute the output."""
    x, t, cond = inputs(spec)
    p = spec.patch_size
    mixed = np.concatenate([x[:, :, p:], x[:, :, :p]], axis=2)  # columns of patches
    shared = {
        kind: dataclasses.replace(spec, positions=kind, grid=positions.PositionGrid())
        for kind in names.POSITIONS
    }
    apply = dit.apply if isinstance(spec, dit.DiTConfig) else mmdit.apply
    seen = []
    for kind, other in shared.items():
        params = drawn(other, scale=0.4)
        if kind == "learned":
            assert params["entry"]["position_table"].shape[1] == np.prod(spec.patches)
        else:
            assert "position_table" not in params["entry"]
        run = jax.jit(
            lambda x, other=other, params=params: apply(other, params, x, t, cond)
        )
        out = np.asarray(run(mixed))
        back = np.concatenate([out[:, :, -p:], out[:, :, :-p]], axis=2)
        seen.append(np.asarray(run(x)))
        assert np.abs(back - seen[-1]).max() > 1e-3, kind
    assert len({value.tobytes() for value in seen}) == 3


# ------------------------------------ QK norm ------------------------------------


@pytest.mark.parametrize(
    ("spec", "calls", "qk_norm"),
    [
        pytest.param(DIT, 2, "none", id="dit_none"),
        pytest.param(DIT, 2, "layer", id="dit_layer", marks=pytest.mark.slow),
        pytest.param(PIXART, 4, "rms", id="pixart_rms"),
        pytest.param(SD3, 2, "none", id="sd3_none", marks=pytest.mark.slow),
        pytest.param(SD3, 2, "layer", id="sd3_layer", marks=pytest.mark.slow),
        pytest.param(FLUX, 3, "rms", id="flux_rms"),
    ],
)
def test_normalised_queries_and_keys_bound_the_scores(
    spec, calls, qk_norm, monkeypatch
):
    """|q k| / sqrt(H) <= sqrt(H), however large the activations are."""
    spec = dataclasses.replace(spec, qk_norm=qk_norm, unroll=True)
    params = drawn(spec, scale=3.0)

    def unit(path, leaf):
        names = [key.key for key in path]
        if names[-2] in ("q_norm", "k_norm") or names[-2][-7:] in (
            "_q_norm",
            "_k_norm",
        ):
            return np.full_like(leaf, names[-1] == "scale")
        return leaf

    params = jax.tree_util.tree_map_with_path(unit, params)
    largest, attend = [], attention.attend

    def watched(q, k, v, mask):
        scores = jnp.einsum("BTKH,BSKH->BKTS", q, k) * q.shape[-1] ** -0.5
        largest.append(jnp.abs(scores).max())
        return attend(q, k, v, mask)

    monkeypatch.setattr(attention, "attend", watched)
    x, t, cond = inputs(spec)
    apply = dit.apply if isinstance(spec, dit.DiTConfig) else mmdit.apply
    found = jax.jit(lambda p: (apply(spec, p, x, t, cond), jnp.stack(largest))[1])(
        params
    )
    assert len(found) == calls
    bound = (spec.width // spec.heads) ** 0.5
    if qk_norm == "none":
        assert np.max(found) > 10 * bound
    else:
        assert np.max(found) <= bound * 1.0001


# ------------------------------------ two streams ------------------------------------


@pytest.mark.parametrize("spec", [SD3, FLUX], ids=["sd3", "flux"])
def test_conditions_of_two_streams(spec):
    net = denoisers.mm_dit(spec)
    assert net.conditioning[2:] == (
        ("pooled", "guidance") if spec.guidance else ("pooled",)
    )
    assert (net.image_tokens, net.other_tokens) == (8, 3)
    params, (x, t, cond) = drawn(spec), inputs(spec)
    apply = jax.jit(net.apply)
    base = apply(params, x, t, cond)
    assert base.shape == x.shape and base.dtype == jnp.float32
    without = {name: value for name, value in cond.items() if name != "mask"}
    assert_allclose(apply(params, x, t, without), base, rtol=1e-5, atol=1e-5)
    for name in ("text", *net.conditioning[2:]):
        other = apply(params, x, t, {**cond, name: cond[name] + 0.5})
        assert np.abs(other - base).max() > 1e-3, name
    part = {**cond, "mask": np.asarray([[True, True, False]] * BATCH)}
    other = {**part, "text": part["text"] * np.asarray([1, 1, 9], "f")[None, :, None]}
    assert_array_equal(apply(params, x, t, other), apply(params, x, t, part))
    assert np.abs(apply(params, x, t, part) - base).max() > 1e-3


def test_without_pooled_features_the_mean_of_real_words_stands_in():
    spec = dataclasses.replace(SD3, pooled_width=0)
    params, (x, t, cond) = drawn(spec), inputs(spec)
    cond["mask"] = np.asarray([[True, True, False], [False] * 3])
    mean = cond["text"][:, :2].mean(axis=1) * np.asarray([[1], [0]], "f")
    fed = dataclasses.replace(SD3, pooled_width=spec.text_width)
    got = jax.jit(lambda p: mmdit.apply(spec, p, x, t, cond))(params)
    fed_cond = {**cond, "pooled": mean}
    want = jax.jit(lambda p: mmdit.apply(fed, p, x, t, fed_cond))(params)
    assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_depth_of_flux_is_split_as_published():
    assert mmdit.split(57) == (19, 38)
    for depth in range(2, 40):
        double, single = mmdit.split(depth)
        assert double >= 1 and single >= 1 and double + single == depth
    with pytest.raises(ValueError, match="at least 2 blocks, got 1"):
        mmdit.split(1)


def test_every_architecture_has_a_builder():
    assert denoisers.mm_dit(FLUX).other_tokens == 3
    assert denoisers.transformer(DIT).image_tokens == 4


def test_a_variance_doubles_the_output_alone():
    x, t, cond = inputs(DIT)
    out = jax.eval_shape(lambda p: dit.apply(DIT, p, x, t, cond), drawn(DIT))
    assert out.shape == (BATCH, 4, 4, 6)


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (SD3, {"depth": 1}, "an MMDiT needs at least 2 blocks, got 1"),
        (SD3, {"heads": 3}, "not divisible by 3 heads"),
        (SD3, {"norm": "batch"}, "norm 'batch'; known: layer, rms"),
        (SD3, {"qk_norm": "l2"}, "qk_norm 'l2'; known: none, layer, rms"),
        (DIT, {"positions": "alibi"}, "known: sinusoidal, learned, rope"),
        (FLUX, {"rope_axes": (2, 2, 2)}, "3 even sizes that sum to a head's 8"),
        (FLUX, {"rope_axes": (1, 3, 4)}, "3 even sizes that sum to a head's 8"),
        (FLUX, {"heads": 4}, "even and at least 6 wide, got 4"),
        (DIT, {"positions": "rope", "heads": 8}, "a multiple of 4 wide, got 2"),
    ],
)
def test_impossible_shapes_are_refused(spec, change, message):
    build = (
        denoisers.transformer if isinstance(spec, dit.DiTConfig) else denoisers.mm_dit
    )
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(spec, **change))


# ------------------------------------ presets ------------------------------------

PRESETS = presets.DITS | presets.PIXARTS | presets.MMDITS


NIGHTLY = [name for name in PRESETS if name.endswith(("_4", "_8"))]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in NIGHTLY else n for n in PRESETS],
)
def test_parameters_of_the_presets(name):
    spec = PRESETS[name].config
    build = (
        denoisers.transformer if isinstance(spec, dit.DiTConfig) else denoisers.mm_dit
    )
    assert denoisers.count_params(build(spec))[0] == PRESETS[name].params


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("dit_s_2", 33.0, 6.06),
        ("dit_b_2", 130.5, 23.01),
        ("dit_l_2", 458.1, 80.71),
        ("dit_xl_2", 675.1, 118.64),
    ],
)
def test_the_printed_numbers_of_dit(name, millions, gmacs):
    """The paper prints parameters with the fixed table of positions, FLOPs as MACs."""
    preset = PRESETS[name]
    table = np.prod(preset.config.patches) * preset.config.width
    assert_allclose((preset.params + table) / 1e6, millions, atol=0.05)
    assert_allclose(preset.forward_gflops / 2, gmacs, atol=0.03)


@pytest.mark.parametrize("name", ["dit_xl_2", "flux_1_dev"])
def test_flops_of_the_presets(name):
    spec = PRESETS[name].config
    build = (
        denoisers.transformer if isinstance(spec, dit.DiTConfig) else denoisers.mm_dit
    )
    net = build(spec)
    arrays = {
        "text": (1, spec.text_tokens, spec.text_width),
        "mask": (1, spec.text_tokens),
        "pooled": (1, getattr(spec, "pooled_width", 0)),
        "guidance": (1,),
        "label": (1,),
    }
    types = {"mask": jnp.bool_, "label": jnp.int32}
    counted = flops.count(
        net.apply,
        jax.eval_shape(lambda: net.init(jax.random.key(0))),
        jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        {
            key: jax.ShapeDtypeStruct(arrays[key], types.get(key, jnp.float32))
            for key in net.conditioning
        },
    )
    assert_allclose(counted.total / 1e9, PRESETS[name].forward_gflops, atol=0.006)


# ------------------------------------ weights ------------------------------------

LAYOUTS = {
    "dit_official": (
        DIT,
        lambda s: dit_weights.pairs(s, "official"),
        lambda s: dit_weights.fixed(s, "official"),
    ),
    "dit_diffusers": (
        dataclasses.replace(DIT, time_ends=1, mlp_epsilon=1e-5),
        lambda s: dit_weights.pairs(s, "diffusers"),
        lambda s: dit_weights.fixed(s, "diffusers"),
    ),
    "pixart": (PIXART, pixart_weights.pairs, lambda s: []),
    "sd3": (SD3, mmdit_weights.pairs, mmdit_weights.fixed),
    "sd3_rms": (
        dataclasses.replace(SD3, qk_norm="rms"),
        mmdit_weights.pairs,
        mmdit_weights.fixed,
    ),
    "flux": (FLUX, mmdit_weights.pairs, mmdit_weights.fixed),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_go_round_bit_for_bit(name):
    spec, pairs, fixed = LAYOUTS[name]
    params, table, constants = drawn(spec), pairs(spec), fixed(spec)
    tensors = layout.write(table, params, constants)
    assert len(tensors) == len(table) + len(constants)
    back = layout.read(table, tensors, "it", fixed=constants)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(assert_array_equal, back, params)

    halves = {key: value.astype(np.float16) for key, value in tensors.items()}
    back = layout.read(table, halves, "it", np.float32, constants)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype("float32")}

    first, *_, last = (pair.name for pair in table)
    tensors["spare"] = tensors.pop(first)
    tensors[last] = tensors[last][:-1]
    with pytest.raises(layout.WeightsError, match="(3 differ)") as caught:
        layout.read(table, tensors, "this network's", fixed=constants)
    for part in (f"missing: {first}", "unknown: spare", f"shape of {last}"):
        assert part in str(caught.value)


def test_files_in_parts_and_in_bfloat16(tmp_path):
    params = drawn(FLUX)
    tensors = layout.write(mmdit_weights.pairs(FLUX), params)
    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    names = sorted(halves)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        layout.save({name: halves[name] for name in mine}, tmp_path / file)
    index = tmp_path / "weights.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {n: file for file, mine in parts.items() for n in mine}}
        )
    )
    loaded = mmdit_weights.load(index, FLUX)
    jax.tree.map(
        lambda got, want: assert_array_equal(
            got, want.astype(ml_dtypes.bfloat16).astype("f")
        ),
        loaded,
        params,
    )


def test_copies_and_constants_are_checked():
    spec, pairs, _ = LAYOUTS["dit_diffusers"]
    tensors = layout.write(pairs(spec), drawn(spec))
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    tensors[name] = tensors[name] + 1
    with pytest.raises(layout.WeightsError, match=f"{name} is not equal to"):
        layout.read(pairs(spec), tensors, "this DiT's")
    constants = mmdit_weights.fixed(SD3)
    tensors = layout.write(mmdit_weights.pairs(SD3), drawn(SD3), constants)
    tensors["pos_embed.pos_embed"] = tensors["pos_embed.pos_embed"][:, ::-1]
    with pytest.raises(layout.WeightsError, match="pos_embed differs from the"):
        layout.read(mmdit_weights.pairs(SD3), tensors, "this SD3's", fixed=constants)


def test_configs_go_round():
    spec = LAYOUTS["dit_diffusers"][0]
    assert dit_weights.from_config(dit_weights.to_config(spec)) == spec
    config = pixart_weights.to_config(PIXART)
    assert pixart_weights.from_config(config, 3) == PIXART
    square = dataclasses.replace(SD3, image_shape=(4, 4, 3), out_channels=3)
    assert (
        mmdit_weights.sd3_from_config(mmdit_weights.to_config(square), 3, 4) == square
    )
    flux = dataclasses.replace(FLUX, rope_axes=(4, 2, 2), out_channels=3)
    config = mmdit_weights.to_config(flux)
    assert mmdit_weights.flux_from_config(config, 3, (4, 8)) == flux


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (dit_weights.from_config, {"norm_type": "ada_norm"}, "norm_type = 'ada_norm'"),
        (dit_weights.from_config, {"ff_inner_dim": 9}, "ff_inner_dim = 9 is not known"),
        (
            lambda c: pixart_weights.from_config(c, 3),
            {"caption_channels": 8},
            "resolution and aspect ratio",
        ),
        (
            lambda c: pixart_weights.from_config(c, 3),
            {"sample_size": 64},
            "no projection of captions",
        ),
        (
            lambda c: mmdit_weights.sd3_from_config(c, 3),
            {"dual_attention_layers": [0, 1]},
            r"dual_attention_layers = \[0, 1\]",
        ),
        (
            lambda c: mmdit_weights.sd3_from_config(c, 3),
            {"caption_projection_dim": 7},
            "7 is not the width 1152",
        ),
        (
            lambda c: mmdit_weights.flux_from_config(c, 3, (4, 4)),
            {"patch_size": 2},
            "patch_size = 2; may be 1",
        ),
    ],
)
def test_other_configs_are_refused(read, config, message):
    with pytest.raises(layout.WeightsError, match=message):
        read(config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dit_weights.pairs(DIT, "timm"), "layout 'timm'; known: official"),
        (lambda: dit_weights.pairs(DIT, "diffusers"), "time_ends = 0, not 1"),
        (
            lambda: dit_weights.pairs(
                dataclasses.replace(DIT, grid=positions.PositionGrid()), "official"
            ),
            "official DiT computes something else: grid",
        ),
        (
            lambda: pixart_weights.pairs(dataclasses.replace(PIXART, vocab_size=9)),
            "vocab_size = 9, not 0",
        ),
        (
            lambda: mmdit_weights.pairs(
                dataclasses.replace(SD3, grid=positions.PositionGrid())
            ),
            "SD3 computes something else: grid",
        ),
        (
            lambda: mmdit_weights.pairs(dataclasses.replace(FLUX, pooled_width=0)),
            "FLUX computes something else: pooled_width = 0",
        ),
    ],
)
def test_networks_that_no_layout_fits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
