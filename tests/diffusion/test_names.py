"""The tables of functions have the names of config, in config's order."""

import pytest

from scaling_ldm import config
from scaling_ldm.diffusion import noise, prediction, samplers
from scaling_ldm.diffusion.losses import denoise, reconstruct

TABLES = {
    "SCHEDULES": noise.SCHEDULES,
    "PREDICTIONS": prediction.PREDICTIONS,
    "SAMPLERS": samplers.SAMPLERS,
    "SPACINGS": samplers.SPACINGS,
    "WEIGHTINGS": denoise.WEIGHTINGS,
    "TIMESTEP_SAMPLING": denoise.TIMESTEP_SAMPLING,
    "RECONSTRUCTION": reconstruct.DISTANCES,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_names_of_config(name):
    assert list(TABLES[name]) == list(getattr(config, name))
