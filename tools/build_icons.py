"""Builds the embedded icon set from the npm package ``@iconify/json``.

    npm pack @iconify/json@2.2.535
    pip install pillow resvg-py==0.5.0
    python tools/build_icons.py \\
        --package iconify-json-2.2.535.tgz --out scaling_ldm/data/icons

It takes a few minutes on one core. The same package and the same versions of the
renderer and of liblzma give the same files, byte for byte. It is needed only to remake
the files; ``scaling_ldm.data.icon_set`` reads them with numpy alone.

What is kept: sets of one colour under a licence that asks for no more than a notice.
What is left out: logos, programming brands, hidden (retired) icons, animated icons
(their first frame is half drawn), and names that hold a brand. Each shape is rendered
at 64 x 64, averaged to 32 x 32 and rounded to 16 levels of alpha. Blank, full and
repeated shapes are dropped.

Compression was measured on 214,955 masks of 512 bytes (110 MB) in the order of their
names. Estimates from 20,000 of them, in MB: deflate 21.2; xz with two horizontal
neighbours in a byte 13.3; xor with the row above 16.0, with the mask before 24.7; the
four bit planes apart 19.4, Gray coded 18.4; position-major 24.0; one pixel in a byte
14.1; two vertical neighbours in a byte 12.8, which is used. The whole set then takes
11.1 MB with xz's preset 6 and a window of 16 MB, and 9.7 MB with 9e and 128 MB. Every
reader needs memory for the window, so 9e with 16 MB is used. Columns first take 12.0
MB; pb=4 or lp=4 changes 0.5%. The order by set instead of name would save 3% and need a
permutation. The 207,000 masks that remain without brands and animations take 10.0 MB;
reading them takes about a second.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import lzma
import pathlib
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import icon_names
import numpy as np

from scaling_ldm.data.icon_set import SIDE, unpack

SCHEMA = 1

# Licences that ask for a notice at most. CC-BY, OFL, MPL and GPL are left out.
LICENSES = (
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unlicense",
)
SKIP_CATEGORIES = ("Logos", "Programming")
# MIT in its package, but its publisher restricts the use of the drawings.
SKIP_SETS = ("fluent-mdl2",)
LZMA2 = {
    "id": lzma.FILTER_LZMA2,
    "preset": 9 | lzma.PRESET_EXTREME,
    "lc": 4,
    "lp": 0,
    "pb": 0,
    "dict_size": 1 << 24,
}
LICENSE_TEXTS = pathlib.Path(__file__).parents[1] / "scaling_ldm/data/icons/licenses"


class Icon(NamedTuple):
    """An icon of a set.

    Attributes:
      base: its base name, in words.
      set: the key of its set.
      style: in the words of captions; "" for none.
      name: as the set calls it.
    """

    base: str
    set: str
    style: str
    name: str


def read_package(path: pathlib.Path) -> tuple[dict, dict[str, dict]]:
    """Returns (collections.json, {set: its document}) for the sets that are kept."""
    raw = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name in ("collections.json", "package.json") or (
                name.startswith("json/") and name.endswith(".json")
            ):
                raw[name] = tar.extractfile(member).read()
    package = json.loads(raw["package.json"])
    infos = json.loads(raw["collections.json"])
    kept = {
        key: json.loads(raw[f"json/{key}.json"])
        for key, info in sorted(infos.items())
        if not info.get("palette")
        and info["license"].get("spdx") in LICENSES
        and info.get("category") not in SKIP_CATEGORIES
        and key not in SKIP_SETS
    }
    infos["package"] = f"{package['name']}=={package['version']}"
    return infos, kept


def list_icons(documents: dict[str, dict]) -> list[Icon]:
    """The icons that are kept, sorted by base name."""
    icons = []
    for key, document in documents.items():
        names = [
            name
            for name, icon in document["icons"].items()
            if not icon.get("hidden") and "<animate" not in icon["body"]
        ]
        namer = icon_names.Namer(key, document, names)
        for name in names:
            base, style = namer(name)
            if not icon_names.is_left_out(name, base):
                icons.append(Icon(base, key, style, name))
    return sorted(icons)


def render(icon: dict, document: dict) -> np.ndarray:
    """Alpha of one icon, centred on a square: uint8 [32, 32], levels 0..15."""
    import resvg_py
    from PIL import Image

    def field(name, default):
        return icon.get(name, document.get(name, default))

    left, top = field("left", 0), field("top", 0)
    width, height = field("width", 16), field("height", 16)
    side = max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{side}" height="{side}" viewBox="0 0 {side} {side}">'
        f'<svg x="{(side - width) / 2}" y="{(side - height) / 2}" width="{width}"'
        f' height="{height}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg></svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")
    alpha = np.asarray(image, np.uint16).reshape(SIDE, 2, SIDE, 2).sum((1, 3))
    return ((alpha + 34) // 68).astype(np.uint8)  # 4 x 255 = 15 x 68


def pack(levels: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32] of 0..15 -> uint8 [n, 16, 32], rows 2r and 2r + 1 a byte."""
    return levels[:, 0::2] << 4 | levels[:, 1::2]


def render_all(icons: list[Icon], documents: dict[str, dict]) -> np.ndarray:
    """Packed masks of some icons: uint8 [n, 16, 32]."""
    masks = np.empty((len(icons), SIDE // 2, SIDE), np.uint8)
    for i, icon in enumerate(icons):
        document = documents[icon.set]
        masks[i] = pack(render(document["icons"][icon.name], document)[None])[0]
        if i % 10000 == 0:
            print(f"rendered {i} of {len(icons)}", flush=True)
    return masks


def drop_repeated(
    icons: list[Icon], masks: np.ndarray
) -> tuple[list[Icon], np.ndarray]:
    """The first icon of each drawing, without blank and full ones.

    A drawing that a base name has in several styles (an arrow is the same filled or
    not) gets no style.
    """
    first, drawings = _unique_rows(masks)
    styles = collections.defaultdict(set)
    for icon, drawing in zip(icons, drawings, strict=True):
        styles[drawing, icon.base].add(icon.style)
    flat = masks.reshape(len(masks), -1)
    first = np.sort(first)
    first = first[(flat[first].max(1) > 0) & (flat[first].min(1) < 255)]
    kept = []
    for i in first:
        several = len(styles[drawings[i], icons[i].base]) > 1
        kept.append(icons[i]._replace(style="") if several else icons[i])
    return kept, masks[first]


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first index of each distinct row, the number of its row for every row)."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    view = flat.view(f"V{flat.shape[1]}").ravel()
    _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
    return first, inverse


def twin_groups(packed: np.ndarray) -> np.ndarray:
    """A number for each mask, equal for masks that look the same; 0 where none does.

    The same: at 16 x 16, above or below half covered, no pixel differs.
    """
    coarse = []
    for start in range(0, len(packed), 8192):
        levels = unpack(packed[start : start + 8192])
        cells = levels.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).sum((2, 4))
        coarse.append(np.packbits(cells >= 30, axis=-1))
    _, inverse = _unique_rows(np.concatenate(coarse))
    counts = np.bincount(inverse)
    shared = np.zeros(len(counts), np.int64)
    # Number the groups in order of appearance: small differences compress best.
    seen, first = np.unique(inverse, return_index=True)
    order = seen[np.argsort(first)]
    order = order[counts[order] > 1]
    shared[order] = np.arange(1, len(order) + 1)
    return shared[inverse].astype(np.uint32)


def _text(strings: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\n".join(strings).encode(), np.uint8)


def write_masks(path: pathlib.Path, masks: np.ndarray) -> None:
    """Writes packed masks, compressed."""
    packed = lzma.compress(
        masks.tobytes(), lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=[LZMA2]
    )
    path.write_bytes(packed)


def write_names(path: pathlib.Path, icons: list[Icon], masks: np.ndarray) -> None:
    """Writes what the masks are called; see `icon_set.IconSet` for the arrays."""
    counts = collections.Counter(icon.base for icon in icons)
    names = sorted(counts)
    styles = sorted({icon.style for icon in icons})
    sets = sorted({icon.set for icon in icons})
    style_index = {style: i for i, style in enumerate(styles)}
    set_index = {key: i for i, key in enumerate(sets)}
    np.savez_compressed(
        path,
        names=_text(names),
        keys=_text(icon_names.split_keys(names)),
        styles=_text(styles),
        sets=_text(sets),
        masks_per_name=np.array([counts[name] for name in names], np.uint16),
        mask_style=np.array([style_index[icon.style] for icon in icons], np.uint8),
        mask_set=np.array([set_index[icon.set] for icon in icons], np.uint8),
        mask_twin=twin_groups(masks),
    )


def list_sets(icons: list[Icon], infos: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each set in the notices."""
    counts = collections.Counter(icon.set for icon in icons)
    return [
        {
            "set": key,
            "name": infos[key]["name"],
            "version": infos[key].get("version", "-"),
            "author": infos[key]["author"]["name"],
            "url": infos[key]["author"].get("url", ""),
            "license": infos[key]["license"]["spdx"],
            "masks": counts[key],
        }
        for key in sorted(counts)
    ]


def notices(sets: list[dict[str, Any]], package: str) -> str:
    """The notices that the licences of the sets ask for, as Markdown."""
    lines = [
        "# Notices for the embedded icon masks",
        "",
        f"The masks are 32 x 32 renderings, alpha only, of shapes in {package}.",
        "Each set stays under its own licence and its copyright stays with its",
        "author. The full text of each licence follows the table. The shapes were",
        "changed: rasterised, centred, reduced to 16 levels, freed of repetitions.",
        "",
        "| set | name | version | copyright | licence | masks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sets:
        author = row["author"] + (f" ({row['url']})" if row["url"] else "")
        lines.append(
            f"| {row['set']} | {row['name']} | {row['version']} | {author}"
            f" | {row['license']} | {row['masks']} |"
        )
    for spdx in sorted({row["license"] for row in sets}):
        license_text = (LICENSE_TEXTS / f"{spdx}.txt").read_text("utf-8")
        lines += ["", f"## {spdx}", "", "```text", license_text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def build(package: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """Writes every embedded file into `out`; returns the manifest."""
    infos, documents = read_package(package)
    icons = list_icons(documents)
    icons, masks = drop_repeated(icons, render_all(icons, documents))
    names = sorted({icon.base for icon in icons})
    out.mkdir(parents=True, exist_ok=True)
    write_masks(out / "masks.xz", masks)
    write_names(out / "names.npz", icons, masks)
    sets = list_sets(icons, infos)
    (out / "NOTICES.md").write_text(notices(sets, infos["package"]), "utf-8")
    manifest = {
        "schema": SCHEMA,
        "source": infos["package"],
        "built_by": "python tools/build_icons.py",
        "renderer": "resvg-py==0.5.0, 64 px averaged to 32 px, 16 levels of alpha",
        "masks": len(masks),
        "names": len(names),
        "keys": len(set(icon_names.split_keys(names))),
        "sets": len(sets),
        "styles": len({icon.style for icon in icons}),
        "files": {
            name: {
                "bytes": (out / name).stat().st_size,
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            }
            for name in ("masks.xz", "names.npz", "NOTICES.md")
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (out / "manifest.json").write_text(text, "utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    print(json.dumps(build(args.package, args.out), indent=2))


if __name__ == "__main__":
    main()
