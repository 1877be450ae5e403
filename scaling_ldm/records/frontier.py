"""Quality against the cost of sampling: cells, fronts, crossings, advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from scaling_ldm.records.laws import Interval, Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of sampling one model: what it costs, and how it was measured.

    The value is a row of the table of measurements; `MeasuredCell` has both.

    `protocol` says how the metric was measured: feature network, resize, reference,
    count of images. Cells may be compared only where it is the same. The model,
    sampler, steps and guidance are what is compared, so they are no part of it.
    """

    model: str  # the run's id
    label: str  # e.g. "83M"
    params: int
    relative_cost: float  # cost of one evaluation; the reference model's is 1
    sampler: str
    steps: int
    guidance: float
    nfe: float  # evaluations an image, guidance counted
    flops: float  # an image: the denoiser's, guidance counted
    decoder_flops: float  # an image; 0 without a decoder
    seconds: float  # an image, as measured
    metric: str  # e.g. "fd_lite0"; lower is better
    deviations: tuple[float, ...]  # bootstrap values less the value; may be empty
    protocol: str
    images: int
    memory_bytes: int | None = None  # to sample one image; None: not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredCell(Cell):
    """A cell with its value, as `read_frontier` puts them together.

    Files written before 0.2.0 hold both in one record.
    """

    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The cell of the lowest value among several.

    The lowest of several noisy values is too low on average. `expected` and `interval`
    predict a new measurement of the chosen cell (see `frontier.cells`). So `value` may
    lie outside `interval`. `probability` is that of this exact cell, with its steps and
    guidance, not that of its model size.
    """

    model: str
    label: str
    params: int
    sampler: str
    steps: int
    guidance: float
    cost: float  # in the unit of the question
    value: float  # as measured
    expected: float  # corrected for luck in the choice; `value` without replicates
    interval: Interval | None  # None without replicates
    probability: float | None  # share of the bootstrap draws that choose this cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestGuidance:
    """The guidance of the lowest value at one model, sampler and step count."""

    choice: Choice  # its cost is relative cost x steps
    tried: tuple[float, ...]  # ascending
    ties: tuple[float, ...]  # others that do not differ from it at the level
    # Whether the best is the lowest ("low"), the highest ("high") or the only ("only")
    # guidance that was tried. A better one may then lie outside. "": it lies between.
    edge: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """The best choice within one budget."""

    budget: float
    choice: Choice
    probabilities: Mapping[str, float]  # by model, of being the best; empty: unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """The Pareto-optimal settings, and the best choice at each budget."""

    cost: str  # "relative_cost_steps" | "flops" | "seconds"
    sampler: str  # "": all of them together
    pareto: tuple[Choice, ...]  # by cost
    points: tuple[FrontPoint, ...]  # by budget, on a logarithmic grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """The cost from which the larger of two neighbouring sizes is the better one."""

    smaller: str  # label
    larger: str
    cost: str  # as in `Front`
    sampler: str
    at: float
    interval: Interval | None  # None without replicates
    doubt: str  # empty, or why to be careful


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What to run within a budget, and what to expect of it."""

    choice: Choice  # its cost is in `unit`
    metric: str
    unit: str
    budget: float
    estimated: bool  # whether the cost was computed for a device, not measured on it
    basis: str  # how the cost was measured or computed
    doubts: tuple[str, ...] = ()  # what speaks against the choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Quality against the cost of sampling, over models, samplers, steps, guidance.

    In a file the cells have no values: `read_frontier` adds those of the table.
    """

    metric: str
    protocols: tuple[str, ...]  # one, unless more were allowed by name
    reference: str  # the model whose evaluation costs 1
    device: str  # where seconds were measured
    cells: tuple[Cell, ...]
    best: tuple[BestGuidance, ...]
    fronts: tuple[Front, ...]
    crossings: tuple[Crossing | Refusal, ...]
    sentences: tuple[str, ...]
    level: float
    bootstrap: int
    seed: int
    notes: tuple[str, ...]
