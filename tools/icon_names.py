"""What an icon is called: its base name, its style, and the key that splits names.

The sets write styles, sizes and counters into their names. The tables below say where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def is_left_out(name: str, base: str) -> bool:
    """Whether an icon is left out: its name holds a brand, or a word to skip.

    Args:
      name: as in its set, words joined by "-".
      base: its base name.
    """
    words = name.split("-")
    pairs = map("-".join, zip(words, words[1:], strict=False))
    left_out = BRANDS | SKIP_WORDS
    whole = not base or base in WHOLE_BRANDS
    return whole or not left_out.isdisjoint([*words, *pairs])


def canonical_style(words: Iterable[str]) -> str:
    """The style in the words of captions, in one order, from the words of a set."""
    found = {STYLE_WORDS[word] for word in words if word in STYLE_WORDS}
    if "duotone" in found or {"outline", "filled"} <= found:
        found -= {"outline", "filled"}
    return " ".join(word for word in STYLE_ORDER if word in found)


def _title_words(title: str) -> list[str]:
    title = re.sub(r"two[- ]tone", "twotone", title.lower())
    return re.findall(r"[a-z]+", title)


class Namer:
    """Separates style, size and counter from the base name, for the icons of a set."""

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

    The key ignores plurals, the order of words, digits, words of style, and whether one
    word is written as two ("check box", "checkbox"). Names with one key go to one side
    of the split.
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
