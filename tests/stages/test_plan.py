"""Plans: budgets met, sizes around the optimum, refusals before anything runs."""

import math

import pytest
from processes import run_main

from scaling_ldm import config, records
from scaling_ldm.flops import peaks
from scaling_ldm.stages import plan


def changed(tiny, **plan_fields):
    c = tiny.copy_and_resolve_references()
    with c.unlocked():
        c.plan.update(plan_fields)
    return config.resolve(c)


def test_steps_meet_the_budget_and_counts_agree(tiny):
    e = changed(
        tiny,
        budgets_flops=(3e8, 3e9),
        sizes=((8, 1), (16, 1), (16, 2), (24, 2)),
        sizes_per_budget=3,
        minimum_steps=50,
    )
    rows = plan.plan(e)
    assert len(rows) == 6
    for r in rows:
        assert abs(r.planned_flops / r.budget_flops - 1) <= 0.01
        assert r.planned_flops == r.steps * r.flops_per_step
        assert r.images == r.steps * e.train.batch_size
        assert r.image_tokens == r.images * 4  # (8 / 4)^2
        assert r.text_tokens == r.images * 5  # 4 words and the time
        assert r.tokens == r.image_tokens + r.text_tokens
        assert r.heads == r.width // 8
        assert r.hours == pytest.approx(r.planned_flops / 1e9 / 64 / 3600)
        assert r.params > r.params_without_embeddings
    assert len({r.run_id for r in rows}) == 6


def test_sizes_surround_the_expected_optimum(tiny):
    sizes = tuple((8 * n, 1) for n in range(1, 7))
    e = changed(
        tiny, sizes=sizes, sizes_per_budget=0, minimum_steps=1, budgets_flops=(1e10,)
    )
    ladder = [r.params_without_embeddings for r in plan.plan(e)]
    assert ladder == sorted(ladder)
    target = ladder[3]
    e = changed(
        tiny,
        sizes=sizes,
        sizes_per_budget=3,
        minimum_steps=1,
        budgets_flops=(1e10,),
        expected_coef=target / 1e10**0.5,
        expected_exponent=0.5,
    )
    assert [r.params_without_embeddings for r in plan.plan(e)] == ladder[2:5]


def test_a_short_run_is_refused_by_name(tiny):
    with pytest.raises(config.ConfigError) as e:
        plan.plan(changed(tiny, budgets_flops=(1e6,), minimum_steps=50))
    text = str(e.value)
    assert "1e+06 FLOPs, 16 x 2" in text
    assert "fewer than config.plan.minimum_steps = 50" in text
    assert "lower train.batch_size" in text


def test_a_budget_that_whole_steps_miss_is_refused(tiny):
    per_step = plan.plan(changed(tiny))[0].flops_per_step
    with pytest.raises(config.ConfigError, match="more than 1% from the budget"):
        plan.plan(changed(tiny, budgets_flops=(10.4 * per_step,), minimum_steps=10))


def test_unknown_accelerators_need_a_measured_speed(tiny):
    e = changed(tiny, accelerator="abacus", flops_per_second_per_device=0.0)
    with pytest.raises(config.ConfigError, match="known: .*h100-sxm"):
        plan.plan(e)


def test_hours_follow_the_stated_utilisation(tiny):
    e = changed(
        tiny, accelerator="t4", flops_per_second_per_device=0.0, utilisation=0.5
    )
    row = plan.plan(e)[0]
    peak = peaks.PEAKS["t4"].flops_per_second["float32"]
    assert row.hours == pytest.approx(row.planned_flops / (0.5 * peak * 64 * 3600))


def test_learning_rate_policies(tiny):
    c = tiny.copy_and_resolve_references()
    c.unlock()
    c.optimizer.learning_rate_policy = "by_width"
    c.optimizer.policy_width = 32
    assert plan.plan(config.resolve(c))[0].learning_rate == pytest.approx(1e-2 * 2)
    c.optimizer.learning_rate_policy, c.optimizer.policy_width = "fixed", 64
    assert plan.plan(config.resolve(c))[0].learning_rate == 1e-2


def test_memory_counts_state_and_activations(tiny):
    row = plan.plan(changed(tiny))[0]
    # parameters, EMA, two Adam moments and gradients, float32, and two counters
    assert 0 <= row.state_bytes - 5 * 4 * row.params <= 16
    assert row.activation_bytes > 8 * 4 * row.depth * 9 * row.width  # residual stream
    twice = changed(tiny, devices=128)
    assert plan.plan(twice)[0].memory_bytes_per_device < row.memory_bytes_per_device


def test_remat_keeps_fewer_activations_and_the_same_model_flops(tiny):
    c = tiny.copy_and_resolve_references()
    with c.unlocked():
        c.model.remat = True
    plain, remat = plan.plan(changed(tiny))[0], plan.plan(config.resolve(c))[0]
    assert remat.activation_bytes < 0.7 * plain.activation_bytes
    assert remat.flops_per_step == plain.flops_per_step
    assert remat.hardware_flops_per_step > plain.hardware_flops_per_step


def test_the_plan_round_trips_and_prints_every_column(tiny, tmp_path):
    e = changed(tiny)
    rows = plan.plan(e)
    plan.write(rows, tmp_path)
    assert records.read_jsonl(tmp_path / "runs.jsonl") == rows
    before = (tmp_path / "runs.jsonl").stat()
    plan.write(rows, tmp_path)  # by another command: others may be reading it
    after = (tmp_path / "runs.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    text = plan.table(e, rows, first=3).splitlines()
    assert text[2].split()[0] == "3"
    for word in ("budget", "params", "FLOPs/step", "steps", "images", "hours"):
        assert word in text[0]


def test_planning_a_sweep_touches_no_accelerator(tmp_path):
    """The plan stage runs where the platform asked for does not exist at all."""
    flags = f"--workdir={tmp_path / 'w'}", "--stages=plan", "--run=1"
    run_main("--config=experiments/tiny.py", *flags, JAX_PLATFORMS="tpu")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (5.6e9, "5.6G")]
)
def test_si(value, text):
    assert plan.si(value) == text
    assert math.isfinite(value)
