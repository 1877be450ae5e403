"""The policies of the learning rate: what a run of another size is trained with.

A policy has a rate for each run, which is data of the compiled step, and factors of
single tensors, which are compiled in; see `width_scaling`. The rate at the base width
may follow a law, see `config.rate_laws`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from scaling_ldm import config
from scaling_ldm.config import rate_laws
from scaling_ldm.training import width_scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """One policy.

    source: where it comes from.
    peak(cfg, rate, width) -> the peak of the rate of a run; `rate` is that at the base
      width.
    tensors: role of a tensor -> the powers of width / policy_width of its factors;
      None: all tensors are trained alike.
    with_depth: whether factors follow depth / policy_depth, too.
    """

    source: str
    peak: Callable[[config.OptimizerConfig, float, int], float]
    tensors: Mapping[str, width_scaling.Powers] | None = None
    with_depth: bool = False


def _as_given(cfg: config.OptimizerConfig, rate: float, width: int) -> float:
    del cfg, width
    return rate


def _by_width(cfg: config.OptimizerConfig, rate: float, width: int) -> float:
    return rate * cfg.policy_width / width


def _measured(cfg: config.OptimizerConfig, rate: float, width: int) -> float:
    del cfg, rate, width
    return math.nan


# The names are those of config.LEARNING_RATE_POLICIES.
POLICIES: dict[str, Policy] = {
    "fixed": Policy(
        source="Liang et al. 2024, arXiv 2410.08184: one rate for all sizes",
        peak=_as_given,
    ),
    "by_width": Policy(
        source="Yang et al. 2022, arXiv 2203.03466: its rate of hidden matrices, here "
        "of all tensors",
        peak=_by_width,
    ),
    "mup": Policy(
        source="Yang et al. 2022, arXiv 2203.03466; of diffusion transformers Zheng et "
        "al. 2025, arXiv 2505.15270",
        peak=_as_given,
        tensors=width_scaling.MUP,
    ),
    "tuned": Policy(
        source="the best rate of each size, measured in another study: "
        "config.optimizer.tuned_from",
        peak=_measured,
    ),
    "completep": Policy(
        source="Dey et al. 2025, arXiv 2505.01618, with alpha = 1",
        peak=_as_given,
        tensors=width_scaling.MUP,
        with_depth=True,
    ),
}


def peak_learning_rate(
    cfg: config.OptimizerConfig, width: int, run: tuple[float, float, float]
) -> float:
    """The peak of the rate of a run, by the named law and policy.

    Of the policy "tuned" it is not a number: the stage plan reads it from measurements.

    Args:
      run: its parameters without embeddings, tokens and batch size.
    """
    rate = rate_laws.rate(cfg, *run)
    return POLICIES[cfg.learning_rate_policy].peak(cfg, rate, width)


def compiled_part(cfg: config.OptimizerConfig) -> config.OptimizerConfig:
    """Without what decides a run's rate alone; the rate is infinite."""
    return dataclasses.replace(
        cfg,
        learning_rate=math.inf,
        rate_law="none",
        rate_law_constants=(),
        rate_law_at=(),
        tuned_from="",
        tuned_group="",
        tuned_budget=0.0,
        tuned_sizes="measured",
        tuned_digest="",
    )


def scaling(
    experiment: config.Experiment, width: int, depth: int
) -> width_scaling.Scaling | None:
    """The factors of the tensors of one size; None where all of them are 1."""
    policy = POLICIES[experiment.optimizer.learning_rate_policy]
    if policy.tensors is None:
        return None
    return width_scaling.of_network(
        experiment, width, depth, policy.tensors, policy.with_depth
    )
