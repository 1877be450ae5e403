"""Published laws in the figures of a report."""

import dataclasses

import numpy as np
import pytest
from finished_study import figures_as, make_workdir, table_rows
from matplotlib.figure import Figure

from scaling_ldm import report
from scaling_ldm.laws import converted
from scaling_ldm.records import Refusal
from scaling_ldm.report import figures, published_laws, reading

TOP = 1.6e12
CHOSEN = ("abra2026", "besiroglu2024", "yin2024_video_envelope")


def test_what_can_be_converted_is_drawn_and_the_rest_says_why(tmp_path):
    part = reading.read(make_workdir(tmp_path))
    chosen = [converted.converted(name) for name in CHOSEN]
    rows = {row["study"]: row for row in published_laws.table(chosen, TOP).rows}
    assert tuple(rows) == CHOSEN
    assert rows["abra2026"]["N_opt"] == pytest.approx(0.0301 * TOP**0.4951)
    assert rows["abra2026"]["D_opt"] is None
    assert "its D counts other tokens" in rows["abra2026"]["not_drawn"]
    refit = rows["besiroglu2024"]
    assert 6 * refit["N_opt"] * refit["D_opt"] == pytest.approx(TOP)
    assert "its units are not known" in rows[CHOSEN[2]]["not_drawn"]
    fit, drawn = part.fits[0], {}
    with figures_as("svg"):
        for quantity in ("N_opt", "L_opt"):
            plot = figures.law(part, fit, quantity, None, chosen)
            drawn[quantity] = [n for n in CHOSEN if f"published: {n}" in plot.svg]
    assert drawn == {"N_opt": [*CHOSEN[:2]], "L_opt": []}


@pytest.mark.slow
def test_the_page_has_the_table_and_the_figures(tmp_path):
    workdir = make_workdir(tmp_path)
    with figures_as("svg"):
        page = report.write(workdir, CHOSEN).read_text("utf-8")
        rows = table_rows(workdir, "overlaid")
        assert [row["study"] for row in rows] == [*CHOSEN]
        assert "Published laws in the figures" in page
        assert page.count("published: besiroglu2024") == 2  # in those of N and D
        report.write(workdir)
    assert not (workdir / "report" / "tables" / "overlaid.csv").exists()


def test_an_unknown_choice_is_named(tmp_path):
    with pytest.raises(KeyError, match="no published laws"):
        report.write(tmp_path, ("abra",))


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
