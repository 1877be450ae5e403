"""Published laws as data: `published.json`, each with its source and reliability."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedLaw:
    """A law as a paper prints it. It is called in FLOPs, parameters and tokens.

    `form` is "power", (coef (C / input_scale)^exponent + offset) x output_scale,
    "surface", E + A / N^alpha + B / D^beta, or "product", coef D^tokens N^params. A
    constant that was never published, or whose unit is not known, is None; then the law
    cannot be called.
    """

    key: str
    study: str  # laws of one data set, network and estimator have the same
    headline: bool  # whether its source recommends this estimate
    subject: str  # e.g. "text to image"
    source: str
    quantity: str
    model: str
    estimator: str  # how the minima were found
    counts: str  # what C, N and D are
    tokens: str  # what D counts: "all" | "image and text" | "image" | "unknown"
    form: str
    constants: Mapping[str, float | None]
    input_unit: str  # unit in the printed law
    output_unit: str
    input_scale: float | None  # printed unit of the input in FLOPs
    output_scale: float | None
    domain: tuple[float, float] | None  # FLOPs over which it was fitted
    reliability: str  # "paper" | "quoted" | "digest": how its numbers were obtained
    note: str

    def __call__(self, *inputs: float) -> float:
        """y(C) for a power law, L(N, D) for a surface, y(N, D) for a product.

        Raises:
          ValueError: a constant or unit is not known.
        """
        c = {k: v for k, v in self.constants.items() if v is not None}
        unknown = [k for k in self.constants if k not in c]
        if unknown or self.input_scale is None or self.output_scale is None:
            raise ValueError(
                f"{self.key} cannot be evaluated: "
                f"{', '.join(unknown) or 'its unit'} not known. {self.note}"
            )
        if self.form == "surface":
            n, d = inputs
            return c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]
        if self.form == "product":
            n, d = inputs
            y = c["coef"] * d ** c["tokens"] * n ** c["params"]
            return y * self.output_scale
        (flops,) = inputs
        y = c["coef"] * (flops / self.input_scale) ** c["exponent"]
        return (y + c.get("offset", 0.0)) * self.output_scale


@functools.cache
def published() -> Mapping[str, PublishedLaw]:
    """The published laws by key, from `published.json` beside this file."""
    text = (
        importlib.resources.files("scaling_ldm.laws")
        .joinpath("published.json")
        .read_text(encoding="utf-8")
    )
    laws = {}
    for row in json.loads(text)["laws"]:
        domain = row.pop("domain")
        law = PublishedLaw(domain=tuple(domain) if domain else None, **row)
        laws[law.key] = law
    return laws
