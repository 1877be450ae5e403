"""What a run has cost so far, as its log and its record say it."""

from __future__ import annotations

from typing import Any

import jax

from scaling_ldm import config, records
from scaling_ldm.flops import peaks
from scaling_ldm.training import mesh, progress


class RunCosts:
    """The costs of one run on a mesh.

    Args:
      experiment: with the run's overrides.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        spec: records.RunSpec,
        device_mesh: jax.sharding.Mesh,
    ) -> None:
        self._experiment, self._spec, self._mesh = experiment, spec, device_mesh

    def so_far(self, step: int, speed: float, seconds: float) -> dict[str, Any]:
        """What a line of the log says of the steps up to one.

        Args:
          speed: model FLOPs a second of this process.
          seconds: wall time of the run, all restarts together.
        """
        spec = self._spec
        return {
            "flops": step * spec.flops_per_step,
            "hardware_flops": step * spec.hardware_flops_per_step,
            "six_nd": self._six_nd(step),
            "images": step * spec.batch_size,
            "tokens": step * spec.tokens // spec.steps,
            "flops_per_second": speed,
            "mfu": self._mfu(speed)[0],
            "seconds": seconds,
        }

    def _six_nd(self, steps: int) -> float:
        """6 x parameters x tokens, the common estimate of training FLOPs."""
        spec = self._spec
        return 6.0 * spec.params_without_embeddings * spec.tokens * steps / spec.steps

    def _mfu(self, flops_per_second: float) -> tuple[float | None, str]:
        """The share of the devices' peak, or None and the reason."""
        device = self._mesh.devices.flat[0]
        return peaks.mfu(
            flops_per_second,
            device.device_kind,
            mesh.devices_of_run(self._mesh),
            self._experiment.model.compute_dtype,
        )

    def record(
        self,
        clock: progress.RunClock,
        restarts: int,
        steps: int,
        *,
        failure: str,
        shared: int = 0,
    ) -> records.TrainRecord:
        """The record of a run that ended after `steps` steps.

        Args:
          shared: the steps that were taken over from another run.
        """
        spec = self._spec
        speed = clock.steps_per_second() * spec.flops_per_step
        utilisation, reason = self._mfu(speed)
        return records.TrainRecord(
            run_id=spec.run_id,
            study=spec.study,
            status="non_finite_loss" if failure else "finished",
            detail=failure,
            budget_flops=spec.budget_flops,
            flops=float(steps * spec.flops_per_step),
            hardware_flops=float(steps * spec.hardware_flops_per_step),
            six_nd=self._six_nd(steps),
            params=spec.params,
            params_without_embeddings=spec.params_without_embeddings,
            width=spec.width,
            depth=spec.depth,
            steps=steps,
            steps_planned=spec.steps,
            images=steps * spec.batch_size,
            tokens=steps * spec.tokens // spec.steps,
            seconds=clock.seconds(),
            device=self._mesh.devices.flat[0].device_kind,
            devices=mesh.devices_of_run(self._mesh),
            flops_per_second=speed,
            mfu=utilisation,
            mfu_reason=reason,
            restarts=restarts,
            seed=spec.seed,
            learning_rate=spec.learning_rate,
            recipe_hash=spec.recipe_hash,
            pretraining_flops=spec.pretraining_flops,
            shared_steps=shared,
        )
