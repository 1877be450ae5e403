"""sample(...): from noise to samples with any network, in one compiled program.

Inversion, image-to-image and inpainting are the same loop on another grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scaling_ldm.diffusion.samplers import compiled_loop
from scaling_ldm.diffusion.samplers.diffusion_model import DiffusionModel
from scaling_ldm.diffusion.samplers.guidance import Guidance
from scaling_ldm.diffusion.samplers.planning import SamplingPlan, SourceImage, plan
from scaling_ldm.diffusion.samplers.solvers import Solver
from scaling_ldm.diffusion.samplers.start import (
    GivenNoise,
    Start,
    begin,
    sharding_of,
    widen,
)
from scaling_ldm.diffusion.samplers.time_grid import TimeGrid


class Trajectory(NamedTuple):
    """The state before the first step and after each step."""

    x: jax.Array  # [steps + 1, B, ...]
    t: np.ndarray  # [steps + 1] float64, as alpha and sigma
    alpha: np.ndarray
    sigma: np.ndarray
    nfe: np.ndarray  # [steps + 1], evaluations of each sample so far


class SamplingProgress(NamedTuple):
    """What a callback is given."""

    step: int  # steps done
    steps: int
    nfe: int  # evaluations of each sample so far
    x: jax.Array  # [B, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """What `sample` gives beside the samples.

    Attributes:
      trajectory: return (x, Trajectory). Otherwise no earlier state is kept.
      callback: called with a SamplingProgress every `callback_every` steps, and at the
        end.
      callback_every: at least 1.
    """

    trajectory: bool = False
    callback: Callable[[SamplingProgress], Any] | None = None
    callback_every: int = 1

    def __post_init__(self) -> None:
        if self.callback_every < 1:
            raise ValueError(
                f"callback_every must be at least 1, got {self.callback_every}"
            )


def sample(
    denoise: DiffusionModel,
    key: Any = None,
    *,
    shape: tuple[int, ...] | jax.ShapeDtypeStruct | None = None,
    cond: Any = None,
    uncond: Any = None,
    sampler: str | Solver = "dpm++2m",
    steps: int = 20,
    grid: TimeGrid | str | Sequence[float] | np.ndarray | None = None,
    guidance: Guidance | ArrayLike | None = None,
    noise: GivenNoise | ArrayLike | None = None,
    image: SourceImage | None = None,
    output: Output | None = None,
    **options: Any,
) -> Any:
    """Draws samples, or takes images part of the way or all the way back to noise.

    One program is compiled per network, batch shape, kind of guidance and build of the
    sampler (how many evaluations it combines, whether it draws noise). A change of
    steps (up to 1024 evaluations), grid, schedule, prediction, guidance scale or of a
    sampler's numbers needs no new compilation. Arithmetic is float32, or float64 if
    noise, image or shape is float64. A network may compute in a lower precision.

    Args:
      denoise: what `denoiser` made.
      key: one typed key, or one per sample [B]. Sample i uses fold_in(key, i) of one
        key. It depends on its own key alone, not on the batch or the devices.
      shape: [B, ...] of the samples, if noise and image do not give it. A
        jax.ShapeDtypeStruct with a NamedSharding splits the drawn samples over devices.
      cond, uncond: trees of arrays for the network; see Guidance.evaluation.
      sampler: a name of SAMPLERS, or a function from a TimeGrid to a SolverTable.
      steps: of the grid: one evaluation each, but 2 steps - 1 in all for heun.
      grid: the name of a spacing; a TimeGrid (see `grid`, which has more options); or
        times, most noise first and without the end. None: trailing on tables, karras
        for edm and heun, else uniform.
      guidance: a number, one per sample [B], or a Guidance. None: uncond is not read.
      noise: [B, ...], standard normal noise to start from; or a GivenNoise.
      image: for image-to-image, inpainting and inversion.
      output: a trajectory, a callback.
      options: of the sampler; see its function, such as `ddim_ddpm.ddim` (eta),
        `ddim_ddpm.ddpm` (variance), `dpm_solver.multistep`, `unipc.unipc`.

    Returns:
      x [B, ...]; or (x, Trajectory), if output asks for it.

    Raises:
      ValueError: unknown names or options; no key where noise is drawn; guidance
        without uncond; a prediction that lacks information at a point of the grid.
    """
    output = Output() if output is None else output
    settings = dict(sampler=sampler, steps=steps, grid=grid, guidance=guidance)
    todo = plan(denoise, **settings, image=image, **options)
    if guidance is not None and uncond is None:
        raise ValueError("guidance needs uncond, the unconditional input")
    if denoise.x0_transform is not None and todo.table.form != "x0":
        raise ValueError("x0_transform does not apply to an inversion")
    start = begin(todo, key, shape, noise, image)
    run, state = _compile(denoise, todo, start, guidance, cond, uncond)
    path = None
    if output.trajectory or output.callback:
        state, path = _run_by_steps(run, state, todo, output)
    else:
        state = run(state, 0, len(todo.table.rows))
    inverts = image is not None and image.invert
    x = state.x / todo.start_std if inverts else state.x
    return (x, path) if output.trajectory else x


Run = Callable[[compiled_loop.LoopState, int, int], compiled_loop.LoopState]


def _compile(
    denoise: DiffusionModel,
    todo: SamplingPlan,
    start: Start,
    guidance: Guidance | ArrayLike | None,
    cond: Any,
    uncond: Any,
) -> tuple[Run, compiled_loop.LoopState]:
    """((state, first row, row to stop before) -> state, the first state)."""
    table, x, dtype = todo.table, start.x, start.x.dtype
    how = guidance
    if how is not None and not isinstance(how, Guidance):
        how = Guidance(scale=how)
    guided = "none" if how is None else how.evaluated(cond, x.shape[0])
    build = compiled_loop.LoopBuild(
        history=table.history,
        saves=table.saves,
        stochastic=table.stochastic,
        unlimited=table.unlimited,
        learned_variance=table.learned_variance,
        guided=guided,
        interval=how is not None and todo.skips,
        channels=None if how is None else how.channels,
        inpaints=start.mask is not None,
        x0_transform=denoise.x0_transform,
    )
    inputs = compiled_loop.LoopInputs(
        params=denoise.params,
        cond=cond,
        uncond=_like(uncond, cond) if guided == "batched" else uncond,
        scale=None if how is None else _numbers(how.scale, dtype),
        rescale=None
        if how is None or how.rescale is None
        else _numbers(how.rescale, dtype),
        keys=start.keys,
        step_noise=start.step_noise,
        image=start.image,
        mask=start.mask,
        image_noise=start.initial,
    )
    if how is None:
        inputs = inputs._replace(uncond=None)
    packed = todo.packed(dtype)
    leaves = jax.tree.leaves((x, inputs))
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    # Inside somebody's jit the bounds are constants, so that one may differentiate.
    loop = compiled_loop.advance if traced else compiled_loop.compiled
    packed = jnp.asarray(packed) if traced else packed

    def run(
        state: compiled_loop.LoopState, first: int, stop: int
    ) -> compiled_loop.LoopState:
        return loop(denoise.network, build, state, packed, first, stop, inputs)

    return run, compiled_loop.begin(x, build)


def _run_by_steps(
    run: Run, state: compiled_loop.LoopState, todo: SamplingPlan, output: Output
) -> tuple[compiled_loop.LoopState, Trajectory | None]:
    """Runs to each step that the output asks for."""
    ends = [int(end) for end in todo.table.step_ends]
    path, nfe, done = [state.x], [0], 0
    for step, end in enumerate(ends, start=1):
        called = step % output.callback_every == 0 or step == len(ends)
        callback = output.callback if called else None
        if not output.trajectory and callback is None:
            continue
        state, done = run(state, done, end), end
        evaluations = _counted(state, todo, done)
        if output.trajectory:
            path.append(state.x)
            nfe.append(evaluations)
        if callback is not None:
            callback(SamplingProgress(step, len(ends), evaluations, state.x))
    if not output.trajectory:
        return state, None
    rows = todo.table.rows
    points = np.asarray([rows[0].at, *(rows[end - 1].to for end in ends)])
    t, alpha, sigma = points.T
    return state, Trajectory(jnp.stack(path), t, alpha, sigma, np.asarray(nfe))


def _counted(state: compiled_loop.LoopState, todo: SamplingPlan, rows: int) -> int:
    """Evaluations as the loop counted them, which must be the plan's."""
    planned = sum(todo.evaluations[:rows])
    if isinstance(state.nfe, jax.core.Tracer):
        return planned
    if int(state.nfe) != planned:
        raise RuntimeError(f"{int(state.nfe)} evaluations were run, {planned} planned")
    return planned


def _numbers(value: Any, dtype: Any) -> Any:
    """An array of a dtype; numbers stay on the host until the compiled call."""
    library = jnp if isinstance(value, jax.Array) else np
    return library.asarray(value, dtype)


def _like(uncond: Any, cond: Any) -> Any:
    """Unconditional arrays with the batch axis and the sharding of the conditional."""

    def match(u: Any, c: Any) -> jax.Array:
        u, sharding = widen(u, c.shape), sharding_of(c)
        return u if sharding is None else jax.device_put(u, sharding)

    return jax.tree.map(match, uncond, jax.tree.map(jnp.asarray, cond))
