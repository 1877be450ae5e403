"""The named values that stages hand to one another; standard library only.

Every record is a frozen dataclass that prints itself, becomes one JSON line and is
read back equal. Unknown keys are an error: a file written by a newer version is
refused rather than half understood. Non-finite numbers are written as the strings
"nan", "inf" and "-inf", so that the files stay standard JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO


class Damaged(ValueError):
    """A file of records that is cut off, foreign, or of another version."""


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One planned training run: everything that decides its numbers.

    FLOPs are 2 x multiply-adds, forward + backward, of the whole batch. `tokens`
    counts image, text and time positions that the trunk processes, over the run.
    """

    run_id: str  # a file-system name; identity is in the fields, never parsed from it
    study: str
    budget_flops: float
    planned_flops: float  # steps x flops_per_step, within 1% of the budget
    flops_per_step: int  # model FLOPs, no recomputation
    hardware_flops_per_step: int  # with recomputation (rematerialisation)
    width: int
    depth: int
    heads: int
    params: int
    params_without_embeddings: int  # without the caption vocabulary's embedding table
    batch_size: int
    steps: int
    images: int
    image_tokens: int  # patches, over the run
    text_tokens: int  # text and time positions, over the run
    tokens: int  # image_tokens + text_tokens
    learning_rate: float
    warmup_steps: int
    seed: int
    state_bytes: int  # parameters, EMA, optimizer, gradients; all devices together
    activation_bytes: int  # saved for the backward pass; the whole batch
    memory_bytes_per_device: int  # at `plan.devices` devices
    accelerator: str
    hours: float  # on `plan.devices` x accelerator at `utilisation`
    utilisation: float
    recipe_hash: str  # Experiment.recipe_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """What one training run produced. `status` is finished | non_finite_loss."""

    run_id: str
    study: str
    status: str
    detail: str  # empty, or what ended the run
    budget_flops: float
    flops: float  # model FLOPs spent
    hardware_flops: float
    six_nd: float  # 6 x params_without_embeddings x tokens
    params: int
    params_without_embeddings: int
    width: int
    depth: int
    steps: int
    steps_planned: int
    images: int
    tokens: int
    validation_loss: float  # raw weights, fixed noise, stratified t
    validation_loss_ema: float  # EMA weights, the same samples, noise and t
    train_loss_smoothed: float  # EMA(0.9) over logged training loss (paper B)
    seconds: float  # wall time inside the train loop, summed over restarts
    device: str
    devices: int
    flops_per_second: float
    mfu: float | None  # None when the device's peak is unknown
    mfu_reason: str
    restarts: int
    seed: int
    learning_rate: float
    recipe_hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One batch of generated images: what it cost and how it was made."""

    run_id: str
    checksum: str  # SHA-256 of an export's weights; "" of a run's own checkpoint
    sampler: str
    spacing: str  # of the time grid; "auto" is the sampler's own
    steps: int
    guidance: float
    nfe: int  # network evaluations per image, guidance counted
    flops: float  # for all images: the sampler's, and the decoder's of latents
    seconds: float
    weights: str  # "ema", "raw" or, of a folder from elsewhere, "unknown"
    seed: int
    images: int
    captions: tuple[str, ...]  # of the pictures in images_file
    images_file: str  # .npy uint8 [n, height, width, 3], relative to the workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One number about pictures, and the protocol without which it means nothing."""

    run_id: str
    checksum: str  # SHA-256 of an export's weights; "" of a run's own checkpoint
    step: int  # of the checkpoint; 0 of a folder from elsewhere
    train_flops: float | None  # spent when it was written; None: unknown
    metric: str  # e.g. "fd_lite0"
    value: float
    low: float  # the interval at `level`; the value itself where there is none
    high: float
    level: float
    doubt: str  # why the value may be off by more than the interval says; "": nothing
    images: int
    nfe: int
    flops: float  # of one picture: network and decoder
    protocol: Mapping[str, Any]  # names of evaluate.protocol.PARTS -> values
    protocol_hash: str  # of the protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided interval at `level`, e.g. 0.9."""

    low: float
    high: float
    level: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A question the data cannot answer, and why: the result of an honest fit."""

    what: str  # e.g. "isoFLOP minimum at 1e+11 FLOPs"
    reason: str  # e.g. "vertex outside the grid"
    detail: str  # the numbers behind the reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = a (ln N - ln n_opt)^2 + l_opt at one budget, and its minimum."""

    budget_flops: float
    points: int
    curvature: float  # a > 0
    n_opt: float
    d_opt: float  # tokens at the minimum
    l_opt: float
    n_opt_interval: Interval
    d_opt_interval: Interval
    l_opt_interval: Interval
    rmse: float  # of loss around the parabola: sqrt(RSS / (points - 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coef * x^exponent, fitted in log-log over `points` points.

    `band` rows are (x, low, high): the pointwise prediction band for a newly measured y
    at `exponent_interval.level`, drawn a little beyond the fitted range.
    """

    x_name: str
    y_name: str
    coef: float
    exponent: float
    coef_interval: Interval
    exponent_interval: Interval
    points: int
    x_min: float
    x_max: float
    rmse_log: float  # of ln y around the law: sqrt(RSS / (points - 2))
    band: tuple[tuple[float, float, float], ...]

    def __call__(self, x: float) -> float:
        return self.coef * x**self.exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    intervals: Mapping[str, Interval]  # of the constants and n_opt_exponent
    points: int
    rmse: float  # of loss around the surface: sqrt(RSS / (points - 5))
    n_opt_exponent: float  # beta / (alpha + beta)
    huber_delta: float | None = None  # None: least squares; else log-Huber width

    def __call__(self, n: float, d: float) -> float:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def n_opt(self, budget_flops: float) -> float:
        """The size of least loss under C = 6 N D (Hoffmann et al. 2022, Eq. 4)."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (
            1 / (self.alpha + self.beta)
        )
        return scale * (budget_flops / 6) ** self.n_opt_exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The largest budget, predicted from the smaller ones, beside its measurement."""

    quantity: str  # "N_opt" | "D_opt" | "L_opt"
    budget_flops: float
    predicted: float
    predicted_interval: Interval
    measured: float
    relative_error: float  # predicted / measured - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """Everything one fit says: laws, or the reasons why there is none."""

    metric: str  # which loss was fitted, e.g. "validation_loss_ema"
    size: str  # which N, e.g. "params_without_embeddings"
    parabolas: tuple[Parabola | Refusal, ...]
    laws: Mapping[str, PowerLaw | Refusal]  # "N_opt", "D_opt", "L_opt" against budget
    parametric: Parametric | Refusal
    held_out: tuple[HeldOut | Refusal, ...]
    excluded: tuple[str, ...]  # one line per point left out, with the reason
    bootstrap: int
    seed: int
    notes: tuple[str, ...] = ()  # doubts that are no refusals, a line each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One way of sampling one model, measured: what it costs and what it reaches.

    `protocol` says how the metric was measured (feature network, resize, reference,
    count of images): cells may be compared only where it is the same. What is being
    compared, the model, sampler, steps and guidance, is no part of it.
    """

    model: str  # the run's id
    label: str  # e.g. "83M"
    params: int
    relative_cost: float  # of one evaluation; that of a stated model is 1
    sampler: str
    steps: int
    guidance: float
    nfe: float  # evaluations an image, guidance counted
    flops: float  # an image: the denoiser's, guidance counted
    decoder_flops: float  # an image; 0 without a decoder
    seconds: float  # an image, as measured
    metric: str  # e.g. "fd_lite0"; lower is better
    value: float
    replicates: tuple[float, ...]  # bootstrap values of the metric; may be empty
    protocol: str
    images: int
    memory_bytes: int | None = None  # to sample one image; None: not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The cell of the lowest value among several.

    The lowest of several noisy values is too low on average. `expected` and `interval`
    are for what the chosen cell would measure again: see `scaling_ldm.frontier.cells`;
    `value` may lie outside `interval`. `probability` is of this exact cell, steps and
    guidance counted, not of its size.
    """

    model: str
    label: str
    params: int
    sampler: str
    steps: int
    guidance: float
    cost: float  # in the unit of the question
    value: float  # as measured
    expected: float  # without the luck of the chosen; `value` without replicates
    interval: Interval | None  # None without replicates
    probability: float | None  # share of the bootstrap draws that choose this cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestGuidance:
    """The guidance of the lowest value at one model, sampler and step count."""

    choice: Choice  # its cost is relative cost x steps
    tried: tuple[float, ...]  # ascending
    ties: tuple[float, ...]  # others that cannot be told from the best at the level
    edge: str  # "", or a doubt: the best is the "low" | "high" end, or the "only" one


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """The best that one budget buys."""

    budget: float
    choice: Choice
    probabilities: Mapping[str, float]  # by model, of being the best; empty: unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """Value against cost: what nothing cheaper reaches, and the best of each budget."""

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
    estimated: bool  # the cost was not measured where it will be spent
    basis: str  # how the cost is known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Quality against the cost of sampling, over models, samplers, steps, guidance."""

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


_RECORDS = {
    cls.__name__: cls
    for cls in (
        RunSpec,
        TrainRecord,
        SampleRecord,
        EvalRecord,
        Interval,
        Refusal,
        Parabola,
        PowerLaw,
        Parametric,
        HeldOut,
        FitResult,
        Cell,
        Choice,
        BestGuidance,
        FrontPoint,
        Front,
        Crossing,
        Advice,
        Frontier,
    )
}


def to_json(value: Any) -> Any:
    """Turns a record (or any nesting of them) into plain JSON values.

    A record becomes a dict with its class name under "record".
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return {"record": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
      ValueError: an unknown record name, or fields that are missing or unknown.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "record" not in value:
        return {k: from_json(v) for k, v in value.items()}
    name = value["record"]
    if name not in _RECORDS:
        raise ValueError(
            f"unknown record {name!r}; known: {', '.join(sorted(_RECORDS))}"
        )
    cls = _RECORDS[name]
    given = {k: from_json(v) for k, v in value.items() if k != "record"}
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    if given.keys() != known:
        raise ValueError(
            f"{name}: missing {sorted(known - given.keys())}, "
            f"unknown {sorted(given.keys() - known)}; written by another version?"
        )
    for k, v in given.items():
        if (
            isinstance(v, str)
            and v in _NON_FINITE
            and hints[k] in (float, float | None)
        ):
            given[k] = _NON_FINITE[v]
    return cls(**given)


def dumps(record: Any) -> str:
    """One JSON line, without the newline."""
    return json.dumps(to_json(record), allow_nan=False)


def loads(line: str) -> Any:
    """A record from one JSON line.

    Raises:
      Damaged: it is none.
    """
    try:
        return from_json(json.loads(line))
    except (ValueError, TypeError, KeyError) as e:
        raise Damaged(f"not a record: {e}") from e


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Writes records a line each, atomically: a reader sees the old file or the new."""
    write_text(path, "".join(dumps(r) + "\n" for r in records))


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Reads what `write_jsonl` wrote.

    Raises:
      Damaged: a line that is no record, with file and line number.
    """
    records = []
    text = pathlib.Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(loads(line))
        except Damaged as e:
            raise Damaged(f"{path}:{number}: {e}") from e
    return records


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file of UTF-8; see `write_file`."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: str | os.PathLike, fill: Callable[[BinaryIO], Any]) -> None:
    """Writes a whole file or none: a temporary one is filled, fsynced, renamed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
