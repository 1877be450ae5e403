"""Pictures in one picture: where each is, and the words under it."""

import numpy as np
import pytest
from PIL import ImageFont

from scaling_ldm.workdir import sample_grid

FONT = ImageFont.load_default(11)


def noise(n, height, width):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("side", "scale"), [((8, 8), 14), ((20, 33), 4), ((112, 112), 1), ((70, 256), 1)]
)
def test_each_picture_is_in_its_place_enlarged_by_a_whole_number(side, scale):
    images = noise(5, *side)
    whole = sample_grid.draw(images, ["words"] * 5)
    height, width = sample_grid.cell(*side)
    assert whole.shape == (2 * height, 3 * width, 3)
    for i, image in enumerate(images):
        y, x = i // 3 * height, i % 3 * width
        shown = whole[y : y + scale * side[0], x : x + scale * side[1]]
        large = np.kron(image, np.ones((scale, scale, 1), np.uint8))
        np.testing.assert_array_equal(shown, large)
    assert whole[height:, 2 * width :].min() == 255  # no sixth picture


def test_words_stand_under_their_own_picture_and_nowhere_else():
    images = noise(3, 112, 112)
    whole = sample_grid.draw(images, ["", "a red bicycle on white", ""])
    height, width = sample_grid.cell(112, 112)
    first, second = whole[112:height, :width], whole[112:height, width:]
    assert first.min() == 255 and second.min() < 64
    assert whole[height + 112 :].min() == 255
    np.testing.assert_array_equal(sample_grid.draw(images, [""] * 3)[:112], whole[:112])


def test_no_more_than_sixteen_are_side_by_side():
    height, width = sample_grid.cell(1, 1)
    whole = sample_grid.draw(noise(257, 1, 1), [""] * 257)
    assert whole.shape == (17 * height, 16 * width, 3)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("", []),
        ("a cat", ["a cat"]),
        ("a red bicycle  on\nwhite paper", ["a red bicycle on", "white paper"]),
        ("f\u00fcnf na\u00efve \u00c9clairs", ["funf naive Eclairs"]),
    ],
)
def test_a_caption_that_fits_is_whole(words, lines):
    assert sample_grid.fitted(words, FONT, 96) == lines


@pytest.mark.parametrize(
    "words",
    [
        "filled bag of trash in navy on a teal and yellow background",
        "x" * 80,
        "wide " * 19,
    ],
)
def test_a_long_caption_is_cut_to_its_width(words):
    lines = sample_grid.fitted(words, FONT, 96)
    assert 1 <= len(lines) <= sample_grid.LINES
    assert all(FONT.getlength(line) <= 96 for line in lines)
    assert lines[-1].endswith("...")
    kept = " ".join(lines).removesuffix("...").rstrip()
    assert words.startswith(kept) and len(kept) > 8


def test_a_caption_is_missing():
    with pytest.raises(ValueError):
        sample_grid.draw(noise(2, 8, 8), ["one"])
