"""Plans: budgets met, sizes around the optimum, refusals before anything runs."""

import json
import math
import pathlib
from types import SimpleNamespace

import pytest
from processes import run_main

from scaling_ldm import config, records
from scaling_ldm.evaluation import planned_metrics
from scaling_ldm.flops import peaks
from scaling_ldm.stages import plan
from scaling_ldm.training import train_step
from scaling_ldm.workdir import plan_table


def changed(tiny, **plan_fields):
    c = tiny.copy_and_resolve_references()
    with c.unlocked():
        c.plan.update(plan_fields)
    return config.resolve(c)


STORED = pathlib.Path(__file__).parents[1] / "golden" / "tiny.json"
RATE = "optimizer.learning_rate"


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


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("abacus", "float32", "for float32; known: .*h100-sxm"),
        ("v5e", "bfloat16", "did you mean tpu-v5e?"),
        ("H100", "bfloat16", "did you mean h100-sxm or h100-pcie or h100-nvl?"),
        ("tpu-v5q", "bfloat16", "did you mean tpu-v5p?"),
        ("tpu-v5e", "float32", "no published peak for float32; known: a100"),
        ("", "bfloat16", "for bfloat16; known:"),
    ],
)
def test_an_unknown_accelerator_is_refused_before_anything_is_counted(
    tiny, monkeypatch, name, dtype, said
):
    monkeypatch.setattr(plan, "_size", lambda *_: pytest.fail("counted first"))
    c = config.to_config_dict(
        changed(tiny, accelerator=name, flops_per_second_per_device=0.0)
    )
    c.model.compute_dtype = dtype
    with pytest.raises(config.ConfigError, match=said):
        plan.plan(config.resolve(c))


@pytest.mark.parametrize(("fsdp", "devices"), [(64, 1), (3, 1), (3, 64)])
def test_devices_that_cannot_share_the_parameters_are_refused(
    tiny, monkeypatch, fsdp, devices
):
    """Of a CPU the plan states cores or hosts; the run's own devices are checked."""
    monkeypatch.setattr(plan, "_size", lambda *_: pytest.fail("counted first"))
    c = config.to_config_dict(changed(tiny, devices=devices))
    c.mesh.fsdp = fsdp
    said = f"config.mesh.fsdp = {fsdp} does not divide config.plan.devices = {devices}"
    with pytest.raises(config.ConfigError, match=said):
        plan.plan(config.resolve(c))
    c.plan.accelerator = "2-core CPU"
    with pytest.raises(pytest.fail.Exception, match="counted first"):
        plan.plan(config.resolve(c))


def test_what_is_known_without_counting_is_refused_at_once(tiny):
    e = changed(
        tiny,
        accelerator="v5e",
        flops_per_second_per_device=0.0,
        steps=3,
        budgets_flops=(),
        minimum_steps=50,
        axes=(("model.norm", ("layer", "rmss")),),
    )
    with pytest.raises(config.ConfigError) as error:
        plan.plan(e)
    text = str(error.value)
    assert "config.plan.steps = 3" in text and "'v5e'" in text
    assert "did you mean 'rms'" in text


def test_short_runs_and_values_of_no_run_are_refused_at_once(tiny):
    e = changed(
        tiny,
        sizes=((16, 2), (16, 1)),
        expected_coef=1e-9,  # the smaller one
        budgets_flops=(1e6,),
        minimum_steps=50,
        axes=(("train.seed", (0, 1)),),
        axes_only=(("train.seed", (("sizes", ((16, 2),)),)),),
    )
    with pytest.raises(config.ConfigError) as error:
        plan.plan(e)
    assert "no run has train.seed 1" in str(error.value)
    assert "fewer than config.plan.minimum_steps = 50" in str(error.value)


def test_a_metric_that_no_run_will_have_is_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_size", lambda *_: pytest.fail("counted first"))
    c = config.to_config_dict(changed(tiny))
    c.fit.metrics = ("loss", "fd_lite")
    with pytest.raises(config.ConfigError, match="no run will have fd_lite; .*loss"):
        plan.plan(config.resolve(c), tmp_path)
    c.evaluate.network = "lite0"
    with pytest.raises(config.ConfigError, match="did you mean fd_lite0?"):
        plan.plan(config.resolve(c), tmp_path)
    c.fit.metrics = ("loss", "loss_t9", "train_loss_smoothed", "fd_lite0")
    assert planned_metrics.of_no_run(config.resolve(c), tmp_path) == []


def test_a_metric_that_was_measured_before_is_known(tiny, monkeypatch, tmp_path):
    c = config.to_config_dict(changed(tiny))
    c.fit.metrics = ("fid",)
    (tmp_path / "runs.jsonl").write_text("")
    row = SimpleNamespace(metric="fid")
    monkeypatch.setattr(records, "read_table", lambda _: [row])
    assert planned_metrics.of_no_run(config.resolve(c), tmp_path) == []
    assert len(planned_metrics.of_no_run(config.resolve(c), None)) == 1


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


def test_rates_by_a_law_of_size_length_and_batch(tiny):
    c = tiny.copy_and_resolve_references()
    c.unlock()
    c.optimizer.rate_law, c.optimizer.learning_rate = "own", 1e-4
    c.optimizer.rate_law_constants = (3.0, -0.5, 0.25, -0.125)
    for row in plan.plan(config.resolve(c)):
        n, d, b = row.params_without_embeddings, row.tokens, row.batch_size
        wanted = 3.0 * n**-0.5 * d**0.25 * b**-0.125
        assert row.learning_rate == pytest.approx(wanted, rel=1e-9)


def test_memory_counts_state_and_activations(tiny):
    row = plan.plan(changed(tiny))[0]
    # parameters, EMA, two Adam moments and gradients, float32, and two counters
    assert 0 <= row.state_bytes - 5 * 4 * row.params <= 16
    assert row.activation_bytes > 8 * 4 * row.depth * 9 * row.width  # residual stream
    twice = changed(tiny, devices=128)
    assert plan.plan(twice)[0].memory_bytes_per_device < row.memory_bytes_per_device


def test_memory_counts_both_averages_of_the_default(tiny):
    c = tiny.copy_and_resolve_references()
    with c.unlocked():
        c.optimizer.averages = config.default().optimizer.averages
    one, (row,) = plan.plan(changed(tiny))[0], plan.plan(config.resolve(c))
    assert row.state_bytes - one.state_bytes == 4 * row.params
    assert row.memory_bytes_per_device > one.memory_bytes_per_device


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
    text = plan_table.table(e, rows, first=3).splitlines()
    assert text[2].split()[0] == "3"
    for word in ("budget", "params", "FLOPs/step", "steps", "images", "time"):
        assert word in text[0]


def test_planning_a_sweep_touches_no_accelerator(tmp_path):
    """The plan stage runs where the platform asked for does not exist at all."""
    flags = f"--workdir={tmp_path / 'w'}", "--stages=plan", "--run=1"
    flags += ("--config.plan.sizes=((16, 1),)",)
    run_main("--config=experiments/tiny.py", *flags, JAX_PLATFORMS="tpu")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (5.6e9, "5.6G")]
)
def test_si(value, text):
    assert plan_table.si(value) == text
    assert math.isfinite(value)


def test_without_axes_a_plan_is_as_it_was():
    """Against the plan of experiments/tiny.py that 0.1.0 stored."""
    rows = plan.plan(config.resolve(config.load("experiments/tiny.py")))
    stored = json.loads(STORED.read_text())["plan"]
    new = {"overrides": {}, "group": "", "pretraining_flops": 0.0}
    new |= {"smaller_budgets": [], "branch_steps": [], "rate_source": ""}
    new |= {"trunk": "", "trunk_steps": 0, "shared_steps": 0}
    assert [records.to_json(row) for row in rows] == [new | row for row in stored]
    assert records.from_json(stored, records.FIRST) == tuple(rows)


def test_every_combination_is_a_run_of_its_own_experiment(tiny):
    """Each row is the row of a plan without axes, with the values set."""
    e = changed(
        tiny,
        budgets_flops=(3e9,),
        sizes=((16, 1), (8, 1)),
        sizes_per_budget=2,
        axes=(
            (f"{RATE},train.batch_size", ((1e-2, 8), (2e-3, 16))),
            ("train.seed", (0, 1)),
            ("model.architecture", ("in_context", "cross_attention")),
        ),
    )
    rows = plan.plan(e)
    assert len(rows) == len({r.run_id for r in rows}) == 16
    assert len({r.recipe_hash for r in rows}) == 8
    assert len({r.group for r in rows}) == 4
    assert rows[-1].run_id == "3.000e09-16x1-cross_attention-lr2e-3-batch16-seed1"
    for row in (rows[0], rows[3], rows[-1]):
        c = tiny.copy_and_resolve_references()
        c.plan.sizes, c.plan.budgets_flops = ((row.width, row.depth),), (3e9,)
        for path, value in row.overrides.items():
            section, name = path.split(".")
            c[section][name] = value
        (same,) = plan.plan(config.resolve(c))
        ours, theirs = records.to_json(row), records.to_json(same)
        for field in ("run_id", "overrides", "group"):
            del ours[field], theirs[field]
        assert ours == theirs
    text = plan_table.table(e, rows).splitlines()
    assert RATE in text[0] and "model.architecture" in text[0]
    assert "cross_attention" in text[1 + len(rows)]
    plain = plan_table.table(changed(tiny), plan.plan(changed(tiny))).splitlines()
    assert "seed" not in plain[0]


def test_axes_of_some_budgets_and_sizes(tiny):
    e = changed(
        tiny,
        budgets_flops=(3e8, 6e8),
        sizes=((16, 2), (16, 1)),
        sizes_per_budget=2,
        axes=(("train.seed", (0, 1, 2)),),
        axes_only=(("train.seed", (("budgets", (6e8,)), ("sizes", ((16, 2),)))),),
    )
    found = [(r.budget_flops, r.depth, r.seed) for r in plan.plan(e)]
    once = [(3e8, 1, 0), (3e8, 2, 0), (6e8, 1, 0)]
    assert sorted(found) == sorted([*once, *((6e8, 2, seed) for seed in (0, 1, 2))])


def test_a_value_that_no_run_would_have_is_refused(tiny):
    """The budget takes one size, and another is asked for."""
    e = changed(
        tiny,
        sizes=((16, 2), (16, 1)),
        expected_coef=1e-9,  # the smaller one
        axes=(("train.seed", (0, 1)),),
        axes_only=(("train.seed", (("sizes", ((16, 2),)),)),),
    )
    with pytest.raises(config.ConfigError, match="no run has train.seed 1"):
        plan.plan(e)


def test_rows_that_an_axis_makes_impossible_are_refused_together(tiny):
    e = changed(
        tiny,
        sizes=((16, 2), (24, 1)),
        sizes_per_budget=2,
        axes=(
            ("model.head_dim", (8, 16)),
            ("model.norm", ("layer", "rmss")),
            ("train.batch_size", (8, 6)),
        ),
    )
    c = config.to_config_dict(e)
    c.mesh.fsdp = 4
    with pytest.raises(config.ConfigError) as error:
        plan.plan(config.resolve(c))
    lines = str(error.value).splitlines()
    assert lines[0] == "this plan cannot run:" and len(lines) == 4
    (head,) = [line for line in lines if "does not divide the widths [24]" in line]
    assert "24 x 1, model.head_dim 16, model.norm layer" in head
    assert "16 x 2" not in head and "head_dim 8" not in head
    (norm,) = [line for line in lines if "did you mean 'rms'" in line]
    assert norm.count("model.norm rmss") == 8
    (batch,) = [line for line in lines if "not divisible by the 4 devices" in line]
    assert batch.count("train.batch_size 6") == 8


def test_an_impossible_row_that_is_restricted_away_is_not_missed(tiny):
    e = changed(
        tiny,
        sizes=((16, 2), (24, 1)),
        sizes_per_budget=0,
        axes=(("model.head_dim", (8, 16)),),
        axes_only=(("model.head_dim", (("sizes", ((16, 2),)),)),),
    )
    found = {(r.width, r.overrides["model.head_dim"]) for r in plan.plan(e)}
    assert found == {(24, 8), (16, 8), (16, 16)}


def test_budgets_that_print_alike_are_kept_apart(tiny):
    near = 3.0004e8
    e = changed(tiny, budgets_flops=(3e8, near))
    assert [r.run_id for r in plan.plan(e)] == ["3.000e08-16x2", "3.0004e08-16x2"]
    e = changed(tiny, budgets_flops=(near,))
    assert [r.run_id for r in plan.plan(e)] == ["3.000e08-16x2"]


def test_axes_with_the_same_steps_for_all(tiny):
    e = changed(tiny, steps=20, budgets_flops=(), axes=(("model.mlp_ratio", (4, 2)),))
    rows = plan.plan(e)
    assert [r.steps for r in rows] == [20, 20]
    assert rows[0].budget_flops > rows[1].budget_flops
    assert rows[1].run_id.endswith("-16x2-mlp_ratio2")


def test_runs_that_differ_in_seed_and_rate_are_traced_once(tiny, monkeypatch):
    traced = []
    size = plan._size
    monkeypatch.setattr(plan, "_size", lambda *a: traced.append(a) or size(*a))
    e = changed(tiny, axes=(("train.seed", (0, 1, 2)), (RATE, (1e-2, 2e-3))))
    assert len(plan.plan(e)) == 6 and len(traced) == 1


def test_plans_of_one_network_count_it_once(tiny, monkeypatch):
    counted, cost = [], train_step.cost
    monkeypatch.setattr(train_step, "cost", lambda *a: counted.append(a) or cost(*a))
    plan._size.cache_clear()  # of what other tests have counted
    for budgets in ((6e8,), (6e8, 12e8)):
        rows = plan.plan(changed(tiny, budgets_flops=budgets))
        assert len(rows) == len(budgets) and len(counted) == 1
    c = tiny.copy_and_resolve_references()
    c.plan.budgets_flops, c.train.batch_size = (6e8,), 16
    (other,) = plan.plan(config.resolve(c))
    assert len(counted) == 2
    assert other.flops_per_step > rows[0].flops_per_step
