"""The sections of the page about pictures: samples beside real ones, and measures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from scaling_ldm.records import SampleRecord
from scaling_ldm.report import evaluation_tables, html, plotting, training_quality
from scaling_ldm.report import format as fmt
from scaling_ldm.report.plotting import Plot
from scaling_ldm.report.study import Study
from scaling_ldm.report.table import Table

MOST_IMAGES = 64


def samples(study: Study) -> list[str]:
    """The first samples with their captions, each beside its real picture if known."""
    s, images, real = study.samples, study.images, study.real
    if s is None:
        return []
    parts = ["<h2>Samples</h2>", html.paragraphs([_how(s)])]
    if images is None:
        return [*parts, "<p>The pictures themselves could not be read.</p>"]
    images = images[:MOST_IMAGES]
    titles = (*s.titles(), *[""] * len(images))[: len(images)]
    beside: Sequence[np.ndarray | None] = [None] * len(images)
    if real is not None and real.shape[0] >= len(images):
        beside = list(real[: len(images)])
        parts.append(html.paragraphs([_real(study)]))
    # Whole pixels, and room for the words of a caption.
    width = images.shape[2] * max(1, round(100 / images.shape[2]))
    cells = "".join(map(_cell, images, beside, titles))
    across = width if beside[0] is None else 2 * width + 3
    parts.append(
        '<div class="grid" style="grid-template-columns: '
        f'repeat(auto-fill, min(100%, {across}px))">{cells}</div>'
    )
    if s.images > len(images):
        parts.append(f"<p>The first {len(images)} of {s.images}.</p>")
    return parts


def _how(s: SampleRecord) -> str:
    known_by = f" (SHA-256 {s.checksum})" if s.checksum else ""
    return (
        f"Run {s.run_id}, {s.weights} weights{known_by}; sampler {s.sampler}, "
        f"{s.steps} steps, guidance {fmt.plain(s.guidance)}: {s.nfe} network "
        f"evaluations an image, {fmt.scientific(s.flops)} FLOPs and "
        f"{fmt.duration(s.seconds)} for all {s.images}; seed {s.seed}."
    )


def _real(study: Study) -> str:
    latents = study.config.get("encode", {}).get("autoencoder", "none") != "none"
    decoded = ", as the autoencoder gives it back" if latents else ""
    return (
        "Left of each pair: what was drawn for the caption. Right: the held-out "
        f"picture that has this caption{decoded}."
    )


def _cell(image: np.ndarray, real: np.ndarray | None, words: str) -> str:
    shown = _picture(image, words)
    if real is not None:
        shown = f'<div class="pair">{shown}{_picture(real, f"real: {words}")}</div>'
    return f"<figure>{shown}<figcaption>{escape(words)}</figcaption></figure>"


def _picture(image: np.ndarray, words: str) -> str:
    data = base64.b64encode(plotting.png(image)).decode()
    return (
        f'<img alt="{escape(words)}" width="{image.shape[1]}" '
        f'height="{image.shape[0]}" src="data:image/png;base64,{data}">'
    )


def measured(
    study: Study, figures: Mapping[str, Plot], tables: Mapping[str, Table]
) -> list[str]:
    """Every measured number; quality against compute where there is some."""
    if not study.evaluations:
        return []
    compared = training_quality.comparisons(study)
    parts = ["<h2>Measured pictures</h2>"]
    parts.append(html.paragraphs(evaluation_tables.between(study)))
    missing = training_quality.unmeasured(study, compared)
    if compared or missing:
        parts.append("<h3>Quality against training compute</h3>")
    parts.append(html.paragraphs(missing, "Not complete:"))
    for name in map(training_quality.name, compared):
        parts.append(html.figure(figures.get(name), "plot"))
        parts.append(html.table(tables.get(f"{name}_pairs")))
    doubts = sorted({f"{r.metric}: {r.doubt}." for r in study.evaluations if r.doubt})
    parts.append(html.paragraphs(doubts, "In doubt:"))
    return [*parts, html.shown("Every number", tables["evaluations"])]
