"""Plans, runs and reads scaling studies of latent diffusion models.

The public names are the modules of `PUBLIC` and the functions of `FUNCTIONS`, such as
`scaling_ldm.load`. Each is imported when it is first used:
`from scaling_ldm import noise, samplers` loads these two modules and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling_ldm import config as config
    from scaling_ldm import flops as flops
    from scaling_ldm import frontier as frontier
    from scaling_ldm import metrics as metrics
    from scaling_ldm import records as records
    from scaling_ldm.diffusion import losses as losses
    from scaling_ldm.diffusion import noise as noise
    from scaling_ldm.diffusion import prediction as prediction
    from scaling_ldm.diffusion import samplers as samplers
    from scaling_ldm.laws import fit as fit
    from scaling_ldm.models import denoisers as denoisers
    from scaling_ldm.models import encoders as encoders
    from scaling_ldm.models import pretrained as pretrained
    from scaling_ldm.models import weights as weights
    from scaling_ldm.training import averages as averages
    from scaling_ldm.training import objective as objective
    from scaling_ldm.workdir.loading import load as load

# Public name -> its module. A name is public if it is here or if one of these modules
# hands it on; every other name is private.
PUBLIC = {
    "averages": "scaling_ldm.training.averages",
    "config": "scaling_ldm.config",
    "denoisers": "scaling_ldm.models.denoisers",
    "encoders": "scaling_ldm.models.encoders",
    "fit": "scaling_ldm.laws.fit",
    "flops": "scaling_ldm.flops",
    "frontier": "scaling_ldm.frontier",
    "losses": "scaling_ldm.diffusion.losses",
    "metrics": "scaling_ldm.metrics",
    "noise": "scaling_ldm.diffusion.noise",
    "objective": "scaling_ldm.training.objective",
    "prediction": "scaling_ldm.diffusion.prediction",
    "pretrained": "scaling_ldm.models.pretrained",
    "records": "scaling_ldm.records",
    "samplers": "scaling_ldm.diffusion.samplers",
    "weights": "scaling_ldm.models.weights",
}

# Public function -> the module that has it.
FUNCTIONS = {"load": "scaling_ldm.workdir.loading"}

__all__ = [*PUBLIC, *FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        function = getattr(importlib.import_module(FUNCTIONS[name]), name)
        globals()[name] = function
        return function
    if name not in PUBLIC:
        raise AttributeError(
            f"module 'scaling_ldm' has no attribute {name!r}; it has "
            f"{', '.join(sorted(__all__))}"
        )
    found = importlib.import_module(PUBLIC[name])
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
