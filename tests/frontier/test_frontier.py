"""Tables of cells whose frontier, crossings and noise are known."""

import dataclasses
import math
import types

import numpy as np
import pytest

from scaling_ldm import config, frontier, records
from scaling_ldm.evaluation import protocol
from scaling_ldm.flops import peaks
from scaling_ldm.models.denoisers import presets
from scaling_ldm.records import Crossing, MeasuredCell, Refusal
from scaling_ldm.stages import frontier as grid
from scaling_ldm.stages import plan
from scaling_ldm.training import mesh

STEPS = (1, 2, 4, 8, 16, 32, 64)
GUIDANCES = (1.5, 2.0, 3.0, 4.0)


def make_cell(**changes):
    """A cell of cost relative_cost x steps in units of 1e9 FLOPs and 1e-3 s."""
    values = {
        "model": "a",
        "label": "A",
        "params": 1000,
        "relative_cost": 1.0,
        "sampler": "ddim",
        "steps": 4,
        "guidance": 2.0,
        "metric": "fd",
        "value": 10.0,
        "deviations": (),
        "protocol": "p0",
        "images": 500,
    } | changes
    nfe = values["steps"] * (1 if values["guidance"] == 1.0 else 2)
    work = values["relative_cost"] * nfe / 2
    costs = {
        "nfe": nfe,
        "flops": 0.9e9 * work,
        "decoder_flops": 0.1e9 * work,
        "seconds": 1e-3 * work,
    }
    return MeasuredCell(**(costs | values))


def deviations(sigma, count=100, bias=0.0):
    """`count` values of exactly this standard deviation, normal in form."""
    import scipy.stats

    z = scipy.stats.norm.ppf((np.arange(count) + 0.5) / count)
    return tuple(bias + sigma * z / z.std())


def make_table(curves, sigma=0.0, bias=0.0, samplers=("ddim",), best=3.0):
    """Cells of models 1, 2, 4, ... times as dear; `best` is the guidance of the lowest.

    Args:
      curves: by model, value at cost c; each step count's other guidances are worse.
      sigma: of the deviations; 0 for none.
    """
    cells = []
    for sampler in samplers:
        for k, curve in enumerate(curves):
            for steps in STEPS:
                for g in GUIDANCES:
                    value = curve(2.0**k * steps) + 2 * abs(g - best)
                    cells.append(
                        make_cell(
                            model=f"run{k}",
                            label=f"{2**k}M",
                            params=10**6 * 2**k,
                            relative_cost=2.0**k,
                            sampler=sampler,
                            steps=steps,
                            guidance=g,
                            value=value,
                            deviations=deviations(sigma, bias=bias) if sigma else (),
                        )
                    )
    return cells


def line(start, slope):
    """A value linear in ln c, so that interpolation in ln c is exact."""
    return lambda c: start - slope * math.log(c)


# Equal at ln c = 3: the larger wins from cost e^3 = 20.1.
CROSSING = (line(20, 2), line(26, 4))


def test_best_guidance_is_found_and_an_end_of_the_grid_is_a_doubt():
    found = frontier.best_guidance(make_table([line(20, 2)]))
    assert len(found) == len(STEPS)
    for b in found:
        assert (b.choice.guidance, b.edge, b.ties) == (3.0, "", ())
        assert b.tried == GUIDANCES
        np.testing.assert_allclose(b.choice.value, 20 - 2 * math.log(b.choice.cost))
    for best, edge in ((4.0, "high"), (1.5, "low")):
        found = frontier.best_guidance(make_table([line(20, 2)], best=best))
        assert {(b.choice.guidance, b.edge) for b in found} == {(best, edge)}
    assert frontier.best_guidance([make_cell()])[0].edge == "only"


def test_guidances_that_cannot_be_told_apart_are_ties():
    cells = [make_cell(guidance=g, value=v) for g, v in ((2.0, 9.0), (3.0, 9.0))]
    (found,) = frontier.best_guidance([*cells, make_cell(guidance=4.0, value=9.1)])
    assert (found.choice.guidance, found.ties) == (2.0, (3.0,))
    noisy = [
        make_cell(guidance=g, value=v, deviations=deviations(0.5))
        for g, v in ((2.0, 9.0), (3.0, 9.3), (4.0, 12.0), (1.5, 12.0))
    ]
    (found,) = frontier.best_guidance(noisy)
    assert (found.choice.guidance, found.ties) == (2.0, (3.0,))
    # Two normals 0.3 apart with sd 0.5 each: P(first is lower) = Phi(0.424) = 0.664.
    np.testing.assert_allclose(found.choice.probability, 0.664, atol=0.05)


def test_pareto_set_is_that_of_a_hand_made_table():
    table = {  # (label, relative cost, steps): value
        ("a", 1.0, 4): 30.0,
        ("a", 1.0, 8): 20.0,
        ("a", 1.0, 20): 20.5,  # worse than 8 steps
        ("b", 2.0, 4): 20.0,  # costs as much as a at 8, and is no better
        ("b", 2.0, 8): 12.0,
        ("b", 2.0, 20): 11.0,
        ("c", 4.0, 4): 15.0,  # costs as much as b at 8
        ("c", 4.0, 20): 5.0,
    }
    cells = [
        make_cell(
            model=m,
            label=m,
            params=int(r * 100),
            relative_cost=r,
            steps=s,
            guidance=g,
            value=v + (g - 2),
        )
        for (m, r, s), v in table.items()
        for g in (2.0, 3.0)
    ]
    for shuffled in (cells, cells[::-1]):
        front = frontier.pareto(shuffled)
        assert [(c.cost, c.value, c.model) for c in front.pareto] == [
            (4.0, 30.0, "a"),
            (8.0, 20.0, "a"),
            (16.0, 12.0, "b"),
            (40.0, 11.0, "b"),
            (80.0, 5.0, "c"),
        ]
    assert all(c.interval is None and c.expected == c.value for c in front.pareto)
    points = frontier.pareto(cells, budgets=[4, 7.9, 8, 39, 1000]).points
    assert [p.choice.value for p in points] == [30.0, 30.0, 20.0, 12.0, 5.0]
    assert all(p.probabilities == {} for p in points)
    with pytest.raises(ValueError, match="below the cheapest cell's 4"):
        frontier.pareto(cells, budgets=[3.0])
    with pytest.raises(ValueError, match="no cell of sampler 'heun'; there are ddim"):
        frontier.pareto(cells, sampler="heun")


def test_the_pareto_set_never_climbs_and_is_of_the_settings_that_are_plotted():
    """The dearer is the lowest of four equals, by luck of which no more is left."""
    cells = [make_cell(steps=4, guidance=2.0, value=10.0, deviations=deviations(1.0))]
    for k, g in enumerate(GUIDANCES):
        value = 9.9 + 0.001 * k
        how = {"guidance": g, "value": value, "deviations": deviations(1.0)}
        cells.append(make_cell(steps=8, **how))
    cells.append(
        make_cell(steps=16, guidance=2.0, value=5.0, deviations=deviations(1.0))
    )
    plotted = [b.choice for b in frontier.best_guidance(cells)]
    assert plotted[1].value < plotted[0].value  # which the correction turns around
    for cost in frontier.COSTS:
        front = frontier.pareto(cells, cost).pareto
        assert [c.steps for c in front] == [4, 16], cost
        assert [c.expected for c in front] == [plotted[0].expected, plotted[2].expected]
    points = frontier.pareto(cells, budgets=[8.0]).points
    assert points[0].choice.steps == 8  # of a budget the cell measured lowest
    front = frontier.pareto(cells).pareto
    assert front[0].probability == 1.0  # alone at its cost
    # Of equal cost the lower alone, in any order.
    twice = frontier.pareto_optimal([*plotted[::-1], plotted[0], plotted[1]])
    assert twice == (plotted[0], plotted[2])


def test_costs_are_the_papers_the_true_flops_and_the_seconds():
    cell = make_cell(relative_cost=0.13, steps=50, guidance=7.5)
    assert frontier.cost_of(cell, "relative_cost_steps") == 6.5
    assert frontier.cost_of(cell, "flops") == pytest.approx(1e9 * 6.5)
    assert frontier.cost_of(cell, "seconds") == pytest.approx(6.5e-3)
    with pytest.raises(ValueError, match="unknown cost 'macs'; known: relative_cost"):
        frontier.cost_of(cell, "macs")
    # Without guidance half the evaluations: cheaper in FLOPs, not in the paper's cost.
    pair = [make_cell(guidance=1.0, value=9.0), make_cell(guidance=2.0, value=8.0)]
    assert len(frontier.pareto(pair, "flops").pareto) == 2
    assert len(frontier.pareto(pair).pareto) == 1


def test_probability_of_being_best_is_that_of_the_draws():
    sigma, gap = 1.0, 0.8
    cells = [
        make_cell(model=m, label=m, params=p, value=v, deviations=deviations(sigma))
        for m, p, v in (("a", 1, 10.0), ("b", 2, 10.0 + gap))
    ]
    front = frontier.pareto(cells, budgets=[4.0], bootstrap=20_000)
    (point,) = front.points
    expected = 0.5 * math.erfc(-gap / (sigma * math.sqrt(2)) / math.sqrt(2))
    np.testing.assert_allclose(point.probabilities["a"], expected, atol=0.012)
    assert sum(point.probabilities.values()) == pytest.approx(1)
    assert point.choice.probability == point.probabilities["a"]
    # E min(d) of the draws against the truth of what they choose, in closed form.
    s = sigma * math.sqrt(2)
    density = math.exp(-((gap / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(
        point.choice.expected - point.choice.value, s * density, atol=0.03
    )


def test_a_draw_does_not_depend_on_order_or_on_the_other_cells():
    cells = make_table(CROSSING, sigma=0.5)
    front = frontier.pareto(cells)
    assert frontier.pareto(cells[::-1]) == front
    assert frontier.pareto(cells, seed=1) != front
    alone = frontier.best_guidance([c for c in cells if c.model == "run1"])
    assert set(alone) < set(frontier.best_guidance(cells))


def test_bias_of_the_replicates_moves_nothing():
    plain = frontier.pareto(make_table(CROSSING, sigma=0.5))
    biased = frontier.pareto(make_table(CROSSING, sigma=0.5, bias=7.0))
    for a, b in zip(plain.points, biased.points, strict=True):
        np.testing.assert_allclose(a.choice.expected, b.choice.expected, rtol=1e-9)
        np.testing.assert_allclose(
            a.choice.interval.low, b.choice.interval.low, rtol=1e-9
        )


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_interval_of_the_chosen_covers_its_truth(spread):
    """8 guidances, `spread` sd of the noise apart: chosen by luck, or by merit."""
    rng = np.random.default_rng(int(spread) + 3)
    trials, covered, plain, optimism = 300, 0, 0, []
    for trial in range(trials):
        truth = 10 + spread * np.arange(8)
        measured = truth + rng.normal(size=8)
        cells = [
            make_cell(
                guidance=float(g),
                value=m,
                deviations=tuple(2 + rng.normal(size=60)),
            )
            for g, m in enumerate(measured, 1)
        ]
        (found,) = frontier.best_guidance(cells, bootstrap=300, seed=trial)
        choice = found.choice
        t = truth[int(choice.guidance) - 1]
        covered += choice.interval.low <= t <= choice.interval.high
        plain += abs(choice.value - t) <= 1.645
        optimism.append((t - choice.value, t - choice.expected))
    assert 0.83 <= covered / trials <= 0.96
    uncorrected, corrected = np.mean(optimism, axis=0)
    if spread == 0:  # the lowest of 8 normals lies 1.42 below their mean
        assert plain / trials < 0.75
        assert uncorrected > 1.2 and abs(corrected) < 0.55
    else:
        assert abs(corrected) < 0.15


def test_crossing_is_where_it_was_put():
    (found,) = frontier.crossings(make_table(CROSSING))
    assert isinstance(found, Crossing)
    np.testing.assert_allclose(found.at, math.exp(3), rtol=1e-9)
    assert (found.smaller, found.larger, found.interval) == ("1M", "2M", None)
    assert found.doubt == ""
    for cost, unit in (("flops", 1e9), ("seconds", 1e-3)):
        (found,) = frontier.crossings(make_table(CROSSING), cost)
        np.testing.assert_allclose(found.at, unit * math.exp(3), rtol=1e-9)


def test_crossings_of_all_neighbours_and_of_one_sampler():
    curves = (line(20, 2), line(26, 4), line(34, 6))  # at ln c = 3 and 4
    cells = make_table(curves, samplers=("ddim", "dpm"))
    for cell in list(cells):
        if cell.sampler == "dpm" and cell.model == "run2":
            cells.remove(cell)
            cells.append(dataclasses.replace(cell, value=cell.value + 100))
    found = frontier.crossings(cells, sampler="ddim")
    np.testing.assert_allclose([c.at for c in found], np.exp([3, 4]), rtol=1e-9)
    found = frontier.crossings(cells, sampler="dpm")
    assert isinstance(found[1], Refusal) and found[1].reason == "never"
    assert (found[1].quantity, found[1].group) == ("crossing", "4M over 2M, dpm")
    found = frontier.crossings(cells)  # each size with the sampler that suits it
    np.testing.assert_allclose([c.at for c in found], np.exp([3, 4]), rtol=1e-9)


def test_a_slow_sampler_does_not_hide_a_fast_one():
    cells = make_table(CROSSING, samplers=("fast", "slow"))
    for i, cell in enumerate(cells):
        if cell.sampler == "slow":  # better by the step, worse by the second
            changes = {"value": cell.value - 0.5, "seconds": 4 * cell.seconds}
            cells[i] = dataclasses.replace(cell, **changes)
    (found,) = frontier.crossings(cells, "seconds")
    np.testing.assert_allclose(found.at, 1e-3 * math.exp(3), rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_crossings_that_never_or_always_happen_are_refused(sigma):
    (never,) = frontier.crossings(make_table((line(20, 2), line(90, 4)), sigma))
    (always,) = frontier.crossings(make_table((line(20, 2), line(12, 4)), sigma))
    assert (never.reason, always.reason) == ("never", "always")
    assert "between costs 2 and 128" in never.detail
    assert ("100% always" in always.detail) == bool(sigma)


def test_a_crossing_lost_in_noise_is_uncertain():
    for curves in (CROSSING, (line(20, 2), line(22, 2))):
        (found,) = frontier.crossings(make_table(curves, sigma=6.0))
        assert isinstance(found, Refusal) and found.reason == "uncertain"
        assert "of 1000 draws" in found.detail
        assert ("measured at cost" in found.detail) == (curves is CROSSING)
    equal = [make_cell(model=m, label=m) for m in "ab"]
    (found,) = frontier.crossings(equal)
    assert found.reason == "the same size"


def test_crossing_beyond_the_smaller_ones_reach_is_a_doubt():
    cells = make_table((line(20, 2), line(31, 4)))  # would be ln c = 5.5; S ends at 64
    (found,) = frontier.crossings(cells)
    # The smaller stays at 20 - 2 ln 64 beyond its last step count.
    np.testing.assert_allclose(found.at, math.exp((11 + 2 * math.log(64)) / 4))
    assert "beyond the smaller's last measured cost of 64" in found.doubt


def test_interval_of_a_crossing_covers_it():
    rng = np.random.default_rng(0)
    sigma, inside, widths, trials = 0.3, 0, [], 80
    for trial in range(trials):
        cells = []
        for cell in make_table(CROSSING):
            if cell.guidance != 3.0:
                continue
            value = cell.value + sigma * rng.normal()
            spread = deviations(sigma, count=40)
            cells.append(dataclasses.replace(cell, value=value, deviations=spread))
        (found,) = frontier.crossings(cells, bootstrap=200, seed=trial)
        assert isinstance(found, Crossing)
        inside += found.interval.low <= math.exp(3) <= found.interval.high
        widths.append(math.log(found.interval.high / found.interval.low))
    assert 0.8 <= inside / trials <= 0.99
    # Of the gap, sd ~ 0.3 sqrt(2 (interpolated: x 0.5 to 1)); it falls by 2 per ln c.
    assert 0.35 < np.mean(widths) < 0.75


def test_unlike_protocols_are_compared_only_by_name():
    cells = [make_cell(), make_cell(steps=8, protocol="p1")]
    for ask in (
        frontier.best_guidance,
        frontier.pareto,
        frontier.crossings,
        lambda c, **k: frontier.build(c, reference="A", device="cpu", **k),
    ):
        with pytest.raises(ValueError, match=r"'p0' of A .*4 steps.*'p1' of A .*8 st"):
            ask(cells)
        with pytest.raises(ValueError, match="'p1' of A"):
            ask(cells, allow_protocols=["p0"])
        ask(cells, allow_protocols=["p0", "p1"])
    with pytest.raises(ValueError, match="list of hashes"):
        frontier.pareto(cells, allow_protocols="p0p1")
    found = frontier.build(
        cells, reference="A", device="cpu", allow_protocols=["p0", "p1"]
    )
    assert found.protocols == ("p0", "p1")
    assert any("p0, p1" in note for note in found.notes)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([make_cell(), make_cell()], r"given twice: A \(a\), ddim, 4 steps"),
        ([make_cell(), make_cell(steps=8, metric="kid")], "one metric at a time"),
        ([make_cell(metric="clip_score")], "'clip_score' is better if it is higher"),
        ([make_cell(), make_cell(steps=8, params=7)], r"two \(label, params, rel"),
        ([make_cell(seconds=0.0)], "seconds must be positive, got 0.0 of A"),
        ([make_cell(flops=math.nan)], "flops must be positive"),
        ([make_cell(deviations=(1.0, math.nan))], "a deviation is not finite: A"),
        ([make_cell(value=math.nan)], "no cell with a finite value among 1"),
        ([], "no cell with a finite value among 0"),
    ],
)
def test_tables_that_say_nothing_are_errors(cells, said):
    with pytest.raises(ValueError, match=said):
        frontier.pareto(cells)


def test_what_was_left_out_or_lacks_replicates_is_noted():
    cells = [
        make_cell(deviations=deviations(1.0)),
        make_cell(steps=8, deviations=deviations(1.0, count=5)),
        make_cell(steps=16, value=math.inf, images=20),
        make_cell(steps=32, images=100),
    ]
    found = frontier.build(cells, reference="A", device="cpu")
    assert len(found.cells) == 3
    notes = "\n".join(found.notes)
    assert "left out: A (a), ddim, 16 steps, guidance 2: fd is inf" in notes
    assert "no intervals: 2 of 3 cells have fewer than 20 replicates" in notes
    assert "cells of 100 to 500 images" in notes
    assert found.fronts[0].points[0].choice.interval is None


@pytest.fixture(scope="module")
def built():
    cells = make_table(CROSSING, sigma=0.2, samplers=("ddim", "dpm"), best=4.0)
    return frontier.build(
        cells, reference="1M", device="NVIDIA L4", bootstrap=400, budgets=12
    )


def test_a_frontier_is_a_record_that_is_read_back_equal(built, tmp_path):
    records.write_jsonl(tmp_path / "frontier.json", [built])
    assert records.read_jsonl(tmp_path / "frontier.json") == [built]
    assert [(f.cost, f.sampler) for f in built.fronts] == [
        (cost, sampler) for cost in frontier.COSTS for sampler in ("", "ddim", "dpm")
    ]
    assert all(len(f.points) == 12 for f in built.fronts)


def test_sentences_say_who_is_best_where_and_what_to_doubt(built):
    text = "\n".join(built.sentences)
    first = built.sentences[0]
    assert first.startswith(
        "With the best sampler the lowest fd within a budget is that of 1M up to cost "
    )
    assert first.endswith("). 12 budgets from cost 1 were compared.")
    last = built.fronts[0].points[-1].choice
    assert first.count("1M up to ") == first.count("2M up to ") == 1
    assert f", then of 2M up to cost 128 ({last.expected:.4g} [" in first
    crossing = next(c for c in built.crossings if c.sampler == "ddim")
    shown = f"{crossing.at:.3g} [{crossing.interval.low:.3g}, "
    assert f"With ddim the larger wins: 2M over 1M from cost {shown}" in text
    assert "At 28 of 28 settings the best guidance is an end" in text
    assert "the highest at 28" in text
    never = frontier.crossings(make_table((line(20, 2), line(90, 4))))
    (said,) = frontier.sentences("fd", [], never)
    assert said.startswith("The smaller is the better one up to the largest cost")
    assert said.endswith(": 2M over 1M, all samplers.")
    refused = [
        records.Refusal(quantity="crossing", group=group, reason="always", detail="")
        for group in ("b over a, ddim", "c over b, ddim")
    ]
    (said,) = frontier.sentences("fd", [], refused)
    assert said.endswith("both can run: b over a, ddim; c over b, ddim.")
    seconds = frontier.crossings(make_table((line(20, 2), line(90, 4))), "seconds")
    assert seconds[0].what == "crossing of 2M over 1M, all samplers, seconds"


def test_advice_takes_the_best_that_fits(built):
    small = frontier.advice(built, 16, "relative_cost")
    large = frontier.advice(built, 64, "relative_cost")
    assert (small.choice.label, small.choice.steps) == ("1M", 16)
    assert (large.choice.label, large.choice.steps) == ("2M", 32)
    assert not large.estimated and "evaluation of 1M" in large.basis
    interval = large.choice.interval
    assert interval.low < 26 - 4 * math.log(64) < interval.high
    assert interval.high - interval.low < 1.2
    same = frontier.advice(built, 64e9, "flops")
    assert same.choice.steps == 32 and same.choice.cost == pytest.approx(64e9)
    assert records.loads(records.dumps(large)) == large
    found = frontier.advice(built, 0.5, "relative_cost")
    assert isinstance(found, Refusal) and found.reason == "nothing fits"
    assert "the least is a relative cost of 1: 1M, ddim, 1 steps" in found.detail


def test_seconds_elsewhere_are_an_estimate_and_said_to_be(built):
    here = frontier.advice(built, 64e-3)
    assert not here.estimated and here.basis == "measured on NVIDIA L4"
    assert frontier.advice(built, 64e-3, device="l4") == here  # the same row
    there = frontier.advice(built, 1e-3, device="t4", dtype="float16", utilisation=0.2)
    assert there.estimated and "0.2 of the float16 peak of t4" in there.basis
    assert "measured on NVIDIA L4 only" in there.basis
    rate = 0.2 * peaks.PEAKS["t4"].flops_per_second["float16"]
    steps = there.choice.steps * (2 if there.choice.label == "2M" else 1)
    np.testing.assert_allclose(there.choice.cost, 1e9 * steps / rate, rtol=1e-9)
    kind = frontier.advice(built, 1e-3, device="Tesla T4", dtype="float16")
    assert "peak of t4" in kind.basis
    with pytest.raises(ValueError, match="unknown device 'abacus'; known: tpu-v2"):
        frontier.advice(built, 1.0, device="abacus")
    with pytest.raises(ValueError, match="no published bfloat16 rate of t4"):
        frontier.advice(built, 1.0, device="t4")


def test_memory_decides_over_sizes_only(built):
    fits = frontier.advice(built, 5e6, "memory_bytes")  # 4 bytes x 10^6 parameters
    assert fits.choice.label == "1M" and fits.estimated
    assert "activations, text encoder and decoder come on top" in fits.basis
    assert frontier.advice(built, 8e6, "memory_bytes").choice.label == "2M"
    assert frontier.advice(built, 1e6, "memory_bytes").reason == "nothing fits"
    cells = tuple(
        dataclasses.replace(c, memory_bytes=9 * c.params) for c in built.cells
    )
    measured = dataclasses.replace(built, cells=cells)
    found = frontier.advice(measured, 9e6, "memory_bytes")
    assert found.choice.cost == 9e6 and not found.estimated


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unit": "watts"}, "unknown unit 'watts'; known: seconds"),
        ({"budget": 0.0}, "budget must be positive"),
        ({"utilisation": 1.5}, r"utilisation must lie in \(0, 1\], got 1.5"),
        ({"unit": "flops", "device": "abacus"}, "unknown device 'abacus'"),
    ],
)
def test_advice_on_nonsense_is_an_error(built, changes, said):
    with pytest.raises(ValueError, match=said):
        frontier.advice(built, **({"budget": 1.0} | changes))


def test_table_1_agrees_with_itself_and_with_the_networks():
    assert len(frontier.TABLE_1) == 11
    for (name, row), preset in zip(
        frontier.TABLE_1.items(), presets.UNETS.values(), strict=True
    ):
        assert row.name == name
        assert row.base_channels == preset.config.base
        assert row.relative_cost == preset.relative_cost
        assert frontier.relative_cost(name) == row.relative_cost
        np.testing.assert_allclose(row.params, preset.params, rtol=0.1)
        share = row.gflops / frontier.TABLE_1["866M"].gflops
        consistent = abs(share - row.relative_cost) < 0.0051  # printed to 0.01
        assert consistent == (row.note == ""), name
    fids = [row.fid for row in frontier.TABLE_1.values()]
    assert fids == sorted(fids, reverse=True)
    with pytest.raises(ValueError, match="unknown network '1B'; table 1 has 39M"):
        frontier.relative_cost("1B")


def test_a_cells_protocol_is_that_of_the_same_pictures_measured_by_evaluate(
    tiny, monkeypatch, tmp_path
):
    """Whatever evaluate.backend is: a frontier's distances are numpy's, and say so."""
    extract = types.SimpleNamespace(
        identity={"network": "lite0", "weights": "ab", "resize": "none"}
    )
    real = types.SimpleNamespace(digest="cd", images=40, moments=None)
    monkeypatch.setattr(grid, "Extractor", lambda *_: extract)
    monkeypatch.setattr(grid.reference, "statistics", lambda *_: real)
    monkeypatch.setattr(grid.frechet.Reference, "of", lambda _: None)
    cost = types.SimpleNamespace(flops=2.0, nfe=1)
    sampler = types.SimpleNamespace(cost=lambda _: cost)
    monkeypatch.setattr(grid._CellMeasurer, "_sampler", lambda *_: sampler)
    found = {}
    for backend in config.FD_BACKENDS:
        c = tiny.copy_and_resolve_references()
        c.evaluate.network, c.evaluate.backend = "lite0", backend
        c.generate.images = c.frontier.images = 8
        experiment = config.resolve(c)
        how = experiment.generate
        device_mesh = mesh.build(experiment.mesh, {})
        specs = plan.plan(experiment)
        cells = grid._CellMeasurer(experiment, tmp_path, specs, device_mesh)
        found[backend] = cells._files.protocol(how)
        measured = protocol.measurement_parts(
            experiment, extract.identity, real.digest, real.images
        ) | protocol.sampling_parts(how)
        wanted = {"metric": "fd_lite0", "backend": "numpy"}
        assert found[backend] == measured | wanted
        assert set(found[backend]) == set(protocol.PARTS)
    same = {protocol.digest(parts) for parts in found.values()}
    assert len(same) == 1 == len({parts["backend"] for parts in found.values()})
