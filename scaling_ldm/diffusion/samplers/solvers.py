"""The table of samplers: the name of each, and the function of its coefficients.

To add a sampler: write the function beside its relatives, add its name to
config/names.py, and add both here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

from scaling_ldm.diffusion.samplers import ddim_ddpm, dpm_solver, euler_heun, unipc
from scaling_ldm.diffusion.samplers.solver_table import SolverTable
from scaling_ldm.diffusion.spelling import did_you_mean

Solver = Callable[..., SolverTable]  # (TimeGrid, options by keyword) -> SolverTable

# The functions of the names in config.SAMPLERS.
SAMPLERS: dict[str, Solver] = {
    "ddim": ddim_ddpm.ddim,
    "ddpm": ddim_ddpm.ddpm,
    "euler": euler_heun.euler,
    "heun": euler_heun.heun,
    "dpm++1": dpm_solver.dpm1,
    "dpm++2m": dpm_solver.dpm2m,
    "dpm++3m": dpm_solver.dpm3m,
    "dpm++2s": dpm_solver.dpm2s,
    "dpm++3s": dpm_solver.dpm3s,
    "sde-dpm++1": dpm_solver.sde_dpm1,
    "sde-dpm++2m": dpm_solver.sde_dpm2m,
    "sde-dpm++3m": dpm_solver.sde_dpm3m,
    "sde-dpm++2s": dpm_solver.sde_dpm2s,
    "unipc1": unipc.unipc1,
    "unipc2": unipc.unipc2,
    "unipc3": unipc.unipc3,
}

# Samplers with a default spacing of their own. Heun's method steps in sigma / alpha; an
# even grid in t gives it very long first steps there.
SPACING_OF = {"heun": "karras"}


@functools.lru_cache(maxsize=256)
def find(sampler: str | Solver, options: tuple[str, ...]) -> Solver:
    """The function of a sampler, after a check that it takes these options.

    Args:
      sampler: a name of SAMPLERS, or such a function itself.
      options: names of keyword arguments.

    Raises:
      ValueError: an unknown sampler or option; the message lists the known ones.
    """
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise ValueError(
            f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}"
            + did_you_mean(sampler, SAMPLERS)
        )
    solver = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    fixed = solver.keywords if isinstance(solver, functools.partial) else {}
    known = [
        name
        for name, parameter in inspect.signature(solver).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in fixed
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"sampler {sampler!r} has no option {', '.join(unknown)}; its options: "
            f"{', '.join(known) or 'none'}{_remedy(unknown[0], known)}"
        )
    return solver


# Fields of other arguments, which a user may pass to `sample` by mistake.
_FIELD_OF = {
    "strength": "SourceImage",
    "mask": "SourceImage",
    "invert": "SourceImage",
    "initial": "GivenNoise",
    "trajectory": "Output",
    "callback": "Output",
    "x0_transform": "denoiser",
}


def _remedy(option: str, known: Sequence[str]) -> str:
    if option in _FIELD_OF:
        return f". samplers.{_FIELD_OF[option]} takes {option}"
    return did_you_mean(option, [*known, "guidance", "steps", "grid", "noise", "image"])
