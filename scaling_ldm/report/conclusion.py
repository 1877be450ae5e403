"""What the laws of a study say, in words, and what speaks against them.

A law is called convincing only if nothing speaks against it: enough budgets over a wide
enough range, narrow intervals, and a held-out budget that it predicted. The bounds are
those of a reader's caution, stated here; they change no law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scaling_ldm.records import FitResult, HeldOut, PowerLaw, Refusal
from scaling_ldm.report import format as fmt

FEW_BUDGETS = 4  # a line through three points has one degree of freedom
SHORT_RANGE = 10.0  # largest over smallest budget
# Up to so many epochs, repeated text is nearly as good as new (Muennighoff et al. 2023,
# arXiv 2305.16264, figure 1). The plan already cautions from the second epoch on.
REPEATED_OFTEN = 4.0
WIDE = 0.5  # width of the interval of an exponent of N or D


def said(fit: FitResult, epochs: float = 0.0) -> str:
    """What ten times the compute buys, and where that holds.

    Where no law of N was fitted, it says that nothing follows for larger budgets.

    Args:
      epochs: as in `against`.
    """
    law = fit.laws.get("N_opt")
    if not isinstance(law, PowerLaw):
        return "These runs do not say which size is best at a larger budget."
    factors = " and ".join(
        f"{factor:.2g} times the {what} ({low:.2g} to {high:.2g})"
        for what, factor, low, high in _tenfold(fit)
    )
    line = f"For ten times the compute, the best network takes {factors}."
    if against(fit, epochs):
        return line
    return (
        f"{line} Nothing here speaks against it between {fmt.scientific(law.x_min)} "
        f"and {fmt.scientific(law.x_max)} FLOPs; beyond that it is an extrapolation."
    )


def against(fit: FitResult, epochs: float = 0.0) -> list[str]:
    """Each reason not to trust the laws of a fit; none if there are no laws.

    Args:
      epochs: the most often that a run sees each of its pictures; 0.0: unknown.
    """
    law = fit.laws.get("N_opt")
    if not isinstance(law, PowerLaw):
        return []
    reasons = list(_against(fit, law))
    if epochs > REPEATED_OFTEN:
        reasons.append(
            f"runs see their pictures up to {epochs:.3g} times, so it holds for "
            "repeated data"
        )
    return reasons


def _tenfold(fit: FitResult) -> Iterator[tuple[str, float, float, float]]:
    """(what, factor, low, high) of N and D for ten times the compute."""
    for quantity, what in (("N_opt", "parameters"), ("D_opt", "tokens")):
        law = fit.laws.get(quantity)
        if isinstance(law, PowerLaw):
            i = law.exponent_interval
            yield what, 10**law.exponent, 10**i.low, 10**i.high


def _against(fit: FitResult, law: PowerLaw) -> Iterator[str]:
    if law.points < FEW_BUDGETS:
        yield f"it rests on {law.points} budgets"
    if law.x_max < SHORT_RANGE * law.x_min:
        yield f"its budgets span a factor of {law.x_max / law.x_min:.2g}"
    for what, _, low, high in _tenfold(fit):
        if low <= 1 <= high:
            yield f"it may be that the {what} do not grow at all"
        if math.log10(high / low) > WIDE:
            yield f"the interval for {what} is wide"
    checks = [h for h in fit.held_out if isinstance(h, HeldOut)]
    if outside := [h for h in checks if not h.inside]:
        named = ", ".join(fmt.SYMBOLS[h.quantity] for h in outside)
        yield f"it did not predict {named} of the budget that was held out"
    if not checks:
        yield "no budget was held out to check it"
    lost = sum(isinstance(p, Refusal) for p in fit.parabolas)
    if lost:
        yield f"{lost} of {len(fit.parabolas)} budgets have no minimum of their own"
    if fit.notes:
        yield f"the fit has {len(fit.notes)} doubt{'s' * (len(fit.notes) > 1)} (below)"
