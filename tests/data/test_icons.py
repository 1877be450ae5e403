"""The embedded icons: what they promise, and that picture i is always picture i."""

import hashlib
import importlib.resources
import re
import subprocess
import sys

import numpy as np
import pytest

from scaling_ldm.data import hashing, icon_set, icons
from scaling_ldm.data.vocabulary import RESERVED, UNKNOWN, Vocabulary

FILES = importlib.resources.files("scaling_ldm.data").joinpath("icons")
# The stream of seed 0. A change here changes every study that was started before.
GOLDEN_PICTURES = "52f1f1f5f3562f830cdc85d76b4884d6c2b59ec344851b1a574aa5e092a32bea"
GOLDEN_CAPTIONS = "0416f05d8bb54849237a82bae8e402bb214ee77fe81267ff22bbcb66b1b25e88"


@pytest.fixture(scope="module")
def embedded():
    return icon_set.load()


@pytest.fixture(scope="module")
def train():
    return icons.PaintedIcons("train", seed=0)


def _digest(batch) -> tuple[str, str]:
    pictures = np.ascontiguousarray(batch["image"]).astype("<f4").tobytes()
    captions = "\n".join(batch["caption"]).encode()
    return hashlib.sha256(pictures).hexdigest(), hashlib.sha256(captions).hexdigest()


# --- The files


def test_manifest_is_what_is_there(embedded):
    manifest = icon_set.manifest()
    for name, facts in manifest["files"].items():
        content = FILES.joinpath(name).read_bytes()
        assert len(content) == facts["bytes"], name
        assert hashlib.sha256(content).hexdigest() == facts["sha256"], name
    counted = {
        "masks": len(embedded.packed),
        "names": len(embedded.names),
        "keys": len(set(embedded.keys)),
        "sets": len(embedded.sets),
        "styles": len(embedded.styles),
    }
    assert {key: manifest[key] for key in counted} == counted


def test_promised_counts_and_sizes(embedded):
    distinct = np.unique(embedded.packed.reshape(-1, 512).view("V512").ravel())
    assert len(distinct) == len(embedded.packed) >= 150_000
    on_disk = sum(file.stat().st_size for file in FILES.iterdir() if file.is_file())
    assert on_disk <= 20e6
    assert embedded.packed.nbytes <= 120e6
    assert embedded.packed.any(axis=(1, 2)).all(), "a blank mask"


def test_names_are_sorted_words(embedded):
    assert list(embedded.names) == sorted(set(embedded.names))
    assert len(embedded.keys) == len(embedded.names)
    pattern = re.compile(r"[a-z0-9]+( [a-z0-9]+)*")
    assert all(pattern.fullmatch(name) for name in embedded.names)
    assert embedded.offsets[0] == 0 and embedded.offsets[-1] == len(embedded.packed)
    assert np.diff(embedded.offsets).min() >= 1
    known = {*"thin bold sharp rounded outline filled duotone".split()}
    assert all(set(style.split()) <= known for style in embedded.styles)


def test_one_name_for_a_drawing_in_several_styles(embedded):
    """The build's naming takes style, size and counter off."""
    name = embedded.names.index("bicycle")
    first, last = embedded.offsets[name : name + 2]
    styles = {embedded.styles[s] for s in embedded.mask_style[first:last]}
    assert {"outline", "filled", "duotone"} <= styles
    assert len(set(embedded.mask_set[first:last])) >= 5
    for decorated in ("bicycle outline", "bicycle filled", "bicycle 24", "bicycle 1"):
        assert decorated not in embedded.names


def test_notices_list_every_set_and_licence(embedded):
    text = FILES.joinpath("NOTICES.md").read_text("utf-8")
    table, *sections = re.split(r"^## ", text, flags=re.M)
    rows = dict(re.findall(r"^\| ([a-z0-9-]+) \|.*\| ([0-9]+) \|$", table, flags=re.M))
    counts = np.bincount(embedded.mask_set, minlength=len(embedded.sets))
    expected = zip(embedded.sets, counts, strict=True)
    assert {key: int(n) for key, n in rows.items()} == dict(expected)
    licences = set(re.findall(r"\| ([\w.-]+) \| [0-9]+ \|$", table, flags=re.M))
    permissive = {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "BSD-3-Clause", "Unlicense"}
    assert licences <= permissive
    assert {section.splitlines()[0] for section in sections} == licences
    assert all(len(section) > 600 for section in sections)


def test_missing_file_says_how_to_build(monkeypatch):
    monkeypatch.setattr(icon_set, "PACKAGE", "scaling_ldm")
    with pytest.raises(FileNotFoundError, match="tools/build_icons.py"):
        icon_set.manifest()


def test_damaged_file_is_an_error(embedded):
    content = FILES.joinpath("masks.xz").read_bytes()
    with pytest.raises(ValueError, match="cut short"):
        icon_set._inflate(content[: len(content) // 8], embedded.packed.shape)
    with pytest.raises(ValueError, match="damaged"):
        icon_set._inflate(b"not xz at all", embedded.packed.shape)


# --- Masks


def test_masks_unpack_every_nibble():
    packed = np.random.default_rng(0).integers(0, 256, (3, 16, 32), np.uint8)
    one = dict.fromkeys("names keys styles sets".split(), ("",))
    arrays = dict.fromkeys("offsets mask_style mask_set mask_twin".split(), packed)
    alpha = icon_set.IconSet(packed=packed, **one, **arrays).masks([2, 0])
    assert alpha.shape == (2, 32, 32) and alpha.dtype == np.uint8
    for row in range(16):
        np.testing.assert_array_equal(
            alpha[:, 2 * row], (packed[[2, 0], row] // 16) * 17
        )
        np.testing.assert_array_equal(
            alpha[:, 2 * row + 1], (packed[[2, 0], row] % 16) * 17
        )


# --- The split


def test_splits_share_no_name_key_or_drawing(embedded):
    names, masks = embedded.split_names(), embedded.split_masks()
    keys = {split: {embedded.keys[k] for k in ids} for split, ids in names.items()}
    assert not set(names["train"]) & set(names["validation"])
    assert not keys["train"] & keys["validation"]
    drawings = {
        split: {mask.tobytes() for mask in embedded.packed[ids]}
        for split, ids in masks.items()
    }
    assert not drawings["train"] & drawings["validation"]


@pytest.mark.slow  # of the data alone
def test_no_drawing_looks_like_one_held_out(embedded):
    """Half covered or not, at 16 x 16."""
    masks = embedded.split_masks()
    rng = np.random.default_rng(0)
    held_out = rng.choice(masks["validation"], 2000, replace=False)

    def coarse(ids):
        cells = embedded.levels(ids).astype(np.uint8).reshape(-1, 16, 2, 16, 2)
        return np.packbits(cells.sum((2, 4)) >= 30, axis=-1).reshape(-1, 32)

    seen = {
        row.tobytes()
        for part in np.array_split(masks["train"], 50)
        for row in coarse(part)
    }
    assert not seen & {row.tobytes() for row in coarse(held_out)}


def test_split_has_its_share_and_ignores_form(embedded):
    names = embedded.split_names(0.05)
    assert 0.04 < len(names["validation"]) / len(embedded.names) < 0.06
    key = dict(zip(embedded.names, embedded.keys, strict=True))
    for same in (
        ("arrow left", "left arrow", "arrows left"),
        ("checkbox", "check box"),
    ):
        assert len({key[name] for name in same if name in key}) == 1
        assert sum(name in key for name in same) >= 2
    assert key["arrow left"] != key["arrow right"]
    more = embedded.split_names(0.1)
    assert set(more["train"]) < set(names["train"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        embedded.split_names(0.0)


# --- Picture i


def test_golden_stream(train):
    assert _digest(train.paint(np.arange(64))) == (GOLDEN_PICTURES, GOLDEN_CAPTIONS)


def test_picture_does_not_depend_on_its_batch(train):
    at = np.array([0, 5, 5, 40_000, 41_500, 123_456_789, 2**40])
    together = train.paint(at)
    assert together["image"].dtype == np.float32
    assert together["image"].shape == (7, 32, 32, 3)
    for i, position in enumerate(at):
        alone = train.paint([position])
        np.testing.assert_array_equal(alone["image"][0], together["image"][i])
        assert alone["caption"][0] == together["caption"][i]


@pytest.mark.slow
def test_picture_is_the_same_in_another_process(train):
    code = (
        "import numpy as np, hashlib\n"
        "from scaling_ldm.data import icons\n"
        "b = icons.PaintedIcons('validation', seed=7).paint(np.arange(990, 1000))\n"
        "print(hashlib.sha256(b['image'].tobytes() + repr(b['caption']).encode())"
        ".hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    icon_set.load.cache_clear()  # and after reading the files again
    batch = icons.PaintedIcons("validation", seed=7).paint(np.arange(900, 1000))
    content = batch["image"][90:].tobytes() + repr(batch["caption"][90:]).encode()
    assert out.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_seed_and_split_matter(train):
    other = icons.PaintedIcons("train", seed=1)
    at = np.arange(256)
    a, b = train.choose(at), other.choose(at)
    for field in ("name", "mask", "pair", "template"):
        assert np.mean(getattr(a, field) != getattr(b, field)) > 0.5, field


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000, 40_961])
def test_permute_is_a_permutation(size):
    slots = np.arange(size)
    seen = []
    for epoch in range(3):
        keys = hashing.draw(0, 1, np.full(size, epoch, np.uint64))
        order = hashing.permute(slots, keys, size)
        np.testing.assert_array_equal(np.sort(order), slots)
        seen.append(order)
    if size >= 1000:
        assert np.mean(seen[0] == seen[1]) < 0.01
        assert abs(np.corrcoef(seen[0], slots)[0, 1]) < 0.1


@pytest.mark.parametrize("split", icons.SPLITS)
def test_every_epoch_shows_every_name_once(split):
    source = icons.PaintedIcons(split, seed=3)
    names = icon_set.load().split_names()[split]
    orders = []
    for epoch in (0, 1, 12345):
        chosen = source.choose(epoch * len(source) + np.arange(len(source)))
        np.testing.assert_array_equal(np.sort(chosen.name), names)
        np.testing.assert_array_equal(
            icon_set.load().mask_name[chosen.mask],
            chosen.name,
            "a mask of another name",
        )
        orders.append(chosen.name)
    assert np.mean(orders[0] == orders[1]) < 0.01


def test_choices_are_uniform(train, embedded):
    at = np.arange(len(train))
    chosen = train.choose(at)
    for values, bins in (
        (chosen.pair, len(train.pairs)),
        (chosen.template, len(icons.TEMPLATES)),
    ):
        counts = np.bincount(values, minlength=bins)
        expected = len(at) / bins
        chi2 = np.sum((counts - expected) ** 2 / expected)
        assert abs(chi2 - bins) < 6 * np.sqrt(2 * bins)
    # Within its name, a mask is as likely to be late as early.
    first, last = embedded.offsets[chosen.name], embedded.offsets[chosen.name + 1]
    many = last - first >= 8
    place = ((chosen.mask - first + 0.5) / (last - first))[many]
    assert abs(place.mean() - 0.5) < 0.02 and abs(place.std() - 12**-0.5) < 0.02


# --- Colours


def test_colours_are_told_apart(train):
    colours = train.colours(np.arange(20_000))
    assert colours.min() >= 0 and colours.max() <= 1
    lab = icons.oklab(colours)
    distance = np.linalg.norm(lab[:, 0] - lab[:, 1], axis=-1)
    assert distance.min() > 0.2
    assert np.abs(lab[:, 0, 0] - lab[:, 1, 0]).min() > 0.05
    assert {*train.pairs.ravel()} == {*range(len(icons.PALETTE))}
    # The jitter keeps a colour nearest to its own name.
    palette = icons.oklab(np.array(list(icons.PALETTE.values())) / 255)
    to_all = np.linalg.norm(lab[:, :, None] - palette, axis=-1)
    pair = train.pairs[train.choose(np.arange(20_000)).pair]
    assert np.mean(to_all.argmin(-1) == pair) > 0.999


def test_oklab_of_known_colours():
    lab = icons.oklab(np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1]]))
    expected = [[1, 0, 0], [0.628, 0.225, 0.126], [0.452, -0.032, -0.312]]
    np.testing.assert_allclose(lab, expected, atol=1e-3)


@pytest.mark.parametrize("size", [32, 16, 8])
def test_picture_is_the_mask_in_its_colours(size):
    source = icons.PaintedIcons("train", seed=0, size=size)
    at = np.arange(50)
    image = source.paint(at)["image"]
    fore, back = source.colours(at).swapaxes(0, 1)[:, :, None, None] * 2 - 1
    alpha = source.icons.masks(source.choose(at).mask) / np.float32(255)
    step = 32 // size
    alpha = alpha.reshape(-1, size, step, size, step).mean((2, 4))[..., None]
    assert image.dtype == np.float32 and image.shape == (50, size, size, 3)
    np.testing.assert_allclose(image, alpha * fore + (1 - alpha) * back, atol=1e-5)


# --- Captions


def test_captions_say_what_is_painted(train, embedded):
    at = np.arange(3000)
    chosen = train.choose(at)
    captions = train.captions(at)
    assert captions == train.paint(at)["caption"]
    palette = list(icons.PALETTE)
    for i, caption in enumerate(captions):
        fore, back = (palette[k] for k in train.pairs[chosen.pair[i]])
        style = embedded.styles[embedded.mask_style[chosen.mask[i]]]
        thing = f"{style} {embedded.names[chosen.name[i]]}".strip()
        article = {"orange": "an"}
        a_fore = f"{article.get(fore, 'a')} {fore}"
        a_back = f"{article.get(back, 'a')} {back}"
        assert caption in (
            f"{a_fore} {thing} on {back}",
            f"{thing} in {fore} on {a_back} background",
            f"on {back} {a_fore} {thing}",
        )
        assert re.fullmatch(r"[a-z0-9 ]+", caption)
    assert len(set(captions)) > 2900


def test_vocabulary_order_is_by_train_frequency(embedded):
    vocabulary = icons.build_vocabulary()
    assert len(vocabulary) == 4096 == len(set(vocabulary.words))
    assert vocabulary.words[:3] == RESERVED
    counts = {}
    for name in embedded.split_names()["train"]:
        for word in embedded.names[name].split():
            counts[word] = counts.get(word, 0) + 1
    fixed = {word for colour in icons.PALETTE for word in colour.split()}
    fixed |= {word for style in embedded.styles for word in style.split()}
    fixed |= {"a", "an", "in", "on", "background"}
    assert set(vocabulary.words[3 : 3 + len(fixed)]) == fixed
    ranked = [(-counts[word], word) for word in vocabulary.words[3 + len(fixed) :]]
    assert ranked == sorted(ranked)
    smaller = icons.build_vocabulary(size=500)
    assert smaller.words == vocabulary.words[:500]
    with pytest.raises(ValueError, match="give at least"):
        icons.build_vocabulary(size=20)


def test_encode_decode():
    vocabulary = Vocabulary((*RESERVED, "a", "red", "bicycle"))
    ids = vocabulary.encode("a red unicycle", 5)
    np.testing.assert_array_equal(ids, [3, 4, UNKNOWN, 0, 0])
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == "a red <unknown>"
    np.testing.assert_array_equal(vocabulary.encode("a red bicycle", 2), [3, 4])
    assert vocabulary.decode(vocabulary.uncond(4)) == "<null>"


@pytest.mark.parametrize("length", [1, 7, 16, 24])
@pytest.mark.parametrize("split", icons.SPLITS)
def test_tokens_are_the_captions(split, length):
    vocabulary = icons.build_vocabulary(size=1000)
    source = icons.PaintedIcons(split, seed=5, vocabulary=vocabulary)
    at = np.arange(400) * 11
    ids, mask = source.token_ids(at, length)
    expected = [vocabulary.encode(caption, length) for caption in source.captions(at)]
    np.testing.assert_array_equal(ids, np.stack(expected))
    assert ids.dtype == np.int32 and mask.dtype == bool
    words = [min(length, len(caption.split())) for caption in source.captions(at)]
    np.testing.assert_array_equal(mask.sum(1), words)
    assert (ids == UNKNOWN).any() or length == 1


def test_no_positions_is_no_pictures(train):
    assert train.paint(np.arange(0))["image"].shape == (0, 32, 32, 3)
    assert train.token_ids(np.arange(0), 8)[0].shape == (0, 8)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'test'; known: train, validation"):
        icons.PaintedIcons("test", seed=0)
    with pytest.raises(ValueError, match="8, 16 or 32"):
        icons.PaintedIcons("train", seed=0, size=64)
    with pytest.raises(ValueError, match="none below 0"):
        icons.PaintedIcons("train", seed=0).paint([-1])
