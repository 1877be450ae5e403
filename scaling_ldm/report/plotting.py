"""How figures look and how they are saved: colours, ticks, SVG, PNG, PDF.

Each figure is rendered three times. SVG is for the page: its colours are CSS variables,
so that it follows the reader's light or dark scheme. PNG and PDF are for papers.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

INK, PAPER, MUTED, RULE = "#1c2127", "#fefefe", "#8b8d98", "#d9dbe0"
LAW, OTHER = "#1f5fbf", "#c2500c"
_SHADES = 33
_MAP = matplotlib.colormaps["viridis"]
_LIGHT = [to_hex(_MAP(0.76 - 0.72 * t)) for t in np.linspace(0, 1, _SHADES)]
_BRIGHT = [to_hex(_MAP(0.34 + 0.62 * t)) for t in np.linspace(0, 1, _SHADES)]
DARK = {  # what a colour becomes on a dark page
    PAPER: "#14171b",
    MUTED: "#80858f",
    RULE: "#3a4048",
    LAW: "#74a9ff",
    OTHER: "#ff9d5c",
    **dict(zip(_LIGHT, _BRIGHT, strict=True)),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.0,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
# Of the legend inside a small panel.
LEGEND: dict[str, Any] = {"loc": "upper right", "ncols": 2, "fontsize": 6.5}
LEGEND |= {"handlelength": 1.2, "columnspacing": 1.0, "labelspacing": 0.25}


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure in its three forms."""

    name: str
    caption: str
    svg: str  # an <svg> element, to be put into the page
    png: bytes
    pdf: bytes


def shade(index: int, count: int) -> str:
    """Colour `index` of a sequence: pale to deep on white, deep to bright on black."""
    return _LIGHT[round(index / max(count - 1, 1) * (_SHADES - 1))]


def line_entries(
    labels: Sequence[str], markersize: float, colours: Sequence[str] = ()
) -> list[Line2D]:
    """Legend entries of lines with points; without colours a shade per label."""
    colours = colours or [shade(i, len(labels)) for i in range(len(labels))]
    return [
        Line2D([], [], color=colour, marker="o", label=label, ms=markersize)
        for label, colour in zip(labels, colours, strict=True)
    ]


def variable(colour: str) -> str:
    """The CSS variable that stands for a colour of a figure."""
    return f"--c{colour[1:]}"


def png(image: np.ndarray) -> bytes:
    """One uint8 image as PNG bytes."""
    out = io.BytesIO()
    matplotlib.image.imsave(out, image, format="png")
    return out.getvalue()


def log_ticks(
    axis: Axis, low: float, high: float, show: Callable[[float], str], most: int
) -> None:
    """Sets at most about `most` labelled ticks, the roundest first, none too close.

    The axis may span a fraction of a decade, or many.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    gap = math.log(high / low) / most
    ticks: list[float] = []
    for multiple in (1, 3, 2, 5, 7, 4, 6, 8, 9, 1.5, 2.5, 3.5, 4.5, 1.2):
        for tick in (multiple * 10.0**d for d in decades):
            near = any(abs(math.log(tick / other)) < gap for other in ticks)
            if low <= tick <= high and not near:
                ticks.append(tick)
    if len(ticks) < 2:
        linear = MaxNLocator(4).tick_values(low, high)
        ticks = [t for t in linear if low <= t <= high and t > 0]
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))


def render(figure: Figure, name: str, caption: str) -> Plot:
    """A finished figure in its three forms."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # one layout for all three forms
        png_out, pdf_out, svg_out = io.BytesIO(), io.BytesIO(), io.StringIO()
        figure.savefig(svg_out, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png_out, format="png", dpi=200, facecolor="white")
        undated = {"CreationDate": None}
        figure.savefig(pdf_out, format="pdf", facecolor="white", metadata=undated)
    svg = _inline(svg_out.getvalue(), name, caption)
    return Plot(name, caption, svg, png_out.getvalue(), pdf_out.getvalue())


def _inline(svg: str, name: str, caption: str) -> str:
    """The element of the page that a stand-alone SVG file becomes."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", svg)
    points = re.search(r'width="([\d.]+)pt"', svg)
    if points is None:
        raise ValueError(f"figure {name}: its SVG has no width in points")
    width = float(points.group(1)) * 4 / 3
    head = f'<svg role="img" aria-label="{_attribute(caption)}" '
    head += f'style="--own:{1.15 * width:.0f}px;max-width:var(--own)"'
    svg = re.sub(r'<svg (width|height)="[^"]*" (width|height)="[^"]*"', head, svg)
    svg = re.sub(r'<svg height="[^"]*"', head, svg)
    used = set(re.findall(r"#([\w-]+)\)?\"", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    # Ids are unique in a file; the name of the figure makes them unique in the page.
    for mark in (' id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    svg = svg.replace(INK, "currentColor")
    for colour in DARK:
        svg = svg.replace(colour, f"var({variable(colour)})")
    return re.sub(r"\n\s*", "\n", svg)


def _attribute(words: str) -> str:
    return words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
