"""The entry point, as a user runs it: the smoke study end to end, and its errors."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from scaling_ldm import config, records, study
from scaling_ldm.evaluation import extractors
from scaling_ldm.stages import evaluate
from scaling_ldm.training import progress
from scaling_ldm.workdir import runs

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, expect=0, timeout=600):
    """Runs the entry point; returns (standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "scaling_ldm.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The tiny study, run once through every stage."""
    workdir = tmp_path_factory.mktemp("smoke") / "tiny"
    out, err = run("--config=experiments/tiny.py", f"--workdir={workdir}")
    return workdir, out, err


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
        assert 0 < record.validation_loss < 2
        rows = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
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


def test_progress_names_run_loss_speed_and_time_left(smoke):
    _, _, err = smoke
    assert re.search(r"run 12 of 12 .* validation loss 0\.\d+ +left 0:00", err)
    assert "trained: 12 of 12 runs finished" in err
    assert "Traceback" not in err
    assert "nan" not in err


def test_a_finished_study_does_nothing_and_says_so(smoke):
    workdir, _, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in (workdir / "runs").rglob("*")}
    out, err = run("--config=experiments/tiny.py", f"--workdir={workdir}")
    assert "nothing to do" in err
    assert out == ""
    assert {p: p.stat().st_mtime_ns for p in (workdir / "runs").rglob("*")} == before


def test_another_experiment_is_refused_and_says_what_differs(smoke):
    workdir, _, _ = smoke
    _, err = run(
        "--config=experiments/tiny.py",
        f"--workdir={workdir}",
        "--config.optimizer.learning_rate=0.5",
        expect=study.EXIT["bad configuration"],
    )
    assert "holds another experiment" in err
    assert "config.optimizer.learning_rate: 0.003 there, 0.5 here" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=experiments/tinny.py"], "no experiment file"),
        ([], "which experiment?"),
        (["--config.train.batchsize=3"], 'Did you mean "batch_size" instead of "batch'),
        (["--config.train.batchsize=3"], "unknown key in --config"),
        (["--stages="], "--stages: none unknown"),
        (
            [
                "--config.model.architecture=adaln_zero",
                "--config.model.classes=3",
                "--config.model.text_width=256",
            ],
            "the icons source has 16 labels",
        ),
        (
            ["--config.model.architecture=adaln_zero", "--config.model.classes=16"],
            "config.model.text_width = 32 means nothing to config.model.architecture",
        ),
        (["--config.train.batch_size=many"], "many"),
        (["--stages=plan,trian"], "trian unknown; known: plan, encode, train, fit"),
        (["--stages=plan", "--run=99"], "the plan has rows 0 to 11"),
        (["--stages=train"], "no plan in"),
        (["--config.model.head_dim=5"], "does not divide the widths [16, 32, 48]"),
        (["--config.data.source=webdataset"], "config.data.path is not set"),
        (["--config.data.shape=(12, 12, 3)"], "the icons source has one of"),
        (["--config.train.batch_size=3"], "config.train.batch_size = 3"),
        (["--config.generate.spacing=linspace"], "cannot sample with sampler"),
        (["--config.generate.sampler=plms"], "config.generate.sampler = 'plms'"),
        (["--config.mesh.fsdp=3"], "does not divide the 2 devices"),
        (["--wrkdir=x"], "wrkdir"),
    ],
)
def test_a_bad_request_is_one_message_before_any_compilation(arguments, said, tmp_path):
    base = ["--config=experiments/tiny.py", f"--workdir={tmp_path / 'w'}"]
    base += ["--config.mesh.cpu_devices=2"]
    if not any(a.startswith("--config.") or "stages" in a for a in arguments):
        base = base[1:2] if arguments[:1] != ["--wrkdir=x"] else base
    _, err = run(*base, *arguments, expect=study.EXIT["bad configuration"])
    assert err.startswith("error: "), err
    assert said in err
    assert "Traceback" not in err


def test_run_plans_and_trains_one_row(tmp_path):
    workdir = tmp_path / "one"
    out, err = run("--config=experiments/tiny.py", f"--workdir={workdir}", "--run=3")
    assert re.findall(r"^ *(\d+) +\S+ +\d+ x \d+ ", out, re.M) == ["3"]
    assert len(records.read_jsonl(workdir / "runs.jsonl")) == 12
    assert [p.parent.name for p in workdir.glob("runs/*/record.json")] == [
        records.read_jsonl(workdir / "runs.jsonl")[3].run_id
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
    monkeypatch.setattr(extractors, "file", lambda cfg: pathlib.Path(__file__))
    given = tiny.copy_and_resolve_references()
    given.mesh.cpu_devices = 8
    given.evaluate.network, given.evaluate.reference = "lite0", "nowhere.npz"
    given.frontier.images = 8
    asked = {
        "workdir": str(tmp_path / "w"),
        "stages": ["plan", "train", measures],
        "only": None,
        "cluster": (None, None, None),
    }
    if refused:
        assert study.run(given, **asked) == study.EXIT["bad configuration"]
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
                "dinov2",
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
    monkeypatch.setattr(config, "STAGES", ("plan", "evaluate", "frontier"))
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
    given.mesh.cpu_devices = 8
    given.evaluate.network, given.evaluate.through_training = "lite0", True
    given.generate.weights = "weights"
    status = study.run(given, **calling(tmp_path, "evaluate"))
    if trained:
        assert (status, reached) == (0, [True])
        return
    assert (status, reached) == (study.EXIT["bad configuration"], [])
    assert capsys.readouterr().err == (
        "error: config.evaluate.through_training = True with config.generate.weights "
        "= 'weights': a folder of weights has no checkpoints, and no run of "
        f"{tmp_path / 'w'} is finished; leave one of them out\n"
    )


def test_exit_codes_are_distinct():
    assert len(set(study.EXIT.values())) == len(study.EXIT)


def test_stage_names_are_the_methods():
    assert all(
        hasattr(study._Study, f"_{stage}")
        for stage in (*config.STAGES, *config.STAGES_ON_REQUEST)
    )
