"""Measures the losses of a run during its training and writes them to its table.

The rows of a step are on the disk before a checkpoint of that step or of a later one is
begun. So a run that continues from a step has all rows up to it. Rows of later steps,
and those of the end, are removed and written again by the same computation. So a run
that was killed and continued ends with the same file as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scaling_ldm import config, records
from scaling_ldm.diffusion.losses import validation
from scaling_ldm.records import measurements, table
from scaling_ldm.training import held_out, progress, train_step
from scaling_ldm.training.run_files import RunFiles


class RunTable:
    """What measures the weights of a run and writes the rows.

    Args:
      experiment: with the run's overrides.
      files: of the run; None in a process that does not write.
      compiled: the functions of the run's size.
      batches: the validation set.
      step: training continues from it.
      marks: the steps at which the run is measured.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        spec: records.RunSpec,
        files: RunFiles | None,
        compiled: train_step.CompiledFunctions,
        batches: Sequence[held_out.HeldOutBatch],
        step: int,
        marks: Sequence[int] = (),
    ) -> None:
        self._spec, self._compiled, self._batches = spec, compiled, batches
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

    def measure(self, step: int, state: train_step.TrainState) -> dict[str, float]:
        """Measures the weights after a step and writes the rows.

        All processes measure. A loss that is not finite is a row like any other.

        Returns:
          Name of the weights -> the loss.

        Raises:
          OSError: the rows cannot be written; what is saved is untouched.
        """
        rows: list[records.Measurement] = []
        found = {}
        for weights, params in {config.RAW: state.params, **state.averages}.items():
            losses = held_out.losses(self._compiled, params, self._batches)
            found[weights] = float(np.mean(losses))
            rows.append(self._row(step, measurements.LOSS, found[weights], weights))
            for number, value in self._strata(losses).items():
                metric = measurements.stratum(number)
                rows.append(self._row(step, metric, value, weights))
        smoothed = float(state.smoothed_loss)
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
