"""What laws say of a budget, a loss and other sizes; published ones, converted."""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
from law_studies import CHINCHILLA, optimum, study, surface_study
from numpy.testing import assert_allclose

from scaling_ldm import config
from scaling_ldm.laws import advice, converted, fit, narrate, planning
from scaling_ldm.laws.planning import Alternative, Prediction, Reached
from scaling_ldm.records import Refusal

FAR = 64.0  # of the wider band, over the largest budget


def fitted(points, extend=4.0):
    with mock.patch.object(fit, "_surface", lambda *_: fit.refuse("not fitted", "")):
        return fit.isoflop(points, bootstrap=200, extend=extend)


@pytest.fixture(scope="module")
def points():
    return surface_study(CHINCHILLA, noise=0.004, rng=np.random.default_rng(1))


@pytest.fixture(scope="module")
def found(points):
    return fitted(points)


@pytest.fixture(scope="module")
def exact():
    """L_opt = 10 C^-0.04, N_opt = 0.4 C^0.5, curvature 0.1."""
    return fitted(study())


@pytest.mark.parametrize("quantity", ["N_opt", "D_opt", "L_opt"])
def test_inside_its_band_a_prediction_is_the_law_and_its_band(found, quantity):
    law = found.laws[quantity]
    for x, low, high in law.band[::8]:
        said = planning.predict(found, quantity, x)
        assert_allclose(said.value, law(x))
        assert_allclose([said.interval.low, said.interval.high], [low, high])
        assert said.outside == pytest.approx(max(law.x_min / x, x / law.x_max, 1.0))


@pytest.mark.parametrize("quantity", ["N_opt", "D_opt", "L_opt"])
def test_beyond_its_band_an_interval_holds_that_of_a_longer_band(
    points, found, quantity
):
    """The band of the same draws that reaches further."""
    longer = fitted(points, extend=FAR).laws[quantity]
    end = found.laws[quantity].band[-1][0]
    beyond = [row for row in longer.band if row[0] > 1.01 * end]
    assert len(beyond) > 5
    for x, low, high in beyond:
        said = planning.predict(found, quantity, x).interval
        assert said.low <= low * 1.001 and said.high >= high * 0.999
    assert said.high / said.low < 12 * high / low  # and not any interval does


def test_where_nothing_is_known_there_is_a_refusal(found):
    law = found.laws["L_opt"]
    far = planning.predict(found, "N_opt", 2e6 * law.x_max)
    assert isinstance(far, Refusal) and "more than 1e+06 times outside" in far.reason
    below = planning.predict(found, "L_opt", law.band[0][0] / 2)
    assert isinstance(below, Refusal) and "below the band" in below.reason
    refused = Refusal(quantity="N_opt", reason="no minimum", detail="at 1e18")
    without = dataclasses.replace(found, laws={**found.laws, "N_opt": refused})
    for said in (
        planning.predict(without, "N_opt", law.x_max),
        advice.size_at(without, law.x_max),
        planning.alternatives(
            without, law.x_max, tokens_per_flop=math.sqrt, sampling_flops=math.sqrt
        )[0][0],
    ):
        assert isinstance(said, Refusal)
        assert (said.reason, said.detail) == (
            "its law is refused: no minimum",
            "at 1e18",
        )


def test_the_compute_of_a_loss_is_the_inverse_of_the_law(found):
    law = found.laws["L_opt"]
    for budget in (law.x_min, law.x_max, 10 * law.x_max):
        loss = law(budget)
        said = planning.budget_of_loss(found, loss)
        assert isinstance(said, Reached)
        assert_allclose(said.budget_flops, budget, rtol=1e-9)
        assert said.interval.low < budget < said.interval.high
        for end, at in (("low", said.interval.low), ("high", said.interval.high)):
            if math.isfinite(at) and at > 0:
                there = planning.predict(found, "L_opt", at).interval
                assert_allclose(getattr(there, end), loss, rtol=1e-4)
    refused = planning.budget_of_loss(found, law.offset * 0.999)
    assert isinstance(refused, Refusal) and "levels off above" in refused.reason
    assert f"E = {law.offset:.4g}" in refused.detail


def test_other_sizes_cost_what_the_curve_says(exact):
    """Losses of the study are exact, so all follows from its four constants."""
    budget = 1e13
    rows, source = planning.alternatives(
        exact,
        budget,
        tokens_per_flop=lambda n: 1 / (6 * n),
        sampling_flops=lambda n: 100 * n,
    )
    assert "the parabola at" in source
    best, half, twice, two, four = rows
    loss = 10 * budget**-0.04
    assert_allclose(best.params, 0.4 * budget**0.5, rtol=1e-6)
    assert_allclose(best.tokens, budget / (6 * best.params))
    assert_allclose([half.params, twice.params], best.params * np.array([0.5, 2.0]))
    assert_allclose([best.loss, half.loss], [loss, loss + 0.1 * math.log(2) ** 2])
    assert half.loss == twice.loss and half.train_flops == budget
    for row, k in ((two, 2), (four, 4)):
        c = row.train_flops
        assert c > budget and row.loss == best.loss
        assert_allclose(row.params, 0.4 * c**0.5 / math.sqrt(k), rtol=1e-6)
        reached = 10 * c**-0.04 + 0.1 * math.log(row.params / (0.4 * c**0.5)) ** 2
        assert_allclose(reached, loss, rtol=1e-9)
        best_of_its_own = c / (6 * (0.4 * c**0.5) ** 2)
        assert_allclose(row.tokens / row.params, k * best_of_its_own, rtol=1e-6)
        images = planning.pays_from(best, row)
        assert_allclose(best.total_flops(images), row.total_flops(images))
    assert planning.pays_from(best, twice) is None


def test_overtraining_below_the_offset_is_refused(found):
    law = found.laws["L_opt"]
    steep = [dataclasses.replace(p, curvature=50.0) for p in found.parabolas]
    lopsided = dataclasses.replace(found, parabolas=tuple(steep))
    rows, _ = planning.alternatives(
        lopsided, law.x_max, tokens_per_flop=math.sqrt, sampling_flops=math.sqrt
    )
    assert [isinstance(row, Alternative) for row in rows] == [True] * 3 + [False] * 2
    assert rows[3].quantity == "overtrained 2 x"
    assert "no compute makes up" in rows[3].reason


# Advice as lines


def advise(laws, **how):
    return advice.training_advice(
        laws, "the source", plan=lambda n, c: (None, "no such network"), **how
    )


def test_advice_without_a_network_says_why_and_keeps_the_laws(found):
    budget = 20 * found.laws["N_opt"].x_max
    speed = advice.Speed(flops_per_second=budget / 7200, devices=8, basis="x", price=3)
    given = advise(found, budget=budget, speed=speed, sampling=lambda _: 1.0)
    said = narrate.lines(given)
    text = "\n".join(said)
    assert said[0] == "what to train, by the source"
    assert "2 h on 8 x x; 16 device hours" in text
    assert "48 at 3 for a device hour" in text
    assert "warning   no such network" in text
    assert "warning   20 times outside of the fitted budgets" in text
    assert "other sizes: not known, network: none planned" in text
    assert "abra2026 (" in text and "porian" not in text
    asked = advise(found, loss=1e-3, sampling=lambda _: 1.0)
    assert isinstance(asked, Refusal) and asked.quantity == "advice for loss 0.001"


def test_published_advice_has_no_interval_and_no_loss():
    laws = converted.converted("abra2026")
    given = advise(laws, budget=1e21, sampling=lambda _: 1.0)
    assert_allclose(given.size, 0.0301 * 1e21**0.4951)
    assert given.size_interval is None and given.published == []
    text = "\n".join(narrate.lines(given))
    assert "[" not in text and "its loss is another one" not in text
    assert "not known: its D counts other tokens" in text
    asked = advise(laws, loss=0.6, sampling=lambda _: 1.0)
    assert isinstance(asked, Refusal) and "its loss is another one" in asked.reason


# Published laws in one convention


def test_every_study_is_converted_or_says_why_not():
    assert set(config.names.PUBLISHED) == {converted.ALL, *converted.studies()}
    usable = set()
    for study_ in converted.studies():
        said = converted.converted(study_)
        usable |= {study_} if said.usable else set()
        for law in said.laws.values():
            assert law.reason if isinstance(law, Refusal) else law(1e20) > 0
        assert isinstance(said.laws["L_opt"], Refusal)
    assert {"liang2024_in_context", "besiroglu2024", "hunyuanvideo2024_video"} < usable
    assert not {"yin2024_video_envelope", "porian2024_tuned", "deepseek2024"} & usable
    known, unknown = converted.named(["abra2026", "all", "abra"])
    assert len(known) == len(converted.studies()) and unknown == ["abra"]


def test_units_and_surfaces_are_converted():
    image = converted.converted("hunyuanvideo2024_image").laws
    assert_allclose(image["N_opt"](1e20), 5.48e-4 * 1e5**0.5634 * 1e9)
    assert_allclose(image["D_opt"](1e20), 0.324 * 1e5**0.4325 * 1e9)
    refit = converted.converted("besiroglu2024").laws
    n = refit["N_opt"](1e21)
    assert_allclose(n, optimum(1e21, **CHINCHILLA), rtol=1e-6)
    assert_allclose(6 * n * refit["D_opt"](1e21), 1e21)


def test_all_estimates_of_abra_agree_inside_its_budgets():
    """A digit lost in a transcription would show: all are of the same runs."""
    every = [s for s in converted.studies() if s.startswith("abra2026")]
    assert len(every) == 11
    sizes = [converted.converted(s).laws["N_opt"](1e20) for s in every]
    assert max(sizes) / min(sizes) < 1.25
    published = fit.published()
    for s in every:
        n, d = (published[f"{s}_{q}_opt"] for q in "nd")
        assert 0.5 < 6 * n(1e20) * d(1e20) / 1e20 < 1  # text tokens are not counted
    tokens = [
        published[f"{s}_d_opt"](1e20) / published[f"{s}_n_opt"](1e20) for s in every
    ]
    assert 140 < min(tokens) and max(tokens) < 230
    loss = {s: published[f"{s}_loss"] for s in every if f"{s}_loss" in published}
    assert len(loss) == 7
    ema = [law(1e20) for s, law in loss.items() if "raw" not in s]
    assert max(ema) / min(ema) < 1.02
    product = published["yin2024_video_lr_opt"]
    with pytest.raises(ValueError, match="unit not known"):
        product(1e9, 1e10)
    known = dataclasses.replace(product, input_scale=1.0, output_scale=1.0)
    assert_allclose(known(1e2, 1e3), 2e-4 * 1e3**-0.0453 * 1e2**-0.1619)


def test_a_prediction_is_frozen(found):
    said = planning.predict(found, "N_opt", found.laws["N_opt"].x_max)
    assert isinstance(said, Prediction)
    with pytest.raises(dataclasses.FrozenInstanceError):
        said.value = 1.0
