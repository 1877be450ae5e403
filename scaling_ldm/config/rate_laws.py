"""Published laws of the learning rate, as data: rate = coef N^b D^c B^d."""

from __future__ import annotations

import dataclasses

from scaling_ldm.config import fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateConstants:
    """A law in parameters without embeddings, training tokens, and batch size.

    source, of: where it is printed, and which models it was measured on.
    coef: None: the source has none that means anything for other models.
    params, tokens, batch_size: the exponents.
    """

    source: str
    of: str
    coef: float | None
    params: float
    tokens: float
    batch_size: float


# The names, but for "none" and "own", are those of RATE_LAWS in names.py.
PUBLISHED: dict[str, RateConstants] = {
    # As the paper prints it. The best batch is a law of its own, 0.58 D^0.571 tokens.
    "step_law": RateConstants(
        source="Li et al. 2025, Predictable Scale: Part I, arXiv 2503.04715",
        of="language models",
        coef=1.79,
        params=-0.713,
        tokens=0.307,
        batch_size=0.0,
    ),
    # A correction for the batch and the length of a run: sqrt(B / B0) (D0 / D)^0.3.
    "marin": RateConstants(
        source="marin-community/marin, Complete(d) AdamH heuristic of its "
        "mixture-of-experts runs, 2026; for an optimizer that keeps the weights' norms",
        of="language models",
        coef=None,
        params=0.0,
        tokens=-0.3,
        batch_size=0.5,
    ),
}


def chosen(cfg: fields.OptimizerConfig) -> RateConstants | None:
    """The law of an experiment; None: there is none."""
    if cfg.rate_law == "none":
        return None
    if cfg.rate_law != "own":
        return PUBLISHED[cfg.rate_law]
    coef, params, tokens, batch_size = cfg.rate_law_constants
    return RateConstants(
        source="config.optimizer.rate_law_constants",
        of="",
        coef=coef,
        params=params,
        tokens=tokens,
        batch_size=batch_size,
    )


def rate(
    cfg: fields.OptimizerConfig, params: float, tokens: float, batch_size: float
) -> float:
    """The peak of the rate by the law, at the base width; without a law, as given.

    With `cfg.rate_law_at` the law is that of ratios, and the rate there is
    `cfg.learning_rate`.
    """
    law = chosen(cfg)
    if law is None:
        return cfg.learning_rate
    at = cfg.rate_law_at or (1.0, 1.0, 1.0)
    first = cfg.learning_rate if cfg.rate_law_at else law.coef
    if first is None:
        raise ValueError(f"{cfg.rate_law} has no coefficient")
    exponents = law.params, law.tokens, law.batch_size
    run = params, tokens, batch_size
    for now, then, exponent in zip(run, at, exponents, strict=True):
        first *= (now / then) ** exponent
    return first


def problems_of(cfg: fields.OptimizerConfig) -> list[str]:
    """What contradicts a law of the rate."""
    name, found = f"config.optimizer.rate_law = {cfg.rate_law!r}", []
    own, at = cfg.rate_law_constants, cfg.rate_law_at
    if cfg.rate_law == "own" and (len(own) != 4 or not own[0] > 0):
        return [
            f"{name} needs config.optimizer.rate_law_constants = (a, b, c, d) of "
            f"rate = a N^b D^c B^d with a > 0, given {own}"
        ]
    if at and (len(at) != 3 or not min(at) > 0):
        return [
            f"config.optimizer.rate_law_at = {at}: must be () or three positive "
            "numbers, (parameters without embeddings, tokens, batch size)"
        ]
    if cfg.rate_law not in ("own", *PUBLISHED):
        return []
    law = chosen(cfg)
    if law is None:
        return []
    if law.coef is None and not at:
        found.append(
            f"{name} has no coefficient: give config.optimizer.rate_law_at, where "
            "config.optimizer.learning_rate is the rate"
        )
    if not at and cfg.learning_rate != fields.OptimizerConfig.learning_rate:
        found.append(
            f"config.optimizer.learning_rate = {cfg.learning_rate} is not read by "
            f"{name}; give config.optimizer.rate_law_at, where it is the rate"
        )
    if law.params and cfg.learning_rate_policy != "fixed":
        found.append(
            f"{name} and config.optimizer.learning_rate_policy = "
            f"{cfg.learning_rate_policy!r} both change the rate with the size"
        )
    return found
