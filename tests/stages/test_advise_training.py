"""What to train, from the command line: advice, a plan by laws, and the next runs."""

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest

from scaling_ldm import config, records, study
from scaling_ldm.config import shapes
from scaling_ldm.laws import fit
from scaling_ldm.records import PowerLaw, Refusal
from scaling_ldm.stages import advise, plan
from scaling_ldm.training import shape_search
from scaling_ldm.workdir import exit_status, laws_from, proposals

CLUSTER = (None, None, None)
BUDGETS = (3e8, 1e9, 3e9)
SIZES = ((8, 1), (16, 1), (24, 1), (32, 1), (40, 1))


@pytest.fixture(scope="module")
def given(tiny):
    c = tiny.copy_and_resolve_references()
    c.plan.sizes, c.plan.budgets_flops, c.plan.sizes_per_budget = SIZES, BUDGETS, 0
    c.plan.minimum_steps = 1
    return c


@pytest.fixture(scope="module")
def runs(given):
    return plan.plan(config.resolve(given))


@pytest.fixture(scope="module")
def laws(runs):
    """A fit whose best size is that of the middle one, at every budget."""
    rng = np.random.default_rng(0)
    middle = runs[2].params_without_embeddings
    points = []
    for run in runs:
        n = run.params_without_embeddings
        loss = 0.4 + (run.budget_flops / 1e9) ** -0.2 * 0.2
        loss += 0.05 * np.log(n / middle) ** 2 + 0.001 * rng.standard_normal()
        points.append((run.budget_flops, n, run.tokens, loss))
    with mock.patch.object(fit, "_surface", lambda *_: fit.refuse("not fitted", "")):
        found = fit.isoflop(points, size="params_without_embeddings", bootstrap=60)
    return dataclasses.replace(found, weights="raw")


@pytest.fixture
def file(laws, tmp_path):
    path = tmp_path / "laws.json"
    records.write_jsonl(path, [laws])
    return path


def ask(given, workdir, stages=("advise",), **how):
    """The status of a command with changed fields "advise_hours"."""
    c = given.copy_and_resolve_references()
    with c.unlocked():
        for name, value in how.items():
            section, _, field = name.partition("_")
            c[section][field] = value
    return study.run(
        c, workdir=str(workdir), stages=list(stages), only=None, cluster=CLUSTER
    )


def test_advice_is_a_run_that_can_be_built(given, laws, file, runs, tmp_path, capsys):
    how = {"advise_laws": str(file), "advise_hours": 0.5, "advise_chips": 2}
    how |= {"advise_flops_per_second": 1e6, "advise_price": 3.0, "advise_images": 50.0}
    assert ask(given, tmp_path / "w", **how) == exit_status.EXIT["done"]
    lines = capsys.readouterr().out.splitlines()
    budget = 0.5 * 3600 * 2e6
    assert f"  compute   {budget:.4g} FLOPs" in lines
    (network,) = (line for line in lines if line.startswith("  network "))
    assert "24 x 1: " in network  # the middle size
    (run,) = (line for line in lines if line.startswith("  run "))
    wanted = runs[2].flops_per_step
    assert f"{round(budget / wanted):,} steps of 8 images" in run
    text = "\n".join(lines)
    assert "time      30 min on 2 x 1e+06 FLOP/s (stated); 1 device hours" in text
    assert "money     3 at 3 for a device hour" in text
    assert "1.2 times outside of the fitted budgets" in text
    (best,) = (line.split() for line in lines if line.startswith("  best size"))
    nfe = 2 * given.generate.steps  # guidance doubles it
    images = 50 * nfe * wanted / given.train.batch_size / 3
    assert float(best[-4]) == pytest.approx(images, rel=0.1)  # of the law's N
    assert float(best[-3]) == pytest.approx(budget + images, rel=0.02)
    assert not (tmp_path / "w" / "runs.jsonl").exists()


def test_a_loss_gives_its_compute_and_a_refused_law_its_reason(
    given, laws, file, tmp_path, capsys
):
    loss = laws.laws["L_opt"](2e9)
    how = {"advise_laws": str(file), "advise_loss": loss}
    assert ask(given, tmp_path / "w", **how) == 0
    text = capsys.readouterr().out
    assert "compute   2e+09 FLOPs [" in text and "time" not in text
    refused = Refusal(quantity="N_opt", reason="no minimum", detail="at 3e+08")
    without = dataclasses.replace(laws, laws={**laws.laws, "N_opt": refused})
    records.write_jsonl(file, [without])
    assert ask(given, tmp_path / "w", **how) == exit_status.EXIT["no answer"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"no advice for loss {loss:g}: its law is refused: no minimum; at 3e+08"
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"advise_flops": 1e9}, "no laws.json; run the stage fit of a study, or name"),
        (
            {"advise_flops": 1e9, "advise_laws": "published:abra"},
            "did you mean abra2026",
        ),
        (
            {"advise_hours": 1.0, "advise_device": "v5e", "advise_laws": "{}"},
            "config.advise.device = 'v5e': did you mean tpu-v5e",
        ),
        (
            {"advise_hours": 1.0, "advise_run": "a", "advise_laws": "{}"},
            "config.advise.run = 'a': ",
        ),
        (
            {"advise_hours": 1.0, "advise_device": "t4", "advise_laws": "{}"},
            "no published rate of t4; there are float16, float32",
        ),
        ({"advise_flops": 1.0, "advise_laws": "{}#a"}, "laws of the groups ''"),
        (
            {"advise_flops": 1.0, "advise_laws": "{}", "fit_metrics": ("loss_t0",)},
            "has no laws of",
        ),
    ],
)
def test_what_is_not_there_is_named(given, file, tmp_path, capsys, how, said):
    how = {k: v.format(file) if isinstance(v, str) else v for k, v in how.items()}
    status = ask(given, tmp_path / "w", **how)
    assert status == exit_status.EXIT["bad configuration"]
    err = capsys.readouterr().err
    assert said in err.replace(f"{tmp_path / 'w'}/", "no ").replace(
        "there is no no", "no"
    )


def test_a_measured_speed_is_that_of_one_device(given, laws, file, tmp_path, capsys):
    kinds = {"str": "", "int": 0, "float": 0.0, "float | None": None}
    fields = dataclasses.fields(records.TrainRecord)
    told = {f.name: kinds[str(f.type)] for f in fields}
    told |= {"run_id": "a", "device": "cpu", "flops_per_second": 8e6, "devices": 4}
    record = records.TrainRecord(**told)
    folder = tmp_path / "w" / "runs" / "a"
    folder.mkdir(parents=True)
    assert (
        ask(given, tmp_path / "w", ("plan",)) == exit_status.EXIT["bad configuration"]
    )
    (folder / "record.json").write_text(records.dumps(record))
    e = config.resolve(given)
    e = dataclasses.replace(
        e, advise=config.AdviseConfig(hours=1.0, run="a", chips=3, laws=str(file))
    )
    speed = advise._speed(e, tmp_path / "w")
    assert (speed.flops_per_second, speed.devices) == (3 * 2e6, 3)
    assert "cpu at 2e+06 FLOP/s (measured, a)" in speed.basis


# A plan by laws


def by_laws(given, file, budget=2e9):
    c = given.copy_and_resolve_references()
    c.plan.from_laws, c.plan.budget = str(file), budget
    return c


def test_the_plan_by_laws_is_the_one_run_of_its_size(
    given, file, runs, tmp_path, capsys
):
    (row,) = plan.plan(config.resolve(by_laws(given, file)))
    like = runs[2]
    assert (row.width, row.depth, row.params) == (24, 1, like.params)
    assert row.budget_flops == 2e9
    assert row.steps == round(2e9 / like.flops_per_step)
    assert row.recipe_hash == like.recipe_hash  # the plan is no part of a recipe
    said = capsys.readouterr().err
    assert "at 2e+09 FLOPs; 24 x 1 has" in said and "caution" not in said
    laws_from.one_run(config.resolve(by_laws(given, file, 9e9)), None)
    said = capsys.readouterr().err
    assert "caution: 9e+09 FLOPs is 3 times outside of the fitted budgets" in said
    c = by_laws(given, file)
    c.plan.axes = {"train.seed": (0, 1)}
    assert [r.seed for r in plan.plan(config.resolve(c))] == [0, 1]


def test_the_laws_belong_to_the_study_not_their_path(
    given, laws, file, tmp_path, capsys
):
    workdir, c = tmp_path / "w", by_laws(given, file)
    run = dict(workdir=str(workdir), stages=["plan"], only=None, cluster=CLUSTER)
    assert study.run(c, **run) == 0
    held = (workdir / "runs.jsonl").read_text()
    assert records.read(workdir / "planned_from.json") == laws
    moved = file.rename(tmp_path / "elsewhere.json")
    assert laws_from.planned(config.resolve(c), workdir).found == laws  # as recorded
    c.plan.from_laws = str(moved)
    assert laws_from.planned(config.resolve(c), workdir).found == laws
    law = laws.laws["N_opt"]
    assert isinstance(law, PowerLaw)
    larger = dataclasses.replace(law, coef=2 * law.coef)
    other = dataclasses.replace(laws, laws={**laws.laws, "N_opt": larger})
    records.write_jsonl(moved, [other])
    capsys.readouterr()
    assert study.run(c, **run) == exit_status.EXIT["bad configuration"]
    assert "has other laws than this study was planned with" in capsys.readouterr().err
    assert (workdir / "runs.jsonl").read_text() == held


def test_a_size_beyond_the_ladder_goes_on_with_its_family(given, runs, monkeypatch):
    e, size = config.resolve(given), "params_without_embeddings"
    n = runs[1].params_without_embeddings
    assert shape_search.nearest(e, n, size) == ((16, 1), n)

    def counted(_, shape):  # as of a transformer
        width, depth = shape
        return 12 * width * width * depth + 300 * width + 999, 12 * width**2 * depth

    monkeypatch.setattr(shape_search, "counted", counted)
    for ladder in (SIZES, ((16, 2), (24, 3), (32, 4)), ((16, 1), (32, 2), (64, 3))):
        c = given.copy_and_resolve_references()
        c.plan.sizes = ladder
        e = config.resolve(c)
        family = [*itertools.islice(shapes.family(e), 400)]
        for wanted in (5e3, 1e5, 3e6, 1e8):
            found, n = shape_search.nearest(e, wanted, size)
            assert n == counted(e, found)[1]
            off = min(abs(np.log(counted(e, s)[1] / wanted)) for s in family)
            assert abs(np.log(n / wanted)) == pytest.approx(off)
    with pytest.raises(config.ConfigError, match="no network of the family"):
        shape_search.nearest(e, 1e18, size)


def test_a_refused_law_plans_nothing(given, laws, file):
    refused = Refusal(quantity="N_opt", reason="no minimum", detail="at 3e+08")
    without = dataclasses.replace(laws, laws={**laws.laws, "N_opt": refused})
    records.write_jsonl(file, [without])
    with pytest.raises(config.ConfigError, match="no size for 2e.09 FLOPs: its law is"):
        plan.plan(config.resolve(by_laws(given, file)))


def test_published_laws_plan_a_run_in_all_parameters(given):
    source = laws_from.read("published:abra2026", "a", "loss")
    assert source.size == "params" and "2608.17286" in source.name


# The next runs


def test_proposals_are_runs_of_the_plan_with_their_rows(
    given, laws, runs, tmp_path, monkeypatch
):
    c = given.copy_and_resolve_references()
    c.plan.next, c.plan.budget = 2, 1e10
    e = config.resolve(c)
    records.write_jsonl(tmp_path / "laws.json", [laws])
    rng = np.random.default_rng(0)
    middle = runs[2].params_without_embeddings
    points = [
        (
            r.budget_flops,
            float(r.params_without_embeddings),
            0.05 * float(np.log(r.params_without_embeddings / middle)) ** 2
            + 0.001 * float(rng.standard_normal()),
        )
        for r in runs
    ]
    gone = [p for p in points if p[1] != middle]  # the middle size was never run
    monkeypatch.setattr(proposals, "_points", lambda *_: gone)
    said = proposals.lines(e, tmp_path, runs)
    assert said[1].startswith("next runs, for N_opt at 1e+10 FLOPs, which the noise")
    assert len(said) == 7 and "24 x 1" in said[3] and "24 x 1" in said[4]
    shown = [float(line.split()[1]) for line in said[3:5]]
    rows = [BUDGETS.index(b) * len(SIZES) + 2 for b in shown]
    assert said[6].endswith(f"--run={rows[0]},{rows[1]}")
    monkeypatch.setattr(proposals, "_points", lambda *_: points)
    assert proposals.lines(e, tmp_path, runs)[1].startswith(
        "no next runs for N_opt: no"
    )
