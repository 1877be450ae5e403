"""What plan, train, generate and evaluate record about a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One planned training run, with all that decides its numbers.

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
    state_bytes: int  # parameters, averages, optimizer, gradients; all devices
    activation_bytes: int  # saved for the backward pass; all rows of one pass
    memory_bytes_per_device: int  # of a step, at `plan.devices` devices
    accelerator: str
    hours: float  # of steps, on `plan.devices` x accelerator at `utilisation`
    utilisation: float
    recipe_hash: str  # Experiment.recipe_hash, with the overrides
    # The run's value of each axis of the study: "section.field" -> value.
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    group: str = ""  # the values that it shares with the runs it is fitted with
    # Spent on the weights that it starts from, beside its own; None: unknown.
    pretraining_flops: float | None = 0.0
    # Of a trajectory (plan.reuse): the smaller budgets that it is measured at, too.
    smaller_budgets: tuple[float, ...] = ()
    trunk: str = ""  # of a decay branch (plan.reuse): the run of the largest budget
    trunk_steps: int = 0  # all of the trunk's
    shared_steps: int = 0  # of a decay branch: its first steps, which the trunk takes
    branch_steps: tuple[int, ...] = ()  # of a trunk: where other runs leave it
    # Where the rate of the policy "tuned" is from; "": another policy.
    rate_source: str = ""

    def points(self) -> tuple[RunSpec, ...]:
        """The separate runs that this one stands for, ascending; the last is itself.

        They have this run's run_id. All else is as a run of that budget would have it.
        """
        return (*map(self._shorter, self.smaller_budgets), self)

    @property
    def own_share(self) -> float:
        """The share of the steps that are not taken over from the trunk."""
        return 1 - self.shared_steps / self.steps

    def budget_at(self, step: int) -> float:
        """The budget that a step stands for; that of the run where it is no other's."""
        ends = {point.steps: point.budget_flops for point in self.points()}
        return ends.get(step, self.budget_flops)

    def _shorter(self, budget: float) -> RunSpec:
        steps = steps_of(budget, self.flops_per_step)
        names = "images", "image_tokens", "text_tokens", "tokens"
        return dataclasses.replace(
            self,
            budget_flops=budget,
            planned_flops=float(steps * self.flops_per_step),
            steps=steps,
            hours=self.hours * (steps / self.steps),
            smaller_budgets=(),
            **{name: getattr(self, name) * steps // self.steps for name in names},
        )


def steps_of(budget: float, flops_per_step: int) -> int:
    """The whole number of steps whose FLOPs are nearest to a budget; at least 1."""
    return max(round(budget / flops_per_step), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """How one training run went; `status` is finished | non_finite_loss.

    What it measured are rows of the table of measurements.
    """

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
    # Wall time in the train loop with compilation, summed over restarts.
    seconds: float
    device: str
    devices: int
    flops_per_second: float
    mfu: float | None  # None when the device's peak is unknown
    mfu_reason: str
    restarts: int
    seed: int
    learning_rate: float
    recipe_hash: str
    # Spent on the weights that it started from, beside `flops`; None: unknown.
    pretraining_flops: float | None = 0.0
    # Of `steps`, those that another run had taken (plan.reuse). All of what is counted
    # above, but for the seconds, is with them.
    shared_steps: int = 0

    @property
    def own_share(self) -> float:
        """The share of the steps that this run has taken itself."""
        return 1 - self.shared_steps / max(self.steps, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One batch of generated images: what it cost and how it was made."""

    run_id: str
    checksum: str  # SHA-256 of an export's weights; "": a run's own checkpoint
    sampler: str
    spacing: str  # spacing of the time grid; "auto": the sampler's own
    steps: int
    guidance: float
    nfe: int  # network evaluations per image, guidance counted
    flops: float  # for all images: the sampler's, and the decoder's of latents
    seconds: float
    weights: str  # "raw" or an average's name; "unknown" where a folder does not say
    seed: int
    images: int
    captions: tuple[str, ...]  # captions of the pictures in images_file
    images_file: str  # .npy uint8 [n, height, width, 3], relative to the workdir
    # config.generate.captions, which the pictures have in turn; (): held-out captions.
    own_captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()  # of the same pictures; (): the network reads none
    # The held-out pictures of the same captions, as images_file; "": there are none.
    real_file: str = ""

    def titles(self) -> list[str]:
        """What a picture was asked for: its caption, or its label if that is empty."""
        labels = [f"label {label}" for label in self.labels]
        labels += [""] * (len(self.captions) - len(labels))
        return [
            caption.strip() or label
            for caption, label in zip(self.captions, labels, strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """How a number about a model was measured; the number is a row of the table.

    `Evaluation` has both.
    """

    run_id: str
    checksum: str  # SHA-256 of an export's weights; "": a run's own checkpoint
    step: int  # step of the checkpoint; 0 for weights from a folder
    train_flops: float | None  # spent when it was written; None: unknown
    metric: str  # e.g. "fd_lite0"
    doubt: str  # why the value may be off by more than the interval; "": no doubt
    images: int
    nfe: int
    flops: float  # FLOPs of one picture: network and decoder
    protocol: Mapping[str, Any]  # names of evaluate.protocol.PARTS -> values
    protocol_hash: str  # digest of the protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(EvalRecord):
    """An EvalRecord with its number, as `read_evaluations` puts them together.

    Files written before 0.2.0 hold both in one record.
    """

    value: float
    low: float  # the interval at `level`; the value itself where there is none
    high: float
    level: float


def epochs(
    images: int, shares: Mapping[str, float], pictures: Mapping[str, int]
) -> float:
    """How often a run sees each picture; of a mix, each of the part seen most often.

    Args:
      images: that the run sees.
      shares: of each part in any unit; {"": 1.0} without a mix.
      pictures: of each part that has a number of them.

    Returns:
      0.0 if none has one: they are painted as they are read.
    """
    whole = sum(shares.values())
    return max(
        (
            images * share / whole / pictures[name]
            for name, share in shares.items()
            if pictures.get(name)
        ),
        default=0.0,
    )
