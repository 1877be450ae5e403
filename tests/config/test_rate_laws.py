"""Laws of the learning rate: their constants, and what contradicts them."""

import re

import pytest

from scaling_ldm import config
from scaling_ldm.config import rate_laws


def resolve(**changes):
    c = config.default()
    c.optimizer.update(changes)
    return config.resolve(c).optimizer


AT = (1e6, 1e9, 256.0)


def test_without_a_law_the_rate_is_as_given():
    assert rate_laws.rate(resolve(learning_rate=3e-4), 1e6, 1e9, 256) == 3e-4


def test_step_law_is_that_of_its_paper():
    """Li et al. 2025, arXiv 2503.04715: 1.79 N^-0.713 D^0.307."""
    got = rate_laws.rate(resolve(rate_law="step_law"), 1e9, 1e11, 512)
    assert got == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert got == rate_laws.rate(resolve(rate_law="step_law"), 1e9, 1e11, 64)


def test_a_law_of_ratios_has_the_given_rate_at_its_point():
    cfg = resolve(rate_law="marin", rate_law_at=AT, learning_rate=2e-3)
    assert rate_laws.rate(cfg, *AT) == 2e-3
    # Four times the batch: twice the rate; 2^10 times the tokens: an eighth.
    assert rate_laws.rate(cfg, 1e6, 1e9, 1024) == pytest.approx(4e-3)
    assert rate_laws.rate(cfg, 9e9, 1024e9, 256) == pytest.approx(2.5e-4)
    steps = resolve(rate_law="step_law", rate_law_at=AT, learning_rate=2e-3)
    assert rate_laws.rate(steps, 1e7, 1e9, 9) == pytest.approx(2e-3 * 10**-0.713)


def test_a_law_of_ones_own():
    cfg = resolve(rate_law="own", rate_law_constants=(2, -0.5, 0.25, 0.5))
    assert rate_laws.rate(cfg, 1e4, 1e8, 64) == pytest.approx(2 * 1e-2 * 1e2 * 8)


def test_the_laws_are_those_of_the_table_of_names():
    assert {"none", *rate_laws.PUBLISHED, "own"} == config.RATE_LAWS.keys()
    assert all(law.of == "language models" for law in rate_laws.PUBLISHED.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate_law": "steplaw"}, "did you mean 'step_law'?"),
        ({"rate_law": "own"}, "needs config.optimizer.rate_law_constants = (a, b, c"),
        ({"rate_law": "own", "rate_law_constants": (1.0, 2.0)}, "given (1.0, 2.0)"),
        (
            {"rate_law": "own", "rate_law_constants": (-1.0, 0.0, 0.0, 0.0)},
            "with a > 0, given (-1.0",
        ),
        (
            {"rate_law": "marin"},
            "has no coefficient: give config.optimizer.rate_law_at",
        ),
        ({"rate_law": "marin", "rate_law_at": (1.0, 2.0)}, "three positive numbers"),
        ({"rate_law": "marin", "rate_law_at": (1.0, 0.0, 2.0)}, "three positive numb"),
        (
            {"rate_law": "step_law", "learning_rate": 1e-3},
            "learning_rate = 0.001 is not",
        ),
        ({"rate_law_at": AT}, "rate_law_at = (1000000.0, 1000000000.0, 256.0) is not"),
        (
            {"rate_law": "step_law", "learning_rate_policy": "by_width"},
            "both change the rate with the size",
        ),
        (
            {"rate_law": "step_law", "learning_rate_policy": "mup"},
            "both change the rate with the size",
        ),
    ],
)
def test_what_contradicts_a_law_is_refused(changes, said):
    with pytest.raises(config.ConfigError, match=re.escape(said)):
        resolve(**changes)


def test_a_law_of_batch_and_length_goes_with_a_policy_of_width():
    cfg = resolve(rate_law="marin", rate_law_at=AT, learning_rate_policy="mup")
    assert rate_laws.rate(cfg, 5.0, 1e9, 256) == cfg.learning_rate
