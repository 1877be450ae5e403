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
from PIL import Image, ImageOps

from scaling_ldm.records.errors import BadRecord

# The formats that are decoded, by pillow's names. EPS and the like run programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Larger pictures are refused before they are decoded; 0.27 GB as RGB.
MAX_PIXELS = 89_478_485


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
      BadRecord: no bytes, no picture, a truncated one, or more than MAX_PIXELS pixels.
    """
    if not data:
        raise BadRecord(name, "it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise BadRecord(
                    name, f"{pixels:,} pixels; at most {MAX_PIXELS:,} are decoded"
                )
            return _rgb(ImageOps.exif_transpose(image), name)
    except BadRecord:
        raise
    except Image.UnidentifiedImageError as e:
        known = ", ".join(FORMATS)
        raise BadRecord(name, f"not a picture of a known format ({known})") from e
    except MemoryError:
        raise
    except Exception as e:  # pillow raises many types on a broken file
        raise BadRecord(name, f"cannot be decoded: {type(e).__name__}: {e}") from e


def _rgb(image: Image.Image, name: str) -> ImageHWC:
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2)
    if image.mode in ("I", "F"):
        raise BadRecord(name, f"pixels of 32 bits (mode {image.mode}) have no range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


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
