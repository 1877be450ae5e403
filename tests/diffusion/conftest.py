"""What the tests of diffusion share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Without the check of annotations, which would refuse wrong types first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
