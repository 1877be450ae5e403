"""State, data position and RunSpec on disk as one checkpoint; the only user of orbax.

A checkpoint is an orbax composite of the sharded train state and a small JSON document.
The document holds the state of the data iterator, the RunSpec, the clock, a digest of
the document, and the checksums of the train state and of each of its parts. A
checkpoint is used only if orbax has committed it, and if the checksum and the digest of
what is read equal the saved ones. Otherwise the one before it is used, and a line says
so. Who needs one part, such as an average, reads that part alone.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.utils import TMP_DIR_SUFFIX

from scaling_ldm import records
from scaling_ldm.records.errors import CheckpointError
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import checksum, mesh, run_files, storage_faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeState:
    """What a run needs besides arrays to continue exactly where it was.

    data: the state of the data iterator.
    seconds: wall time in the train loop so far.
    restarts: how often the run was continued.
    shared_steps: its first steps, which another run had taken (plan.reuse).
    """

    data: dict[str, Any]
    seconds: float
    restarts: int
    shared_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint as it was read.

    step: optimizer updates done.
    state: the tree of arrays.
    progress: everything else.
    """

    step: int
    state: Any
    progress: ResumeState


def _silence_abandoned_writes() -> None:
    """Keeps one failed write from printing a traceback for every other array.

    When one array cannot be written, orbax closes the event loop that the other writes
    report to. Each of them then raises where nothing can catch it, and Python prints
    that. The failure itself is still raised. The hook is installed once for the
    process; every other exception is printed as before.
    """
    before = sys.unraisablehook
    if getattr(before, "silences_abandoned_writes", False):
        return

    def hook(unraisable: sys.UnraisableHookArgs, /) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            return
        before(unraisable)

    hook.silences_abandoned_writes = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


@dataclasses.dataclass(frozen=True)
class Kept(policies.PreservationPolicy):
    """Which checkpoints stay when another one is complete.

    The steps of `always` stay, and so do the latest `keep` of `marks`. A step between
    marks stays if it is among the latest `keep` of all. Once `keep` marks or all marks
    have checkpoints, it stays only if it comes after the last mark. So a step between
    marks never removes a mark, and a finished run has the checkpoints of its marks.
    """

    keep: int
    always: frozenset[int]
    marks: frozenset[int]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Whether each checkpoint stays; orbax lists them with ascending `step`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        marked = [step for step in steps if step in self.marks][-self.keep :]
        between = [step for step in steps[-self.keep :] if step not in self.marks]
        if marked and len(marked) == min(self.keep, len(self.marks)):
            between = [step for step in between if step > marked[-1]]
        stay = self.always.union(marked, between)
        return [step in stay for step in steps]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: created if it is missing; shared by all processes.
      spec: the run they belong to; a checkpoint of another run is an error.
      keep: how many of the latest to keep; see `Kept`.
      say: is called with each line for the user.
      always: steps whose checkpoints are never removed.
      marks: the planned steps; at any other step a signal or the clock asked for one.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        spec: records.RunSpec,
        keep: int,
        say: Callable[[str], None] = print,
        always: Collection[int] = (),
        marks: Collection[int] = (),
    ) -> None:
        self._directory = directory.resolve()
        self._spec = spec
        self._kept = Kept(keep, frozenset(always), frozenset(marks))
        self._say = say
        self._report_unfinished()
        _silence_abandoned_writes()
        storage_faults.prepare_orbax(self._directory)
        with storage_faults.asking(self._directory):
            self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # By default orbax lets each device that holds a copy of an array write its part
        # of it, however small. A checkpoint of a small network then takes twice as
        # long.
        arrays = ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=2**20
        )
        state = ocp.PyTreeCheckpointHandler(
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (jax.Array, arrays)
            )
        )
        with storage_faults.named_metadata(self._directory):
            return ocp.CheckpointManager(
                str(self._directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    save_decision_policy=policies.FixedIntervalPolicy(1),
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                ),
                item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
            )

    def _report_unfinished(self) -> None:
        """Says which writes were cut off; orbax removes them."""
        for path in run_files.unfinished(self._directory, TMP_DIR_SUFFIX):
            self._say(
                f"checkpoint {path.name.split('.')[0]} of {self._spec.run_id} is "
                "unfinished: the one before is used"
            )

    def save(self, step: int, state: Any, progress: ResumeState) -> None:
        """Starts writing the state after `step` steps; returns before it is on disk.

        Raises:
          CheckpointError: this or the previous write failed, for example because the
            disk is full. Complete checkpoints are untouched.
        """
        meta = {
            "step": step,
            "spec": records.to_json(self._spec),
            "progress": dataclasses.asdict(progress),
            "processes": jax.process_count(),
            "checksum": 0,
            "parts": checksum.of_parts(state),
        }
        meta["checksum"] = sum(meta["parts"].values()) % 2**32
        meta = records.stamped(meta)
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )
            if not saved:
                raise ValueError(f"later ones exist: {self._manager.all_steps()}")
        except Exception as e:  # orbax raises many kinds; each means: not saved
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
        room = ""
        if not isinstance(self._directory, ObjectPath):
            free = shutil.disk_usage(self._directory).free / 2**20
            room = f" ({free:.0f} MiB free there)"
        cause = str(error).strip().splitlines()[0][:300]
        remedy = "Make room" if records.is_full(error) else "Repair that"
        return CheckpointError(
            f"could not write checkpoint {step} of {self._spec.run_id} to "
            f"{self._directory}{room}: {cause}. "
            f"Complete checkpoints are untouched. {remedy}, then run the same command "
            "to continue from the latest of them."
        )

    def restore(
        self, abstract_state: Any, only: int | None = None, part: str | None = None
    ) -> Restored | None:
        """The newest checkpoint that can be read in full; None if there is none.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to read into. The number
            of devices and of processes may differ from that at the save.
          only: read the checkpoint of this step or none, and change no file.
          part: a child of the state, such as "params". The others are not read, unless
            version 0.1.0 wrote the checkpoint; `Restored.state` is that part.

        Raises:
          CheckpointError: a checkpoint belongs to another run; or the system cannot
            read it; or the checkpoint of `only` is damaged.
          NewerVersion: a newer version of the library wrote a checkpoint.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if only is not None and step != only:
                continue
            state, meta, error = self._read(step, abstract_state, part)
            error = storage_faults.behind(error, self._directory / str(step))
            if mesh.any_process(storage_faults.of_environment(error)):
                raise CheckpointError(
                    f"cannot read checkpoint {step} of {self._spec.run_id} in "
                    f"{self._directory} ({storage_faults.cause(error)}). Nothing was "
                    "changed there: make it readable, then run the same command"
                ) from error
            if not mesh.any_process(error is not None):
                error = _difference(state, meta, abstract_state)
            if mesh.any_process(error is not None):
                if only is not None:
                    before = [s for s in self._manager.all_steps() if s < step]
                    raise storage_faults.damaged_end(
                        self._directory, step, max(before, default=0), error
                    )
                self._pass_over(step, error)
                continue
            if part is not None:
                state = checksum.parts(state)[part].tree
            return Restored(
                step=step, state=state, progress=ResumeState(**meta["progress"])
            )
        return None

    def _read(
        self, step: int, abstract_state: Any, part: str | None
    ) -> tuple[Any, Any, Exception | None]:
        """(state, meta, None) as they are on disk, or (None, None, the error).

        The state is {part: its tree} if a part is asked for and has its own checksum.

        Raises:
          NewerVersion: a newer version of the library wrote them.
          CheckpointError: they belong to another run.
        """
        try:
            meta = self._part(step, meta=ocp.args.JsonRestore())
            _check_digest(meta)
            if meta.get("step", step) != step:  # 0.1.0 did not say it
                raise ValueError(f"it is that of step {meta['step']}")
            version = records.version_of(meta, self._directory / str(step))
            theirs = _identity(records.from_json(meta["spec"], version))
            wrong = [k for k, v in _identity(self._spec).items() if theirs[k] != v]
            if wrong:
                raise CheckpointError(
                    f"{self._directory / str(step)} belongs to another run, of other "
                    f"{', '.join(wrong)}: put the run's own back, or use another "
                    "--workdir"
                )
            wanted = abstract_state
            if part is not None and "parts" in meta:
                wanted = {part: checksum.parts(abstract_state)[part].tree}
            args = ocp.args.PyTreeRestore(
                wanted,
                ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=wanted is not abstract_state,
            )
            return self._part(step, state=args), meta, None
        except (records.NewerVersion, CheckpointError):
            raise
        except Exception as e:  # whatever a damaged file makes orbax raise
            return None, None, e

    def _part(self, step: int, **args: Any) -> Any:
        """One part of a checkpoint as it is on disk."""
        (name,) = args
        return self._manager.restore(step, args=ocp.args.Composite(**args))[name]

    def _pass_over(self, step: int, error: Exception | None) -> None:
        """Renames a damaged checkpoint and says so."""
        self._say(
            f"checkpoint {step} of {self._spec.run_id} is damaged "
            f"({storage_faults.cause(error)}); it is renamed to damaged-{step}, and "
            "the one before is used"
        )
        self.close()
        if mesh.is_primary():
            damaged = self._directory / f"damaged-{step}"
            if isinstance(damaged, ObjectPath):
                damaged.rmtree()
            else:
                shutil.rmtree(damaged, ignore_errors=True)
            (self._directory / str(step)).rename(damaged)
        mesh.barrier(f"damaged-{step}")
        self._manager = self._open()

    def set_aside(self) -> list[pathlib.Path]:
        """The damaged checkpoints that were passed over, by this call or before."""
        return sorted(self._directory.glob("damaged-*"))

    def close(self) -> None:
        """Waits for a write under way and releases the folder.

        Raises:
          OSError: the folder is in a store, which failed meanwhile.
        """
        with storage_faults.asking(self._directory):
            self._manager.close()


def saved_identity(folder: pathlib.Path, step: int) -> str:
    """A digest of the state that a run saved at a step, without reading its arrays.

    It is made of the checksum of all bits and of the run's recipe.

    Args:
      folder: the run's checkpoints.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      NewerVersion: a newer version of the library wrote it.
    """
    path = folder / str(step) / "meta" / "metadata"
    try:
        meta = records.read_json(path)
        _check_digest(meta)
    except (FileNotFoundError, records.Damaged) as e:
        raise CheckpointError(f"{folder} has no readable checkpoint {step}") from e
    spec = records.from_json(meta["spec"], records.version_of(meta, path))
    return records.digest([step, meta["checksum"], spec.recipe_hash, spec.seed])


def _check_digest(meta: dict[str, Any]) -> None:
    """Checks and removes the digest that was in metadata before they had a seal."""
    if "digest" in meta and meta.pop("digest") != records.digest(meta):
        raise records.Damaged("meta has changed since it was saved")


def _difference(state: Any, meta: dict[str, Any], whole: Any) -> ValueError | None:
    """The error that what was read is not what was saved; None: it is.

    Args:
      state: the state, or {part: its tree}.
      whole: the abstract state.
    """
    if jax.tree.structure(state) == jax.tree.structure(whole):
        saved, read = meta["checksum"], checksum.of(state)
    else:
        ((name, tree),) = state.items()
        first = checksum.parts(whole)[name].first
        saved, read = meta["parts"][name], checksum.of(tree, first)
    if saved == read:
        return None
    return ValueError(f"checksum {read}, saved as {saved}")


def _identity(spec: records.RunSpec) -> dict[str, Any]:
    """The fields that a checkpoint and the run that continues it must share."""
    fields = (
        "run_id recipe_hash width depth heads steps batch_size seed learning_rate "
        "warmup_steps"
    )
    return {name: getattr(spec, name) for name in fields.split()}
