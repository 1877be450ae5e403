"""Measures the losses of runs during their training and writes them to their tables.

The rows of a step are on the disk before a checkpoint of that step or of a later one is
begun. So a run that continues from a step has all rows up to it. Rows of later steps,
and those of the end, are removed and written again by the same computation. So a run
that was killed and continued ends with the same file as one that was not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.diffusion.losses import validation
from scaling_ldm.records import measurements, table
from scaling_ldm.training import held_out, progress, train_step
from scaling_ldm.training.run_files import RunFiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The losses of the weights of a run.

    losses: name of the weights -> that of each validation picture, float64 [samples].
    smoothed: the smoothed training loss.
    """

    losses: Mapping[str, np.ndarray]
    smoothed: float


def of_state(
    compiled: train_step.CompiledFunctions,
    batches: Sequence[held_out.HeldOutBatch],
    state: train_step.TrainState,
) -> list[Measured]:
    """Measures all weights of a state, of each of its runs in the order of their slots.

    All processes measure. A state without an axis of runs is that of one.

    Args:
      batches: the validation set.
    """
    weights = {config.RAW: state.params, **state.averages}
    losses = {
        name: np.atleast_2d(held_out.losses(compiled, params, batches))
        for name, params in weights.items()
    }
    smoothed = np.atleast_1d(np.asarray(state.smoothed_loss))
    return [
        Measured(
            losses={name: found[slot] for name, found in losses.items()},
            smoothed=float(value),
        )
        for slot, value in enumerate(smoothed)
    ]


class RunTable:
    """What writes the rows of a run.

    Args:
      experiment: with the run's overrides.
      files: of the run; None in a process that does not write.
      step: training continues from it.
      marks: the steps at which the run is measured.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        spec: records.RunSpec,
        files: RunFiles | None,
        step: int,
        marks: Sequence[int] = (),
    ) -> None:
        self._spec = spec
        cfg, shown = experiment.validation, records.to_json(experiment)
        self._protocols = {
            metric: table.loss_protocol_hash(metric, shown, {})
            for metric in (measurements.LOSS, measurements.TRAIN_LOSS)
        }
        # An autoencoder reads no time, so it has no strata.
        self._bins: np.ndarray | None = None
        if experiment.objective_kind != "reconstruction":
            self._bins = validation.bins_of_times(
                cfg.samples, measurements.STRATA, seed=cfg.seed
            )
        self._path = None
        if files is not None:
            self._path = files.measurements
            kept = min(step, spec.steps - 1)
            if table.drop_rows(self._path, kept):
                progress.say(
                    f"the last line of {spec.run_id}'s {table.FILE} was cut off and is "
                    f"dropped; everything after step {kept} is measured again"
                )
            self._say_what_is_gone([mark for mark in marks if mark <= kept])

    def _say_what_is_gone(self, passed: Sequence[int]) -> None:
        """Names the marks that a run has passed and whose losses are not in its file.

        It was damaged or removed, or the plan has got smaller budgets since.
        """
        there = set()
        if self._path is not None and self._path.is_file():
            rows, _ = table.read_rows(self._path)
            last = measurements.TRAIN_LOSS  # of the rows that a step writes at once
            there = {row.step for row in rows if row.metric == last}
        if gone := [mark for mark in passed if mark not in there]:
            steps = ", ".join(map(str, gone))
            progress.say(
                f"{self._path} has no losses of steps that {self._spec.run_id} has "
                f"passed ({steps}), and they are not measured again: put a copy back, "
                "or remove the run's checkpoints to train it from the beginning"
            )

    def write(self, step: int, measured: Measured) -> dict[str, float]:
        """Writes the rows of the weights after a step.

        A loss that is not finite is a row like any other.

        Returns:
          Name of the weights -> the loss.

        Raises:
          OSError: the rows cannot be written; what is saved is untouched.
        """
        rows: list[records.Measurement] = []
        found = {}
        for weights, losses in measured.losses.items():
            found[weights] = float(np.mean(losses))
            rows.append(self._row(step, measurements.LOSS, found[weights], weights))
            for number, value in self._strata(losses).items():
                metric = measurements.stratum(number)
                rows.append(self._row(step, metric, value, weights))
        smoothed = measured.smoothed
        rows.append(self._row(step, measurements.TRAIN_LOSS, smoothed, config.RAW))
        if self._path is not None:
            table.append_rows(self._path, rows)
        return found

    def _strata(self, losses: np.ndarray) -> dict[int, float]:
        """Number of a tenth of the distribution of t -> the mean loss in it.

        Few samples leave some of them empty; these are not there.
        """
        if self._bins is None:
            return {}
        return {
            int(number): float(np.mean(losses[self._bins == number]))
            for number in np.unique(self._bins)
        }

    def _row(
        self, step: int, metric: str, value: float, weights: str
    ) -> records.Measurement:
        training = metric == measurements.TRAIN_LOSS
        name = measurements.TRAIN_LOSS if training else measurements.LOSS
        return measurements.measurement(
            self._spec,
            step=step,
            metric=metric,
            value=value,
            weights=weights,
            protocol_hash=self._protocols[name],
        )
