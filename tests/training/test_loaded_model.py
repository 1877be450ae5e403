"""A model that draws for captions or labels: what it is given, and in which order."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import config
from scaling_ldm.data import vocabulary
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.models import encoders, pretrained
from scaling_ldm.training import captions, loaded_model


def small(conditioning, reader=None, classes=0, label_names=()):
    """A model whose network is a function: x moves by the mean of what it reads."""

    def network(x, t, cond):
        told = sum(np.float32(0.1) * cond[n].reshape(len(x), -1).mean(1) for n in cond)
        return 0.5 * x - told[:, None, None, None]

    return loaded_model.LoadedModel(
        name="small",
        denoise=samplers.denoiser(
            network, noise.rectified_flow(), prediction="flow", time="unit"
        ),
        shape=(2, 2, 3),
        conditioning=conditioning,
        classes=classes,
        label_names=label_names,
        about={},
        drawing={"sampler": "euler", "steps": 50, "guidance": 3.0, "grid": None},
        _captions=reader,
        _autoencoder=None,
    )


WORDS = vocabulary.Vocabulary((*vocabulary.RESERVED, "a", "red", "t", "shirt"))


def test_pictures_of_several_captions_stand_in_their_order():
    model = small(("text", "mask"), captions.WordReader(WORDS, 4))
    both = model.sample(["a t-shirt", "red"], n=3, steps=1, batch_size=4)
    assert both.shape == (6, 2, 2, 3)
    # Picture i has the noise of i, whatever is drawn beside it.
    alone = model.sample("A T-shirt!", n=3, steps=1, batch_size=4)
    np.testing.assert_array_equal(both[:3], alone)
    assert (both[3:] != model.sample("a t-shirt", n=6, steps=1)[3:]).any()
    assert (model.sample("red", seed=1, steps=1) != model.sample("red", steps=1)).any()
    none = model.sample(n=2, steps=1)
    np.testing.assert_array_equal(model.sample("", n=2, guidance=None, steps=1), none)
    with pytest.warns(UserWarning, match="'blue shirt': the network has not learnt bl"):
        model.encode_text("blue shirt")


def test_labels_are_a_condition_like_captions():
    model = small(("label",), classes=3)
    cond, uncond = model._conditions(None, [0, 2], {})
    assert cond["label"].tolist() == [0, 2] and uncond["label"].tolist() == [3, 3]
    assert model.sample(labels=1, n=2, steps=1).shape == (2, 2, 2, 3)
    cond, _ = model._conditions(None, None, {})
    assert cond["label"].tolist() == [3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(captions="xyzzy"), "'xyzzy': the network has learnt none of its words; "),
        (dict(captions="a", labels=0), "small reads text, mask, no labels"),
        (dict(captions="a", n=0), "n = 0 and batch_size = 16: at least 1 each"),
        (dict(captions="a", arrays={"image": [1]}), r"not \['image'\]"),
        (dict(captions=["a", "red"], arrays={"mask": [1]}), "rows of conditions diff"),
    ],
)
def test_what_a_loaded_model_does_not_read_is_refused(given, said):
    model = small(("text", "mask"), captions.WordReader(WORDS, 4))
    with pytest.raises(ValueError, match=said):
        model.sample(**given, steps=1)


@pytest.mark.parametrize("given", [3, b"a red shirt", ["red", None]])
def test_captions_that_are_no_text_are_refused(given, unchecked):
    model = small(("text", "mask"), captions.WordReader(WORDS, 4))
    with pytest.raises(TypeError, match="captions must be text: "):
        model.sample(given, steps=1)


def test_pictures_that_are_not_finite_are_refused_and_not_black():
    model = small(("text", "mask"), captions.WordReader(WORDS, 4))
    for guidance in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="the guidance scale must be finite, got"):
            model.sample("red", guidance=guidance, steps=1)
    x = np.zeros((3, 2, 2, 3), np.float32)
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(config.ConfigError, match="1 of 3 pictures in a batch have val"):
        model.decode(x)
    x[1, 0, 0, 0] = 9.0  # beyond [-1, 1] is white
    assert model.decode(x)[1, 0, 0].tolist() == [255, 128, 128]


def test_what_a_labelled_or_coarse_model_does_not_get_is_refused():
    labelled = small(("label",), classes=3)
    with pytest.raises(ValueError, match="small reads label, no captions"):
        labelled.sample("a")
    for label in (3, -1, 1.5):
        with pytest.raises(ValueError, match="labels are 0 to 2, got"):
            labelled.sample(labels=label)
    coarse = small(("text", "mask", "image"), captions.WordReader(WORDS, 4))
    with pytest.raises(ValueError, match="give image in arrays"):
        coarse.sample("a")


def test_labels_have_the_names_of_their_classes():
    model = small(("label",), classes=3, label_names=("a_cat", "dog", "T-shirt"))

    def drawn(labels):
        return model.sample(labels=labels, n=2, steps=2, sampler="euler")

    np.testing.assert_array_equal(drawn("a cat"), drawn(0))
    np.testing.assert_array_equal(drawn(["t shirt", "dog"]), drawn([2, 1]))
    assert not np.array_equal(drawn("dog"), drawn(0))
    with pytest.raises(ValueError, match="did you mean 'dog'. known: a_cat, dog, T-sh"):
        drawn("dogs")
    with pytest.raises(ValueError, match="have no names; they are 0 to 2"):
        small(("label",), classes=3).sample(labels="dog")


def test_labels_whose_names_differ_in_case_alone_are_told_apart():
    model = small(("label",), classes=2, label_names=("b", "B"))
    assert [model._label_named(name) for name in ("b", "B")] == [0, 1]


class Ids:
    """A tokenizer whose ids are the lengths of words, at most `length` of them."""

    def encode(self, captions, length):
        ids = [[len(w) for w in c.split()][:length] for c in captions]
        rows = [row + [0] * (length - len(row)) for row in ids]
        return np.asarray(rows, np.int32), np.asarray(rows) > 0


def encoder(width, factor, vector):
    """Features are ids times a factor; a vector is their sum."""

    def features(params, ids, mask):
        assert mask is None  # padding is read like text
        return jnp.repeat(factor * ids[:, :, None].astype("float32"), width, axis=2)

    def summed(params, ids, mask):
        return jnp.sum(factor * ids, axis=1, keepdims=True).astype("float32")

    network = encoders.TextEncoder(
        init=lambda key: {},
        apply=features,
        width=width,
        max_tokens=9,
        vector=summed if vector else None,
    )
    return lambda: pretrained.PretrainedTextEncoder(network, {}, Ids(), {"name": "it"})


def several(t5=True, features=True, unit=1):
    clips = [encoder(1, unit, vector=True), encoder(2, 10 * unit, vector=True)]
    last = encoder(4, 100 * unit, vector=False) if t5 else None
    return captions.SeveralReader(clips, last, (2, 3), 4, features)


def test_several_encoders_stand_side_by_side_and_one_after_the_other():
    found = several().read(["ab c", "d"])
    np.testing.assert_array_equal(
        found["text"][0],
        [
            [2, 20, 20, 0],  # both CLIPs, and zeros up to the width
            [1, 10, 10, 0],
            [200, 200, 200, 200],
            [100, 100, 100, 100],
            [0, 0, 0, 0],
        ],
    )
    assert found["mask"].shape == (2, 5) and found["mask"].all()
    np.testing.assert_array_equal(found["pooled"], [[3, 30], [1, 10]])
    without = several(t5=False).read(["ab c"])
    np.testing.assert_array_equal(without["text"][0, :2], found["text"][0, :2])
    np.testing.assert_array_equal(without["text"][0, 2:], 0)
    alone = several(features=False)
    np.testing.assert_array_equal(alone.read(["ab c"])["text"], found["text"][:1, 2:])
    assert isinstance(alone, captions.CaptionReader)
    assert {k: v.shape for k, v in alone.uncond.items()} == {
        "text": (3, 4),
        "mask": (3,),
        "pooled": (2,),
    }


def test_a_network_that_reads_the_guidance_is_given_it_and_not_guided():
    reader = several(features=False, unit=1e-3)
    model = small(("text", "mask", "pooled", "guidance"), reader)
    cond, _ = model._conditions(["ab", "c"], None, {}, 2.5)
    assert cond["guidance"].tolist() == [2.5, 2.5]
    drawn = model.sample("ab", steps=1)  # with the guidance of `drawing`
    np.testing.assert_array_equal(model.sample("ab", steps=1, guidance=3.0), drawn)
    assert (model.sample("ab", steps=1, guidance=9.0) != drawn).any()
    with pytest.raises(ValueError, match="give guidance in arrays"):
        model.sample("ab", steps=1, guidance=None)


def test_what_is_not_given_is_as_in_drawing():
    model = small(("label",), classes=3)
    how = {"sampler": "euler", "steps": 2, "guidance": 2.0}
    model = dataclasses.replace(
        model, drawing=how | {"grid": lambda steps: [0.9, 0.5][:steps]}
    )
    given = how | {"grid": [0.9, 0.5]}
    drawn = model.sample(labels=1)
    np.testing.assert_array_equal(model.sample(labels=1, **given), drawn)
    for other in ({"steps": 1}, {"guidance": 9.0}, {"grid": [1.0, 0.1]}):
        assert (model.sample(labels=1, **other) != drawn).any(), other


def test_options_of_a_sampler_are_not_given_to_another_one():
    model = small(("label",), classes=3)
    how = {"steps": 2, "guidance": 2.0, "grid": [0.9, 0.5]}
    model = dataclasses.replace(
        model, drawing=how | {"sampler": "ddim", "keeps_epsilon": True}
    )
    drawn = model.sample(labels=1, sampler="euler")  # which has no such option
    other = dataclasses.replace(model, drawing=how | {"sampler": "euler"})
    np.testing.assert_array_equal(other.sample(labels=1), drawn)
    with pytest.raises(ValueError, match="euler' has no option keeps_epsilon"):
        model.sample(labels=1, sampler="euler", keeps_epsilon=True)
