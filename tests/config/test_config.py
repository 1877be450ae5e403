"""Configs: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import inspect
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from scaling_ldm import config
from scaling_ldm.config import identity
from scaling_ldm.diffusion import noise, prediction, samplers
from scaling_ldm.diffusion.losses import denoise
from scaling_ldm.models.encoders import efficientnet_lite
from scaling_ldm.training import objective as objective_lib


def refused(change):
    c = config.default().to_dict()
    change(c)
    with pytest.raises(config.ConfigError) as e:
        config.resolve(c)
    return str(e.value)


def test_default_resolves_and_round_trips():
    experiment = config.resolve(config.default())
    words = dataclasses.replace(config.EncodeConfig(), text_encoder="vocabulary")
    assert experiment == dataclasses.replace(config.Experiment(), encode=words)
    assert config.resolve(config.to_config_dict(experiment)) == experiment


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["train"].update(batchsize=3),
            "config.train.batchsize: did you mean config.train.batch_size?",
        ),
        (lambda c: c.update(trian={}), "did you mean config.train?"),
        (lambda c: c["train"].update(seed=1.5), "must be int like 0, got float 1.5"),
        (lambda c: c["train"].update(seed=True), "must be int like 0, got bool True"),
        (lambda c: c.update(train=3), "config.train is a section"),
        (lambda c: c["data"].update(source="icon"), "did you mean 'icons'?"),
        (lambda c: c["model"].update(architecture="dit"), "known: in_context"),
        (lambda c: c["model"].update(head_dim=48), "does not divide the widths"),
        (lambda c: c["model"].update(heads=4), "exactly one of them is positive"),
        (
            lambda c: c["model"].update(heads=5, head_dim=0),
            "config.model.heads = 5 does not divide the widths [128, 192",
        ),
        (lambda c: c["model"].update(patch_size=3), "does not divide the 32x32"),
        (
            lambda c: c["model"].update(classes=3),
            "classes = 3 is not read by config.model.architecture = 'in_context'; "
            "it is for: adaln_zero; its default is 0",
        ),
        (
            lambda c: c["model"].update(architecture="adaln_zero"),
            "config.model.classes = 0: adaln_zero needs labels",
        ),
        (lambda c: c["plan"].update(budgets_flops=()), "set exactly one, and leave"),
        (lambda c: c["plan"].update(steps=9), "set exactly one, and leave"),
        (lambda c: c["plan"].update(sizes=()), "must be a non-empty tuple"),
        (lambda c: c["plan"].update(budgets_flops=(2.0, 1.0)), "must increase"),
        (
            lambda c: c["train"].update(checkpoint_flops=(2.0, 1.0)),
            "checkpoint_flops = (2.0, 1.0)",
        ),
        (
            lambda c: c["generate"].update(run="a", weights="b"),
            "set one, not both",
        ),
        (
            lambda c: c["train"].update(checkpoint_minutes=-1.0),
            "config.train.checkpoint_minutes = -1.0: must be >= 0",
        ),
        (
            lambda c: c["train"].update(save_signals=("SIGKILL",)),
            "save_signals = ('SIGKILL',): may hold SIGUSR1, SIGUSR2, each at most once",
        ),
        (
            lambda c: c["train"].update(save_signals=("SIGUSR2",)),
            "config.train.stop_signals: SIGUSR2 is in both",
        ),
        (
            lambda c: c["train"].update(checkpoint_flops=(0.0, 1.0)),
            "be positive and increase",
        ),
        (
            lambda c: c["train"].update(checkpoint_flops=("all",)),
            "checkpoint_flops must be float",
        ),
        (lambda c: c["plan"].update(sizes=((64,),)), "is not (width, depth)"),
        (lambda c: c["optimizer"].update(b1=1.5), "must lie in [0.0, 0.99999]"),
        (lambda c: c["train"].update(batch_size=0), "must be positive"),
        (lambda c: c["mesh"].update(replica=0), "must be positive, or -1 for"),
        (lambda c: c["fit"].update(metrics=("fd", "fd")), "of the table of"),
        (lambda c: c["fit"].update(metrics=()), "must be a non-empty tuple"),
        (lambda c: c["fit"].update(window=0.5), "must be a factor above 1, or 0"),
        (
            lambda c: c["objective"].update(schedule="rectified_flows"),
            "edm (did you mean 'rectified_flow'?)",
        ),
        (lambda c: c["objective"].update(prediction="eps"), "known: epsilon, x0, v"),
        (lambda c: c["objective"].update(weighting="snr"), "known: uniform, min_snr"),
        (
            lambda c: c["objective"].update(timestep_sampling="mode"),
            "known: uniform, logit",
        ),
        (
            lambda c: c["objective"].update(name="rectified_flow"),
            "unknown key config.objective.name",
        ),
        (
            lambda c: c["objective"].update(
                schedule="linear", zero_terminal_snr=True, prediction="epsilon"
            ),
            "prediction = 'epsilon' with config.objective.zero_terminal_snr: at pure "
            "noise this prediction does not determine the picture; use v, x0 or flow",
        ),
        (
            lambda c: c["objective"].update(prediction="score"),
            "'score' with config.objective.schedule = 'rectified_flow'",
        ),
        (
            lambda c: c["objective"].update(
                schedule="vp_cosine", zero_terminal_snr=True
            ),
            "zero_terminal_snr = True is not read by config.objective.schedule = "
            "'vp_cosine'; it is for: linear, scaled_linear, cosine",
        ),
        (
            lambda c: c["objective"].update(schedule="cosine", time_shift=3.0),
            "time_shift = 3.0 is not read by config.objective.schedule = 'cosine'",
        ),
        (lambda c: c["objective"].update(schedule_steps=50), "'rectified_flow'; it is"),
        (lambda c: c["objective"].update(min_snr_gamma=1.0), "it is for: min_snr"),
        (
            lambda c: c["objective"].update(
                timestep_sampling="uniform", time_scale=2.0
            ),
            "config.objective.timestep_sampling = 'uniform'; it is for: logit_normal",
        ),
        (
            lambda c: c["objective"].update(schedule="scaled_linear", schedule_steps=8),
            "use cosine, or zero_terminal_snr",
        ),
        (lambda c: c["objective"].update(schedule="edm"), "train on vp_cosine"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(change, said):
    assert said in refused(change)


def test_one_bad_objective_has_one_message():
    def change(c):
        c["objective"].update(schedule="linears", prediction="eps", time_shift=2.0)

    lines = refused(change).splitlines()
    assert [line.split()[1] for line in lines[1:]] == [
        "config.objective.schedule",
        "config.objective.prediction",
    ]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"network": "lite1"}, ["network"]),
        ({"network": "lite1", "metrics": ("clip_score",)}, ["network"]),
        ({"network": "lite0", "metrics": ("clip",)}, ["metrics"]),
        ({"network": "lite0", "metrics": ("clip", "clip_score")}, ["metrics"] * 2),
        ({"network": "lite0", "input_size": 63}, ["input_size"]),
        ({"network": "lite0", "input_size": -1}, ["input_size"]),
        ({"network": "clip", "weights": "a", "input_size": 32}, ["input_size"]),
    ],
)
def test_one_bad_choice_of_an_evaluation_has_one_message(change, fields):
    lines = refused(lambda c: c["evaluate"].update(change)).splitlines()
    named = [line.split()[1].removeprefix("config.evaluate.") for line in lines[1:]]
    assert named == fields


@pytest.mark.parametrize("size", [0, 64, 65, 224])
def test_lite0_has_no_map_of_one_pixel(size):
    c = config.default()
    c.evaluate.network, c.evaluate.input_size = "lite0", size
    assert config.resolve(c).evaluate.input_size == size
    strides = math.prod(block.stride for block in efficientnet_lite.BLOCKS)
    assert 2 * 2 * strides == 64  # twice the stem's and the blocks'


def test_the_known_names_are_those_of_the_tables():
    assert set(config.SCHEDULES) == set(noise.SCHEDULES)
    assert set(config.PREDICTIONS) == set(prediction.PREDICTIONS)
    assert config.SAMPLERS == tuple(samplers.SAMPLERS)
    assert config.SPACINGS == tuple(samplers.SPACINGS)
    assert set(config.WEIGHTINGS) == set(denoise.WEIGHTINGS)
    assert set(config.TIMESTEP_SAMPLING) == set(denoise.TIMESTEP_SAMPLING)
    for name, make in noise.SCHEDULES.items():
        discrete = isinstance(make(), noise.Discrete)
        assert discrete == (name in config.DISCRETE_SCHEDULES)
        on_unit = (make().t_noise, round(make().t_data, 3)) == (1.0, 0.0)
        assert on_unit == ("time_shift" in config.SCHEDULES[name])


@pytest.mark.parametrize(
    ("fields", "table", "prefix"),
    [
        (config.WEIGHTINGS, denoise.WEIGHTINGS, "{}_"),
        (config.TIMESTEP_SAMPLING, denoise.TIMESTEP_SAMPLING, "time_"),
    ],
    ids=["weighting", "timestep_sampling"],
)
def test_a_field_and_the_parameter_it_sets_have_one_default(fields, table, prefix):
    for name, make in table.items():
        parameters = inspect.signature(make).parameters.values()
        expected = {prefix.format(name) + p.name: p.default for p in parameters}
        assert set(fields[name]) == set(expected)
        for field, default in expected.items():
            assert getattr(config.ObjectiveConfig(), field) == default


@pytest.mark.parametrize("schedule", config.SCHEDULES)
def test_every_named_objective_is_built(schedule):
    def build(**values):
        return objective_lib.diffusion_objective(
            config.ObjectiveConfig(schedule=schedule, **values)
        )

    for weighting in config.WEIGHTINGS:
        for law in config.TIMESTEP_SAMPLING:
            for kind in config.PREDICTIONS:
                got = build(weighting=weighting, timestep_sampling=law, prediction=kind)
                assert got.schedule == noise.SCHEDULES[schedule]()
                assert got.prediction == kind
    if schedule in config.DISCRETE_SCHEDULES:
        got = build(schedule_steps=1500, zero_terminal_snr=True).schedule
        assert got.steps == 1500
        assert got.alpha(got.t_noise) == 0


def test_an_objectives_parameters_arrive():
    fields = config.ObjectiveConfig(
        weighting="p2", p2_gamma=0.5, p2_k=2.0, time_location=0.7, time_scale=0.1
    )
    got = objective_lib.diffusion_objective(dataclasses.replace(fields, time_shift=3.0))
    assert got.weighting.weight(0.0) == pytest.approx(3**-0.5)
    t = 1 / (1 + 2.718281828**-0.7)
    assert got.times(0.0) == pytest.approx(3 * t / (1 + 2 * t))
    assert got.caption_dropout == fields.caption_dropout


def test_every_problem_is_listed_at_once():
    def change(c):
        c["train"]["batch_size"] = -1
        c["model"]["activation"] = "tanh"

    text = refused(change)
    assert "batch_size = -1" in text
    assert "activation = 'tanh'" in text


def test_every_numeric_field_has_a_check_of_its_range():
    """A nonsense value is refused before anything runs, or it is listed here."""
    free = {"data.shape", "objective.time_location", "mesh.replica", "plan.sizes"}
    free |= {"plan.budgets_flops", "train.checkpoint_flops"}
    free |= {"train.save_signals", "train.stop_signals"}
    free |= {"optimizer.averages"}  # in test_optimizer_checks
    free |= {"evaluate.metrics", "frontier.samplers"}  # in test_evaluate
    free |= {"frontier.steps", "frontier.guidances"}
    free |= {"plan.axes", "plan.axes_only"}  # in test_axes
    free |= {"train.init_exceptions"}  # in test_initial_weights
    free |= {"data.mix", "data.parts"}  # in test_mix
    free |= {"fit.metrics", "fit.protocols"}  # in stages/test_fit
    free |= {"generate.captions"}  # in stages/test_generate
    free |= {"evaluate.held_out"}  # below
    free |= {"compile.programs"}  # in stages/test_compile
    free |= {"report.published"}  # in report/test_published
    free |= {"compare.studies", "compare.groups"}  # in stages/test_compare
    free |= {"compare.budgets"}
    # In test_rate_laws.
    free |= {"optimizer.rate_law_constants", "optimizer.rate_law_at"}
    for section in dataclasses.fields(config.Experiment):
        part = getattr(config.Experiment(), section.name)
        if not dataclasses.is_dataclass(part):
            continue
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            name = f"{section.name}.{field.name}"
            if isinstance(value, (bool, str)) or name in free:
                continue
            text = refused(
                lambda c, s=section.name, f=field.name, v=value: c[s].update(
                    {f: type(v)(-12345)}
                )
            )
            assert f"config.{name}" in text


def test_measures_of_held_out_data_are_known_ones():
    for given in (("vlb", "vlb"), ("nll",)):
        said = refused(lambda c, given=given: c["evaluate"].update(held_out=given))
        assert f"held_out = {given}: may hold vlb, each at most once" in said


def test_recipe_hash_ignores_where_and_how_long_but_not_what():
    base = config.resolve(config.default())

    def changed(section, **values):
        part = dataclasses.replace(getattr(base, section), **values)
        return dataclasses.replace(base, **{section: part}).recipe_hash

    assert changed("mesh", fsdp=4) == base.recipe_hash
    assert changed("plan", budgets_flops=(1e17,)) == base.recipe_hash
    assert changed("data", path="elsewhere") == base.recipe_hash
    assert changed("data", prefetch_batches=9) == base.recipe_hash
    assert changed("model", unroll="always") == base.recipe_hash
    assert changed("model", remat=True) == base.recipe_hash
    for how in (
        {"steps_per_dispatch": 4},
        {"optimize_code": False},
        {"checkpoints_per_run": 3},
        {"keep_checkpoints": 5},
        {"checkpoint_flops": (1e9, 2e9)},
        {"checkpoint_minutes": 0.5},
        {"save_signals": ()},
        {"stop_signals": ("SIGUSR1",)},
        {"log_every_steps": 7},
        {"show_every_seconds": 1.0},
        {"tensorboard": True},
        {"profile_steps": 2},
    ):
        assert changed("train", **how) == base.recipe_hash, how
    assert changed("fit", seed=3) == base.recipe_hash
    assert changed("train", batch_size=8) != base.recipe_hash
    assert changed("data", seed=1) != base.recipe_hash
    assert changed("optimizer", learning_rate=1.0) != base.recipe_hash
    assert changed("optimizer", averages=("ema", "power_0.1")) != base.recipe_hash
    assert changed("optimizer", schedule="cosine") != base.recipe_hash
    assert changed("optimizer", warmup_steps=5) != base.recipe_hash
    assert changed("objective", weighting="sigmoid") != base.recipe_hash
    assert changed("validation", samples=8) != base.recipe_hash


def test_load_says_which_file_was_meant(tmp_path):
    (tmp_path / "tiny.py").write_text("x = 1\n")
    with pytest.raises(config.ConfigError, match="did you mean .*tiny.py"):
        config.load(tmp_path / "tinny.py")
    with pytest.raises(config.ConfigError, match=r"no get_config\(\)"):
        config.load(tmp_path / "tiny.py")


def test_a_misspelt_metric_names_the_nearest():
    said = refused(
        lambda c: c["evaluate"].update(metrics=("fdi", "kidd"), network="clip")
    )
    assert "config.evaluate.metrics = ('fdi', 'kidd'): may hold fd, fd_infinity" in said
    assert "did you mean fd, kid?" in said


FAILING = {
    "calls": ("import scaling_ldm", "    return scaling_ldm.fit.isoflop([1])", 5),
    "imports": ("import nowhere", "    return None", 1),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_in_an_experiment_is_its_own_line_and_none_of_the_library(
    name, tmp_path
):
    """The experiment lies beside the library, and in the current folder."""
    library = pathlib.Path(config.__file__).parents[1]
    shutil.copytree(
        library, tmp_path / library.name, ignore=shutil.ignore_patterns("__pycache__")
    )
    first, body, line = FAILING[name]
    path = tmp_path / "mine.py"
    path.write_text(f"{first}\n\n\ndef get_config():\n{body}\n")
    code = (
        "from scaling_ldm import config\n"
        f"assert config.__file__.startswith({str(tmp_path)!r})\n"
        f"try:\n    config.load({str(path)!r})\n"
        "except config.ConfigError as e:\n    print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, *frames, _ = done.stdout.splitlines()
    text = (first, body.strip())[line == 5]
    function = "get_config" if line == 5 else "<module>"
    assert said == f"{path} fails:"
    assert frames == [f"  {path}:{line} in {function}: {text}"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_text_encoder_is_chosen_by_what_is_installed(monkeypatch, installed):
    found = object() if installed else None
    monkeypatch.setattr(
        config.files.importlib.util,
        "find_spec",
        lambda name: found if name == "all_minilm_l6_v2" else None,
    )
    c = config.default()
    assert config.resolve(c).encode.text_encoder == "vocabulary"  # nothing to encode
    c.data.source, c.data.path = "image_folder", "pictures"
    chosen = config.resolve(c)
    want = ("minilm", 384) if installed else ("vocabulary", 256)
    assert (chosen.encode.text_encoder, chosen.model.text_width) == want
    assert chosen.reads_words == (not installed)
    assert config.resolve(config.to_config_dict(chosen)) == chosen
    c.model.text_width = 32
    if installed:
        with pytest.raises(config.ConfigError, match="whose features are 384 wide"):
            config.resolve(c)
    c.encode.text_encoder = "vocabulary"
    assert config.resolve(c).model.text_width == 32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_encoder": "none"}, "known: auto, vocabulary, minilm; or a folder"),
        ({"autoencoder": "icons_f8", "pictures": 9}, "known: none, icons_f4; or a"),
    ],
)
def test_names_of_frozen_networks_are_known_folders_or_hub_ids(change, said):
    assert said in refused(lambda c: c["encode"].update(change))


def test_networks_that_read_no_text_get_no_text_encoder(monkeypatch):
    monkeypatch.setattr(config.files.importlib.util, "find_spec", lambda _: object())
    c = config.default()
    c.data.source, c.model.architecture = "memory", "adaln_zero"
    c.model.classes = 3
    assert config.resolve(c).reads_words
    c.model.architecture, c.model.classes = "in_context", 0
    assert not config.resolve(c).reads_words


def test_what_differs_is_what_decides():
    mine = dataclasses.asdict(config.Experiment())
    kept = identity.deciding(mine)
    assert "generate" not in kept and "path" not in kept["encode"]
    assert kept["train"]["batch_size"] == 1024 and "path" in mine["encode"]
