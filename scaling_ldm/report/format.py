"""Numbers and names as a reader sees them.

Three significant digits, four for losses; FLOPs in scientific notation; parameters,
tokens and images with SI prefixes (k, M, G, T).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from scaling_ldm.records import Interval
from scaling_ldm.records.measurements import in_words

NONE = "\N{EN DASH}"
SYMBOLS = {"N_opt": "N", "D_opt": "D", "L_opt": "L"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(x: float | None, digits: int = 3) -> str:
    """`digits` significant digits in positional notation: 0.568, 12.3, 1230."""
    if x is None:
        return NONE
    if not math.isfinite(x) or x == 0:
        return f"{x:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(x)))
    x = round(x, decimals)
    decimals = digits - 1 - math.floor(math.log10(abs(x)))  # 0.9996 became 1
    return f"{x:.{max(decimals, 0)}f}".replace("-", "\N{MINUS SIGN}")


def scientific(x: float | None, digits: int = 3) -> str:
    """1.60×10¹²."""
    if x is None:
        return NONE
    if not math.isfinite(x) or x == 0:
        return f"{x:g}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.replace("-", "\N{MINUS SIGN}")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def prefixed(x: float | None, digits: int = 3) -> str:
    """12.3 k, 4.56 M: counts; below a thousand as they are."""
    if x is None or not math.isfinite(x):
        return plain(x)
    x = float(f"{x:.{digits - 1}e}")
    for factor, prefix in _PREFIXES:
        if abs(x) >= factor:
            return f"{plain(x / factor, digits)}\N{NO-BREAK SPACE}{prefix}"
    return plain(x, digits) if x != int(x) else f"{int(x)}"


def duration(seconds: float | None) -> str:
    """1.66 ms, 12.3 s, 5 min 37 s, 2 h 15 min; from a hundred hours on, 1230 h."""
    if seconds is None or not math.isfinite(seconds):
        return plain(seconds)
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    if seconds >= 360_000:
        words = f"{plain(seconds / 3600)} h"
    elif seconds >= 3599.5:
        words = f"{hours[0]} h {hours[1]} min"
    elif seconds >= 59.95:
        words = f"{minutes[0]} min {minutes[1]} s"
    elif seconds >= 1 or seconds == 0:
        words = f"{plain(seconds)} s"
    elif seconds >= 1e-3:
        words = f"{plain(seconds * 1e3)} ms"
    else:
        words = f"{plain(seconds * 1e6)} \N{MICRO SIGN}s"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def compact(x: float | None) -> str:
    """Positional where that is short, else scientific: 0.503, 9.00×10⁻⁴."""
    if x is None or x == 0 or 1e-2 <= abs(x) < 1e4:
        return plain(x)
    return scientific(x)


def tick(x: float) -> str:
    """A round number on an axis: 20 k, 0.27."""
    for factor, prefix in _PREFIXES:
        if abs(x) >= factor * 0.9999:
            return f"{x / factor:.3g}\N{NO-BREAK SPACE}{prefix}"
    return f"{x:.3g}"


def flops_tick(x: float) -> str:
    """A round number of FLOPs on an axis: 3×10¹¹."""
    mantissa, exponent = f"{x:.2e}".split("e")
    return f"{float(mantissa):g}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def loss(x: float | None) -> str:
    return plain(x, 4)


def percent(x: float | None, digits: int = 3) -> str:
    """A ratio as a signed percentage, at most two decimals: +3.14%."""
    if x is None or not math.isfinite(x):
        return plain(x)
    text = f"{100 * x:+.2f}" if abs(x) < 0.1 else f"{100 * x:+.{digits - 2}f}"
    return text.replace("-", "\N{MINUS SIGN}") + "%"


def bracket(interval: Interval, show: Callable[[float], str]) -> str:
    return f"[{show(interval.low)}, {show(interval.high)}]"


def quantity(name: str) -> Callable[[float | None], str]:
    """How a value of N_opt, D_opt or L_opt is shown."""
    return loss if name == "L_opt" else prefixed


def count(x: int | None) -> str:
    return NONE if x is None else f"{x:,}".replace(",", "\N{NO-BREAK SPACE}")


def spoken(field: str) -> str:
    """A metric, or what counts as N, as words."""
    words = {
        "fid": "FID",
        "kid": "KID",
        "fd_lite0": "FD-Lite0",
        "fd_lite0_infinity": "FD-Lite0 of infinitely many pictures",
        "kid_lite0": "KID-Lite0",
        "precision_lite0": "precision on Lite0",
        "recall_lite0": "recall on Lite0",
        "fd_clip": "FD-CLIP",
        "fd_dinov2": "FD-DINOv2",
        "params": "all parameters",
        "params_without_embeddings": "parameters without embeddings",
    }
    if field in words:
        return words[field]
    said = in_words(field)  # has words for losses
    return said if said != field else field.replace("_", " ")


def measure(metric: str, weights: str) -> str:
    """A metric and its weights as words: "validation loss, average ema"."""
    return in_words(metric, weights, spoken(metric))


def who(source: str) -> str:
    """A source up to its year: "Liang et al. 2024"."""
    found = re.match(r".*?\b\d{4}\b", source)
    return found.group() if found else source


def cited(source: str) -> str:
    """A source without its title: "Liang et al. 2024, arXiv 2410.08184"."""
    found = re.search(r"arXiv \d{4}\.\d+", source)
    return f"{who(source)}, {found.group()}" if found else source
