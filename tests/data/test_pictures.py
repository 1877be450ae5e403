"""Records of pictures: how they are decoded, counted, fitted and read ahead."""

import dataclasses
import io
import json
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps

from scaling_ldm import config
from scaling_ldm.data import icons, pictures
from scaling_ldm.data.pictures import columns, record


def painted(count=4, **options):
    return pictures.open_pictures("icons", count=count, **options)


def encoded(image, form="PNG", **options):
    out = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def image():
    """A real picture that is not square: uint8 [32, 24, 3]."""
    return painted().read(0).image[:, :24]


# --- Decoding


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "AVIF"])
def test_formats(image, form):
    options = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 100, "subsampling": 0},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }.get(form, {})
    got = pictures.decode(encoded(image, form, **options), "x")
    assert got.dtype == np.uint8 and got.shape == (32, 24, 3)
    assert np.abs(got.astype(int) - image).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = pictures.decode(encoded(image, exif=exif), "x")
    # How to turn the stored picture so that it is upright, as EXIF numbers it.
    turned = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: image[::-1].swapaxes(0, 1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: image.swapaxes(0, 1)[::-1],
    }[orientation]
    assert_array_equal(got, turned)


def test_transparency_is_laid_over_white(image):
    alpha = np.zeros((32, 24), np.uint8)
    alpha[:16], alpha[16:20] = 255, 128
    rgba = np.dstack([image, alpha])
    got = pictures.decode(encoded(rgba), "x")
    assert_array_equal(got[:16], image[:16])
    assert (got[20:] == 255).all()
    half = image[16:20] * (128 / 255) + 255 * (127 / 255)
    assert_allclose(got[16:20], half, atol=1)
    grey = Image.fromarray(rgba).convert("LA")
    assert (pictures.decode(encoded(grey), "x")[20:] == 255).all()


def test_a_transparent_palette_entry_is_white(image):
    palette = ImageOps.posterize(Image.fromarray(image), 2).convert("P")
    index = np.asarray(palette)[0, 0]
    got = pictures.decode(encoded(palette, transparency=int(index)), "x")
    where = np.asarray(palette) == index
    assert where.any() and (got[where] == 255).all()
    assert_array_equal(got[~where], np.asarray(palette.convert("RGB"))[~where])


def test_grey_cmyk_bits_and_16_bits_become_rgb(image):
    grey = np.asarray(Image.fromarray(image).convert("L"))
    for found in (
        pictures.decode(encoded(grey), "x"),
        pictures.decode(encoded(grey.astype(np.uint16) * 257), "x"),
    ):
        assert_array_equal(found, np.repeat(grey[..., None], 3, 2))
    cmyk = Image.fromarray(image).convert("CMYK")
    got = pictures.decode(encoded(cmyk, "JPEG", quality=100), "x")
    assert np.abs(got.astype(int) - image).mean() < 4
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(pictures.decode(encoded(bits), "x"))) <= {0, 255}


def chunk(kind, data):
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )


def raw_png(bits, colours, row, width, transparent):
    """A PNG of one row, with a tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colours, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("bits", "row", "key", "wanted"),
    [
        (1, b"\x0f", 0, [255] * 8),
        (1, b"\x0f", 1, [0, 0, 0, 0, 255, 255, 255, 255]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (4, bytes([0x01, 0xE3]), 14, [0, 17, 255, 51]),
        (8, bytes([0, 1, 255]), 0, [255, 1, 255]),
        (16, struct.pack(">4H", 0, 255, 256, 65535), 0, [255, 0, 1, 255]),
        (16, struct.pack(">4H", 0, 255, 256, 65535), 256, [0, 0, 255, 255]),
    ],
)
def test_a_transparent_grey_is_white(bits, row, key, wanted):
    got = pictures.decode(raw_png(bits, 0, row, len(wanted), [key]), "x")
    assert_array_equal(got, np.array(wanted)[None, :, None].repeat(3, 2))


def test_a_transparent_colour_is_white_if_it_can_be_told():
    row = bytes([0, 0, 0, 5, 5, 5])
    assert pictures.decode(raw_png(8, 2, row, 2, [5] * 3), "x")[0, :, 1].tolist() == [
        0,
        255,
    ]
    with pytest.raises(pictures.BadRecord, match="store it with an alpha channel"):
        pictures.decode(raw_png(16, 2, bytes(12), 2, [0, 0, 255]), "x")


def tiff(bits, white_is_zero, data, width):
    """A TIFF of one row of grey."""
    tags = [
        (256, width),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, int(not white_is_zero)),
    ]
    tags += [(273, 8), (277, 1), (278, 1), (279, len(data))]
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<I", 8 + len(data))
    return b"II*\0" + start + data + struct.pack("<H", len(tags)) + listed + bytes(4)


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "data", "wanted"),
    [
        (16, False, struct.pack("<4H", 0, 255, 256, 65535), [0, 0, 1, 255]),
        (16, True, struct.pack("<4H", 0, 255, 256, 65535), [255, 255, 254, 0]),
        (8, True, bytes([0, 1, 128, 255]), [255, 254, 127, 0]),
        (12, False, bytes([0xFF, 0xF0, 0x00, 0x80, 0x0F, 0xFF]), [255, 0, 128, 255]),
    ],
)
def test_grey_tiff(bits, white_is_zero, data, wanted):
    got = pictures.decode(tiff(bits, white_is_zero, data, 4), "x")
    assert_array_equal(got, np.array(wanted)[None, :, None].repeat(3, 2))


def test_bands_do_not_show(monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (37, 11, 4), np.uint8)
    whole = pictures.decode(encoded(values), "x")
    monkeypatch.setattr(record, "_BAND", 50)  # 4 rows of 11 pixels, and 1 at the end
    assert_array_equal(pictures.decode(encoded(values), "x"), whole)
    grey = Image.fromarray(values[..., 0].astype(np.uint16) << 8)
    assert_array_equal(pictures.decode(encoded(grey), "x")[..., 1], values[..., 0])


def test_of_an_animation_the_first_frame(image):
    frames = [Image.fromarray(image), Image.fromarray(255 - image)]
    data = encoded(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
    )
    assert_array_equal(pictures.decode(data, "x"), image)


def resized_header(data, width, height):
    """A PNG whose header claims another size."""
    header = struct.pack(">II", width, height) + data[24:29]
    crc = zlib.crc32(b"IHDR" + header)
    return data[:16] + header + struct.pack(">I", crc) + data[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: b"", r"empty \(0 bytes\)"),
        (lambda d: d[: len(d) // 2], "cannot be decoded: .*truncated"),
        (lambda d: d[:20], "cannot be decoded|not a picture"),
        (lambda d: b"<html>404</html>", "not a picture but a web page: its download"),
        (lambda d: b"a text", "not a picture of a known format .JPEG"),
        (lambda d: resized_header(d, 10_000, 9_000), "90,000,000 pixels; at most"),
        (lambda d: resized_header(d, 60_000, 60_000), "more than 89,478,485 pixels"),
        (
            lambda d: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "format EPS, which is not read; make it PNG",
        ),
    ],
    ids=["empty", "cut", "header", "html", "text", "large", "bomb", "eps"],
)
def test_bad_pictures_say_why(image, spoil, said):
    noisy = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    with pytest.raises(pictures.BadRecord, match=said) as caught:
        pictures.decode(spoil(encoded(noisy)), "s.tar:17")
    assert caught.value.name == "s.tar:17" and str(caught.value).startswith("s.tar:17")


def test_pixels_are_counted_before_a_canvas_is_made(monkeypatch):
    header = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 16)
    sides = (9_999).to_bytes(3, "little") + (8_999).to_bytes(3, "little")
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(pictures.BadRecord, match="90,000,000 pixels; at most"):
        pictures.decode(header + sides, "x")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypheix", "HEIC"),
        (b"\xff\x0a\0", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\x01", "Photoshop"),
        (b"\n<svg xmlns=''/>", "SVG"),
        (b"P6 1 1 255 abc", "PPM"),
    ],
)
def test_formats_that_are_not_read_are_named(data, kind):
    with pytest.raises(pictures.BadRecord, match=f"format {kind}, which is not read"):
        pictures.decode(data, "x")


@pytest.mark.parametrize("label", [7, 7.0, np.float32(7), np.int8(7), "7", b" 7.0\n"])
def test_labels(label):
    assert columns.whole(label, "x") == 7


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (2.5, "is 2.5, no whole number"),
        ("2.5", "is '2.5', no whole number"),
        (float("inf"), "is inf, no whole number"),
        (float("nan"), "is nan, no whole number"),
        (10**11, "is 100000000000, below 0 or above 2,147,483,646"),
        pytest.param(
            10**9999, "is a number of thousands of digits, below 0 or above", id="long"
        ),
        (2**31 - 1, "below 0 or above"),
        (-1, "is -1, below 0"),
        ("1_0", "is '1_0', no whole"),
        ([7], r"is \[7\], no whole"),
        (None, "it has no label"),
        (" ", "it has no label"),
    ],
)
def test_labels_that_are_none(label, said):
    with pytest.raises(pictures.BadRecord, match=said):
        columns.whole(label, "x")


def test_a_cut_jpeg_is_not_half_grey(image):
    data = encoded(painted().read(1).image, "JPEG")
    assert pictures.decode(data, "x").shape == (32, 32, 3)
    with pytest.raises(pictures.BadRecord, match="truncated"):
        pictures.decode(data[: len(data) * 3 // 4], "x")


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        (None, "no caption"),
        ("", "empty"),
        (" \n", "empty"),
        (b"caf\xe9", "not UTF-8"),
        ("caf\udce9", "not UTF-8"),
        (7, "int, not text"),
    ],
)
def test_bad_captions_say_why(caption, said):
    with pytest.raises(pictures.BadRecord, match=said):
        record.clean_caption(caption, "x")


def test_captions_are_stripped():
    assert record.clean_caption(b"\xef\xbb\xbf a caf\xc3\xa9\n", "x") == "a café"


# --- Fitting


@pytest.mark.parametrize(("h", "w"), [(48, 64), (64, 48), (64, 64), (100, 37)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (80, 40)])
def test_fit_keeps_the_middle_and_the_aspect(h, w, height, width):
    # A ramp from 0 to 255 along each axis, so that values tell where a pixel is from.
    rows = np.linspace(0, 255, h)[:, None].repeat(w, 1)
    columns = np.linspace(0, 255, w)[None].repeat(h, 0)
    image = np.dstack([rows, columns, rows]).round().astype(np.uint8)
    got = pictures.fit(image, height, width)
    assert got.dtype == np.uint8 and got.shape == (height, width, 3)
    scale = max(height / h, width / w)
    y = (np.arange(height) + 0.5) / scale + (h - height / scale) / 2 - 0.5
    x = (np.arange(width) + 0.5) / scale + (w - width / scale) / 2 - 0.5
    assert_allclose(got[:, width // 2, 0], np.clip(y, 0, h - 1) * 255 / (h - 1), atol=5)
    assert_allclose(
        got[height // 2, :, 1], np.clip(x, 0, w - 1) * 255 / (w - 1), atol=5
    )


def test_fit_antialiases():
    image = np.zeros((128, 128, 3), np.uint8)
    image[::2] = 255  # stripes of one pixel: a picked pixel would be black or white
    assert_allclose(pictures.fit(image, 16, 16)[2:-2], 127.5, atol=3)


def test_fit_leaves_what_fits(image):
    assert pictures.fit(image, 32, 24) is image


# --- Counting


def bad(number):
    return pictures.BadRecord(f"s.tar:{number}", "its caption is empty")


def test_a_tally_is_patient_up_to_its_fraction():
    tally = pictures.Tally(allowed=0.1, minimum=50)
    for _ in range(45):
        assert tally.add(object())
    for i in range(5):
        assert not tally.add(bad(i))
    tally.finish()
    with pytest.raises(config.ConfigError, match="6 of 51 .*fraction of 0.1") as caught:
        tally.add(bad(5))
    for i in range(6):
        assert f"s.tar:{i}: its caption is empty" in str(caught.value)


def test_a_tally_waits_for_its_minimum_and_judges_at_the_end():
    tally = pictures.Tally(allowed=0.1, minimum=50)
    tally.add(bad(0))
    tally.add(object())
    with pytest.raises(config.ConfigError, match="1 of 2 records are bad"):
        tally.finish()


def test_without_patience_the_first_bad_record_ends_it():
    tally = pictures.Tally(allowed=0)
    tally.add(object())
    with pytest.raises(config.ConfigError, match="s.tar:3"):
        tally.add(bad(3))


def test_nothing_good_is_an_error():
    with pytest.raises(config.ConfigError, match="no usable picture: 0 pictures"):
        pictures.Tally(allowed=0.5).finish()
    with pytest.raises(config.ConfigError, match="it must be at least 0 and below 1"):
        pictures.Tally(allowed=1.0)


def test_a_tally_continues_from_its_state():
    tally = pictures.Tally(allowed=0.9)
    for i in range(25):
        tally.add(bad(i))
    tally.add(object())
    state = json.loads(json.dumps(dataclasses.asdict(tally)))
    again = pictures.Tally(**state)
    assert again == tally and again.seen == 26 and len(again.first) == 20
    assert "1 pictures, 25 bad records (96.154%)" in again.summary()
    assert "and 5 more" in again.summary()


# --- Held out


def test_equal_captions_never_straddle():
    for i in range(50):
        alike = (f"A red Fox {i}", f"fox {i} a  red", f"a red fox {i}\n")
        assert len({pictures.held_out(c, 0.5) for c in alike}) == 1
    captions = [f"thing {i} of many" for i in range(4000)]
    small, large = (
        {c for c in captions if pictures.held_out(c, f)} for f in (0.05, 0.2)
    )
    assert small < large
    assert 150 < len(small) < 250 and 700 < len(large) < 900


# --- Reading ahead


class Scattered:
    """Some bad, some slow; who reads is remembered."""

    identity = "0"

    def __init__(self):
        self.threads = set()

    def __len__(self):
        return 40

    def read(self, index):
        self.threads.add(threading.get_ident())
        time.sleep(0.02 if index % 4 == 0 else 0)
        if index == 37:
            raise OSError("the disk is gone")
        if index % 5 == 0:
            raise bad(index)
        return pictures.Picture(
            image=np.full((2, 2, 3), index, np.uint8), caption="c", name=str(index)
        )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_keeps_the_order(workers):
    source, indices = Scattered(), [*range(30, 0, -2), *range(1, 36, 2)]
    found = list(pictures.read_ahead(source, indices, workers))
    assert [index for index, _ in found] == indices
    for index, item in found:
        if index % 5 == 0:
            assert isinstance(item, pictures.BadRecord)
            assert item.name == f"s.tar:{index}"
        else:
            assert item.image[0, 0, 0] == index
    mine = threading.get_ident()
    assert (source.threads == {mine}) if workers == 0 else (mine not in source.threads)
    assert len(source.threads) <= max(workers, 1)


def test_reading_ahead_prepares_in_the_threads_and_raises_what_the_store_does():
    prepared = pictures.read_ahead(Scattered(), [1, 2], 2, lambda p: p.image.sum())
    assert [value for _, value in prepared] == [12, 24]
    with pytest.raises(OSError, match="the disk is gone"):
        list(pictures.read_ahead(Scattered(), range(36, 40), 2))
    assert not list(pictures.read_ahead(Scattered(), [], 2))


# --- Memory and icons


def test_memory_is_found_by_name_and_known_by_content(image):
    made = pictures.memory([image, 255 - image], ["one", "two"], [3, 4], name="pair")
    found = pictures.open_pictures("memory", "pair")
    assert found is made and found.read(1).label == 4 and found.read(1).caption == "two"
    assert_array_equal(found.read(1).image, 255 - image)
    same = pictures.memory([image.copy(), 255 - image], ["one", "two"], [3, 4])
    assert same.identity == made.identity
    others = [
        pictures.memory([image, image], ["one", "two"], [3, 4]),
        pictures.memory([image, 255 - image], ["one", "too"], [3, 4]),
        pictures.memory([image, 255 - image], ["one", "two"]),
    ]
    assert len({made.identity, *(other.identity for other in others)}) == 4


def test_grey_pictures_in_memory(image):
    grey = image[..., :1]
    made = pictures.memory([grey, grey[..., 0]], ["a", "b"], [1.0, 2.5], name="grey")
    assert_array_equal(made.read(0).image, np.repeat(grey, 3, 2))
    assert made.read(0).label == 1
    with pytest.raises(pictures.BadRecord, match="label is 2.5, no whole number"):
        made.read(1)
    again = pictures.memory([grey, grey[..., 0]], ["a", "b"], [1, 2], name="grey")
    assert_array_equal(again.read(1).image, np.repeat(grey, 3, 2))
    plain = pictures.memory([np.zeros((2, 2, 3), np.uint8)], ["a"], [np.int64(1)])
    assert plain.identity == "1b955c52ee59445f57283ba303a3dc84"  # as in 0.1.0


def test_memory_refuses_what_does_not_fit(image):
    with pytest.raises(config.ConfigError, match="'images': 1, 'captions': 2"):
        pictures.memory([image], ["a", "b"])
    with pytest.raises(config.ConfigError, match=r"image 1 is float32 \(32, 24, 3\)"):
        pictures.memory([image, image.astype("f")], ["a", "b"])
    with pytest.raises(config.ConfigError, match="known: .*make them with"):
        pictures.open_pictures("memory", "nobody")


def test_icons_are_the_painted_ones_and_split_by_base_name():
    found = painted(200, validation_fraction=0.1, seed=3)
    read = [found.read(i) for i in range(200)]
    assert [p.held_out for p in read] == [False] * 180 + [True] * 20
    for split, part in (("train", read[:180]), ("validation", read[180:])):
        source = icons.PaintedIcons(split, seed=3, validation_fraction=0.1)
        rows = source.paint(np.arange(len(part)))
        assert [p.caption for p in part] == rows["caption"]
        got = np.stack([p.image for p in part]) / 127.5 - 1
        assert_allclose(got, rows["image"], atol=0.5 / 127.5 + 1e-6)
        alone = painted(len(part), split=split, validation_fraction=0.1, seed=3)
        assert_array_equal(alone.read(7).image, part[7].image)
    colours = list(icons.PALETTE)
    assert all(colours[p.label] in p.caption for p in read)
    assert found.identity != painted(200, validation_fraction=0.1, seed=4).identity


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"source": "webtataset"},
            "unknown source of pictures 'webtataset'; known: im",
        ),
        ({"source": "icons", "size": 3}, "no option size; it has: count, split"),
        ({"source": "icons", "path": "/x"}, "the icons are embedded"),
        ({"source": "icons", "split": "test"}, "known: train, validation, both"),
        ({"source": "icons", "count": 0}, "count = 0 must be at least 1"),
    ],
)
def test_open_pictures_refuses_what_does_not_fit(options, said):
    with pytest.raises(config.ConfigError, match=said):
        pictures.open_pictures(**options)
