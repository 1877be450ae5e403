"""Published laws in the figures of a report."""

import dataclasses

import numpy as np
import pytest
from finished_study import figures_as, make_workdir, table_rows
from matplotlib.figure import Figure

from scaling_ldm import report
from scaling_ldm.laws import converted
from scaling_ldm.records import Refusal
from scaling_ldm.report import published_laws


def test_what_can_be_converted_is_drawn_and_the_rest_says_why(tmp_path):
    workdir = make_workdir(tmp_path)
    chosen = ("abra2026", "besiroglu2024", "yin2024_video_envelope")
    with figures_as("svg"):
        page = report.write(workdir, chosen).read_text("utf-8")
    rows = {row["study"]: row for row in table_rows(workdir, "overlaid")}
    assert tuple(rows) == chosen
    top = 1.6e12
    n = float(rows["abra2026"]["N_opt"])
    assert n == pytest.approx(0.0301 * top**0.4951)
    assert rows["abra2026"]["D_opt"] == ""
    assert "its D counts other tokens" in rows["abra2026"]["not_drawn"]
    refit = rows["besiroglu2024"]
    assert 6 * float(refit["N_opt"]) * float(refit["D_opt"]) == pytest.approx(top)
    assert "its units are not known" in rows[chosen[2]]["not_drawn"]
    assert "Published laws in the figures" in page
    assert page.count("published: besiroglu2024") == 2  # in the figures of N and D
    assert page.count("published: abra2026") == 1
    assert "published: yin2024" not in page


def test_without_a_choice_there_is_no_table_and_an_unknown_one_is_named(tmp_path):
    workdir = make_workdir(tmp_path)
    with figures_as():
        report.write(workdir)
    assert not (workdir / "report" / "tables" / "overlaid.csv").exists()
    with pytest.raises(KeyError, match="no published laws"):
        report.write(workdir, ("abra",))


def test_lines_have_the_heights_that_the_axis_needs():
    axes = Figure().add_subplot()
    every = [converted.converted(s) for s in converted.studies()]
    drawn = [s for s in every if not isinstance(s.laws["N_opt"], Refusal)]
    heights = published_laws.draw(axes, "N_opt", every, np.array([1e20, 1e21]))
    assert len(axes.lines) == len(drawn) > 10 and len(heights) == 2 * len(drawn)
    assert min(heights) == min(s.laws["N_opt"](1e20) for s in drawn)
    assert published_laws.draw(axes, "L_opt", every, np.array([1e20, 1e21])) == []
    unknown = dataclasses.replace(every[0], domain=None)
    assert published_laws.table([unknown], 1e20).rows[0]["flops_min"] is None
