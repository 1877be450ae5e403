"""Draws pictures with a trained model, by their positions.

Picture i has the i-th held-out caption, or the i-th of the given captions, which are
repeated in order, and its own random key. It is the same on any number of devices and
after any interruption. In a batch of another size it is the same up to rounding:
another program may round a few of the 256 levels the other way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from scaling_ldm import config, data, flops
from scaling_ldm.data import label_names, vocabulary
from scaling_ldm.diffusion import samplers
from scaling_ldm.models import from_config, pretrained
from scaling_ldm.training import captions as caption_readers
from scaling_ldm.training import mesh, train_step
from scaling_ldm.training.objective import diffusion_objective, widened
from scaling_ldm.training.trained_model import TrainedModel

Pictures = UInt8[np.ndarray, "n H W 3"]
Positions = Int[np.ndarray, "n"]
Samples = Float[np.ndarray, "n h w C"]  # latents, or pixels in [-1, 1]


class SamplingCost(NamedTuple):
    """The cost of one picture.

    nfe: evaluations of the network; guidance doubles them.
    flops: of these evaluations.
    decoder_flops: of the autoencoder; 0 if there is none.
    """

    nfe: int
    flops: float
    decoder_flops: float


def sampling_plan(
    experiment: config.Experiment, sampling: config.GenerateConfig
) -> samplers.SamplingPlan:
    """The sampler's steps.

    Raises:
      ValueError: the sampler cannot use this grid with this schedule and prediction.
    """
    return samplers.plan(denoise(experiment), **options(sampling))


def denoise(
    experiment: config.Experiment, network: Any = None, params: Any = None
) -> samplers.DiffusionModel:
    objective = diffusion_objective(experiment.objective)
    return samplers.denoiser(
        network,
        objective.schedule,
        prediction=objective.prediction,
        params=params,
    )


def options(sampling: config.GenerateConfig) -> dict[str, Any]:
    """How a study draws, as `samplers.sample` takes it."""
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "grid": None if sampling.spacing == "auto" else sampling.spacing,
        "guidance": sampling.guidance,
    }


class PictureSampler:
    """Draws pictures with a model's weights.

    Args:
      experiment: of the study; the model's overrides are applied to it.
      model: the weights.
      batch_size: pictures in one call on all devices together; rounded up to a multiple
        of the devices.
      captions: your own, repeated in order; (): those of the held-out split.

    Raises:
      ConfigError: the model learnt other words than the pictures have, or knows no word
        of a caption.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        workdir: pathlib.Path,
        model: TrainedModel,
        device_mesh: jax.sharding.Mesh,
        batch_size: int,
        captions: Sequence[str] = (),
    ) -> None:
        experiment = config.with_overrides(experiment, model.overrides)
        self._experiment, self._mesh = experiment, device_mesh
        self._batch = -(-batch_size // device_mesh.size) * device_mesh.size
        self._size = model.width, model.depth
        self._denoiser = from_config.denoiser(experiment, *self._size, unroll=False)
        self._denoise = denoise(experiment, self._denoiser, model.load(device_mesh))
        _, self._source = data.sources(experiment, workdir)
        vocabulary.refuse_others(
            vocabulary.Vocabulary(model.words) if model.words else None,
            vocabulary.read_by(self._denoiser.conditioning, self._source),
            model.run_id,
        )
        label_names.refuse_others(
            model.label_names,
            label_names.read_by(self._denoiser.conditioning, self._source),
            model.run_id,
        )
        self._own, self._text = tuple(captions), None
        if captions:
            self._text = self._read(captions)
        self._decoder = PictureDecoder(experiment, device_mesh)
        self._whole = jax.jit(
            lambda x: x, out_shardings=mesh.named_sharding(device_mesh, mesh.REPLICATED)
        )
        self._wide = jax.jit(widened)
        self._warm: set[Any] = set()
        self._costs: dict[Any, SamplingCost] = {}
        self._memory: dict[int, int] = {}
        self._given = functools.lru_cache(maxsize=64)(self._conditions)

    def captions(self, positions: Positions) -> list[str]:
        """The captions of the pictures at these positions."""
        if self._own:
            return [self._own[i % len(self._own)] for i in positions]
        return self._source.captions(positions)

    def labels(self, positions: Positions) -> list[int]:
        """The labels of the pictures; none if the network reads no labels."""
        if "label" not in self._denoiser.conditioning:
            return []
        return self._source.rows(positions)["label"].tolist()

    def real_images(self, positions: Positions) -> Pictures:
        """The held-out pictures at these positions, whose captions are drawn.

        Latents are decoded: these are the pictures as the autoencoder gives them back.
        """
        return self._decoder(self._source.rows(positions)["x"])

    def _read(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        words = vocabulary.of(self._source)
        try:
            return caption_readers.reader(self._experiment, words).read(captions)
        except ValueError as e:
            raise config.ConfigError(f"config.generate.captions: {e}") from e

    def images(self, positions: Positions, sampling: config.GenerateConfig) -> Pictures:
        """The pictures at these positions, on every process."""
        samples = jax.ShapeDtypeStruct(
            (self._batch, *self._experiment.data.shape),
            np.float32,
            sharding=mesh.named_sharding(self._mesh, mesh.BATCH),
        )
        parts = []
        for start in range(0, len(positions), self._batch):
            rows = positions[start : start + self._batch]
            cond, uncond, keys = self._given(*self._filled(rows, sampling))
            x = samplers.sample(
                self._denoise,
                keys,
                shape=samples,
                cond=cond,
                uncond=uncond,
                **options(sampling),
            )
            parts.append(self._decoder(np.asarray(self._whole(x)))[: len(rows)])
        return np.concatenate(parts)

    def timed(
        self, positions: Positions, sampling: config.GenerateConfig
    ) -> tuple[Pictures, float]:
        """`images`, and the seconds for each, without compilation and data loading."""
        build = (sampling.sampler, sampling.steps > 2)
        if build not in self._warm:
            short = dataclasses.replace(sampling, steps=min(sampling.steps, 4))
            self.images(positions[: self._batch], short)
            self._warm.add(build)
        for start in range(0, len(positions), self._batch):
            self._given(*self._filled(positions[start : start + self._batch], sampling))
        begin = time.perf_counter()
        images = self.images(positions, sampling)
        return images, (time.perf_counter() - begin) / len(positions)

    def cost(self, sampling: config.GenerateConfig) -> SamplingCost:
        """The cost of one picture, counted without drawing it."""
        # The guidance scale is no part of the key: every scale costs the same.
        build = sampling.sampler, sampling.spacing, sampling.steps
        if build not in self._costs:
            self._costs[build] = self._counted(sampling)
        return self._costs[build]

    def _counted(self, sampling: config.GenerateConfig) -> SamplingCost:
        todo = sampling_plan(self._experiment, sampling)
        cond, uncond, _ = self._given(tuple(range(self._batch)), sampling.seed)
        given = self._denoise.params, cond, uncond
        leaves, structure = jax.tree.flatten(given)
        total = _flops_of_sampling(
            train_step.compiled_part(self._experiment),
            self._size,
            tuple(options(sampling).items()),
            (self._batch, *self._experiment.data.shape),
            structure,
            tuple((leaf.shape, leaf.dtype) for leaf in leaves),
        )
        each = total / self._batch
        return SamplingCost(todo.nfe, each, self._decoder.flops)

    def memory(self, sampling: config.GenerateConfig) -> int:
        """Bytes on one device that drawing a single picture takes.

        It is the size of all parameters, and the larger of the compiler's memory plans
        for an evaluation (with both sides of guidance at once) and for the decoder.
        """
        rows = 2 if sampling.guidance else 1
        if rows not in self._memory:
            self._memory[rows] = self._planned(rows)
        return self._memory[rows]

    def _planned(self, rows: int) -> int:
        everything = self._given(tuple(range(self._batch)), 0)
        cond = jax.tree.map(lambda a: _abstract(a, rows), everything[0])
        params = jax.tree.map(_abstract, self._denoise.params)
        x = jax.ShapeDtypeStruct((rows, *self._experiment.data.shape), np.float32)
        t = jax.ShapeDtypeStruct((rows,), np.float32)
        evaluation = _bytes_of_program(self._denoiser.apply, params, x, t, cond)
        decoding = self._decoder.memory()
        return max(evaluation + _bytes(self._decoder.params), decoding + _bytes(params))

    def _filled(
        self, rows: np.ndarray, sampling: config.GenerateConfig
    ) -> tuple[tuple[int, ...], int]:
        return tuple(int(i) for i in np.resize(rows, self._batch)), sampling.seed

    def _conditions(self, positions: tuple[int, ...], seed: int) -> tuple[Any, ...]:
        every = np.asarray(positions)
        mine = every[mesh.rows_of_process(self._mesh, len(every))]
        rows = self._source.rows(mine)
        if self._text is not None:
            given = {k: v[mine % len(self._own)] for k, v in self._text.items()}
            rows = rows | given
        names = self._denoiser.conditioning
        cond = mesh.put(self._mesh, {name: rows[name] for name in names})
        cond = self._wide(cond)
        # A coarse picture is what super-resolution starts from: it is never dropped.
        empty = {
            name: np.broadcast_to(self._source.uncond[name], rows[name].shape)
            if name in self._source.uncond
            else rows[name]
            for name in names
        }
        index = mesh.put(self._mesh, mine.astype(np.int32))
        keys = keys_of(jax.random.key(seed), index)
        return cond, self._wide(mesh.put(self._mesh, empty)), keys


@functools.lru_cache(maxsize=256)
def _flops_of_sampling(
    experiment: config.Experiment,
    size: tuple[int, int],
    settings: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    structure: Any,
    leaves: tuple[tuple[tuple[int, ...], np.dtype], ...],
) -> float:
    """FLOPs of drawing one batch; counted once for all runs of a size.

    Args:
      experiment: as `train_step.compiled_part` gives it.
      size: width and depth of the network.
      settings: arguments of `samplers.plan`.
      shape: of the batch.
      structure: of (parameters, conditions, conditions without guidance).
      leaves: shape and type of each array in it.
    """
    abstract = [jax.ShapeDtypeStruct(*leaf) for leaf in leaves]
    params, cond, uncond = jax.tree.unflatten(structure, abstract)
    network = from_config.denoiser(experiment, *size, unroll=False)
    with jax.set_mesh(None):
        counted = samplers.cost(
            denoise(experiment, network, params),
            shape,
            cond=cond,
            uncond=uncond,
            **dict(settings),
        )
    return float(counted.total)


@jax.jit
def keys_of(key: jax.Array, index: jax.Array) -> jax.Array:
    """The keys of the pictures at some positions, [n]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


class PictureDecoder:
    """Samples -> uint8 pictures [n, height, width, 3], with the autoencoder if any.

    flops: of decoding one picture.
    params: of the autoencoder; None if there is none.
    """

    def __init__(
        self, experiment: config.Experiment, device_mesh: jax.sharding.Mesh
    ) -> None:
        cfg = experiment.encode
        self._mesh, self._most = device_mesh, cfg.batch_size
        self._one = jax.ShapeDtypeStruct((1, *experiment.data.shape), np.float32)
        self.params, self.flops = None, 0.0
        if cfg.autoencoder == "none":
            return
        network, params, _ = pretrained.autoencoder(cfg.autoencoder, cfg.compute_dtype)
        self.params = mesh.place_params(device_mesh, params)

        def decode(params: Any, x: jax.Array) -> jax.Array:
            return network.decode(params, network.from_latent(x))

        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        self._decode, self._plain = jax.jit(decode, out_shardings=whole), decode
        with jax.set_mesh(None):
            self.flops = float(flops.count(decode, params, self._one).total)

    def memory(self) -> int:
        """Bytes on one device that decoding one picture takes."""
        if self.params is None:
            return 0
        params = jax.tree.map(_abstract, self.params)
        return _bytes_of_program(self._plain, params, self._one)

    def __call__(self, x: Samples) -> Pictures:
        if self.params is None:
            return pixels(x)
        devices = self._mesh.size
        rows = -(-min(self._most, len(x)) // devices) * devices
        mine = mesh.rows_of_process(self._mesh, rows)
        images = []
        for start in range(0, len(x), rows):
            batch = x[(start + np.arange(rows)) % len(x)]
            placed = mesh.put(self._mesh, batch[mine])
            images.append(pixels(np.asarray(self._decode(self.params, placed))))
        return np.concatenate(images)[: len(x)]


def _abstract(a: Any, rows: int | None = None) -> jax.ShapeDtypeStruct:
    """An array's shape and type, with another number of rows if it is given."""
    shape = a.shape if rows is None else (rows, *a.shape[1:])
    return jax.ShapeDtypeStruct(shape, a.dtype)


def _bytes(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _bytes_of_program(function: Callable[..., Any], *abstract: Any) -> int:
    """The compiler's plan of the most bytes that a function holds on one device."""
    with jax.set_mesh(None):
        planned = jax.jit(function).lower(*abstract).compile().memory_analysis()
    if planned is None:
        raise RuntimeError(
            "this device's compiler does not say how much memory it uses"
        )
    return (
        planned.argument_size_in_bytes
        + planned.output_size_in_bytes
        + planned.temp_size_in_bytes
        - planned.alias_size_in_bytes
    )


def pixels(x: Samples) -> Pictures:
    """[-1, 1] -> uint8 [n, height, width, 3]; grey becomes RGB.

    Raises:
      ConfigError: a value is not finite; as a byte it would be any shade.
    """
    if not (finite := np.isfinite(x).all(axis=(1, 2, 3))).all():
        raise config.ConfigError(
            f"{(~finite).sum()} of {len(x)} pictures in a batch have values that are "
            "not finite: these weights diverge with this sampler, steps and guidance"
        )
    found = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.repeat(found, 3, -1) if found.shape[-1] == 1 else found
