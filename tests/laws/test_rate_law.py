"""Best learning rates and their law, on runs whose answer is known."""

import dataclasses
import doctest
import math

import numpy as np
import pytest

from scaling_ldm.laws import fit, rates
from scaling_ldm.records import BestRate, Measurement, RateLaw, Refusal, TrainRecord

COEF, EXPONENTS = 3.0, {"params": -0.5, "tokens": 0.25, "batch_size": 0.4}
SIZES, TOKENS, BATCHES = (1e4, 4e4, 1.6e5), (1e8, 1e9), (32, 128)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def best_rate(n, d, b):
    return COEF * n**-0.5 * d**0.25 * b**0.4


def runs(noise=0.0, seeds=1, factors=FACTORS, off=1.2, bend=0.0, seed=0):
    """Loss 1 + 0.05 ln(rate / best)^2; the grid is `off` the best rate."""
    rng = np.random.default_rng(seed)
    found = []
    for n in SIZES:
        for d in TOKENS:
            for b in BATCHES:
                for factor in factors:
                    x = math.log(factor * off)
                    loss = 1 + 0.05 * x**2 + bend * x**3
                    rate = best_rate(n, d, b) * factor * off
                    for _ in range(seeds):
                        found.append((n, d, b, rate, loss + noise * rng.normal()))
    return found


def test_a_law_without_noise_is_found_to_the_last_digits():
    found = fit.rate_law(runs())
    assert len(found.best) == 12 and not found.excluded
    for best in found.best:
        right = best_rate(best.params, best.tokens, best.batch_size)
        assert best.rate == pytest.approx(right, rel=1e-6)
        assert best.curvature == pytest.approx(0.05, rel=1e-6)
        assert best.loss == pytest.approx(1.0, abs=1e-9)
        assert (best.rates, best.points) == (5, 5)
    assert found.law.coef == pytest.approx(COEF, rel=1e-5)
    assert found.law.exponents == pytest.approx(EXPONENTS, rel=1e-6)
    assert found.law(2e4, 3e8, 64) == pytest.approx(best_rate(2e4, 3e8, 64), rel=1e-6)
    assert found.law.held == {}


def test_what_is_lost_at_half_and_double_the_rate_is_read_off_the_runs():
    fine = tuple(2 ** (k / 2) for k in range(-5, 6))
    found = fit.rate_law(runs(factors=fine, off=1.1, bend=0.02)).best[0]
    for factor, lost in ((0.5, found.lost_at_half), (2.0, found.lost_at_double)):
        x = math.log(factor * found.rate / best_rate(1e4, 1e8, 32))
        right = 1 + 0.05 * x**2 + 0.02 * x**3 - found.loss
        assert lost == pytest.approx(right, rel=0.05)
    assert found.lost_at_double > 1.1 * found.lost_at_half > 0
    narrow = fit.rate_law(runs(factors=(0.6, 0.8, 1.0, 1.2, 1.5), off=1.0)).best[0]
    assert narrow.lost_at_half is narrow.lost_at_double is None


@pytest.mark.parametrize(("seeds", "factors"), [(1, FACTORS), (2, (0.4, 1.0, 2.5))])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, factors):
    """90% intervals of 12 best rates and 3 exponents, in 60 studies with noise."""
    rates_hit, exponents_hit = [], []
    for study in range(60):
        found = fit.rate_law(runs(0.004, seeds, factors, seed=study))
        for best in found.best:
            right = best_rate(best.params, best.tokens, best.batch_size)
            interval = best.rate_interval
            assert interval.low < best.rate < interval.high
            rates_hit.append(interval.low <= right <= interval.high)
        for name, right in EXPONENTS.items():
            interval = found.law.intervals[name]
            exponents_hit.append(interval.low <= right <= interval.high)
    # 720 and 180 of them; cells of a study share their estimate of the noise.
    assert 0.85 < np.mean(rates_hit) < 0.95
    assert 0.82 < np.mean(exponents_hit) < 0.97


def refusal(found, reason):
    assert isinstance(found, Refusal)
    assert reason in found.reason
    return found.why


@pytest.mark.parametrize("factors", [(1, 2, 4, 8, 16), (0.06, 0.12, 0.25, 0.5, 1)])
def test_a_best_rate_at_the_edge_is_refused_and_so_is_the_law(factors):
    found = fit.rate_law(runs(factors=factors, off=1.0))
    why = refusal(found.best[0], "best rate at the edge of the grid")
    assert f"least loss 1 at rate {best_rate(1e4, 1e8, 32):.4g}, an end of" in why
    assert "1e+08 tokens, batch 32" in found.best[0].what
    assert "0 of 12 have one" in refusal(found.law, "fewer than 3 best rates")


def test_other_grids_that_do_not_tell_a_best_rate_are_refused():
    two = fit.rate_law(runs(factors=(0.5, 1.0))).best[0]
    assert "2 with a finite loss" in refusal(two, "fewer than 3 rates")
    three = fit.rate_law(runs(factors=(0.5, 1.0, 2.0))).best[0]
    assert "a fourth rate or a second seed" in refusal(three, "noise not known")
    one = [
        (1e4, 1e8, 32, rate, loss)
        for rate, loss in zip(
            (1, 2, 4, 8, 16), (1.004, 1.001, 1.0, 1.004, 1.001), strict=True
        )
    ]
    flat = fit.rate_law(one).best[0]
    refusal(flat, "best rate not identified")
    # The best of noisy losses, with a parabola that opens downwards.
    hill = [row[:4] + (loss,) for row, loss in zip(one, (1, 3, 0.9, 3, 1), strict=True)]
    refusal(fit.rate_law(hill).best[0], "no upward-opening parabola")


def test_a_lopsided_curve_widens_the_interval():
    found = fit.rate_law(runs(off=1.0, bend=0.01)).best[0]
    three = fit.rate_law(runs(off=1.0, bend=0.01, seeds=2, noise=1e-6), neighbours=1)
    assert found.rate < three.best[0].rate < best_rate(1e4, 1e8, 32)
    assert found.rate_interval.high == pytest.approx(three.best[0].rate, rel=1e-4)


def test_exponents_are_those_of_what_varies():
    some = [row for row in runs() if row[2] == 32]
    law = fit.rate_law(some).law
    assert law.exponents == pytest.approx({"params": -0.5, "tokens": 0.25}, rel=1e-6)
    assert law.held == {"batch_size": 32}
    assert law(1e5, 1e9, 32) == pytest.approx(best_rate(1e5, 1e9, 32), rel=1e-6)
    with pytest.raises(ValueError, match="batch_size = 32 alone, and is asked at 64"):
        law(1e5, 1e9, 64)
    along = [row for row in runs() if row[0] / row[1] == 1e-4 or row[0] == 1.6e5]
    assert isinstance(fit.rate_law(along).law, RateLaw)
    tied = [
        (n, 20 * n, 32, *row[3:]) for n in (1e4, 2e4, 4e4, 8e4) for row in runs()[:5]
    ]
    refusal(fit.rate_law(tied).law, "params and tokens vary together")
    alone = fit.rate_law(runs()[:5]).law
    assert "1 of 1 have one" in refusal(alone, "fewer than 3 best rates")


def test_rows_with_names_and_unusable_rows():
    names = ("params", "tokens", "batch_size", "learning_rate", "loss")
    named = [dict(zip(names, row, strict=True)) for row in runs()]
    assert fit.rate_law(named) == fit.rate_law(reversed(runs()))
    bad = [*runs(), (1e4, 1e8, 32, 9.0, math.nan), (1e4, 1e8, 32, 0.0, 1.0)]
    found = fit.rate_law(bad)
    assert found.best == fit.rate_law(runs()).best
    assert found.excluded == (
        "run of 10000 parameters at rate 0: learning_rate is 0",
        "run of 10000 parameters at rate 9: loss is nan",
    )
    with pytest.raises(ValueError, match=r"has 4 values; 5 are needed: \(params, tok"):
        fit.rate_law([(1, 2, 3, 4)])
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        fit.rate_law(runs(), neighbours=0)


def test_a_narrow_parabola_leaves_far_rates_out():
    """Far from the best rate, losses that explode do not move it."""
    exploded = [
        (*row[:4], row[4] + (5.0 if row[3] > 3 * best_rate(*row[:3]) else 0.0))
        for row in runs(seeds=2, noise=1e-4)
    ]
    near = fit.rate_law(exploded, neighbours=1).best[0]
    assert near.rate == pytest.approx(best_rate(1e4, 1e8, 32), rel=0.02)
    assert dataclasses.replace(near).points == 6


def cliffed(first):
    """`runs` whose losses explode from this multiple of the best rate on."""
    return [
        (*row[:4], row[4] + (60.0 if row[3] > first * best_rate(*row[:3]) else 0.0))
        for row in runs(seeds=2, noise=1e-4, off=1.0)
    ]


def test_a_parabola_does_not_go_through_a_rate_that_diverged():
    """It would have its minimum between two rates, with a narrow interval."""
    found = fit.rate_law(cliffed(3.0)).best[0]
    assert found.points == 6  # without the rate that is four times the best one
    assert found.rate == pytest.approx(best_rate(1e4, 1e8, 32), rel=0.02)
    beside = fit.rate_law(cliffed(1.5)).best[0]
    why = refusal(beside, "loss rises abruptly beside the best rate")
    assert "train rates between" in why and "61.0" in why


def record(number, run, **changes):
    """A finished run and its rows: of the last step, and some that do not count."""
    n, d, b, rate, loss = run
    fields = {
        f.name: "" if f.type == "str" else 0 for f in dataclasses.fields(TrainRecord)
    }
    fields |= {"run_id": f"run{number}", "status": "finished", "mfu": None}
    fields |= {"params": 2 * round(n), "params_without_embeddings": round(n)}
    fields |= {"tokens": round(d), "steps": 10, "images": 10 * b, "learning_rate": rate}
    trained = TrainRecord(**(fields | changes))
    row = {
        f.name: getattr(trained, f.name, "") for f in dataclasses.fields(Measurement)
    }
    row |= {"step": 10, "metric": "loss", "value": loss, "low": loss, "high": loss}
    end = Measurement(**(row | {"level": 1.0, "weights": "ema", "protocol_hash": "p"}))
    others = ({"step": 5}, {"weights": "raw"}, {"metric": "loss_t0"})
    far = [dataclasses.replace(end, value=9.0 + number, **other) for other in others]
    return trained, [end, *far]


def test_records_and_rows_of_a_study():
    made = [record(k, run) for k, run in enumerate(runs())]
    diverged, _ = record(90, runs()[0], status="non_finite_loss", detail="at step 3")
    unmeasured, _ = record(91, runs()[0])
    trained = [r for r, _ in made] + [diverged, unmeasured]
    rows = [row for _, of_run in made for row in of_run]
    found = fit.rate_records(trained, rows, weights="ema")
    assert found.best == fit.rate_law(runs()).best
    assert found.size == "params_without_embeddings"
    assert found.excluded == (
        "run90: non_finite_loss (at step 3)",
        "run91: no validation loss, average ema at its last step",
    )
    doubled = fit.rate_records(trained, rows, weights="ema", size="params")
    assert doubled.best[0].params == 2e4
    mixed = [dataclasses.replace(r, protocol_hash="q") for r in rows[:40]] + rows[40:]
    with pytest.raises(ValueError, match="protocol"):
        fit.rate_records(trained, mixed, weights="ema")
    asked = fit.rate_records(trained, mixed, weights="ema", asked=("p",))
    assert len(asked.best) == 10
    with pytest.raises(ValueError, match="larger values of precision"):
        fit.rate_records(trained, rows, metric="precision_x", weights="ema")


def test_the_example():
    assert doctest.testmod(rates).failed == 0
    assert isinstance(fit.rate_law(runs()).best[0], BestRate)
