"""Builds the embedded icon set from the npm package ``@iconify/json``.

    npm pack @iconify/json@2.2.535
    pip install pillow resvg-py==0.5.0
    python tools/build_icons.py \\
        --package iconify-json-2.2.535.tgz --out scaling_ldm/data/icons

Takes a few minutes on one core. The same package and the same versions of the
renderer and of liblzma give the same files, byte for byte. Needed only to remake the
files; ``scaling_ldm.data.icons`` reads them with numpy alone.

What is kept: single-colour sets under a licence that asks for no more than a notice,
without logos, programming brands, hidden (retired) icons, animated icons (a still of
them is a half-drawn first frame) and names that hold a brand. Each shape is rendered at
64 x 64, averaged to 32 x 32 and rounded to 16 levels of alpha; blank, full and repeated
shapes are dropped.

Compression, as measured on 214,955 masks of 512 bytes (110 MB) in the order of their
names. Estimated from 20,000 of them: deflate 21.2 MB; xz on two horizontal neighbours a
byte 13.3; xor with the row above 16.0, with the mask before 24.7; the four bit planes
apart 19.4, Gray coded 18.4; position-major 24.0; a byte a pixel 14.1; two vertical
neighbours a byte, which is what is used, 12.8. On the whole set that is 11.1 MB with
xz's preset 6 and a window of 16 MB, 9.7 MB with 9e and 128 MB (a window this large is
memory that every reader pays, so 9e with 16 MB is used); columns first 12.0; pb=4 or
lp=4 changes 0.5%. Order by set instead of name would save 3% and need a permutation.
The 207,000 masks that remain without brands and animations take 10.0 MB; reading them
takes about a second.
"""

import argparse
import collections
import hashlib
import io
import json
import lzma
import pathlib
import re
import tarfile

import numpy as np

SIZE = 32  # pixels; rendered at twice that
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

# A name with one of these words is a trademark, not a thing. Names that are also
# ordinary words (target, signal, shell, medium, sketch, ...) are not listed.
BRANDS = frozenset(
    """
    500px adobe airbnb airtable alexa algolia alibaba alipay amazon amd amex android
    angular angularjs anthropic apache app-store apple-music apple-pay
    apple-podcasts apple-tv appstore archlinux asana atlassian audible auth0 aws
    azure baidu bandcamp bash behance bilibili binance bing bitbucket blackberry
    blogger bluesky bmw bnb brand btc bun canva capcut cardano centos chatgpt chrome
    chromecast cisco claude cloudflare codepen codesandbox coinbase cpanel cplusplus
    creative-commons css3 dailymotion databricks debian deepseek deezer deno
    deviantart dhl digg digitalocean dingding discord disqus django docker dolby
    douban douyin dribbble dropbox drupal ebay elementor eslint ethereum etsy
    evernote facebook fedex fediverse fedora figma filezilla firebase firefox fitbit
    flickr flipboard flutter foursquare freebsd gatsby gitbook gitee github
    gitkraken gitlab gitter glassdoor gmail gnome goodreads google graphql grok
    grunt gulp gumroad hackernews hackerrank haskell heroku hexo hotjar houzz hp
    html5 huawei hubspot hulu ibm icloud icq ie illustrator imdb inkscape instagram
    intercom invision ios itunes javascript jcb jenkins jira joomla jquery jsfiddle
    jupyter kakao kickstarter klarna kotlin kubernetes laravel lastfm lastpass
    linkedin linktree linux litecoin logo logos lyft mac-os macos magento mailchimp
    mailgun mantine mastercard mastodon mcdonalds messenger metamask microsoft
    minecraft mixcloud monero mongodb mysql napster nasa netbeans netflix netlify
    nextcloud nextjs nginx nike nintendo nissan nodejs npm nuxt nvidia oculus
    odnoklassniki onlyfans openai openvpn oracle patreon paypal peloton pexels
    phabricator photoshop php picasa pinterest playstation pnpm podio polkadot
    postgresql postman powershell producthunt python qq quora qzone raspberry-pi
    reddit redhat redis redux renren replit researchgate roblox rollup safari
    salesforce samsung sass sencha shazam shopee shopify sina sketchfab skype slack
    slideshare snapchat solana soundcloud sourceforge sourcetree spotify squarespace
    stackblitz stackexchange stackoverflow stadia strava stumbleupon substack
    supabase suse svelte swiggy symfony tailwind tailwindcss taobao teamviewer
    telegram tencent terraform tesla tether tiktok tinder toyota trello tripadvisor
    tumblr twilio twitch twitter typescript typo3 uber ubisoft ubuntu unsplash
    untappd ups upwork usdc usdt usps vaadin venmo vercel viadeo viber vimeo visa
    visualstudio vivaldi vk vsco vscode vue vuejs walmart wattpad waze webflow
    webpack wechat weibo wetransfer whatsapp wikidata wikimedia wikipedia wikivoyage
    wix wordpress xamarin xampp xbox xiaomi xing xmpp xrp yahoo yandex yelp yoast
    youtube yuque zalando zapier zendesk zhihu zulip
    """.split()
)

# Brands only where they are the whole name.
WHOLE_BRANDS = frozenset(
    """
    gemini medium meta notion opera react rust sketch steam stripe swift threads tidal
    unity windows
    """.split()
)
# Drawings of anatomy that a grid of samples can do without.
SKIP_WORDS = frozenset("genitalia penis testicles vagina vulva".split())

# Words of style, wherever a set writes them, and what a caption calls them. "light"
# strokes are called thin: "light" is also a word of colour.
STYLE_WORDS = {
    "outline": "outline",
    "outlined": "outline",
    "line": "outline",
    "linear": "outline",
    "stroke": "outline",
    "o": "outline",
    "fill": "filled",
    "filled": "filled",
    "solid": "filled",
    "baseline": "filled",
    "f": "filled",
    "duotone": "duotone",
    "boldduotone": "duotone",
    "duo": "duotone",
    "twotone": "duotone",
    "thin": "thin",
    "light": "thin",
    "bold": "bold",
    "sharp": "sharp",
    "rounded": "rounded",
    "round": "rounded",
}
STYLE_ORDER = ("thin", "bold", "sharp", "rounded", "outline", "filled", "duotone")
# Always style at the end of a name; fill and stroke are unless the set's own table
# names its styles; the others only where the set has the name without them.
STRONG_STYLE = frozenset("outline outlined filled solid duotone twotone".split())
VERB_STYLE = frozenset("fill stroke".split())
# "chart line" and "traffic light" are things; these sets mean the style.
LINE_IS_STYLE = ("clarity", "majesticons")
LIGHT_IS_STYLE = ("stash",)
O_IS_STYLE = ("uiw", "vaadin")
SIZE_IS_LAST = ("osmic",)
# The style that a set calls regular, or does not name at all.
UNNAMED_STYLE = {
    "akar-icons": "outline",
    "bi": "outline",
    "boxicons": "outline",
    "bx": "outline",
    "bxs": "filled",
    "bytesize": "outline",
    "charm": "outline",
    "clarity": "outline",
    "feather": "outline",
    "fluent": "outline",
    "griddy-icons": "outline",
    "heroicons-outline": "outline",
    "heroicons-solid": "filled",
    "famicons": "filled",
    "hugeicons": "outline",
    "ic": "filled",
    "humbleicons": "outline",
    "icon-park-outline": "outline",
    "icon-park-solid": "filled",
    "icon-park-twotone": "duotone",
    "iconoir": "outline",
    "ion": "filled",
    "lucide": "outline",
    "lucide-lab": "outline",
    "maki": "filled",
    "material-symbols": "filled",
    "material-symbols-light": "filled",
    "mdi": "filled",
    "meteor-icons": "outline",
    "mynaui": "outline",
    "ph": "outline",
    "pinhead": "filled",
    "proicons": "outline",
    "simple-line-icons": "outline",
    "tabler": "outline",
    "tdesign": "outline",
    "temaki": "filled",
    "uil": "outline",
    "uim": "duotone",
    "uis": "filled",
    "uit": "thin outline",
    "vadivam": "outline",
    "wpf": "filled",
    "zondicons": "filled",
}
# Added to whatever the name says.
SET_STYLE = {"material-symbols-light": "thin"}

COUNTERS = frozenset("one two three four five six".split())  # of the icon-park sets
# After these a number is part of the thing.
NUMBERED = frozenset(
    """
    alpha battery clock counter dice die exposure face filter grade heading hour key
    keycap level looks number numeric quality speaker stage star step volume
    """.split()
)


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


def is_left_out(name: str, base: str) -> bool:
    """True for an icon that holds a brand, or a word to skip.

    Args:
      name: as in its set, words joined by "-".
      base: its base name.
    """
    words = name.split("-")
    pairs = map("-".join, zip(words, words[1:], strict=False))
    left_out = BRANDS | SKIP_WORDS
    whole = not base or base in WHOLE_BRANDS
    return whole or not left_out.isdisjoint([*words, *pairs])


def canonical_style(words) -> str:
    """The caption's words for a collection of a set's words, in one order."""
    found = {STYLE_WORDS[word] for word in words if word in STYLE_WORDS}
    if "duotone" in found or {"outline", "filled"} <= found:
        found -= {"outline", "filled"}
    return " ".join(word for word in STYLE_ORDER if word in found)


def _title_words(title: str) -> list[str]:
    title = re.sub(r"two[- ]tone", "twotone", title.lower())
    return re.findall(r"[a-z]+", title)


class Namer:
    """Takes the style, the size and the counter out of the names of one set."""

    def __init__(self, key: str, document: dict, names: list[str]):
        self.key = key
        self.names = frozenset(names)
        self.prefixes = self._table(document.get("prefixes"))
        self.suffixes = self._table(document.get("suffixes"))
        titles = [*self.prefixes.values(), *self.suffixes.values()]
        # Tables that hold sizes alone leave the style to the name.
        self.table_has_style = any(canonical_style(words) for words in titles)
        self.plain = frozenset("-".join(self._without_style(name)[0]) for name in names)

    @staticmethod
    def _table(table: dict | None) -> dict[str, list[str]]:
        ordered = sorted((table or {}).items(), key=lambda item: (-len(item[0]), item))
        return {affix: _title_words(title) for affix, title in ordered}

    def __call__(self, name: str) -> tuple[str, str]:
        """Returns (base name, style), both lower-case words with spaces between."""
        words, style = self._without_style(name)
        words = self._without_counter(words)
        base = " ".join(words)
        named = canonical_style(style)
        if not {"outline", "filled", "duotone"} & set(named.split()):
            style = [*style, *UNNAMED_STYLE.get(self.key, "").split()]
        style = [*style, *SET_STYLE.get(self.key, "").split()]
        return re.sub(r"[^a-z0-9]+", " ", base).strip(), canonical_style(style)

    def _without_style(self, name: str) -> tuple[list[str], list[str]]:
        style = []
        for affix, words in self.prefixes.items():
            if affix and name.startswith(affix + "-"):
                name = name[len(affix) + 1 :]
                style += words
                break
        for affix, words in self.suffixes.items():
            if not affix:
                style += words
            elif name.endswith("-" + affix):
                name = name[: -len(affix) - 1]
                style += words
                break
        words = re.sub(r"two-tone\b", "twotone", name).split("-")
        if self.key == "clarity" and words[-1] in ("alerted", "badged"):
            for word in ("outline", "solid", "line"):
                if word in words[1:]:
                    words.remove(word)
                    style.append(word)
        while len(words) > 1 and self._ends_in_style(words):
            style.append(words.pop())
        return words, style

    def _ends_in_style(self, words: list[str]) -> bool:
        word = words[-1]
        if re.fullmatch(r"\d+px", word) or word in STRONG_STYLE:
            return True
        if self.key in SIZE_IS_LAST and word.isdigit():
            return True
        if word not in STYLE_WORDS or self.table_has_style:
            return False
        if word == "o" and self.key in O_IS_STYLE:
            return True
        if word == "line":
            return self.key in LINE_IS_STYLE
        if word == "light":
            return self.key in LIGHT_IS_STYLE
        return word in VERB_STYLE or "-".join(words[:-1]) in self.names

    def _without_counter(self, words: list[str]) -> list[str]:
        while len(words) > 1:
            word, plain = words[-1], "-".join(words[:-1])
            counter = (
                re.fullmatch(r"0\d", word)
                or (self.key.startswith("icon-park") and word in COUNTERS)
                or (re.fullmatch(r"\d+|alt|variant|s", word) and plain in self.plain)
                or (
                    re.fullmatch(r"[1-9]", word)
                    and words[-2] not in NUMBERED
                    and words[-2].isalpha()
                    and any(f"{plain}-{n}" in self.plain for n in "123" if n != word)
                )
            )
            if not counter:
                break
            words = words[:-1]
        glued = re.fullmatch(r"([a-z]{3,})\d{1,2}", words[-1])
        if glued and "-".join([*words[:-1], glued[1]]) in self.plain:
            words = [*words[:-1], glued[1]]
        return words


KEY_STOP = frozenset([*STYLE_WORDS, "regular", "alt", "variant", "small", "large"])


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(x|ch|sh|ss)es$", word):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and word[-2] not in "sui":
        return word[:-1]
    return word


def split_keys(names: list[str]) -> list[str]:
    """A key for each base name, the same for names that differ in form alone.

    Number of the noun, order of the words, digits, words of style, and one word written
    as two ("check box", "checkbox") make no difference: names with one key go to one
    side of the split.
    """
    singular = [[_singular(word) for word in name.split()] for name in names]
    pairs = {}
    for words in singular:
        for a, b in zip(words, words[1:], strict=False):
            if len(a) > 2 and len(b) > 2 and a.isalpha() and b.isalpha():
                pairs.setdefault(a + b, (a, b))

    def key(words: list[str]) -> str:
        parts = [part for word in words for part in pairs.get(word, (word,))]
        parts = [re.sub(r"(?<=[a-z]{3})\d+$", "", part) for part in parts]
        kept = [p for p in parts if p not in KEY_STOP and not p.isdigit()]
        return " ".join(sorted(set(kept or parts)))

    return [key(words) for words in singular]


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
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")
    alpha = np.asarray(image, np.uint16).reshape(SIZE, 2, SIZE, 2).sum((1, 3))
    return ((alpha + 34) // 68).astype(np.uint8)  # 4 x 255 = 15 x 68


def pack(levels: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32] of 0..15 -> uint8 [n, 16, 32], rows 2r and 2r + 1 a byte."""
    return levels[:, 0::2] << 4 | levels[:, 1::2]


def unpack(packed: np.ndarray) -> np.ndarray:
    """Undoes `pack`."""
    return np.stack([packed >> 4, packed & 15], 2).reshape(-1, SIZE, SIZE)


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
        cells = levels.reshape(-1, SIZE // 2, 2, SIZE // 2, 2).sum((2, 4))
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


def _text(strings) -> np.ndarray:
    return np.frombuffer("\n".join(strings).encode(), np.uint8)


def _notices(sets: list[dict], license_texts: dict[str, str], package: str) -> str:
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
        lines += ["", f"## {spdx}", "", "```text", license_texts[spdx].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def build(package: pathlib.Path, out: pathlib.Path) -> dict:
    """Writes every embedded file into `out`; returns the manifest."""
    license_dir = pathlib.Path(__file__).parents[1] / "scaling_ldm/data/icons/licenses"
    infos, documents = read_package(package)
    entries = []  # (base, set, style, icon name)
    bodies = {}
    for key, document in documents.items():
        names = [
            name
            for name, icon in document["icons"].items()
            if not icon.get("hidden") and "<animate" not in icon["body"]
        ]
        namer = Namer(key, document, names)
        for name in names:
            base, style = namer(name)
            if not is_left_out(name, base):
                entries.append((base, key, style, name))
                bodies[key, name] = document["icons"][name]
    entries.sort()

    masks = np.empty((len(entries), SIZE // 2, SIZE), np.uint8)
    for i, (_, key, _, name) in enumerate(entries):
        masks[i] = pack(render(bodies[key, name], documents[key])[None])[0]
        if i % 10000 == 0:
            print(f"rendered {i} of {len(entries)}", flush=True)

    first, inverse = _unique_rows(masks)
    # One drawing given in several styles (an arrow is the same filled or not) has none.
    styles = collections.defaultdict(set)
    for entry, drawing in zip(entries, inverse, strict=True):
        styles[drawing].add((entry[0], entry[2]))
    flat = masks.reshape(len(masks), -1)
    first = np.sort(first)
    first = first[(flat[first].max(1) > 0) & (flat[first].min(1) < 255)]
    kept = []
    for i in first:
        base, key, style, _ = entries[i]
        alternatives = {s for b, s in styles[inverse[i]] if b == base}
        kept.append((base, key, style if len(alternatives) == 1 else ""))
    masks = masks[first]

    names = sorted({base for base, _, _ in kept})
    style_names = sorted({style for _, _, style in kept})
    set_counts = collections.Counter(key for _, key, _ in kept)
    set_names = sorted(set_counts)
    name_counts = collections.Counter(base for base, _, _ in kept)
    rows = []
    for key in set_names:
        info = infos[key]
        rows.append(
            {
                "set": key,
                "name": info["name"],
                "version": info.get("version", "-"),
                "author": info["author"]["name"],
                "url": info["author"].get("url", ""),
                "license": info["license"]["spdx"],
                "masks": set_counts[key],
            }
        )

    out.mkdir(parents=True, exist_ok=True)
    lzma2 = {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 4,
        "lp": 0,
        "pb": 0,
        "dict_size": 1 << 24,
    }
    (out / "masks.xz").write_bytes(
        lzma.compress(
            masks.tobytes(),
            format=lzma.FORMAT_XZ,
            check=lzma.CHECK_CRC32,
            filters=[lzma2],
        )
    )
    style_index = {style: i for i, style in enumerate(style_names)}
    set_index = {key: i for i, key in enumerate(set_names)}
    np.savez_compressed(
        out / "names.npz",
        names=_text(names),
        keys=_text(split_keys(names)),
        styles=_text(style_names),
        sets=_text(set_names),
        masks_per_name=np.array([name_counts[name] for name in names], np.uint16),
        mask_style=np.array([style_index[style] for _, _, style in kept], np.uint8),
        mask_set=np.array([set_index[key] for _, key, _ in kept], np.uint8),
        mask_twin=twin_groups(masks),
    )
    license_texts = {
        spdx: (license_dir / f"{spdx}.txt").read_text("utf-8")
        for spdx in {row["license"] for row in rows}
    }
    (out / "NOTICES.md").write_text(
        _notices(rows, license_texts, infos["package"]), "utf-8"
    )
    files = ("masks.xz", "names.npz", "NOTICES.md")
    manifest = {
        "schema": SCHEMA,
        "source": infos["package"],
        "built_by": "python tools/build_icons.py",
        "renderer": "resvg-py==0.5.0, 64 px averaged to 32 px, 16 levels of alpha",
        "masks": len(masks),
        "names": len(names),
        "keys": len(set(split_keys(names))),
        "sets": len(set_names),
        "styles": len(style_names),
        "files": {
            name: {
                "bytes": (out / name).stat().st_size,
                "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            }
            for name in files
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
