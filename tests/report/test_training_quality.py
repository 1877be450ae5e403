"""Quality against training compute, of curves whose crossings are known."""

import dataclasses
import json
import math
import struct

import numpy as np
import pytest
from finished_study import table_rows

from scaling_ldm import records, report
from scaling_ldm.report import html, reading, training_quality

SIZES = {"a": 10_000, "b": 40_000, "c": 160_000}
MARKS = (1e9, 4e9, 1.6e10, 6.4e10)


def spec(run_id, params, width=16, depth=2):
    """A planned run; what the report does not look at is 1, or its default."""
    own = {"overrides", "group", "smaller_budgets", "branch_steps"}
    own |= {"trunk", "trunk_steps", "shared_steps", "rate_source"}
    every = {f.name for f in dataclasses.fields(records.RunSpec)}
    given = dict.fromkeys(every - own, 1)
    named = {"study": "s", "accelerator": "cpu", "recipe_hash": "0", "run_id": run_id}
    sizes = {"params": params, "params_without_embeddings": params}
    shape = {"width": width, "depth": depth}
    return records.RunSpec(**given | named | sizes | shape)


@pytest.fixture(scope="module")
def measured(evaluated):
    """measured(run_id, flops, value, ...): of the checkpoint after these FLOPs."""

    def make(run_id, flops, value, metric="fd_lite0", half=0.0, protocol="p" * 16):
        return evaluated(
            run_id=run_id,
            step=int(flops / 1e8),
            train_flops=flops,
            metric=metric,
            value=value,
            low=value - half,
            high=value + half,
            level=0.9 if half else 1.0,
            images=5000,
            protocol={"sampler": "ddim", "steps": 50, "guidance": 3.0},
            protocol_hash=protocol,
        )

    return make


@pytest.fixture(scope="module")
def curve(measured):
    """curve(run_id, value, ...): a run whose value is a function of its FLOPs."""

    def make(run_id, value, marks=MARKS, **how):
        return [measured(run_id, flops, value(flops), **how) for flops in marks]

    return make


def line(slope, at_1e10, scale=1.0):
    """Linear in ln FLOPs."""
    return lambda flops: scale * (at_1e10 + slope * math.log(flops / 1e10))


def written(workdir, found, runs=SIZES):
    specs = [spec(*run) if isinstance(run, tuple) else run for run in runs.items()]
    records.write_jsonl(workdir / "runs.jsonl", specs)
    records.write_jsonl(workdir / "evaluations.jsonl", found)
    return reading.read(workdir)


def train(workdir, run_id, steps, status="finished"):
    """What training leaves: a record, and checkpoints of these steps."""
    folder = workdir / "runs" / run_id
    names = (f.name for f in dataclasses.fields(records.TrainRecord))
    named = {"study": "s", "device": "cpu", "recipe_hash": "0", "run_id": run_id}
    named |= {"status": status, "detail": "", "mfu": None, "mfu_reason": ""}
    record = records.TrainRecord(**dict.fromkeys(names, 1) | named)
    records.write_jsonl(folder / "record.json", [record])
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)


def compared(workdir, found, **how):
    """The row of each two sizes, of the only comparison."""
    (only,) = training_quality.comparisons(written(workdir, found, **how))
    return training_quality.pairs(only).rows


SMALL, LARGE = "10.0\N{NO-BREAK SPACE}k", "40.0\N{NO-BREAK SPACE}k"


def ends(row, key):
    return [row[f"{key}_low"], row[f"{key}_high"]]


@pytest.mark.parametrize("half", [0.0, 0.1])
def test_an_order_without_intervals_is_said_to_be_doubtful(tmp_path, half, curve):
    found = [
        *curve("a", line(0.0, 9.0), half=half),
        *curve("b", line(0.0, 3.0), half=half),
    ]
    (only,) = training_quality.comparisons(written(tmp_path, found))
    caption = training_quality.pairs(only).caption
    assert ("any of this may be chance" in caption) == (half == 0.0)


@pytest.mark.parametrize(
    ("metric", "scale"), [("kid_clip", 1.0), ("recall_lite0", -1.0), ("fd_clip", None)]
)
def test_a_crossing_is_where_the_curves_meet(tmp_path, metric, scale, curve):
    """Linear where values span little; in ln value where they span much."""
    if scale is None:
        small, large = (
            lambda flops, e=e: 900 * (flops / 2e10) ** -e for e in (0.5, 0.8)
        )
    else:
        small, large = line(-1, 20, scale), line(-3, 20 + 2 * math.log(2), scale)
    found = curve("a", small, metric=metric) + curve("b", large, metric=metric)
    (crossing,) = compared(tmp_path, found)
    assert (crossing["smaller"], crossing["larger"]) == (SMALL, LARGE)
    assert (crossing["crossings"], crossing["better"]) == (1, LARGE)
    np.testing.assert_allclose(ends(crossing, "at"), 2e10, rtol=1e-3)
    assert ends(crossing, "flops") == [1e9, 6.4e10]


def test_curves_that_do_not_cross_are_said_not_to(tmp_path, curve):
    found = curve("a", line(-1, 20), half=0.9) + curve("b", line(-1, 18), half=0.9)
    (row,) = compared(tmp_path, found)
    assert (row["crossings"], row["better"], row["overlap"]) == (0, LARGE, "")
    assert ends(row, "at") == ends(row, "overlap") == [None, None]
    assert ends(row, "flops") == [1e9, 6.4e10]
    wide = curve("a", line(-1, 20), half=1.2) + found[len(MARKS) :]
    (row,) = compared(tmp_path, wide)
    assert row["overlap"] == "throughout" and ends(row, "flops") == [1e9, 6.4e10]
    assert row["crossings"] is row["better"] is None


def test_a_crossing_comes_with_the_compute_at_which_intervals_overlap(tmp_path, curve):
    half = math.log(4)  # of each: both together are the distance at 1e10 / 4 and x 4
    found = curve("a", line(-1, 20), half=half) + curve("b", line(-3, 20), half=half)
    (row,) = compared(tmp_path, found)
    assert (row["crossings"], row["better"], row["overlap"]) == (1, LARGE, "in part")
    np.testing.assert_allclose(ends(row, "at"), 1e10, rtol=1e-3)
    np.testing.assert_allclose(ends(row, "overlap"), [2.5e9, 4e10], rtol=0.01)


def test_sizes_are_compared_where_both_are_measured(tmp_path, curve):
    found = curve("a", line(0, 20), half=1.0) + curve("b", line(0, 19), half=1.0)
    (row,) = compared(tmp_path, found)
    assert (row["overlap"], ends(row, "flops")) == ("throughout", [1e9, 6.4e10])
    found = curve("a", line(0, 20), marks=MARKS[:3], half=0.1)
    found += curve("b", line(0, 19), marks=MARKS[1:], half=0.1)
    (row,) = compared(tmp_path, found)
    assert ends(row, "flops") == [4e9, 1.6e10]
    assert (row["crossings"], row["better"], row["overlap"]) == (0, LARGE, "")


def test_a_size_that_ends_is_not_said_to_be_overtaken(tmp_path, curve):
    found = curve("a", line(-1, 10), marks=MARKS[:3])
    found += curve("b", line(-1, 15)) + curve("c", line(-1, 18))
    rows = compared(tmp_path, found)
    assert [(row["smaller"], row["crossings"]) for row in rows] == [
        (SMALL, 0),
        (SMALL, 0),
        (LARGE, 0),
    ]
    assert [row["flops_high"] for row in rows] == [1.6e10, 1.6e10, 6.4e10]
    assert {row["better"] for row in rows[:2]} == {SMALL}


def test_what_is_said_does_not_depend_on_the_order_of_the_records(tmp_path, curve):
    """Two runs may be measured at once, the best of all first, the smallest last."""
    found = [*curve("a", line(-1, 20)), *curve("b", line(-3, 20))]
    found += curve("c", line(-4, 19))
    orders = (found, found[::-1], [*found[5:], *found[:5]])
    first, *others = (compared(tmp_path, order) for order in orders)
    assert all(other == first for other in others)
    for order in orders:
        (only,) = training_quality.comparisons(written(tmp_path, order))
        assert [c.size for c in only.curves] == list(SIZES.values())
        for c in only.curves:
            np.testing.assert_array_equal(c.flops, MARKS)


def test_several_crossings_are_counted(tmp_path, curve):
    values = iter((5.0, 3.0, 5.0, 3.0))
    found = curve("a", lambda _: 4.0) + curve("b", lambda _: next(values))
    (row,) = compared(tmp_path, found)
    assert row["crossings"] == 3
    np.testing.assert_allclose(ends(row, "at"), [2e9, 3.2e10])


def test_a_crossing_where_one_size_has_no_number_is_somewhere_between(tmp_path, curve):
    """Of one size one run ended before the other began."""
    found = curve("a", line(0, 5), marks=MARKS[:2])
    found += curve("a2", line(0, 9), marks=MARKS[2:]) + curve("b", line(0, 7))
    runs = {"a": 10_000, "a2": 10_000, "b": 40_000}
    (row,) = compared(tmp_path, found, runs=runs)
    assert (row["crossings"], row["better"]) == (1, LARGE)
    assert ends(row, "at") == [4e9, 1.6e10]


def test_an_order_that_intervals_leave_open_in_part_says_so(tmp_path, curve):
    wide, narrow = 1.0, 0.1
    found = curve("b", line(0, 5), half=narrow)
    far = curve("a", line(0, 9), marks=MARKS[:2], half=narrow)
    near = curve("a", line(0, 5.5), marks=MARKS[2:], half=wide)
    (row,) = compared(tmp_path, [*found, *far, *near])
    assert (row["crossings"], row["better"], row["overlap"]) == (0, LARGE, "in part")
    assert ends(row, "flops") == [1e9, 6.4e10]
    values = iter((5.0, 3.0, 5.0, 3.0))
    found = curve("a", lambda _: 4.0, half=0.5)
    found += curve("b", lambda _: next(values), half=0.25)
    (row,) = compared(tmp_path, found)
    assert (row["crossings"], row["overlap"]) == (3, "in part")
    np.testing.assert_allclose(row["at_high"], 3.2e10)


@pytest.mark.parametrize(("half", "logarithmic"), [(0.5, True), (1.5, False)])
def test_an_interval_beyond_zero_has_no_place_on_a_logarithmic_axis(
    tmp_path, curve, half, logarithmic
):
    found = curve("a", lambda flops: 1e11 / flops, half=half)  # 100 to 1.6
    found[-1] = dataclasses.replace(found[-1], low=found[-1].value - 1.6 * half)
    (only,) = training_quality.comparisons(written(tmp_path, found))
    assert only.logarithmic == logarithmic


def test_sizes_without_a_common_compute_are_not_compared(tmp_path, curve):
    found = curve("a", line(0, 5), marks=MARKS[:2])
    found += curve("b", line(0, 7), marks=MARKS[2:])
    (row,) = compared(tmp_path, found)
    assert row["overlap"] == "no common compute"
    assert row["crossings"] is row["better"] is row["flops_low"] is None


def test_of_several_runs_of_a_size_the_best_counts(tmp_path, curve):
    found = curve("a", line(0, 9), marks=MARKS[:2]) + curve("a2", line(0, 5))
    found += curve("b", line(0, 7))
    runs = {"a": 10_000, "a2": 10_000, "b": 40_000}
    (row,) = compared(tmp_path, found, runs=runs)
    assert (row["crossings"], row["better"]) == (0, SMALL)


def test_numbers_of_two_protocols_and_two_metrics_never_meet(tmp_path, curve):
    found = curve("a", line(-1, 20)) + curve("b", line(-1, 25), protocol="q" * 16)
    found += curve("c", line(-1, 5), metric="kid_lite0")
    several = training_quality.comparisons(written(tmp_path, found))
    assert [(c.metric, c.protocol_hash[0], c.labels) for c in several] == [
        ("fd_lite0", "p", ("10.0\N{NO-BREAK SPACE}k",)),
        ("fd_lite0", "q", ("40.0\N{NO-BREAK SPACE}k",)),
        ("kid_lite0", "p", ("160\N{NO-BREAK SPACE}k",)),
    ]
    assert len({training_quality.name(c) for c in several}) == 3
    for c in several:
        assert training_quality.pairs(c).rows == []


MEASURED = f"kept checkpoints are measured by FD-Lite0 (protocol {'p' * 16})"


def told(workdir):
    """What is said of checkpoints without a number, line by line."""
    study = reading.read(workdir)
    return list(training_quality.unmeasured(study, training_quality.comparisons(study)))


def test_kept_checkpoints_without_a_number_are_named(tmp_path, curve):
    """As the page is in the middle of measuring: every one of them, the last, none."""
    found = [*curve("a", line(-1, 20)), *curve("b", line(-1, 21), marks=MARKS[:1])]
    written(tmp_path, found)
    steps = [round(flops / 1e8) for flops in MARKS]
    for run_id in "ab":
        train(tmp_path, run_id, steps)
        # Neither is a checkpoint: of one set aside and one cut off.
        for name in ("damaged-7", "9.orbax-checkpoint-tmp-1"):
            (tmp_path / "runs" / run_id / "checkpoints" / name).mkdir()
    train(tmp_path, "c", [3], status="non_finite_loss")  # nobody will measure it
    line_ = f"5 of 8 {MEASURED}; missing: b at steps 40, 160, 640."
    assert told(tmp_path) == [line_]
    page = report.write(tmp_path).read_text(encoding="utf-8")
    said = f'<p><span class="bad">Not complete:</span> {html.prose(line_)}</p>'
    assert page.count(said) == 1
    written(tmp_path, [*found, *curve("b", line(-1, 21), marks=MARKS[1:3])])
    assert told(tmp_path) == [f"7 of 8 {MEASURED}; missing: b at step 640."]
    written(tmp_path, [*found, *curve("b", line(-1, 21))])
    assert told(tmp_path) == []  # and then nothing is said


def test_many_checkpoints_without_a_number_are_counted(tmp_path, curve):
    written(tmp_path, curve("a", line(-1, 20)))
    train(tmp_path, "a", [10, 40, *range(41, 47)])
    assert told(tmp_path) == [
        f"2 of 8 {MEASURED}; missing: a at steps 41, 42, 43, 44, 45, 46."
    ]
    train(tmp_path, "b", [10])
    (only,) = told(tmp_path)
    assert only == f"2 of 9 {MEASURED}; missing: 7, of 2 runs."


def test_of_each_metric_and_protocol_what_is_missing_is_its_own(tmp_path, curve):
    everywhere = curve("a", line(-1, 20), metric="kid_lite0")
    found = [*everywhere, *curve("a", line(-1, 20), marks=MARKS[:2])]
    exported = [
        dataclasses.replace(r, checksum="ab" * 32) for r in curve("a", line(0, 1))
    ]
    written(tmp_path, found + exported)
    train(tmp_path, "a", [10, 40, 160, 640])
    assert told(tmp_path) == [f"2 of 4 {MEASURED}; missing: a at steps 160, 640."]


def test_before_any_curve_the_experiment_says_whether_there_will_be_one(
    tmp_path, curve
):
    written(tmp_path, curve("a", line(-1, 20), marks=MARKS[:1]))
    train(tmp_path, "a", [10, 40])
    assert told(tmp_path) == []
    config = {"name": "s", "config": {"evaluate": {"through_training": True}}}
    (tmp_path / "experiment.json").write_text(json.dumps(config))
    assert told(tmp_path) == [f"1 of 2 {MEASURED}; missing: a at step 40."]
    # Once there are curves they alone count, not what was measured of one checkpoint.
    other = curve("a", line(-1, 20), marks=MARKS[:1], protocol="q" * 16)
    written(tmp_path, [*other, *curve("a", line(-1, 20), marks=MARKS[:2])])
    assert told(tmp_path) == []


def test_weights_from_a_folder_are_no_checkpoint_of_a_run(tmp_path, measured):
    """Their card may name a run of this study; their curve is not its curve."""
    found = [measured("a", flops, 5.0) for flops in MARKS]
    found[1:] = [dataclasses.replace(r, checksum="ab" * 32) for r in found[1:]]
    assert training_quality.comparisons(written(tmp_path, found)) == []


def test_without_two_checkpoints_of_any_run_nothing_is_drawn(tmp_path, measured):
    found = [measured(name, 1e10, 5.0) for name in SIZES]
    found += [measured("a", 2e10, 5.0, metric="fid"), measured("gone", 1e9, 1.0)]
    found += [measured("gone", 2e9, 1.0), measured("a", 3e10, math.nan)]
    assert training_quality.comparisons(written(tmp_path, found)) == []
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "Measured pictures" in text
    assert "Quality against training compute" not in text


def test_a_caption_says_how_it_was_measured(tmp_path, curve):
    for half, words in (
        (1.0, "Bands: 90% intervals."),
        (0.0, "No intervals are known."),
    ):
        found = curve("a", line(-1, 20), half=half)
        (only,) = training_quality.comparisons(written(tmp_path, found))
        assert training_quality.caption(only) == (
            "FD-Lite0 against training compute, a line per run, a colour per size, a "
            f"point per checkpoint. {words} 5\N{NO-BREAK SPACE}000 pictures; ddim, 50 "
            f"steps, guidance 3; protocol {'p' * 16}."
        )


def test_sizes_that_look_alike_are_told_apart(tmp_path, curve):
    specs = [spec("a", 10_001, 16, 2), spec("b", 10_002, 12, 4)]
    records.write_jsonl(tmp_path / "runs.jsonl", specs)
    found = curve("a", line(-1, 20)) + curve("b", line(-1, 21))
    records.write_jsonl(tmp_path / "evaluations.jsonl", found)
    (only,) = training_quality.comparisons(reading.read(tmp_path))
    assert [label.split(" ", 1)[1] for label in only.labels] == ["(16 × 2)", "(12 × 4)"]


def test_the_page_has_a_figure_and_its_tables_for_each_comparison(
    tmp_path, curve, measured
):
    found = []
    for k, name in enumerate(SIZES):  # power laws: over more than a decade of values
        value = lambda flops, k=k: (2 + k) * 1e3 * (flops / 1e9) ** -(0.5 + 0.1 * k)  # noqa: E731
        found += curve(name, value, half=1.0) + curve(
            name, line(1, 20 + k), metric="recall_<lite0>"
        )
    found.append(measured("a", 1e11, 30.0, metric="recall_<lite0>", half=1.0))
    written(tmp_path, found)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert text.count("Quality against training compute") == 1
    assert text.count("<svg") == 2 and "recall <lite0>" not in text
    names = [p.stem for p in sorted((tmp_path / "report/figures").glob("*.png"))]
    assert names == [f"quality_{m}_{'p' * 16}" for m in ("fd_lite0", "recall__lite0_")]
    for path in (tmp_path / "report" / "figures").glob("*.png"):
        assert min(struct.unpack(">II", path.read_bytes()[16:24])) > 300
    several = training_quality.comparisons(reading.read(tmp_path))
    assert [c.logarithmic for c in several] == [True, False]
    assert [c.level for c in several] == [0.9, 0.9]
    for c in several:
        table = training_quality.pairs(c)
        assert table_rows(tmp_path, table.name) == [
            {k: "" if v is None else str(v) for k, v in row.items()}
            for row in table.rows
        ]
        assert len(table.rows) == 3 and html.table(table) in text
    assert "5\N{NO-BREAK SPACE}000 pictures; ddim, 50 steps, guidance 3" in text
    np.testing.assert_array_equal(several[0].curves[1].flops, MARKS)
