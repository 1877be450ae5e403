"""A model that draws for captions or labels: what it is given, and in which order."""

import numpy as np
import pytest

from scaling_ldm.data import vocabulary
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.training import captions, loaded_model


def small(conditioning, reader=None, classes=0):
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
