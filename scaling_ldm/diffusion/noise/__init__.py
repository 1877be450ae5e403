"""Noise schedules: how much signal and noise there is at time t; numpy and jax only.

A noisy picture is x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I). Time grows from
data to noise. A schedule is determined by its log signal-to-noise ratio

    logsnr(t) = log(alpha(t)^2 / sigma(t)^2)

and by one of three relations between alpha and sigma:

    variance preserving   alpha^2 + sigma^2 = 1
    rectified flow        alpha + sigma = 1
    variance exploding    alpha = 1

The argument decides the arithmetic. jax arrays give float32 (or wider, if they are
wider) inside and outside jit. Python numbers and numpy arrays give numpy float64, from
which samplers compute their coefficients. Nothing is computed in bfloat16.

| schedule | t of data ... noise | source |
|---|---|---|
| `linear` | 0 ... steps - 1 | Ho 2020 |
| `scaled_linear` | 0 ... steps - 1 | Rombach 2022 |
| `cosine` | 0 ... steps - 1 | Nichol & Dhariwal 2021 |
| `vp_sde`, `vp_cosine` | 0 ... 1 | Song 2021, Salimans & Ho 2022 |
| `rectified_flow` | 0 ... 1 | Liu 2022, Lipman 2022 |
| `edm` | sigma itself | Karras 2022 |

May import: nothing else of the library.
"""

from collections.abc import Callable

from scaling_ldm.diffusion.noise.continuous import (
    Edm,
    RectifiedFlow,
    edm,
    rectified_flow,
    vp_cosine,
    vp_sde,
)
from scaling_ldm.diffusion.noise.discrete import (
    Discrete,
    cosine,
    from_betas,
    linear,
    scaled_linear,
    zero_terminal_snr,
)
from scaling_ldm.diffusion.noise.schedule import Real, Schedule, shift_time

# The functions of the names in config.SCHEDULES.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "vp_sde": vp_sde,
    "vp_cosine": vp_cosine,
    "rectified_flow": rectified_flow,
    "edm": edm,
}

__all__ = [
    "SCHEDULES",
    "Discrete",
    "Edm",
    "Real",
    "RectifiedFlow",
    "Schedule",
    "cosine",
    "edm",
    "from_betas",
    "linear",
    "rectified_flow",
    "scaled_linear",
    "shift_time",
    "vp_cosine",
    "vp_sde",
    "zero_terminal_snr",
]
