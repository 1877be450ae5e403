"""The tables of time: their numbers are those of the attempts."""

import pytest

from scaling_ldm import records
from scaling_ldm.records import goodput
from scaling_ldm.report import goodput_tables
from scaling_ldm.report.study import Study


def attempt(run_id, number, began, first, last, **more):
    parts = dict.fromkeys(goodput.MEASURED, 0.0) | {"STEP": 6.0, "PROGRAM_STARTUP": 2.0}
    given = {"compiled": 3, "cache_hits": 1, "processes": 2, "devices": 4}
    return records.Attempt(
        run_id=run_id,
        number=number,
        began=began,
        seconds=8.0,
        ended="",
        first_step=first,
        last_step=last,
        parts=parts,
        **given | more,
    )


def study_of(attempts):
    found = Study.__new__(Study)  # a table of time reads nothing else
    object.__setattr__(found, "attempts", attempts)
    return found


def test_a_row_for_each_part_and_for_each_run():
    hosts = {"host_seconds": (1.0, 3.0), "data_seconds": (0.5, 1.5)}
    study = study_of(
        {
            "a": (attempt("a", 0, 0.0, 0, 60), attempt("a", 1, 10.0, 40, 90, **hosts)),
            "b": (attempt("b", 0, 50.0, 0, 60),),
        }
    )
    whole, runs = goodput_tables.whole(study), goodput_tables.runs(study)
    seconds = {row["part"]: row["seconds"] for row in whole.rows}
    assert list(seconds) == list(goodput.PARTS)
    assert seconds["STEP"] == pytest.approx(16.0)
    assert seconds["WASTED_PROGRESS_FROM_DISRUPTION"] == pytest.approx(2.0)
    assert seconds["INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"] == pytest.approx(2.0)
    assert whole.total["seconds"] == pytest.approx(sum(seconds.values())) == 26.0
    assert sum(row["share"] for row in whole.rows) == pytest.approx(1.0)
    assert "3 attempts of 2 runs; 20 steps done again; 9 programs" in whole.caption
    a, b = runs.rows
    assert (a["attempts"], a["lost_steps"], b["lost_steps"]) == (2, 20, 0)
    assert a["seconds"] == pytest.approx(18.0)
    assert a["goodput"] == pytest.approx(10 / 18)
    assert (a["slowest_process"], a["its_host_share"]) == (1, pytest.approx(0.5))
    assert a["its_data_share"] == pytest.approx(0.25)
    assert b["slowest_process"] is None
    for table in (whole, runs):
        shown = [[column.show(row) for column in table.columns] for row in table.rows]
        assert all(len(row) == len(table.columns) for row in shown)


def test_without_attempts_there_are_no_tables():
    assert not goodput_tables.whole(study_of({})).rows
    assert not goodput_tables.runs(study_of({})).rows
