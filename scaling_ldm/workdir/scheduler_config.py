"""What a scheduler_config.json of diffusers says: schedule, prediction, points of t.

Schedule and prediction are part of what a network has learnt. Tensors do not show them.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling_ldm import config
from scaling_ldm.diffusion import noise, samplers
from scaling_ldm.models import pretrained
from scaling_ldm.models.weights import autoencoder_kl, files
from scaling_ldm.training.objective import diffusion_objective

FILE = "scheduler_config.json"
FLOW = "FlowMatchEulerDiscreteScheduler"
TIME_SCALE = 1000  # our networks read t times this, published ones t itself
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
# What these take where a file does not say timestep_spacing; others take "linspace".
_LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
# What clips estimates of x0 to [-1, 1] unless a file says otherwise.
_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
# Of a spacing that reaches the data's end, these take one point more and leave it out.
_ONE_MORE = ("DPMSolver", "DEIS", "UniPC")
# Of a flow, another order of points than the ones below.
_FLOW_ONLY = {
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
    "stochastic_sampling": (False, None),
    "time_shift_type": ("exponential", None),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
}


_EULER: dict[str, Any] = {"sampler": "euler"}
# Without a limit on x0, this is euler.
_LIMITED_DDIM = {"sampler": "ddim", "keeps_epsilon": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A noise schedule, what its networks predict, and where they are evaluated.

    grid(steps, tokens) -> the points of a sampler of so many steps, for a picture of so
      many tokens.
    x0_transform: of estimates of x0, as `samplers.denoiser` takes it.
    sampler: its name and options, as `samplers.sample` takes them.
    """

    schedule: noise.Schedule
    prediction: str
    grid: Callable[[int, int], samplers.TimeGrid]
    x0_transform: Callable[[Any], Any] | None = None
    sampler: Mapping[str, Any] = dataclasses.field(default_factory=_EULER.copy)


def read(where: str, folder: pathlib.Path) -> Scheduler:
    """Reads the scheduler_config.json of a folder.

    Args:
      where: begins messages.

    Raises:
      ConfigError: it says a schedule that is not known here, or says none.
    """
    path = folder / FILE
    if not path.exists():
        raise config.ConfigError(f"{where}: no {path}, which says schedule and t")
    said = files.read_json(path)
    if said.get("_class_name") == FLOW:
        return _flow(path, said)
    return _table(path, said)


def beside(path: pathlib.Path) -> Scheduler | None:
    """That of the pipeline that a network's folder or file is of; None: not there.

    It is read from the folder, or from `scheduler` beside it, as pipelines have it.

    Raises:
      ConfigError: it says a schedule that is not known here.
    """
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent / "scheduler"):
        if (place / FILE).exists():
            return read(os.fspath(path), place)
    return None


def differences(path: pathlib.Path, experiment: config.Experiment) -> list[str]:
    """Where a network has learnt something else; a line each.

    It is compared with what is said beside the network: prediction and schedule, and
    scale and shift of the latents in vae/. What is not said is not compared.
    """
    found, there = [], beside(path)
    here = diffusion_objective(experiment.objective)
    vae = (path if path.is_dir() else path.parent).parent / "vae"
    if (vae / files.CONFIG).exists():
        latents = autoencoder_kl.from_config(files.config(vae))
        ours = pretrained.autoencoder_identity(experiment.encode.autoencoder)
        found += [
            f"{name} of latents: {getattr(latents, name)} there, {ours[name]} here"
            for name in ("scale", "shift")
            if name in ours and ours[name] != getattr(latents, name)
        ]
        if ours["name"] == "none":
            found.append("latents there, pictures here")
    if there is None:
        return found
    return found + [
        f"objective.{name}: {ours[0]} there, {ours[1]} here"
        for name, ours in {
            "prediction": (repr(there.prediction), repr(here.prediction)),
            "schedule": (there.schedule, here.schedule),
        }.items()
        if ours[0] != ours[1]
    ]


def _flow(path: pathlib.Path, said: Mapping[str, Any]) -> Scheduler:
    steps = said.get("num_train_timesteps", TIME_SCALE)
    if steps != TIME_SCALE:
        raise config.ConfigError(
            f"{path}: num_train_timesteps is {steps}, not {TIME_SCALE}"
        )
    for key, known in _FLOW_ONLY.items():
        if said.get(key) not in known:
            raise config.ConfigError(
                f"{path}: {key} is {said[key]!r}; known: {known[0]!r}"
            )
    schedule = noise.rectified_flow()

    def grid(steps: int, tokens: int) -> samplers.TimeGrid:
        if said.get("use_dynamic_shifting"):
            return samplers.grid(
                schedule, steps, "flow_shifted", shift=math.exp(_mu(said, tokens))
            )
        shift = said.get("shift", 1.0)
        # diffusers spaces them to its least t, 1 / 1000, shifted, and shifts them all.
        least = float(noise.shift_time(1 / TIME_SCALE, shift))
        times = noise.shift_time(np.linspace(1.0, least, steps), shift)
        return samplers.from_times(schedule, times)

    return Scheduler(schedule=schedule, prediction="flow", grid=grid)


def _mu(said: Mapping[str, Any], tokens: int) -> float:
    """ln of the shift, linear in the tokens of a picture."""
    low, high = said.get("base_shift", 0.5), said.get("max_shift", 1.15)
    few = said.get("base_image_seq_len", 256)
    many = said.get("max_image_seq_len", 4096)
    return low + (high - low) * (tokens - few) / (many - few)


def _table(path: pathlib.Path, said: Mapping[str, Any]) -> Scheduler:
    # Early configurations do not say it; there was no other then.
    prediction = said.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise config.ConfigError(
            f"{path}: prediction_type {prediction!r}; known: {', '.join(_PREDICTIONS)}"
        )
    schedule = _schedule(path, said)
    usual = "leading" if said.get("_class_name") in _LEADING else "linspace"
    spacing = said.get("timestep_spacing", usual)
    if spacing not in ("leading", "linspace", "trailing"):
        raise config.ConfigError(
            f"{path}: timestep_spacing {spacing!r}; known: leading, linspace, trailing"
        )
    options = {}
    if said.get("use_karras_sigmas"):
        spacing = "karras"
    if spacing == "leading":
        options["offset"] = said.get("steps_offset", 0)

    one_more = _multistep(said) and spacing in ("leading", "linspace")

    def grid(steps: int, tokens: int) -> samplers.TimeGrid:
        del tokens
        found = samplers.grid(schedule, steps + one_more, spacing, **options)
        times = [point.t for point in found.points[:steps]]
        return samplers.from_times(schedule, times)

    limit = _x0_transform(said)
    limited = limit is not None and said.get("_class_name") == "DDIMScheduler"
    return Scheduler(
        schedule=schedule,
        prediction=_PREDICTIONS[prediction],
        grid=grid,
        x0_transform=limit,
        sampler=_LIMITED_DDIM if limited else _EULER,
    )


def _x0_transform(said: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """The limit on estimates of x0, which samplers of diffusers apply at every step."""
    clips = str(said.get("_class_name")) in _CLIPPING
    if said.get("thresholding") and (clips or _multistep(said)):
        ratio = said.get("dynamic_thresholding_ratio", 0.995)
        return samplers.dynamic_threshold(
            ratio, 1.0, largest=said.get("sample_max_value", 1.0)
        )
    if clips and said.get("clip_sample", True):
        return samplers.clip(said.get("clip_sample_range", 1.0))
    return None


def _multistep(said: Mapping[str, Any]) -> bool:
    return str(said.get("_class_name")).startswith(_ONE_MORE)


def _schedule(path: pathlib.Path, said: Mapping[str, Any]) -> noise.Schedule:
    steps, kind = said.get("num_train_timesteps"), said.get("beta_schedule")
    ends = said.get("beta_start"), said.get("beta_end")
    if said.get("trained_betas") is not None:
        schedule = noise.from_betas(said["trained_betas"])
    elif kind == "squaredcos_cap_v2" and steps:
        schedule = noise.cosine(steps)
    elif kind in ("linear", "scaled_linear") and steps and None not in ends:
        schedule = noise.SCHEDULES[kind](steps, *ends)
    else:
        raise config.ConfigError(
            f"{path}: beta_schedule {kind!r}, beta_start and beta_end {ends}, "
            f"num_train_timesteps {steps}; known: linear, scaled_linear with all of "
            f"these, squaredcos_cap_v2, trained_betas, {FLOW}"
        )
    if said.get("rescale_betas_zero_snr"):
        schedule = noise.zero_terminal_snr(schedule)
    return schedule
