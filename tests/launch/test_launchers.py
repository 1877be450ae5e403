"""What each launcher starts, and that words reach the entry point as given."""

import json
import os
import pathlib
import re
import shutil
import types

import launch_programs
import older_workdirs
import pytest
import yaml
from launch_programs import (
    AWKWARD,
    FLAGS,
    PROGRAMS,
    STUDY,
    bash,
    expanded,
    of_row,
    stub,
    words_of,
)
from processes import ROOT

from scaling_ldm import records
from scaling_ldm.workdir import exit_status

GOLDEN = pathlib.Path(__file__).parent / "golden"
rows = launch_programs.load("rows")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder in which a launcher is started, with launch/ beside it.

    No scheduler is installed. Of 42 rows, the missing ones are 0, 1 and 5.
    """
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows.shutil, "which", lambda name: None)
    monkeypatch.setattr(rows, "listed", lambda flags: [0, 1, 5])
    monkeypatch.setattr(rows, "planned", lambda flags: 42)
    monkeypatch.setattr(rows.sys, "executable", "python")
    monkeypatch.setattr(rows, "absolute", lambda path: f"/shared/{path}")
    return tmp_path


@pytest.fixture
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


def started(name, *more):
    """A launcher's main with the flags of FLAGS; its status."""
    return started_with([*STUDY, *FLAGS[name], *more], name)


def started_with(words, name):
    module = launch_programs.load(name)
    if name == "slurm":
        module.BODY = "launch/slurm.sh"
    return module.main(words)


def dry_run(capsys, name, *more):
    assert started(name, *more, "--dry-run") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_dry_run_prints_what_is_stored(name, here, capsys):
    one = ("--rows=2-9",) if name in ("gke", "tpu_vm", "skypilot") else ()
    text = dry_run(capsys, name, *AWKWARD, *one)
    assert text == (GOLDEN / f"{name}.sh").read_text(encoding="utf-8")
    assert not (here / "launched").exists()


def test_a_job_of_gpus_on_gke(here, capsys):
    """Also the default name, whose digits are those of the claim and the path in it."""
    module = launch_programs.load("gke")
    flags = ("--image=i", "--pvc=studies:/data", "--gpu=nvidia-h100-80gb", "--nodes=2")
    more = ("--workdir_there=/data/iso", "--rows=5", "--dry-run")
    assert module.main([*STUDY, *flags, *more]) == 0
    text = capsys.readouterr().out
    assert text == (GOLDEN / "gke_gpus.sh").read_text(encoding="utf-8")


def printed():
    """(launcher, words, lines) of each dry run that docs/clusters.md shows."""
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    shown = r"```bash\npython launch/(\w+)\.py ([^\n]*)\n```\n\n```text\n(.*?)\n```"
    return [
        pytest.param(name, rows.shlex.split(words), lines.split("\n"), id=name)
        for name, words, lines in re.findall(shown, text, re.DOTALL)
    ]


def test_every_launcher_has_an_example():
    assert {example.id for example in printed()} | {"local"} == {*PROGRAMS}


@pytest.mark.parametrize(("name", "words", "lines"), printed())
def test_the_examples_print_what_the_page_shows(
    name, words, lines, here, capsys, monkeypatch
):
    """Every line is printed, in this order; "..." stands for others."""
    monkeypatch.setattr(rows, "listed", lambda flags: [*range(42)])
    module = launch_programs.load(name)
    if name == "slurm":
        module.BODY = "launch/slurm.sh"
    assert module.main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert lines[-1] == out[-1]
    for line in lines:
        if line != "...":
            assert line in out
            out = out[out.index(line) + 1 :]


# What the entry point gets


def test_local_starts_each_row(here, programs, capsys):
    launch_programs.records_its_words(programs, "python")
    done = bash(dry_run(capsys, "local", *AWKWARD), programs, here)
    assert done.returncode == 0, done.stderr
    words = words_of(programs, "python")
    third = len(words) // 3
    for k, row in enumerate((0, 1, 5)):
        assert of_row(words[k * third : (k + 1) * third], row, "runs/iso")


def test_local_does_the_stages_before_and_after(here, capsys, monkeypatch):
    """--whole: plan and encode, the missing rows, and what the entry point has left."""
    local = launch_programs.load("local")
    done, statuses, left = [], {}, [0, 1, 5]

    def one(self, command):
        stages = command[command.index("--stages") + 1] if "--stages" in command else ""
        done.append(stages)
        return statuses.get(stages, 0)

    def every(self, commands, most):
        done.append([command[-1] for command in commands.values()])
        return statuses.get("train", 0)

    monkeypatch.setattr(local.Running, "one", one)
    monkeypatch.setattr(local.Running, "every", every)
    monkeypatch.setattr(rows, "listed", lambda flags: left)
    this = ("local", *AWKWARD, "--whole")
    assert started(*this) == 0
    assert done == ["plan,encode", ["0", "1", "5"], ""]
    left, done[:] = [], []  # the rows are there; the stages behind them may not be
    assert started(*this) == 0
    assert done == ["plan,encode", ""]
    left = [7]
    for stages, ended in (("plan,encode", 1), ("train", 2)):
        statuses, done[:] = {stages: rows.PREEMPTED}, []
        assert started(*this) == rows.PREEMPTED
        assert len(done) == ended
    printed = dry_run(capsys, *this).splitlines()
    assert "--stages plan,encode" in printed[0]
    assert "local.py" in printed[1]
    assert "--whole" not in printed[1]
    assert "--stages" not in printed[2]


def test_local_gives_each_core_all_rows(here, programs, capsys, monkeypatch):
    """The largest budget first, and another size first on each core."""
    local = launch_programs.load("local")
    sizes = ((8, 1), (16, 1), (32, 1), (8, 1))
    plan = [
        types.SimpleNamespace(width=w, depth=d, budget_flops=budget)
        for budget in (1e9, 2e9)
        for w, d in sizes
    ]
    monkeypatch.setattr(local.records, "read_plan", lambda path: plan)
    monkeypatch.setattr(rows, "listed", lambda flags: [0, 1, 2, 3, 4, 5, 6, 7])
    monkeypatch.setattr(local.os, "sched_getaffinity", lambda pid: {3, 5})
    monkeypatch.setattr(local, "platform", lambda: "cpu")
    monkeypatch.setattr(local.shutil, "which", lambda name: name)
    launch_programs.records_its_words(programs, "taskset")
    this = ("local", *AWKWARD, "--at_once=auto")
    done = bash(dry_run(capsys, *this), programs, here)
    assert done.returncode == 0, done.stderr
    words = words_of(programs, "taskset")
    half = len(words) // 2
    orders = ["4,7,5,6,0,3,1,2", "5,6,4,7,1,2,0,3"]
    for i, (core, order) in enumerate(zip((3, 5), orders, strict=True)):
        some = words[i * half : (i + 1) * half]
        assert some[:2] == ["--cpu-list", str(core)]
        assert of_row(some, order, "runs/iso")
        assert some[-2:] == [
            "--config.mesh.cpu_devices=1",
            "--config.mesh.compilation_cache=runs/iso/compiled",
        ]
    monkeypatch.setattr(local, "platform", lambda: "gpu")
    assert "taskset" not in dry_run(capsys, *this)
    monkeypatch.setattr(local, "platform", lambda: "cpu")
    place = "--config.mesh.compilation_cache=/c"
    assert "iso/compiled" not in dry_run(capsys, *this, place)
    with pytest.raises(SystemExit, match="2"):
        started(*this, "--config.mesh.cpu_devices=2", "--dry-run")


def test_slurm_gives_the_task_the_same_words(here, programs, capsys):
    """sbatch hands its words to the script, and srun starts them with the row."""
    launch_programs.records_its_words(programs, "sbatch")
    launch_programs.records_its_words(programs, "srun")
    assert bash(dry_run(capsys, "slurm", *AWKWARD), programs, here).returncode == 0
    given = words_of(programs, "sbatch")
    assert "--array=0-1,5%4" in given
    script = given.index("launch/slurm.sh")
    text = rows.shlex.join(["bash", *given[script:]])
    done = bash(text, programs, here, SLURM_ARRAY_TASK_ID="5")
    assert done.returncode == 0, done.stderr
    assert of_row(words_of(programs, "srun"), 5, "runs/iso")


def test_gke_gives_the_pod_the_same_words(here, capsys):
    assert started("gke", *AWKWARD, "--dry-run") == 0
    text = capsys.readouterr().out
    manifest = text.split("cat >launched/iso-5.yaml <<'END'\n")[1].split("\nEND\n")[0]
    (job,) = yaml.safe_load(manifest)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert of_row([expanded(word) for word in container["command"]], 5)


def test_xpk_gives_the_shell_the_same_words(here, programs, capsys):
    launch_programs.records_its_words(programs, "xpk")
    launch_programs.records_its_words(programs, "python")
    text = dry_run(capsys, "xpk", *AWKWARD)
    assert bash(text, programs, here).returncode == 0
    calls = [word for word in words_of(programs, "xpk") if word.startswith("--command")]
    assert '"' not in calls[2]  # xpk writes it into YAML between double quotes
    command = expanded(calls[2].removeprefix("--command="))
    assert bash(f"({command})", programs, here).returncode == 0
    assert of_row(words_of(programs, "python"), 5)


def test_skypilot_tells_each_node_of_the_others(here, programs, capsys):
    """Rank 0 is the first address. After 4 the nodes try again, after 75 they end."""
    launch_programs.records_its_words(programs, "python", COUNTED_STATUSES)
    stub(programs, "sleep", "")
    text = dry_run(capsys, "skypilot", *AWKWARD)
    task = text.split("cat >launched/iso-5.yaml <<'END'\n")[1].split("\nEND\n")[0]
    run = yaml.safe_load(task)["run"]
    ranks = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": "2",
        "STATUSES": "4 4 75",
    }
    assert bash(run, programs, here, **ranks).returncode == 75
    words = words_of(programs, "python")
    joins = ["--coordinator=10.0.0.7:8476", "--num_processes=2", "--process_id=1"]
    assert of_row(words, 5)
    assert words[-3:] == joins
    assert words.count("-m") == 3


# A program that ends with the next of $STATUSES at each call.
COUNTED_STATUSES = """\
n=$(cat "$0.count" 2>/dev/null || echo 1)
echo $((n + 1)) >"$0.count"
exit "$(cut -d' ' -f"$n" <<<"$STATUSES")"
"""
# The metadata server of a TPU of two hosts, asked on the second one.
METADATA = """\
case ${!#} in
  */worker-network-endpoints) echo "a:1:10.0.0.7,b:2:10.0.0.8" ;;
  */agent-worker-number) echo 1 ;;
  *) exit 22 ;;
esac
"""


@pytest.mark.parametrize(
    ("statuses", "more", "status", "calls", "deleted"),
    [
        ("75 4 0", (), 0, 3, True),
        ("75 0", ("--keep",), 0, 2, False),
        ("2", (), 2, 1, False),
        ("4 4", ("--max_restarts=1",), 4, 2, False),
    ],
)
def test_a_tpu_vm(statuses, more, status, calls, deleted, here, programs, capsys):
    """Its script goes on after 75 and 4, and deletes the TPU when the row is done."""
    launch_programs.records_its_words(programs, "python", COUNTED_STATUSES)
    launch_programs.records_its_words(programs, "gcloud")
    stub(programs, "curl", METADATA)
    stub(programs, "sleep", "")
    text = dry_run(capsys, "tpu_vm", *AWKWARD, *more, "--setup=true")
    assert bash(text, programs, here).returncode == 0
    assert "--metadata-from-file=startup-script=launched/iso-5.sh" in words_of(
        programs, "gcloud"
    )
    (programs / "gcloud.words").unlink()
    done = bash("bash launched/iso-5.sh", programs, here, STATUSES=statuses)
    assert done.returncode == status, done.stderr
    words = words_of(programs, "python")
    assert of_row(words, 5)
    assert words[-3:] == [
        "--coordinator=10.0.0.7:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
    assert words.count("-m") == calls
    assert ("delete" in words_of(programs, "gcloud")) is deleted


def test_a_tpu_vm_whose_setup_fails_starts_nothing(here, programs, capsys):
    launch_programs.records_its_words(programs, "python")
    launch_programs.records_its_words(programs, "gcloud")
    stub(programs, "curl", METADATA)
    text = dry_run(capsys, "tpu_vm", "--setup=cd nowhere && true")
    assert bash(text, programs, here).returncode == 0
    assert bash("bash launched/iso-5.sh", programs, here).returncode == 1
    assert words_of(programs, "python") == []


@pytest.mark.parametrize(
    ("status", "restarts", "limit", "requeued"),
    [
        (0, 0, None, False),
        (75, 0, None, True),
        (75, 500, None, True),
        (75, 0, "0", False),
        (4, 0, None, True),
        (4, 100, None, False),
        (4, 2, "3", True),
        (2, 0, None, False),
        (3, 0, None, False),
        (143, 0, None, False),
    ],
)
def test_which_tasks_slurm_queues_again(status, restarts, limit, requeued, programs):
    launch_programs.records_its_words(programs, "scontrol")
    stub(programs, "srun", f"exit {status}")
    variables = {
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    if limit is not None:
        variables["SCALING_LDM_MAX_RESTARTS"] = limit
    done = bash("bash launch/slurm.sh --config x", programs, ROOT, **variables)
    assert done.returncode == status, done.stderr
    assert words_of(programs, "scontrol") == ["requeue", "12_5"] * requeued
    at_the_limit = status == 4 and not requeued
    said = f"was queued again {restarts} times, for any reason"
    assert (said in done.stderr) is at_the_limit


def test_a_run_ends_at_the_signal_that_slurm_is_told(here, capsys):
    text = dry_run(capsys, "slurm", "--signal=USR1@90", "--max_restarts=0")
    assert "--signal=USR1@90 --no-requeue" in text
    assert "--export=ALL,SCALING_LDM_MAX_RESTARTS=0" in text
    assert "--config.train.save_signals=()" in text
    assert '\'--config.train.stop_signals=("SIGUSR1", "SIGUSR2")\'' in text
    assert "signals" not in dry_run(capsys, "slurm", "--signal=USR2@90")


# What is left out


def listing(name):
    """What the program that lists jobs prints: row 0 works, row 1 is over."""
    jobs = [("iso-0", "RUNNING"), ("iso-1", "FAILED_SETUP"), ("else-5", "RUNNING")]
    fields = ("job_id", "job_name", "status")
    sky = [dict(zip(fields, (k, *job), strict=True)) for k, job in enumerate(jobs)]
    return {
        "slurm": "0 scaling_ldm /shared/runs/iso\n5 scaling_ldm /shared/other\nN/A\n",
        "gke": "iso-0 \niso-1 Failed\nelse-5 \n",
        "tpu_vm": "iso-0\tWAITING_FOR_RESOURCES\niso-1\tSUSPENDED\n",
        "skypilot": json.dumps(sky),
    }[name]


@pytest.mark.parametrize(
    ("name", "program", "over"),
    [
        ("slurm", "squeue", ()),
        ("gke", "kubectl", ("kubectl delete jobset --namespace=default iso-1\n",)),
        ("tpu_vm", "gcloud", ("queued-resources delete iso-1 --force",)),
        ("skypilot", "sky", ()),
    ],
)
def test_what_is_started_is_left_out(
    name, program, over, here, programs, capsys, monkeypatch
):
    monkeypatch.setattr(rows.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (programs / "listing").write_text(listing(name))
    stub(programs, program, f"cat {programs}/listing")
    assert started(name, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "already started: 0\n" in err
    assert "2 rows to start: 1,5\n" in err
    assert "iso-0" not in out
    assert all(text in out for text in over)


def test_no_jobs_are_started_if_the_scheduler_does_not_answer(
    here, programs, capsys, monkeypatch
):
    monkeypatch.setattr(rows.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    stub(programs, "squeue", "exit 1")
    launch_programs.records_its_words(programs, "sbatch")
    with pytest.raises(SystemExit, match="1"):
        started("slurm")
    assert "squeue --me" in capsys.readouterr().err
    assert words_of(programs, "sbatch") == []
    assert started("slurm", "--dry-run") == 0
    assert "what is started is not left out" in capsys.readouterr().err


def test_commands_are_run_and_their_files_written(here, programs, capsys, monkeypatch):
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    launch_programs.records_its_words(programs, "kubectl")
    assert started("gke") == 0
    files = {f"iso-{n}.yaml" for n in ("0", "1", "5", "queue")}
    assert {path.name for path in (here / "launched").iterdir()} == files
    words = words_of(programs, "kubectl")
    assert words[:2] == ["apply", "--filename=launched/iso-queue.yaml"]
    assert words[2] == "create"
    assert len(words) == 6
    stub(programs, "kubectl", "exit 3")
    assert started("gke") == 1
    assert "kubectl ended with 3" in capsys.readouterr().err


def test_a_scheduler_that_is_not_installed_is_named(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(SystemExit, match="2"):
        started("xpk")
    assert "xpk is not installed; --dry-run shows" in capsys.readouterr().err


def test_nothing_missing_starts_nothing(here, capsys, monkeypatch):
    monkeypatch.setattr(rows, "listed", lambda flags: [])
    for name in PROGRAMS:
        with pytest.raises(SystemExit, match="0"):
            started(name)
        out, err = capsys.readouterr()
        assert out == ""
        assert "0 rows to start: none" in err


# Names of jobs


def flags_of(name, *words):
    """The flags of a launcher without a --name."""
    given = [word for word in FLAGS[name] if not word.startswith(("--name", "--workd"))]
    config = ("--config", "experiments/tiny.py")
    return launch_programs.load(name).flags_of([*config, *given, *words])


SERVICES = ("gke", "xpk", "tpu_vm", "skypilot")
LISTS = {"gke": "kubectl", "tpu_vm": "gcloud", "skypilot": "sky"}


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--workdir=/a/iso"], ["--workdir=/b/iso"]),
        (["--workdir=gs://a/iso"], ["--workdir=gs://b/iso"]),
        (
            ["--workdir=/a/iso", "--workdir_there=/data/a/iso"],
            ["--workdir=/a/iso", "--workdir_there=/data/b/iso"],
        ),
        (
            ["--workdir=/a/iso", "--workdir_there=/elsewhere/iso"],
            ["--workdir=/b/iso", "--workdir_there=/elsewhere/iso"],
        ),
        (["--workdir=/a/" + "i" * 99], ["--workdir=/b/" + "i" * 99]),
    ],
)
def test_two_studies_have_other_names(name, one, other, here):
    names = [rows.name_of(flags_of(name, *words), 99_999, 40) for words in (one, other)]
    assert names[0] != names[1]
    for found in names:
        assert re.fullmatch(r"i[a-z]*-[0-9a-f]{8}-99999", found)
        assert found.startswith("iso-") or len(found) == 39


@pytest.mark.parametrize("name", ["gke", "skypilot"])
def test_a_study_in_a_volume_has_one_name(name, here):
    """Also from another machine, and where the volume is mounted elsewhere."""
    volume = {"gke": "--pvc={1}:{0}", "skypilot": "--volume={0}={1}"}[name]

    def found(workdir, there, mounted, claim="studies"):
        where = (f"--workdir={workdir}", f"--workdir_there={there}")
        return flags_of(name, *where, volume.format(mounted, claim)).name

    same = found("/a/iso", "/data/x/iso", "/data")
    assert found("/b/mine", "/data/x/../x/iso/", "/data") == same
    assert found("/a/iso", "/mnt/x/iso", "/mnt/") == same
    assert found("/a/iso", "/data/x/iso", "/data", "others") != same
    assert found("/a/iso", "/database/iso", "/data") != same


def test_names_of_folders(here):
    """Letters and digits of the last folder that a job sees, from the first letter."""

    def found(*where):
        return flags_of("tpu_vm", *where).name.rpartition("-")[0]

    assert found("--workdir=runs/My_Study/") == "my-study"
    assert found("--workdir=runs/2026_10B") == "b"
    assert found("--workdir=runs/2026") == "study"
    assert found("--workdir=gs://bucket/a/iso/") == "iso"
    assert found("--workdir=a", "--workdir_there=/data/b") == "b"
    assert flags_of("tpu_vm", "--workdir=a", "--name=c").name == "c"


@pytest.mark.parametrize("name", LISTS)
def test_nothing_of_another_study_is_touched(name, here, programs, capsys, monkeypatch):
    """All rows of /a/iso are started, at work or over: those of /b/iso are not."""
    monkeypatch.setattr(rows.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    theirs = flags_of(name, "--workdir=/a/iso")
    jobs = [rows.name_of(theirs, row, 40) for row in (0, 1, 5)]
    states = {
        "gke": ("", "Failed", "Completed"),
        "tpu_vm": ("ACTIVE", "FAILED", "SUSPENDED"),
        "skypilot": ("RUNNING", "FAILED", "CANCELLED"),
    }[name]
    found = [*zip(jobs, states, strict=True)]
    lines = "".join(f"{job} {state}\n" for job, state in found)
    sky = [{"job_id": 1, "job_name": job, "status": state} for job, state in found]
    text = json.dumps(sky) if name == "skypilot" else lines
    (programs / "listing").write_text(text)
    stub(programs, LISTS[name], f"cat {programs}/listing")
    given = [word for word in FLAGS[name] if not word.startswith(("--name", "--workd"))]
    for folder, left in (("/a/iso", "1,5"), ("/b/iso", "0-1,5")):
        words = ["--config=experiments/tiny.py", f"--workdir={folder}", *given]
        assert started_with([*words, "--dry-run"], name) == 0
        out, err = capsys.readouterr()
        assert f"rows to start: {left}\n" in err
        assert ("already started" in err) is (folder == "/a/iso")
        assert any(job in out for job in jobs) is (folder == "/a/iso")
        if folder == "/b/iso":
            assert "delete jobset" not in out
            assert not re.search(r"^gcloud .* delete", out, re.MULTILINE)


def test_a_bucket_has_the_same_name_from_every_folder():
    """Slurm's comment is the URL, from whatever folder the launcher is started."""
    assert rows.absolute("gs://bucket/iso/") == "gs://bucket/iso"
    assert rows.absolute("file:///a/../b") == "/b"
    assert rows.absolute("runs") == os.path.realpath("runs")


# Flags


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("local", ["--stages=fit"], "not known: --stages=fit; --help shows the flags"),
        ("local", ["--config.trian.seed=1"], "did you mean config.train?"),
        ("local", ["--at_once=0"], "--at_once=0"),
        ("local", ["--at_once=some"], "must be at least 1, or auto"),
        ("local", ["--work=x"], "not known: --work=x; did you mean --workdir?"),
        ("slurm", ["--signal=KILL@3"], "--signal=KILL@3"),
        ("gke", ["--gpu=x"], "--tpu and --topology, or --gpu and --nodes"),
        ("gke", ["--topology=3x3"], "a slice of 3x3 has 9 chips"),
        ("gke", ["--topology=four"], "--topology=four: must be as in 4x4"),
        ("gke", ["--pvc=studies"], "--pvc=studies: must be CLAIM:/PATH"),
        ("gke", ["--name=1st"], "would be called '1st-0'"),
        ("xpk", ["--name=My_study"], "would be called 'My_study-0'"),
        ("xpk", ["--name=" + "a" * 39], "at most 40 characters"),
        ("skypilot", ["--volume=data"], "--volume=data: must be /PATH=NAME"),
        ("gke", ["--workdir_there=gs:/b/x"], "a URL has two slashes"),
        ("local", ["--rows=100"], "--rows=100: the last row of the plan is 41"),
        ("slurm", ["--rows=0-42"], "--rows=0-42: the last row of the plan is 41"),
        ("gke", ["--rows=0,1-99999999999999"], "the last row of the plan is 41"),
        ("tpu_vm", ["--rows=5-2"], "--rows=5-2: must be rows of the plan, as in 0-9"),
    ],
)
def test_flags_that_are_refused(name, words, said, here, capsys):
    with pytest.raises(SystemExit, match="2"):
        started(name, *words, "--dry-run")
    assert said in capsys.readouterr().err


def test_rows_as_text():
    assert rows.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert rows.ranges([]) == ""
    assert rows.numbers("0-2,7", planned=8) == {0, 1, 2, 7}
    for wrong in ("", "a", "1-", "3,,4", "2-1", "8"):
        with pytest.raises(SystemExit, match="2"):
            rows.numbers(wrong, planned=8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("slurm", "those after a preemption count as well"),
        ("skypilot", "counted anew after each recovery"),
        ("tpu_vm", "counted anew at each start of a host"),
        ("xpk", "after a preemption or a lost host"),
    ],
)
def test_help_says_what_the_limit_of_restarts_counts(name, said, capsys):
    with pytest.raises(SystemExit, match="0"):
        launch_programs.load(name).flags_of(["--help"])
    assert said in " ".join(capsys.readouterr().out.split())


def test_exit_statuses_are_those_of_the_study():
    """What a launcher starts again is what exit_statuses.md says."""
    assert (rows.PREEMPTED, rows.LOST) == (75, 4)
    assert rows.HOPELESS == [1, 2, 3, 5]
    assert {*rows.HOPELESS, 0, 4, 75} == {*exit_status.EXIT.values()}
    text = (ROOT / "launch" / "slurm.sh").read_text()
    assert '"$status" = 75' in text
    assert '"$status" = 4' in text


# The missing rows of a real directory


def test_launchers_ask_the_entry_point(tmp_path, capfd, monkeypatch):
    """An experiment that fits gives its rows; another is refused, with its status."""
    example = older_workdirs.MADE / records.FIRST
    workdir = tmp_path / "w"
    older_workdirs.unpack(example, workdir, finished=True)
    specs = records.read_plan(workdir)
    shutil.rmtree(workdir / "runs" / specs[1].run_id)
    monkeypatch.chdir(ROOT)
    local = launch_programs.load("local")
    this = ("--config", str(example / "study.py"), "--workdir", str(workdir))
    files = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert local.main([*this, "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert out.count("scaling_ldm.main") == 1
    assert out.endswith("--run 1\n")
    assert local.main([*this, f"--rows=0-{len(specs) - 1}", "--dry-run"]) == 0
    assert capfd.readouterr().out.endswith("--run 1\n")
    with pytest.raises(SystemExit, match="2"):
        local.main([*this, f"--rows={len(specs)}", "--dry-run"])
    assert f"the last row of the plan is {len(specs) - 1}" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        local.main([*this, "--config.train.seed=9", "--dry-run"])
    assert "holds another experiment" in capfd.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == files
