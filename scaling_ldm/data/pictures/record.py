"""A picture with its caption, the interface of sets of them, and decoding.

A set (`Pictures`) gives random access to records in a fixed order. Any number of
threads may read it; every host opens it for itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, features

from scaling_ldm.records.errors import BadRecord

# The formats that are decoded, by pillow's names. EPS is left out: it runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# If a sample has two pictures, the one with an ending of COMMON is taken.
COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A file with one of these endings is a picture. Its bytes decide how it is decoded.
SUFFIXES = (
    *COMMON,
    *(".jpe", ".jfif", ".jif", ".pjpeg", ".apng", ".dib", ".avif"),
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".psd", ".svg"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".exr", ".hdr", ".eps", ".ico", ".qoi"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"),
)
# Larger pictures are refused before they are decoded. Decoding takes at most 18 bytes
# for each pixel (measured: WebP 17, others 13), transparent or not: 1.6 GB.
MAX_PIXELS = 89_478_485
_BAND = 1 << 20  # pixels that are converted at once
# How files of formats that are not decoded begin, from the byte that is given.
_FOREIGN = (
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (4, b"ftypavi", "AVIF (this Pillow has no decoder of it)"),
    (4, b"ftypcrx", "Canon raw"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL \r\n", "JPEG XL"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "EPS"),
    (0, b"<svg", "SVG"),
    (0, b"P4", "PBM"),
    (0, b"P5", "PGM"),
    (0, b"P6", "PPM"),
    (0, b"qoif", "QOI"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"\0\0\1\0", "ICO"),
)
# How files begin that have the name of a picture and are none.
_NO_PICTURES = (
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file, git lfs pull"),
    (b"<!doctype html", "a web page: its download failed"),
    (b"<html", "a web page: its download failed"),
)


ImageHWC = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One record.

    Attributes:
      image: uint8 [h, w, 3], sRGB, of any size.
      caption: not empty, without space at its ends.
      name: where it is from, for messages: "shard-00003.tar:000017.jpg".
      label: its class, if the set has classes.
      held_out: whether it is held out, if the set has its own split; with None,
        `split.held_out` decides.
    """

    image: ImageHWC
    caption: str
    name: str
    label: int | None = None
    held_out: bool | None = None


@runtime_checkable
class Pictures(Protocol):
    """Random access to pictures with captions.

    len(): number of records, good and bad.
    read(index): the picture at 0 <= index < len(); several threads may call it. It
      raises BadRecord if the record is at fault, and OSError if the store is.
    identity: hexadecimal digest of the content of the set, not of its place. It covers
      the names of the files and the options that choose among them. Not every byte of
      a file is read for it: its size, its index of records, or its first and last bytes
      stand for its content.

    A set whose labels have names says them in their order: label_names.
    """

    def __len__(self) -> int: ...

    def read(self, index: int) -> Picture: ...

    @property
    def identity(self) -> str: ...


def digest(*parts: object) -> str:
    """32 hexadecimal digits, from the parts as text; bytes count as they are."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        total.update(len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()


def listing_digest(kind: str, files: Iterable[tuple], *parts: object) -> str:
    """The identity of a set of files, each (name, bytes, ...), in any order."""
    return digest(kind, *sorted(files), *parts)


def clean_caption(value: object, name: str) -> str:
    """The caption as text, stripped.

    Raises:
      BadRecord: it is missing, empty, not text, or bytes that are not UTF-8.
    """
    if value is None:
        raise BadRecord(name, "it has no caption")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise BadRecord(name, f"its caption is not UTF-8 ({e})") from e
    if not isinstance(value, str):
        raise BadRecord(name, f"its caption is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise BadRecord(name, f"its caption is not UTF-8 ({e})") from e
    if not value.strip():
        raise BadRecord(name, "its caption is empty")
    return value.strip()


def decode(data: bytes, name: str) -> ImageHWC:
    """An encoded picture -> uint8 [h, w, 3].

    The EXIF orientation is applied. Transparent pixels are laid over white. Grey,
    palette, CMYK and 16-bit grey pictures become RGB. An animation gives its first
    frame. Colour profiles are not applied.

    Raises:
      BadRecord: no bytes, not a picture, a truncated one, one whose range of values is
        unknown, or more than MAX_PIXELS pixels, which are counted before decoding.
    """
    if not data:
        raise BadRecord(name, "it is empty (0 bytes)")
    _check_pixels(name, *_webp_canvas(data))
    try:
        with Image.open(io.BytesIO(data), formats=_readable()) as image:
            _check_pixels(name, *image.size)
            key = _transparent_grey(image, data, name)
            white_is_zero, bits = _sixteen(image)
            ImageOps.exif_transpose(image, in_place=True)
            out = np.empty((image.height, image.width, 3), np.uint8)
            rows = max(_BAND // image.width, 1)
            for top in range(0, image.height, rows):
                bottom = min(top + rows, image.height)
                band = image.crop((0, top, image.width, bottom))
                if image.mode.startswith("I;16"):
                    out[top:bottom] = _from_16(band, key, white_is_zero, bits)
                else:
                    out[top:bottom] = _rgb(band, name)
            return out
    except BadRecord:
        raise
    except Image.DecompressionBombError as e:
        raise BadRecord(name, f"more than {MAX_PIXELS:,} pixels: {e}") from e
    except Image.UnidentifiedImageError as e:
        raise BadRecord(name, _not_known(data)) from e
    except MemoryError:
        raise
    except Exception as e:  # pillow raises many types on a broken file
        raise BadRecord(name, f"cannot be decoded: {type(e).__name__}: {e}") from e


def _readable() -> list[str]:
    return [one for one in FORMATS if one != "AVIF" or features.check("avif")]


def _not_known(data: bytes) -> str:
    head = data[:64].lstrip() if data[:64].lstrip()[:1] in b"<%" else data[:64]
    for at, mark, kind in _FOREIGN:
        if head[at:].startswith(mark):
            return f"a picture of the format {kind}, which is not read; make it PNG"
    start = head.lower()
    for mark, what in _NO_PICTURES:
        if start.startswith(mark):
            return f"not a picture but {what}"
    return f"not a picture of a known format ({', '.join(FORMATS)})"


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadRecord(
            name, f"{width * height:,} pixels; at most {MAX_PIXELS:,} are decoded"
        )


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """(width, height) of an animated or transparent WebP picture, else (0, 0).

    Pillow makes its canvas when it opens the file. Without animation and transparency
    (the formats VP8 and VP8L alone) a side has 14 bits, and Pillow's own check comes
    first.
    """
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return 0, 0
    width, height = (int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    return width + 1, height + 1


def _transparent_grey(image: Image.Image, data: bytes, name: str) -> int | None:
    """The transparent value of a 16-bit grey PNG; None if there is none.

    Of other depths it is put into `image.info` as the value that Pillow's pixels have.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return None
    bits, colours = data[24], data[25]
    if bits == 16 and colours == 2:
        raise BadRecord(
            name,
            "one of its 16-bit colours is transparent, and 8 bits cannot tell that "
            "colour from its neighbours; store it with an alpha channel",
        )
    if colours == 0 and bits in (2, 4):
        image.info["transparency"] = key * (255 // (2**bits - 1))
    return key if image.mode.startswith("I;16") else None


def _sixteen(image: Image.Image) -> tuple[bool, int]:
    """Whether 0 is white in a TIFF of 16 bits, and how many of them are used."""
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return False, 16
    tags = image.tag_v2  # pyrefly: ignore[missing-attribute]  # only of TIFF
    return tags.get(262) == 0, tags.get(258, (16,))[0]


def _from_16(
    band: Image.Image, key: int | None, white_is_zero: bool, bits: int
) -> np.ndarray:
    """Grey of 16 bits -> uint8 [h, w, 3]."""
    values = np.asarray(band)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    if key is not None:
        grey = np.where(values == key, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, 2)


def _rgb(band: Image.Image, name: str) -> np.ndarray:
    """A picture of any other mode -> uint8 [h, w, 3]."""
    if band.mode in ("I", "F"):
        raise BadRecord(name, f"pixels of 32 bits (mode {band.mode}) have no range")
    if band.has_transparency_data:
        band = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
    return np.asarray(band.convert("RGB"))


def fit(image: ImageHWC, height: int, width: int) -> np.ndarray:
    """The largest centred part of this aspect, resized: uint8 [height, width, 3].

    A picture shrinks by Lanczos with antialiasing and grows by bicubic, both in sRGB.
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    scale = max(height / h, width / w)
    wide, high = width / scale, height / scale
    left, top = (w - wide) / 2, (h - high) / 2
    box = (max(left, 0), max(top, 0), min(left + wide, w), min(top + high, h))
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), how, box))
