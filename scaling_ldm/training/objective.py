"""Objectives: the loss that a network is trained on, and its held-out error.

The plan, the step and the loop treat every objective alike. So one loop trains a
diffusion model, an autoencoder, and what a user's own file describes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from scaling_ldm import config
from scaling_ldm.config import objective_kind
from scaling_ldm.diffusion import noise
from scaling_ldm.diffusion.losses import denoise, reconstruct, validation
from scaling_ldm.models import from_config, sharded
from scaling_ldm.models.shapes import IndexB, TimeB

Batch = denoise.Batch


def no_aux(key: jax.Array, params: Any) -> Any:
    """The state of an objective that has none beside the parameters: an empty tree."""
    del key, params
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A network and what it learns, as pure functions.

    init(key) -> params
    init_aux(key, params) -> aux: a tree of arrays that belongs to the objective, such
      as a teacher. It is sharded, saved and counted like the parameters.
    loss(params, averages, aux, batch, uncond, step, key) -> (loss, aux, metrics): a
      float32 scalar, whose gradient with respect to `params` is taken; aux after this
      step, a tree of the same structure; and a float32 scalar for each name in
      `metrics`. `averages` holds the tracked averages of the parameters by name,
      `batch` the arrays of this step, and `uncond` those of the empty condition without
      a batch axis. `step` counts updates from 0. All randomness comes from `key`, which
      differs at each step. A `MeanLoss` can also be taken in parts of a batch.
    per_example_loss(params, batch, t_B, index_B, key) -> [B] held-out losses.
    conditioning: the names that a batch holds beside "x".
    image_tokens, other_tokens: how many the network processes for each picture.
    embeddings: paths of the parameters that are tables of words or labels.
    metrics: names of the further numbers that the loss returns; they are logged.
    arrays: shapes and types, for one picture, of arrays that no source of this library
      has.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]
    per_example_loss: Callable[..., jax.Array]
    conditioning: tuple[str, ...]
    image_tokens: int
    other_tokens: int
    embeddings: tuple[str, ...]
    init_aux: Callable[[jax.Array, Any], Any] = no_aux
    metrics: tuple[str, ...] = ()
    arrays: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)


Build = Callable[[config.Experiment, int, int, bool], Objective]


def build(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Objective:
    """The objective of an experiment for the network of one size.

    Args:
      width, depth: one pair of `config.plan.sizes`.
      unroll: whether the blocks are compiled one by one instead of in a loop.

    Raises:
      ConfigError: a user's own file has changed since the plan, or gives no Objective.
    """
    kind = experiment.objective_kind
    if not objective_kind.is_own(kind):
        return OBJECTIVES[kind](experiment, width, depth, unroll)
    where = f"config.objective.kind = {kind!r}"
    found = _own(experiment.objective)(experiment, width, depth, unroll)
    if not isinstance(found, Objective):
        raise config.ConfigError(
            f"{where} gives {type(found).__name__}; it must return a "
            "scaling_ldm.training.objective.Objective"
        )
    return found


@functools.lru_cache(maxsize=64)
def _own(cfg: config.ObjectiveConfig) -> Build:
    """The function of a user's own file, after a check of its text against the recipe.

    Raises:
      ConfigError: the file is not there, has another text, or has no such function.
    """
    path, (place, _, name) = objective_kind.source(cfg), cfg.kind.rpartition(":")
    where = f"config.objective.kind = {cfg.kind!r}"
    if objective_kind.digest(path) != cfg.digest:
        raise config.ConfigError(f"{where}: {path} changed since the command started")
    try:
        if place.endswith(".py"):
            module = _run(path, f"_objective_{path.stem}_{cfg.digest}")
        else:
            module = importlib.import_module(place)
    except Exception as e:
        raise config.ConfigError(f"{where}: {path} fails: {e!r}") from e
    if not callable(vars(module).get(name)):
        raise config.ConfigError(f"{where}: {path} defines no function {name}")
    return vars(module)[name]


def _run(path: pathlib.Path, name: str) -> types.ModuleType:
    """Runs a file as a module. It gets a name, because dataclasses look modules up."""
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return module


def widened(batch: Batch) -> Batch:
    """A batch whose text features are float32, for use in a compiled function.

    They reach the devices in the type in which records store them, which is half as
    wide. Every value of that type is a float32.
    """
    if (text := batch.get("text")) is None or text.dtype not in _NARROW:
        return batch
    return {**batch, "text": text.astype(jnp.float32)}


_NARROW = (jnp.float16, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class MeanLoss:
    """A loss that is the mean over the rows of a batch; `train.microbatch` needs one.

    It is called like any `loss` of an Objective.

    draw(batch, key) -> arrays with a leading axis of rows: all that is random.
    of_rows(params, averages, aux, batch, uncond, step, drawn) -> (loss, aux, metrics)
      of some rows: they are in `batch` and, the same ones, in `drawn`. Over equal parts
      of a batch, the mean of each result, aux too, is that of the whole batch.
    """

    draw: Callable[[Batch, jax.Array], Any]
    of_rows: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]

    def __call__(
        self,
        params: Any,
        averages: Any,
        aux: Any,
        batch: Batch,
        uncond: Batch,
        step: Any,
        key: jax.Array,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """The loss of a whole batch."""
        drawn = self.draw(batch, key)
        return self.of_rows(params, averages, aux, batch, uncond, step, drawn)


def _plain_loss(draw: Callable[..., Any], of_rows: Callable[..., jax.Array]) -> Any:
    """The loss of an objective without state or metrics.

    Args:
      draw: as of `MeanLoss`.
      of_rows: (params, batch, uncond, drawn) -> loss.
    """

    def with_state(
        params: Any,
        averages: Any,
        aux: Any,
        batch: Batch,
        uncond: Batch,
        step: Any,
        drawn: Any,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        del averages, step
        return of_rows(params, batch, uncond, drawn), aux, {}

    return MeanLoss(draw, with_state)


def _denoising(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Objective:
    denoiser = from_config.denoiser(experiment, width, depth, unroll)
    settings = diffusion_objective(experiment.objective)

    def per_example_loss(
        params: Any, batch: Batch, t_B: TimeB, index_B: IndexB, key: jax.Array
    ) -> jax.Array:
        cond = {name: batch[name] for name in denoiser.conditioning}
        return validation.per_example_loss(
            denoiser.apply,
            params,
            batch["x"],
            cond,
            t_B,
            index_B,
            key,
            objective=settings,
        )

    return Objective(
        init=denoiser.init,
        loss=_plain_loss(
            denoise.draw,
            functools.partial(denoise.loss_of_rows, denoiser.apply, objective=settings),
        ),
        per_example_loss=per_example_loss,
        conditioning=denoiser.conditioning,
        image_tokens=denoiser.image_tokens,
        other_tokens=denoiser.other_tokens,
        embeddings=denoiser.embeddings,
    )


def _reconstruction(
    experiment: config.Experiment, width: int, depth: int, unroll: bool
) -> Objective:
    del unroll  # its blocks differ, so there is no stack
    network = from_config.autoencoder(experiment, width, depth)
    network = dataclasses.replace(
        network,
        encode=sharded.on_rows(network.encode),
        decode=sharded.on_rows(network.decode),
    )
    cfg, (H, W, _) = experiment.objective, experiment.data.shape

    def per_example_loss(
        params: Any, batch: Batch, t_B: TimeB, index_B: IndexB, key: jax.Array
    ) -> jax.Array:
        del t_B, index_B, key
        return reconstruct.per_example_loss(network, params, batch["x"])

    of_rows = functools.partial(
        reconstruct.loss_of_rows,
        network,
        reconstruction=cfg.reconstruction,
        kl_weight=cfg.kl_weight,
    )
    return Objective(
        init=network.init,
        loss=_plain_loss(functools.partial(reconstruct.draw, network), of_rows),
        per_example_loss=per_example_loss,
        conditioning=(),
        image_tokens=H * W // network.factor**2,
        other_tokens=0,
        embeddings=(),
    )


# The functions of the names in config.OBJECTIVES.
OBJECTIVES: dict[str, Build] = {
    "denoising": _denoising,
    "reconstruction": _reconstruction,
}


@functools.lru_cache(maxsize=64)
def diffusion_objective(cfg: config.ObjectiveConfig) -> denoise.DiffusionObjective:
    """The settings of the diffusion loss; samplers read schedule and prediction here.

    Args:
      cfg: a section that `config.resolve` has checked.
    """
    if cfg.schedule in config.DISCRETE_SCHEDULES:
        schedule = noise.SCHEDULES[cfg.schedule](steps=cfg.schedule_steps)
        if cfg.zero_terminal_snr:
            schedule = noise.zero_terminal_snr(schedule)
    else:
        schedule = noise.SCHEDULES[cfg.schedule]()

    def with_fields(make: Any, fields: tuple[str, ...], prefix: str) -> Any:
        return make(**{f.removeprefix(prefix): getattr(cfg, f) for f in fields})

    weighting, sampling = cfg.weighting, cfg.timestep_sampling
    return denoise.DiffusionObjective(
        schedule=schedule,
        prediction=cfg.prediction,
        weighting=with_fields(
            denoise.WEIGHTINGS[weighting],
            config.WEIGHTINGS[weighting],
            prefix=f"{weighting}_",
        ),
        timestep_sampling=with_fields(
            denoise.TIMESTEP_SAMPLING[sampling],
            config.TIMESTEP_SAMPLING[sampling],
            prefix="time_",
        ),
        time_shift=cfg.time_shift,
        caption_dropout=cfg.caption_dropout,
    )
