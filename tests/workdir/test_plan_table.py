"""The plan as text: times that can be read, and what makes losses hard to read."""

import dataclasses
import pathlib

import pytest

from scaling_ldm import config, records
from scaling_ldm.workdir import plan_table

STUDY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"


@pytest.fixture
def rows():
    return records.read_plan(STUDY)


def changed(tiny, **sections):
    c = tiny.to_dict()
    c["plan"]["devices"] = 1
    for section, values in sections.items():
        c[section].update(values)
    return config.resolve(c)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.036, "0.036 s"),
        (3.034, "3.03 s"),
        (61, "1.02 min"),
        (421.2, "7.02 min"),
        (3600 * 5.125, "5.12 h"),
        (3600 * 43210.4, "43,210 h"),
    ],
)
def test_a_time_has_a_unit_that_fits(seconds, text):
    assert plan_table.duration(seconds) == text


def test_a_stated_speed_is_not_called_measured(tiny, rows):
    text = plan_table.table(config.resolve(tiny), rows)
    assert "FLOP/s per device (stated in config.plan.flops_per_second_per_de" in text
    assert f"peak on {tiny.plan.devices} devices; after" in text
    assert "peak on 1 device; after" in plan_table.table(changed(tiny), rows)
    assert "measured)" not in text and "compilation" in text
    e = changed(tiny, plan={"flops_per_second_per_device": 0.0, "accelerator": "t4"})
    assert "40% of peak (assumed" in plan_table.table(e, rows)


def test_widths_below_the_values_of_a_patch_are_named(tiny, rows):
    """Paper B patches latents of 4 channels: 16 values; here it is 4 * 4 * 3 = 48."""
    (line,) = plan_table.cautions(changed(tiny), rows)
    widths = sorted({row.width for row in rows if row.width < 48})
    assert widths and max(row.width for row in rows) == 48
    assert "48 values" in line and f"widths {', '.join(map(str, widths))} are" in line
    small = changed(tiny, model={"patch_size": 2})
    assert plan_table.cautions(small, rows) == []
    # An axis of patches: only the rows with the large one.
    mixed = [
        dataclasses.replace(row, overrides={"model.patch_size": 2 + 2 * (k == 0)})
        for k, row in enumerate(rows)
    ]
    (line,) = plan_table.cautions(small, mixed)
    assert f"widths {rows[0].width} are" in line


def test_a_long_warm_up_is_named(tiny, rows):
    e = changed(tiny, model={"patch_size": 2})
    long = [dataclasses.replace(row, steps=100, warmup_steps=25) for row in rows]
    assert plan_table.cautions(e, long) == []
    long[1] = dataclasses.replace(long[1], warmup_steps=60)
    (line,) = plan_table.cautions(e, long)
    assert "in 1 run the warm-up" in line and "60 of 100" in line
    assert rows[1].run_id in line


def test_runs_that_repeat_their_pictures_are_named(tiny, rows):
    e = changed(tiny, model={"patch_size": 2})
    few = [dataclasses.replace(row, images=1000) for row in rows]
    few[2] = dataclasses.replace(few[2], images=4000)
    assert plan_table.cautions(e, few, {}) == []
    assert plan_table.cautions(e, few, {"": 4000}) == []
    (line,) = plan_table.cautions(e, few, {"": 1250})
    assert (
        "1 run: pictures are seen" in line
        and "1,250 to train on" in line
        and "3.2 times" in line
    )
    assert few[2].run_id in line
    text = plan_table.table(e, few, pictures={"": 1250})
    assert text.splitlines()[0].split()[-2:] == ["epochs", "time"]
    assert text.splitlines()[4].split()[-3] == "3.2"
    assert "epochs" not in plan_table.table(e, few)


def test_of_a_mix_the_part_that_is_seen_most_often_counts(tiny, rows):
    mix = {"mix": {"own": 3.0, "prior": 1.0}, "parts": ()}
    e = dataclasses.replace(
        config.resolve(tiny),
        data=dataclasses.replace(
            config.resolve(tiny).data, mix=tuple(mix["mix"].items())
        ),
    )
    row = dataclasses.replace(rows[0], images=8000)
    assert plan_table.epochs(e, row, {"own": 1000, "prior": 4000}) == pytest.approx(6)
    assert plan_table.epochs(e, row, {"own": 10**6, "prior": 500}) == pytest.approx(4)


def test_steps_that_do_not_fit_the_accelerator_are_named(tiny, rows):
    """A t4 has 16e9 bytes, which are 14.9 GiB; of a device without a row: nothing."""
    small = {"model": {"patch_size": 2}}
    e = changed(tiny, **small, plan={"accelerator": "t4"})
    there = 16 * 10**9
    held = [dataclasses.replace(row, memory_bytes_per_device=there) for row in rows]
    assert plan_table.cautions(e, held) == []
    held[1] = dataclasses.replace(held[1], memory_bytes_per_device=there + 2**30)
    (line,) = plan_table.cautions(e, held)
    assert "in 1 run a step needs more than a t4 has" in line
    assert f"15.90 of 14.90 GiB ({rows[1].run_id})" in line
    unknown = changed(tiny, **small, plan={"accelerator": "mine"})
    assert plan_table.cautions(unknown, held) == []


def test_batches_that_devices_cannot_share_are_named(tiny, rows):
    rows = [dataclasses.replace(row, batch_size=8) for row in rows]
    given = {"accelerator": "t4", "devices": 8}
    small = {"model": {"patch_size": 2}}
    assert plan_table.cautions(changed(tiny, **small, plan=given), rows) == []
    given["devices"] = 16
    (line,) = plan_table.cautions(changed(tiny, **small, plan=given), rows)
    assert (
        "config.plan.devices = 16 does not divide config.train.batch_size = 8" in line
    )
    assert "validation" not in line
    given["devices"] = 3
    (line,) = plan_table.cautions(changed(tiny, **small, plan=given), rows)
    assert "config.validation.batch_size = 16" in line
    given["accelerator"] = "2-core CPU"  # its devices are a guess about cores
    assert plan_table.cautions(changed(tiny, **small, plan=given), rows) == []
