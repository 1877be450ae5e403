"""The entry point, as a user runs it: the smoke study end to end, and its errors."""

import json
import pathlib
import re

import jax
import pytest
from absl import flags, logging
from processes import ROOT
from processes import run_main as run

from scaling_ldm import config, main, records, study
from scaling_ldm.config import command_line
from scaling_ldm.evaluation import extractors
from scaling_ldm.records import errors
from scaling_ldm.stages import evaluate
from scaling_ldm.training import progress, signals
from scaling_ldm.workdir import ending, exit_status, runs

# One size of the tiny study on pictures of 8 pixels, at its three budgets.
ONE_SIZE = "--config.plan.sizes=((32, 1),)"
SMALL = (
    "--config=experiments/tiny.py",
    "--config.data.shape=(8, 8, 3)",
    ONE_SIZE,
    "--config.plan.sizes_per_budget=1",
)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The small study, run once through every stage."""
    workdir = tmp_path_factory.mktemp("smoke") / "tiny"
    out, err = run(*SMALL, f"--workdir={workdir}")
    return workdir, out, err


@pytest.fixture
def call(capsys, monkeypatch):
    """call(*arguments, expect=0): the entry point in this process, as `run` is."""
    monkeypatch.chdir(ROOT)
    verbosity = logging.get_verbosity()
    values = {name: flags.FLAGS[name].value for name in flags.FLAGS}

    def run_here(*arguments, expect=0):
        capsys.readouterr()
        try:
            status = main.main(main.parse(["main.py", *arguments]))
        except SystemExit as e:
            status = e.code
        finally:
            for name in set(flags.FLAGS) - set(values):
                delattr(flags.FLAGS, name)  # config and its fields
            for name, value in values.items():
                flags.FLAGS[name].value = value
            logging.set_verbosity(verbosity)
        out, err = capsys.readouterr()
        assert status == expect, err
        return out, err

    return run_here


@pytest.mark.slow
def test_every_stage_leaves_its_files(smoke):
    workdir, out, err = smoke
    specs = records.read_jsonl(workdir / "runs.jsonl")
    assert len(specs) == len(re.findall(r"^ *\d+ +\S+ +\d+ x \d+ ", out, re.M))
    for spec in specs:
        folder = workdir / "runs" / spec.run_id
        record = records.loads((folder / "record.json").read_text())
        assert record.status == "finished"
        assert record.steps == spec.steps
        assert record.flops == spec.planned_flops
        assert 0 < runs.last_loss(workdir, spec, "raw") < 2
        rows = [
            json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        assert rows[-1]["step"] == spec.steps
        assert rows[-1]["flops"] == spec.planned_flops
    laws = records.loads((workdir / "laws.json").read_text())
    assert isinstance(laws, records.FitResult)
    sample = records.loads((workdir / "samples" / "record.json").read_text())
    assert sample.nfe == 2 * sample.steps
    assert (workdir / sample.images_file).exists()
    assert "<html" in (workdir / "report" / "index.html").read_text()[:500]
    assert list((workdir / "report" / "figures").glob("*.pdf"))
    assert list((workdir / "report" / "tables").glob("*.csv"))


@pytest.mark.slow
def test_progress_names_run_loss_speed_and_time_left(smoke):
    _, _, err = smoke
    assert re.search(r"run 3 of 3 .* validation loss 0\.\d+ +left 0:00", err)
    assert "trained: 3 of 3 runs finished" in err
    assert "Traceback" not in err
    assert "nan" not in err


@pytest.mark.slow
def test_a_finished_study_does_nothing_and_says_so(smoke):
    workdir, _, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in (workdir / "runs").rglob("*")}
    out, err = run(*SMALL, f"--workdir={workdir}")
    assert "nothing to do" in err
    assert out == ""
    assert {p: p.stat().st_mtime_ns for p in (workdir / "runs").rglob("*")} == before


@pytest.mark.slow
def test_another_experiment_is_refused_and_says_what_differs(smoke, call):
    workdir, _, _ = smoke
    _, err = call(
        *SMALL,
        "--config.mesh.cpu_devices=4",
        f"--workdir={workdir}",
        "--config.optimizer.learning_rate=0.5",
        expect=exit_status.EXIT["bad configuration"],
    )
    assert "holds another experiment" in err
    assert "config.optimizer.learning_rate: 0.003 there, 0.5 here" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=experiments/tinny.py"], "no experiment file"),
        ([], "no experiment is given"),
        (
            ["--config.train.batchsize=3"],
            "did you mean config.train.batch_size? known:",
        ),
        (["--config.train.batchsize=3"], "unknown key config.train.batchsize: "),
        (["--config.trian.seed=3"], "config.trian: did you mean config.train? known:"),
        (["--config.train=3"], "config.train is a section: give --config.train.FIELD"),
        (["--config.name.x=3"], "unknown key config.name.x: did you mean config.name?"),
        (["--stages="], "--stages: none given; known: plan, encode"),
        (
            [
                "--config.model.architecture=adaln_zero",
                "--config.model.classes=3",
                "--config.model.text_width=256",
                ONE_SIZE,
            ],
            "the icons source has 16 labels",
        ),
        (
            ["--config.model.architecture=adaln_zero", "--config.model.classes=16"],
            "config.model.text_width = 32 is not read by config.model.architecture",
        ),
        (
            ["--config.train.batch_size=abc"],
            "--config.train.batch_size: must be a whole number, got 'abc'",
        ),
        (
            ["--config.optimizer.learning_rate=abc"],
            "--config.optimizer.learning_rate: must be a number, got 'abc'",
        ),
        (["--stages=plan,trian"], "trian unknown; did you mean train? known: plan"),
        (
            ["--stages=paln,trian,fit"],
            "--stages: paln, trian unknown; did you mean plan, train? known: plan",
        ),
        (["--stages=plann"], "plann unknown; did you mean plan? known: plan, encode"),
        (["--stages=x"], "--stages: x unknown; known: plan, encode, train, generate"),
        (["--stges=plan", "--run=0"], "unknown flag --stges: did you mean --stages?"),
        (["--stages=plan", "--verbose"], "flag --verbose: --help shows the flags"),
        (["--confg=experiments/tiny.py"], "flag --confg: did you mean --config?"),
        (["--stages=plan", "x"], "'x' is no flag; --help shows the flags"),
        (["plan"], "'plan' is no flag; did you mean --stages=plan?"),
        (["trian", "fit"], "'trian fit' is no flag; did you mean --stages=train,fit?"),
        (["--stages=plan", "--run=99"], "the plan has rows 0 to 11"),
        (["--stages=train"], "no plan in"),
        (["--config.model.head_dim=5"], "does not divide the widths [16, 32, 48]"),
        (["--config.data.source=webdataset"], "config.data.path is not set"),
        (["--config.data.shape=(12, 12, 3)", ONE_SIZE], "the icons source has one of"),
        (["--config.train.batch_size=3", ONE_SIZE], "config.train.batch_size = 3"),
        (["--config.generate.spacing=linspace"], "cannot sample with sampler"),
        (["--config.generate.sampler=plms"], "config.generate.sampler = 'plms'"),
        (["--config.mesh.fsdp=3", ONE_SIZE], "does not divide the 4 devices"),
        (["--config.name=../up"], "must be the name of a folder"),
        (["--stages=plan", "--process_id=2"], "--process_id belong together"),
        (["--wrkdir=x"], "unknown flag --wrkdir: did you mean --workdir?"),
    ],
)
def test_a_bad_request_is_one_message_before_any_compilation(
    arguments, said, tmp_path, call
):
    base = ["--config=experiments/tiny.py", f"--workdir={tmp_path / 'w'}"]
    base += ["--config.mesh.cpu_devices=4"]
    if not any(a.startswith("--config.") or "stages" in a for a in arguments):
        base = base[1:2] if arguments[:1] != ["--wrkdir=x"] else base
    _, err = call(*base, *arguments, expect=exit_status.EXIT["bad configuration"])
    err = re.sub(r"\Aplan  .* left \S+\n", "", err)  # where counting takes seconds
    assert err.startswith("error: "), err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort"])
def test_help_shows_our_flags_an_example_and_no_other_flags(flag, call):
    out, err = call(flag)
    assert re.findall(r"^ +--(\w+):", out, re.M) == list(command_line.FLAGS)
    assert command_line.EXAMPLE in out
    assert all(stage in out for stage in command_line.STAGES)
    assert out.endswith("\n--helpfull adds the flags of absl and others.\n")
    assert "absl." not in out and "verbosity" not in out and err == ""


def test_helpfull_shows_our_flags_first_and_then_all():
    out, _ = run("--helpfull")
    assert out.index("--config:") < out.index("absl.app:") < out.index("verbosity")


def test_flags_of_absl_are_flags(tmp_path):
    """One that absl knows, a file with flags, a negated field, a value apart."""
    (tmp_path / "flags").write_text("--config=experiments/tiny.py\n--stages=plan\n")
    out, err = run(
        f"--flagfile={tmp_path / 'flags'}",
        "--noconfig.train.optimize_code",
        "--config.plan.sizes",
        "((32, 1),)",
        f"--workdir={tmp_path / 'w'}",
        "--verbosity=0",
    )
    assert "3 runs" in out and err == ""


BUGS = {
    "KeyError": "    return {'small': 1}['large']",
    "AttributeError": "    return config.nothing",
    "ImportError": "    from scaling_ldm import nothing",
    "ModuleNotFoundError": "    import nowhere",
    "ZeroDivisionError": "    return 1 / 0",
    "ValueError": "    return int('many')",
    "FileNotFoundError": "    return open('nowhere')",
    "SyntaxError": "    return (1",
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_an_experiment_file_is_reported_as_that_bug(name, tmp_path, call):
    path = tmp_path / "mine.py"
    path.write_text(
        f"from scaling_ldm import config\n\n\ndef get_config():\n{BUGS[name]}\n"
    )
    workdir = tmp_path / "w"
    _, err = call(f"--config={path}", f"--workdir={workdir}", expect=2)
    first, *others = err.splitlines()
    assert first == f"error: {path} fails:"
    assert others[-1].startswith(f"  {name}: ")
    assert "key" not in others[-1]
    where = (
        f'File "{path}", line 5' if name == "SyntaxError" else f"{path}:5 in get_con"
    )
    assert where in err and BUGS[name].strip() in err
    assert len(others) <= 4 and "Traceback" not in err
    assert not workdir.exists()


def test_a_bug_in_a_neighbour_is_reported_with_both_lines(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "base.py").write_text("def make(size):\n    return {'a': 1}[size]\n")
    (folder / "large.py").write_text(
        "from mine import base\n\n\ndef get_config():\n    return base.make('b')\n"
    )
    _, err = run(f"--config={folder / 'large.py'}", expect=2)
    assert [line.strip() for line in err.splitlines()] == [
        f"error: {folder / 'large.py'} fails:",
        f"{folder / 'large.py'}:5 in get_config: return base.make('b')",
        f"{folder / 'base.py'}:2 in make: return {{'a': 1}}[size]",
        "KeyError: 'b'",
    ]


def test_an_unknown_key_in_an_experiment_file_has_its_line_and_the_nearest(
    tmp_path, call
):
    path = tmp_path / "mine.py"
    path.write_text(
        "from scaling_ldm import config\n\n\ndef get_config():\n"
        "    c = config.default()\n    c.train.batchsize = 3\n    return c\n"
    )
    _, err = call(f"--config={path}", expect=2)
    wrapper = str(ROOT / "tests" / "annotations.py")  # checks calls in tests alone
    _, where, what = [line for line in err.splitlines() if wrapper not in line]
    assert where == f"  {path}:6 in get_config: c.train.batchsize = 3"
    assert "unknown key batchsize: did you mean batch_size? known: " in what


def test_a_renamed_field_is_read_from_a_file_and_from_a_flag(tmp_path, call):
    """One line on standard error has today's name; the plan is the same."""
    path = tmp_path / "tiny.py"
    text = (ROOT / "experiments" / "tiny.py").read_text()
    path.write_text(
        text.replace(
            "    return c", "    c.objective.time_law = 'uniform'\n    return c"
        )
    )
    plan = ("--stages=plan", ONE_SIZE, f"--workdir={tmp_path / 'w'}")
    said = "config.objective.time_law is now config.objective.timestep_sampling\n"
    out, err = call(f"--config={path}", *plan)
    assert err == said
    flag = "--config.objective.time_law=uniform"
    assert call("--config=experiments/tiny.py", flag, *plan) == (out, said)
    today = "--config.objective.timestep_sampling=uniform"
    assert call("--config=experiments/tiny.py", today, *plan) == (out, "")


@pytest.mark.slow
def test_run_plans_and_trains_one_row(tmp_path):
    workdir = tmp_path / "one"
    out, _ = run(*SMALL, f"--workdir={workdir}", "--run=1")
    assert re.findall(r"^ *(\d+) +\S+ +\d+ x \d+ ", out, re.M) == ["1"]
    assert len(records.read_jsonl(workdir / "runs.jsonl")) == 3
    assert [p.parent.name for p in workdir.glob("runs/*/record.json")] == [
        records.read_jsonl(workdir / "runs.jsonl")[1].run_id
    ]
    assert not (workdir / "laws.json").exists()


@pytest.mark.parametrize(
    ("measures", "refused"),
    [
        ("evaluate", True),
        ("frontier", True),
        ("generate", False),  # needs none of what is missing
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_done(
    tiny, tmp_path, monkeypatch, capsys, measures, refused
):
    """Found by the stage itself, it would cost the whole training."""

    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr(study._Study, "_plan", reached)
    monkeypatch.setattr(extractors, "weights_path", lambda cfg: pathlib.Path(__file__))
    given = tiny.copy_and_resolve_references()
    given.mesh.cpu_devices = 4
    given.evaluate.network, given.evaluate.reference = "lite0", "nowhere.npz"
    given.frontier.images = 8
    asked = {
        "workdir": str(tmp_path / "w"),
        "stages": ["plan", "train", measures],
        "only": None,
        "cluster": (None, None, None),
    }
    if refused:
        assert study.run(given, **asked) == exit_status.EXIT["bad configuration"]
        said = capsys.readouterr().err
        assert (
            said == "error: config.evaluate.reference = 'nowhere.npz': no such file\n"
        )
    else:
        with pytest.raises(Reached):
            study.run(given, **asked)


def calling(tmp_path, *stages):
    """What study.run is given beside the experiment."""
    workdir, cluster = str(tmp_path / "w"), (None, None, None)
    return {
        "workdir": workdir,
        "stages": stages or None,
        "only": None,
        "cluster": cluster,
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ("evaluate", "frontier"),
            [
                "evaluate measures nothing: config.evaluate.network = 'none'; set one "
                "of lite0, inception_pytorch_fid, inception_torch_fidelity, clip, "
                "dinov2, or evaluate.held_out",
                "frontier measures nothing: config.frontier.images = 0; set how many "
                "pictures a cell has",
            ],
        ),
        ((), []),  # all of them, by default
    ],
)
def test_a_stage_asked_for_in_vain_says_what_to_set(
    tiny, tmp_path, monkeypatch, asked, said
):
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    for where in (config, command_line.names):
        monkeypatch.setattr(where, "STAGES", ("plan", "evaluate", "frontier"))
    assert study.run(tiny, **calling(tmp_path, "plan")) == 0
    assert study.run(tiny, **calling(tmp_path, *asked)) == 0
    assert [line for line in lines if "measures nothing" in line] == said


@pytest.mark.parametrize("trained", [False, True])
def test_checkpoints_of_given_weights_are_refused_where_no_run_has_any(
    tiny, tmp_path, monkeypatch, capsys, trained
):
    reached = []
    monkeypatch.setattr(study._Study, "_evaluate", lambda _: reached.append(True))
    monkeypatch.setattr(evaluate, "check", lambda _: None)
    if trained:
        monkeypatch.setattr(runs, "best", lambda *_: "a run")
    given = tiny.copy_and_resolve_references()
    given.mesh.cpu_devices = 4
    given.evaluate.network, given.evaluate.through_training = "lite0", True
    given.generate.weights = "weights"
    status = study.run(given, **calling(tmp_path, "evaluate"))
    if trained:
        assert (status, reached) == (0, [True])
        return
    assert (status, reached) == (exit_status.EXIT["bad configuration"], [])
    assert capsys.readouterr().err == (
        "error: config.evaluate.through_training = True with config.generate.weights "
        "= 'weights': a folder of weights has no checkpoints, and no run of "
        f"{tmp_path / 'w'} is finished; leave one of them out\n"
    )


def test_exit_codes_are_distinct():
    assert len(set(exit_status.EXIT.values())) == len(exit_status.EXIT)


@pytest.mark.parametrize(
    ("error", "job", "status"),
    [
        (config.ConfigError("x"), False, "bad configuration"),
        (errors.Damaged("x"), False, "storage"),
        (FileNotFoundError("x"), False, "storage"),
        (errors.CheckpointError("x"), False, "storage"),
        (errors.Preempted("x"), False, "preempted, run the same command again"),
        (ValueError("x"), False, "defect"),
        (jax.errors.JaxRuntimeError("x"), False, "defect"),
        (jax.errors.JaxRuntimeError("x"), True, "lost a process"),
        (ValueError("Gloo AllGather failed: reset"), True, "lost a process"),
        (ValueError("Gloo AllGather failed: reset"), False, "defect"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), True, "defect"),
        (errors.CheckpointError("x"), True, "storage"),
        ((errors.CheckpointError("x"), "y"), True, "lost a process"),
        ((ValueError("x"), "y"), True, "lost a process"),
        ((errors.Preempted("x"), "y"), True, "preempted, run the same command again"),
        (ValueError("x"), True, "defect"),
    ],
)
def test_each_class_of_errors_has_its_exit_status(error, job, status, monkeypatch):
    """A pair is an error and the text of the JaxRuntimeError that caused it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2 if job else 1)
    if isinstance(error, tuple):
        error, cause = error
        error.__cause__ = jax.errors.JaxRuntimeError(cause)
    assert exit_status.of(error) == exit_status.EXIT[status]


@pytest.mark.parametrize(
    ("heard", "status"),
    [("", "lost a process"), ("SIGTERM", "preempted, run the same command again")],
)
def test_a_process_that_a_stop_has_ended_is_not_lost(heard, status, monkeypatch):
    def end(why, status, *_):
        raise SystemExit(status)

    stop = signals.StopSignal()
    stop.heard = heard
    monkeypatch.setattr(signals, "current", lambda: stop)
    monkeypatch.setattr(ending, "now", end)
    monkeypatch.setattr(progress, "_muted", True)
    with pytest.raises(SystemExit) as e:
        study._lost()
    assert e.value.code == exit_status.EXIT[status]


def test_a_class_that_is_only_named_like_a_known_one_is_a_defect():
    class Preempted(Exception):
        pass

    assert exit_status.of(Preempted("x")) == exit_status.EXIT["defect"]


def test_stage_names_are_the_methods():
    assert all(
        hasattr(study._Study, f"_{stage}")
        for stage in (*config.STAGES, *config.STAGES_ON_REQUEST)
    )
