"""The probe of a plan: what is said of two measured sizes, and that it measures."""

import dataclasses
import pathlib

import pytest

from scaling_ldm import config, records
from scaling_ldm.training import probe

STUDY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"


def spec_of(flops, steps):
    spec = records.read_plan(STUDY)[0]
    return dataclasses.replace(
        spec, flops_per_step=flops, steps=steps, planned_flops=float(flops * steps)
    )


def test_sizes_between_the_two_are_on_the_line():
    """100 steps each of 1, 2 and 4 ms: the middle one is not measured."""
    small, middle, large = (spec_of(f, 100) for f in (10**9, 2 * 10**9, 4 * 10**9))
    found = [
        probe.StepTime(spec=small, seconds=1e-3),
        probe.StepTime(spec=large, seconds=4e-3),
    ]
    assert found[0].flops_per_second == 1e12
    one, two, total = probe.lines(found, [small, middle, large] * 100, 4, "TPU v4")
    assert "1 ms a step  250 GFLOP/s per device" in one and "4 ms" in two
    assert "300 runs take 1:10 on 4 x TPU v4, without compilation" in total
    assert "config.plan.flops_per_second_per_device = 2.5e+11" in total


def test_the_cheapest_and_the_dearest_size_are_measured(tiny, monkeypatch, capsys):
    specs = [spec_of(f, 10) for f in (3 * 10**9, 10**9, 2 * 10**9)]
    asked = []
    monkeypatch.setattr(
        probe, "step_seconds", lambda e, spec, mesh: asked.append(spec) or 1e-3
    )
    probe.run(config.resolve(tiny), specs)
    assert asked == [specs[1], specs[0]]
    assert capsys.readouterr().err.count("probe  ") == 3
    asked.clear()
    probe.run(config.resolve(tiny), specs[:1] * 3)
    assert asked == [specs[0]]
    odd = dataclasses.replace(specs[0], batch_size=3)
    with pytest.raises(config.ConfigError, match="not divisible by the"):
        probe.run(config.resolve(tiny), [odd])


@pytest.mark.slow
@pytest.mark.parametrize("many", [1, 3])
def test_a_step_is_timed(tiny, many):
    import jax

    from scaling_ldm.stages import plan
    from scaling_ldm.training import mesh

    c = tiny.to_dict()
    c["train"]["steps_per_dispatch"] = many
    e = config.resolve(c)
    (spec, *_) = plan.plan(e)
    device_mesh = mesh.build(e.mesh, {})
    with jax.set_mesh(device_mesh):
        assert 0 < probe.step_seconds(e, spec, device_mesh) < 10
