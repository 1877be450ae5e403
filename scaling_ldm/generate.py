"""A finished run -> sample pictures with captions, and what they cost."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import (
    config,
    finished,
    flops,
    frozen,
    mesh,
    meters,
    networks,
    records,
    samplers,
    tasks,
)
from scaling_ldm import data as data_lib


def run(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    specs: Sequence[records.RunSpec],
) -> records.SampleRecord | None:
    """Samples the finished run with the lowest validation loss, from its EMA weights.

    Captions are those of held-out names. Nothing happens when the pictures are there
    already.

    Returns:
      The record, or None when no run is finished.
    """
    if experiment.model.architecture == "autoencoder_kl":
        meters.say("no samples: an autoencoder generates nothing by itself")
        return None
    spec = finished.best(workdir, specs)
    if spec is None:
        meters.say("no finished run to sample from")
        return None
    path = workdir / "samples" / "record.json"
    if path.exists():
        known = records.loads(path.read_text())
        wanted = _settings(experiment, spec)
        same = {name: getattr(known, name) for name in wanted} == wanted
        if same and len(known.captions) == experiment.generate.images:
            meters.say(f"samples of {spec.run_id} are there already")
            return known
    device_mesh = mesh.build(experiment.mesh, {})
    with jax.set_mesh(device_mesh):
        record, images = _sample(experiment, workdir, spec, device_mesh)
    if mesh.is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(workdir / record.images_file, images, allow_pickle=False)
        records.write_text(path, records.dumps(record))
    return record


def _settings(experiment: config.Experiment, spec: records.RunSpec) -> dict[str, Any]:
    cfg = experiment.generate
    return {
        "run_id": spec.run_id,
        "sampler": cfg.sampler,
        "spacing": cfg.spacing,
        "steps": cfg.steps,
        "guidance": cfg.guidance,
        "seed": cfg.seed,
    }


def check(experiment: config.Experiment) -> None:
    """Refuses, before anything is trained, what could not be sampled afterwards.

    Raises:
      config.ConfigError: the sampler cannot use this grid with this schedule and
        prediction.
    """
    try:
        _plan(experiment)
    except ValueError as e:
        cfg = experiment.generate
        raise config.ConfigError(
            f"config.generate cannot sample with sampler {cfg.sampler!r}, spacing "
            f"{cfg.spacing!r} and steps = {cfg.steps}: {e}"
        ) from e


def _plan(experiment: config.Experiment) -> samplers.Plan:
    return samplers.plan(_denoise(experiment), **_sampler(experiment))


def _denoise(
    experiment: config.Experiment, network: Any = None, params: Any = None
) -> samplers.Denoise:
    learnt = tasks.objective(experiment.objective)
    return samplers.denoiser(
        network,
        learnt.schedule,
        prediction=learnt.prediction,
        params=params,
        time=learnt.schedule.unit_time,
    )


def _sampler(experiment: config.Experiment) -> dict[str, Any]:
    cfg = experiment.generate
    return {
        "sampler": cfg.sampler,
        "steps": cfg.steps,
        "grid": None if cfg.spacing == "auto" else cfg.spacing,
        "guidance": cfg.guidance,
    }


def _sample(
    experiment: config.Experiment,
    workdir: pathlib.Path,
    spec: records.RunSpec,
    device_mesh: jax.sharding.Mesh,
) -> tuple[records.SampleRecord, np.ndarray]:
    cfg = experiment.generate
    denoiser = networks.denoiser(experiment, spec.width, spec.depth, unroll=False)
    params = finished.averaged(experiment, workdir, spec, device_mesh)
    _, source = data_lib.sources(experiment, workdir)
    positions = np.arange(cfg.images)
    padded = -(-cfg.images // device_mesh.size) * device_mesh.size
    every = np.arange(padded) % cfg.images
    mine = every[mesh.rows_of_process(device_mesh, padded)]
    rows = source.rows(mine)
    names = denoiser.conditioning
    cond = mesh.put(device_mesh, {name: rows[name] for name in names})
    # A coarse picture is a part of the task: only the caption is ever null.
    null = {
        name: np.broadcast_to(source.null[name], rows[name].shape)
        if name in source.null
        else rows[name]
        for name in names
    }
    null = mesh.put(device_mesh, null)
    index = mesh.put(device_mesh, mine.astype(np.int32))

    latent = experiment.encode.autoencoder != "none"

    def sample(params: Any, cond: Any, null: Any, index: jax.Array) -> jax.Array:
        key = jax.random.key(cfg.seed)
        x = samplers.sample(
            _denoise(experiment, denoiser.apply, params),
            jax.vmap(lambda i: jax.random.fold_in(key, i))(index),
            shape=(padded, *experiment.data.shape),
            cond=cond,
            uncond=null,
            **_sampler(experiment),
        )
        return x if latent else _to_pixels(x)

    begin = time.perf_counter()
    whole = mesh.named(device_mesh, mesh.WHOLE)
    compiled = jax.jit(sample, out_shardings=whole)
    images = np.asarray(compiled(params, cond, null, index))
    decoding = 0.0
    if latent:
        images, decoding = _decode(experiment, images[: cfg.images], device_mesh)
    seconds = time.perf_counter() - begin
    with jax.set_mesh(None):
        counted = flops.count(
            sample,
            *jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
                (params, cond, null, index),
            ),
        )
    return records.SampleRecord(
        **_settings(experiment, spec),
        nfe=_plan(experiment).nfe,
        flops=float(counted.total) * cfg.images / padded + decoding,
        seconds=seconds,
        weights="ema",
        captions=tuple(source.captions(positions)),
        images_file="samples/images.npy",
    ), images[: cfg.images]


def _to_pixels(x: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _decode(
    experiment: config.Experiment,
    latents: np.ndarray,
    device_mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, float]:
    """Samples in the latent space -> uint8 pictures, and the FLOPs of decoding them.

    In batches of config.encode.batch_size, the last one filled up.
    """
    cfg = experiment.encode
    network, params, _ = frozen.autoencoder(cfg.autoencoder, cfg.compute_dtype)
    devices = device_mesh.size
    most = min(cfg.batch_size, len(latents))
    rows = -(-most // devices) * devices
    mine = mesh.rows_of_process(device_mesh, rows)

    def decode(params: Any, x: jax.Array) -> jax.Array:
        return _to_pixels(network.decode(params, network.from_latent(x)))

    whole = mesh.named(device_mesh, mesh.WHOLE)
    compiled = jax.jit(decode, out_shardings=whole)
    placed = frozen.place(device_mesh, params)
    images = []
    for start in range(0, len(latents), rows):
        batch = latents[(start + np.arange(rows)) % len(latents)]
        images.append(np.asarray(compiled(placed, mesh.put(device_mesh, batch[mine]))))
    with jax.set_mesh(None):
        one = jax.ShapeDtypeStruct((rows, *latents.shape[1:]), latents.dtype)
        counted = flops.count(decode, params, one)
    of_each = float(counted.total) / rows
    return np.concatenate(images)[: len(latents)], of_each * len(latents)
