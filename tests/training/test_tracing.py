"""The garbage collector runs seldom while a plan is made, and as before afterwards."""

import gc

import pytest

from scaling_ldm import config
from scaling_ldm.stages import plan
from scaling_ldm.training import tracing, train_step


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_thresholds_come_back_after_an_error():
    gc.set_threshold(700, 11, 12)
    with pytest.raises(ValueError, match="stop"), tracing.collecting_seldom():
        assert gc.get_threshold()[0] > 10_000
        raise ValueError("stop")
    assert gc.get_threshold() == (700, 11, 12)


@pytest.mark.parametrize("chosen", [0, 10**7])
def test_a_collector_that_is_off_or_rarer_stays_so(chosen):
    gc.set_threshold(chosen, 11, 12)
    with tracing.collecting_seldom():
        assert gc.get_threshold() == (chosen, 11, 12)


def test_a_plan_counts_its_networks_with_few_collections(tiny, monkeypatch):
    gc.set_threshold(700, 11, 12)
    seen, cost = [], train_step.cost

    def spied(*args):
        seen.append(gc.get_threshold()[0])
        return cost(*args)

    monkeypatch.setattr(train_step, "cost", spied)
    plan._size.cache_clear()  # of what other tests have counted
    assert plan.plan(config.resolve(tiny))
    assert seen and min(seen) > 10_000
    assert gc.get_threshold() == (700, 11, 12)
