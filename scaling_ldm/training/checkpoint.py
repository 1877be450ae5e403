"""State, data position and RunSpec on disk as one checkpoint; the only user of orbax.

A checkpoint is an orbax composite of the sharded train state and a small JSON document
(data iterator state, RunSpec, clock, checksum of the state, digest of the rest). It
counts only when orbax has committed it and what is read back has the checksum and the
digest that it was saved with: anything else is passed over for the one before, with a
line that says so.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from scaling_ldm import records
from scaling_ldm.records.errors import CheckpointError
from scaling_ldm.training import mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeState:
    """What a run needs besides arrays to go on exactly where it was."""

    data: dict[str, Any]  # the grain iterator's state
    seconds: float  # train-loop wall time so far
    restarts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    step: int
    state: Any
    progress: ResumeState


def checksum(tree: Any) -> int:
    """A hash of all bits and where they are, 32 bits: the same on every mesh.

    Every word is mixed with its leaf and its place in it (murmur3's finaliser), then
    all are added modulo 2^32, in any order.
    """
    sums = [
        _leaf_sum(leaf, np.uint32(i * 0x9E3779B1 % 2**32))
        for i, leaf in enumerate(jax.tree.leaves(tree))
    ]
    return sum(int(s) for s in jax.device_get(sums)) % 2**32


@jax.jit
def _leaf_sum(leaf: jax.Array, salt: jax.Array) -> jax.Array:
    """Of one array: leaves of one shape share what is compiled."""
    width = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
    sharding = jax.typeof(words).sharding
    sharding = None if sharding.mesh.empty else sharding
    words ^= salt
    for axis in range(words.ndim):
        words = words * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(
            jnp.uint32, words.shape, axis, out_sharding=sharding
        )
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def _hush_abandoned_writes() -> None:
    """Keeps one failed write from printing a traceback for every other array.

    When one array cannot be written, orbax closes the event loop that the others report
    to; each then raises where nobody can catch it, and Python prints it. The failure
    itself is raised as ever. Installed once, for the process; all else passes through.
    """
    before = sys.unraisablehook
    if getattr(before, "hushes_abandoned_writes", False):
        return

    def hook(unraisable: sys.UnraisableHookArgs, /) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
        before(unraisable)

    hook.hushes_abandoned_writes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: made when missing; shared by all processes.
      spec: the run they belong to; another run's checkpoint is an error.
      keep: how many of the latest to keep.
      say: where lines for the user go.
      always: steps whose checkpoints are never removed.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        spec: records.RunSpec,
        keep: int,
        say: Callable[[str], None] = print,
        always: Collection[int] = (),
    ) -> None:
        self._directory = directory.resolve()
        self._spec = spec
        self._kept = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), policies.CustomSteps(sorted(always))]
        )
        self._say = say
        self._tell_unfinished()
        _hush_abandoned_writes()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                save_decision_policy=policies.FixedIntervalPolicy(1),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def _tell_unfinished(self) -> None:
        """Says which writes were cut off; orbax clears them away."""
        for path in sorted(self._directory.glob(f"*{TMP_DIR_SUFFIX}*")):
            self._say(
                f"checkpoint {path.name.split('.')[0]} of {self._spec.run_id} is "
                "unfinished: passed over for the one before"
            )

    def save(self, step: int, state: Any, progress: ResumeState) -> None:
        """Starts writing the state after `step` steps; returns before it is on disk.

        Raises:
          CheckpointError: this or the previous write failed (disk full, say). The
            checkpoints that were complete before are untouched.
        """
        meta = {
            "spec": records.to_json(self._spec),
            "progress": dataclasses.asdict(progress),
            "processes": jax.process_count(),
            "checksum": checksum(state),
        }
        meta["digest"] = records.digest(meta)
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )
            if not saved:
                raise ValueError(f"later ones exist: {self._manager.all_steps()}")
        except Exception as e:  # orbax raises many kinds; all mean: not saved
            raise self._failed(step, e) from e

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          CheckpointError: a write failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as e:  # as above
            raise self._failed("the last", e) from e

    def _failed(self, step: Any, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self._directory).free / 2**20
        cause = str(error).strip().splitlines()[0][:300]
        return CheckpointError(
            f"could not write checkpoint {step} of {self._spec.run_id} to "
            f"{self._directory} ({free:.0f} MiB free there): {cause}\n"
            "Complete checkpoints are untouched. Make room, then run the same command "
            "to continue from the latest of them."
        )

    def restore(self, abstract_state: Any, only: int | None = None) -> Restored | None:
        """The newest checkpoint that reads back whole, or None.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings wanted now; the device
            and process counts may differ from those that saved.
          only: the checkpoint of this step or none.

        Raises:
          CheckpointError: a checkpoint of another run.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if only is not None and step != only:
                continue
            state, meta, error = self._read(step, abstract_state)
            if mesh.any_process(error is not None):
                self._pass_over(step, error)
                continue
            saved, read = meta["checksum"], checksum(state)
            if saved != read:
                self._pass_over(step, ValueError(f"checksum {read}, saved as {saved}"))
                continue
            saved_spec = records.from_json(meta["spec"])
            if _identity(saved_spec) != _identity(self._spec):
                raise CheckpointError(
                    f"{self._directory / str(step)} belongs to another run: "
                    f"{saved_spec}\nwanted: {self._spec}\nUse another --workdir."
                )
            return Restored(
                step=step, state=state, progress=ResumeState(**meta["progress"])
            )
        return None

    def _read(
        self, step: int, abstract_state: Any
    ) -> tuple[Any, Any, Exception | None]:
        """(state, meta, None) as they are on disk, or (None, None, what went wrong)."""
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    meta=ocp.args.JsonRestore(),
                ),
            )
            meta = restored["meta"]
            if meta.pop("digest") != records.digest(meta):
                raise ValueError("meta is not what was saved")
        except Exception as e:  # whatever a damaged file makes orbax raise
            return None, None, e
        return restored["state"], meta, None

    def _pass_over(self, step: int, error: Exception | None) -> None:
        """Sets a damaged checkpoint aside under another name and says so."""
        cause = "seen by another process"
        if error is not None:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self._say(
            f"checkpoint {step} of {self._spec.run_id} is damaged ({cause}); set aside "
            f"as damaged-{step}, trying the one before"
        )
        self._manager.close()
        if mesh.is_primary():
            damaged = self._directory / f"damaged-{step}"
            shutil.rmtree(damaged, ignore_errors=True)
            (self._directory / str(step)).rename(damaged)
        mesh.barrier(f"damaged-{step}")
        self._manager = self._open()

    def close(self) -> None:
        self._manager.close()


def _identity(spec: records.RunSpec) -> tuple[Any, ...]:
    """What must agree between a checkpoint and the run that continues it."""
    return (
        spec.run_id,
        spec.recipe_hash,
        spec.width,
        spec.depth,
        spec.heads,
        spec.steps,
        spec.batch_size,
        spec.seed,
        spec.learning_rate,
        spec.warmup_steps,
    )
