"""Pictures of the generate stage in one picture, with their captions under them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

ACROSS = 16  # pictures side by side, at most
LINES = 3  # of a caption, at most
_WIDTH = 112  # pixels that a caption needs; smaller pictures are enlarged
_LEAST, _MOST = 11, 32  # height of letters, in pixels

Pictures = UInt8[np.ndarray, "n H W 3"]
Sheet = UInt8[np.ndarray, "rows columns 3"]


def draw(images: Pictures, captions: Sequence[str]) -> Sheet:
    """One picture, row by row on white. Each caption stands under its own picture.

    A picture narrower than a caption needs is enlarged by a whole number, without
    smoothing. A long caption is cut and ends in "...". The font has the letters of
    English: an accent is left out, and another letter is drawn as a box.

    Raises:
      ValueError: there are not as many captions as pictures.
    """
    n, height, width, _ = images.shape
    scale, font = _scale(width), _font(width)
    cell_height, cell_width = cell(height, width)
    across = min(ACROSS, int(np.ceil(n**0.5)))
    down = -(-n // across)
    whole = np.full((down * cell_height, across * cell_width, 3), 255, np.uint8)
    corners = [divmod(i, across) for i in range(n)]
    corners = [(y * cell_height, x * cell_width) for y, x in corners]
    for image, (y, x) in zip(images, corners, strict=True):
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        whole[y : y + height * scale, x : x + width * scale] = large
    picture = Image.fromarray(whole)
    pen = ImageDraw.Draw(picture)
    for words, (y, x) in zip(captions, corners, strict=True):
        lines = fitted(words, font, width * scale)
        for number, line in enumerate(lines):
            below = y + height * scale + number * _line(font)
            pen.text((x, below), line, font=font, fill=(0, 0, 0))
    return np.asarray(picture)


def cell(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture with its caption and the gaps, in pixels."""
    scale, font = _scale(width), _font(width)
    gap = _line(font) // 2
    return height * scale + LINES * _line(font) + gap, width * scale + gap


def fitted(words: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most LINES lines of at most `width` pixels; the last may end in "..."."""
    lines = list(_broken(_plain(words).split(), font, width))
    if len(lines) > LINES:
        last = f"{lines[LINES - 1]} {lines[LINES]}"
        lines = [*lines[: LINES - 1], _cut(last, font, width)]
    return lines


def _broken(
    words: Sequence[str], font: ImageFont.FreeTypeFont, width: int
) -> Iterator[str]:
    """Words in lines; a word that is longer than a line is cut."""
    line = ""
    for word in words:
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        fits = font.getlength(word) <= width
        line = word if fits else _cut(word, font, width)
    if line:
        yield line


def _cut(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As many letters as fit before "..."."""
    while words and font.getlength(f"{words}...") > width:
        words = words[:-1]
    return f"{words.rstrip()}..."


def _plain(words: str) -> str:
    """Without accents, which the font lacks."""
    parts = unicodedata.normalize("NFKD", words)
    return "".join(c for c in parts if not unicodedata.combining(c))


def _scale(width: int) -> int:
    return -(-_WIDTH // width)


def _font(width: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow, larger under larger pictures.

    Raises:
      RuntimeError: this Pillow was built without FreeType.
    """
    size = min(max(_LEAST, width // 20), _MOST)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("captions need a Pillow with FreeType, as its wheels have")
    return font


def _line(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics())
