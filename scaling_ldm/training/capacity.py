"""Whether this host and its devices can hold what an experiment allocates.

`check` counts only what is certainly held at the same time, so its refusal is never a
guess. It is the parameters, the optimizer's state and the averages; the batches that
are prepared; and the validation set. Activations, gradients and the compiler's
temporaries are not counted. `step_memory` estimates these. `problems_of_plan` is about
the devices that a plan states.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.config import axes, names, objective_kind
from scaling_ldm.flops import peaks
from scaling_ldm.training import accumulation, objective_checks

_CGROUP = pathlib.Path("/sys/fs/cgroup/memory.max")  # the limit of a container
_FLOAT = 4  # bytes
# Their steps are not traced: each of many blocks would be traced anew.
NOT_TRACED = ("autoencoder_kl",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bytes that are held on one host, and the fields that they follow from."""

    nbytes: int
    what: str


def host_bytes() -> int:
    """The memory of this host, or of the container that this process is in."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else ""
    return min(found, int(limit)) if limit.isdigit() else found


def device_bytes(device: jax.Device) -> int | None:
    """The memory of a device; None: unknown, or that of the host."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")


def stated_bytes(accelerator: str) -> int | None:
    """The memory of an accelerator of `flops.peaks.PEAKS`; None: it has no row."""
    row = peaks.PEAKS.get(accelerator)
    return row.memory_bytes if row else None


def is_cpu(accelerator: str) -> bool:
    """Whether a plan's accelerator is a CPU; its `plan.devices` are no JAX devices."""
    return "cpu" in accelerator.lower()


def of_pictures(
    experiment: config.Experiment, stages: Collection[str], processes: int
) -> list[Allocation]:
    """What a host holds of the pictures that the stages work on."""
    row = objective_checks.abstract_batch(experiment, 1)
    if not experiment.data.coarse:
        del row["image"]
    if not experiment.reads_words:  # features have the type of the records
        stored = np.dtype(experiment.encode.dtype)
        row["text"] = jax.ShapeDtypeStruct(row["text"].shape, stored)
    each = sum(math.prod(one.shape) * one.dtype.itemsize for one in row.values())
    train, valid = experiment.train, experiment.validation
    queued = experiment.data.prefetch_batches + train.steps_per_dispatch
    counts = {
        "train": (
            (
                train.batch_size * queued,
                "config.train.batch_size x (config.train.steps_per_dispatch + "
                "config.data.prefetch_batches)",
            ),
            (valid.samples, "config.validation.samples"),
        ),
        # Each host encodes batches of its own.
        "encode": (
            (experiment.encode.batch_size * processes, "config.encode.batch_size"),
        ),
        "generate": ((experiment.generate.batch_size, "config.generate.batch_size"),),
        "evaluate": ((experiment.evaluate.batch_size, "config.evaluate.batch_size"),),
    }
    return [
        Allocation(nbytes=count * each // processes, what=f"{field} = {count} pictures")
        for stage, fields in counts.items()
        if stage in stages
        for count, field in fields
    ]


def state_bytes(spec: records.RunSpec, fsdp: int) -> int:
    """Bytes of a run's state on one device between two steps; gradients are gone."""
    return (spec.state_bytes - _FLOAT * spec.params) // fsdp


def step_bytes(state: int, activations: int, devices: int, fsdp: int) -> int:
    """What a training step holds on one device at least.

    The arrays of the block that is being computed are not in it.

    Args:
      state: `RunSpec.state_bytes`.
      activations: `RunSpec.activation_bytes`.
    """
    return state // fsdp + activations // devices


def ways_to_fit(
    experiment: config.Experiment,
    spec: records.RunSpec,
    devices: int,
    there: int,
    held: Callable[[config.Experiment, int, int], int],
) -> list[str]:
    """Settings with which a training step fits, the cheapest first.

    Args:
      devices: of the job that is too small.
      there: bytes of a device.
      held: (experiment, devices, fsdp) -> bytes of a step on one device, estimated. It
        may take seconds, so of settings that hold less and less it is asked for a few.
        It is called where the state alone fits and the batch can be split. Of
        autoencoders state and saved activations stand for it.
    """
    more = dataclasses.replace(experiment.model, remat=True)
    remat = dataclasses.replace(experiment, model=more)

    def fits(changed: config.Experiment, devices: int, fsdp: int) -> bool:
        if spec.batch_size % devices or changed.train.microbatch % devices:
            return False
        if spec.state_bytes // fsdp > there:
            return False
        if changed.model.architecture not in NOT_TRACED:
            return held(changed, devices, fsdp) <= there
        saved = 0  # with remat: not known
        if changed.model.remat == experiment.model.remat:
            saved = spec.activation_bytes * accumulation.passes(experiment.train)
            saved //= accumulation.passes(changed.train)
        return step_bytes(spec.state_bytes, saved, devices, fsdp) <= there

    ways, fsdp = [], experiment.mesh.fsdp
    larger = [n for n in range(fsdp + 1, devices + 1) if devices % n == 0]
    size = _first(larger, lambda size: fits(experiment, devices, size))
    if size is not None:
        ways.append(f"mesh.fsdp = {size}")
    ways += _smaller_passes(experiment, spec, devices, fits, [fsdp, *larger])
    if not experiment.model.remat and fits(remat, devices, devices):
        saved = f"mesh.fsdp = {devices}" if devices > fsdp else "these devices"
        ways.append(f"model.remat = True with {saved}")
    sizes = spec.batch_size, experiment.train.microbatch
    jobs = [devices * times for times in (2, 4, 8, 16, 32)]
    jobs = [count for count in jobs if not any(size % count for size in sizes)]
    count = _first(jobs, lambda count: fits(experiment, count, count))
    if count is not None:
        ways.append(f"{count} devices with mesh.fsdp = {count}")
    return ways


def _first(settings: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first of settings that hold less and less with which a step fits, if any.

    If one holds more than the one before, a later setting that fits may be returned.
    """
    if not settings or not fits(settings[-1]):
        return None
    low, high = 0, len(settings) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(settings[middle]):
            high = middle
        else:
            low = middle + 1
    return settings[high]


def _smaller_passes(
    experiment: config.Experiment,
    spec: records.RunSpec,
    devices: int,
    fits: Callable[[config.Experiment, int, int], bool],
    shards: Sequence[int],
) -> list[str]:
    """The fewest passes over parts of the batch with which a step fits, if any.

    Args:
      fits: (experiment, devices, fsdp) -> whether a step fits.
      shards: values of mesh.fsdp, the smallest first.
    """
    if objective_kind.is_own(experiment.objective_kind):
        return []  # its loss may not be one that can be taken in parts
    rows = spec.batch_size // accumulation.passes(experiment.train)

    def fits_in(part: int, size: int) -> bool:
        train = dataclasses.replace(experiment.train, microbatch=part)
        return fits(dataclasses.replace(experiment, train=train), devices, size)

    parts = [n for n in range(rows - 1, 0, -1) if rows % n == n % devices == 0]
    part = _first(parts, lambda part: fits_in(part, shards[-1]))
    if part is None:
        return []
    size = _first(shards, lambda size: fits_in(part, size))
    also = f" with mesh.fsdp = {size}" if size != experiment.mesh.fsdp else ""
    return [f"train.microbatch = {part}{also}"]


def check(
    experiment: config.Experiment,
    specs: Sequence[records.RunSpec],
    stages: Collection[str],
    fsdp: int,
) -> None:
    """Refuses what does not fit into memory, before anything is allocated.

    Args:
      specs: the runs that will be trained.
      stages: those that will run.
      fsdp: devices that share one copy of the state.

    Raises:
      ConfigError: it does not fit; the message has the memory and each part's size.
    """
    held = of_pictures(experiment, stages, jax.process_count())
    largest = max(specs, key=lambda spec: spec.state_bytes, default=None)
    device = jax.local_devices()[0]
    if largest is not None and "train" in stages:
        each = state_bytes(largest, fsdp)
        what = f"state of {largest.run_id}, {largest.params} parameters"
        on_device = device_bytes(device)
        if device.platform == "cpu":
            each *= jax.local_device_count()
            held.append(Allocation(nbytes=each, what=what))
        elif on_device is not None and each > on_device:
            raise _refusal([Allocation(nbytes=each, what=what)], on_device, "device")
    there = host_bytes()
    if sum(one.nbytes for one in held) > there:
        raise _refusal(held, there, "host")


def _refusal(held: list[Allocation], there: int, where: str) -> config.ConfigError:
    total = sum(one.nbytes for one in held)
    parts = sorted(held, key=lambda one: -one.nbytes)
    said = "; ".join(f"{_gib(one.nbytes)} for {one.what}" for one in parts)
    return config.ConfigError(
        f"this does not fit into memory: a {where} has {_gib(there)} and would hold at "
        f"least {_gib(total)}: {said}"
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.4g} GiB"


def problems_of_plan(experiment: config.Experiment) -> list[str]:
    """What is wrong with a plan, its devices too, before its networks are counted."""
    cfg, found = experiment.plan, []
    if cfg.steps and cfg.steps < cfg.minimum_steps:
        found.append(
            f"config.plan.steps = {cfg.steps}, fewer than config.plan.minimum_steps = "
            f"{cfg.minimum_steps}"
        )
    if not is_cpu(cfg.accelerator) and cfg.devices % experiment.mesh.fsdp:
        found.append(
            f"config.mesh.fsdp = {experiment.mesh.fsdp} does not divide "
            f"config.plan.devices = {cfg.devices}, the devices of one run"
        )
    dtypes = {one.model.compute_dtype for one in axes.variants(experiment)}
    row = peaks.PEAKS.get(cfg.accelerator)
    for dtype in () if cfg.flops_per_second_per_device else sorted(dtypes):
        if dtype not in config.DTYPES or (row and dtype in row.flops_per_second):
            continue
        known = [n for n, r in peaks.PEAKS.items() if dtype in r.flops_per_second]
        given = cfg.accelerator.lower()
        close = [n for n in known if given and given in n]
        close = close or [n for n in [names.nearest(given, known)] if n]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        found.append(
            f"config.plan.accelerator = {cfg.accelerator!r} has no published peak for "
            f"{dtype}; {hint}known: {', '.join(known)}. For other hardware set "
            "config.plan.flops_per_second_per_device to its speed; config.plan.probe "
            "measures that of this machine"
        )
    return found
