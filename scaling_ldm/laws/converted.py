"""Published laws in one convention: C in training FLOPs, N in parameters, D in tokens.

A surface L(N, D) becomes N_opt(C) and D_opt(C) by C = 6 N D (Hoffmann et al. 2022,
Eq. 4). What cannot be converted is refused: a coefficient or a unit that is not known,
a D that leaves out the text tokens, and a loss, which is that of other data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from scaling_ldm.laws.published import PublishedLaw, published
from scaling_ldm.records import Refusal

QUANTITIES = ("N_opt", "D_opt", "L_opt")
ALL = "all"  # every study that has a law
_EVERY_TOKEN = ("all", "image and text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedStudy:
    """What one publication says of the best size and tokens of a budget."""

    study: str
    source: str
    subject: str
    estimator: str
    model: str
    counts: str
    domain: tuple[float, float] | None  # FLOPs of the fit; None: not known
    # "N_opt", "D_opt" and "L_opt" -> a function of FLOPs, or why there is none.
    laws: Mapping[str, Callable[[float], float] | Refusal]

    @property
    def usable(self) -> bool:
        """Whether it says a size."""
        return not isinstance(self.laws["N_opt"], Refusal)


def studies() -> dict[str, list[PublishedLaw]]:
    """The published laws by study, in the order of the file."""
    found: dict[str, list[PublishedLaw]] = {}
    for law in published().values():
        found.setdefault(law.study, []).append(law)
    return found


def named(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """(known studies, unknown names) of names of studies; "all" is every study."""
    known, unknown, every = [], [], studies()
    for name in given:
        if name == ALL:
            known += every
        else:
            (known if name in every else unknown).append(name)
    return list(dict.fromkeys(known)), unknown


def converted(study: str) -> ConvertedStudy:
    """The laws of a study, converted; a KeyError for an unknown one."""
    laws = studies()[study]
    first = laws[0]
    domains = [law.domain for law in laws if law.domain]
    return ConvertedStudy(
        study=study,
        source=first.source,
        subject=first.subject,
        estimator=first.estimator,
        model=first.model,
        counts=first.counts,
        domain=domains[0] if domains else None,
        laws={q: _quantity(laws, q) for q in QUANTITIES},
    )


def _quantity(
    laws: list[PublishedLaw], quantity: str
) -> Callable[[float], float] | Refusal:
    """One quantity of a study as a function of FLOPs, or why it cannot be."""

    def refuse(reason: str, detail: str = "") -> Refusal:
        return Refusal(quantity=quantity, reason=reason, detail=detail)

    own = [law for law in laws if law.quantity == quantity]
    surface = [law for law in laws if law.form == "surface"]
    if quantity == "L_opt":
        losses = [law.output_unit for law in own] or ["loss" for _ in surface]
        if not losses:
            return refuse("no law of it was published")
        return refuse("its loss is another one", f"{losses[0]} of its own data")
    if surface and not surface[0].input_scale:
        return refuse("its units are not known")
    if surface:
        return _of_surface(surface[0], quantity)
    if not own:
        others = ", ".join(sorted({law.quantity for law in laws}))
        return refuse("no law of it was published", f"there is one of {others}")
    (law,) = own
    if not (law.input_scale and law.output_scale):
        return refuse("its units are not known", law.output_unit)
    if None in law.constants.values():
        return refuse("its coefficient was not published", "the exponent alone")
    if quantity == "D_opt" and law.tokens not in _EVERY_TOKEN:
        return refuse(
            "its D counts other tokens", f"{law.output_unit}, without those of text"
        )
    return law


def _of_surface(law: PublishedLaw, quantity: str) -> Callable[[float], float]:
    c = {k: v for k, v in law.constants.items() if v is not None}
    alpha, beta = c["alpha"], c["beta"]
    scale = (alpha * c["A"] / (beta * c["B"])) ** (1 / (alpha + beta))

    def n_opt(flops: float) -> float:
        return scale * (flops / 6) ** (beta / (alpha + beta))

    if quantity == "N_opt":
        return n_opt
    return lambda flops: flops / (6 * n_opt(flops))
