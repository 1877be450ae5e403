"""The conclusion in words: what the laws buy, and each reason not to trust them."""

import dataclasses

import pytest

from scaling_ldm import records
from scaling_ldm.records import HeldOut, Interval, Parabola, PowerLaw, Refusal
from scaling_ldm.report import conclusion


def interval(low, high):
    return Interval(low=low, high=high, level=0.9)


def law(quantity, exponent=0.5, half=0.05, points=5, top=1e14):
    return PowerLaw(
        x_name="budget_flops",
        y_name=quantity,
        coef=1.0,
        exponent=exponent,
        coef_interval=interval(0.9, 1.1),
        exponent_interval=interval(exponent - half, exponent + half),
        points=points,
        x_min=1e12,
        x_max=top,
        rmse_log=0.01,
        band=(),
    )


def checked(measured=1.0):
    return HeldOut(
        quantity="N_opt",
        budget_flops=1e14,
        predicted=1.0,
        predicted_interval=interval(0.8, 1.2),
        measured=measured,
        relative_error=1.0 / measured - 1,
    )


MINIMUM = Parabola(
    budget_flops=1e12,
    points=5,
    curvature=1.0,
    n_opt=1.0,
    d_opt=1.0,
    l_opt=1.0,
    n_opt_interval=interval(1.0, 1.0),
    d_opt_interval=interval(1.0, 1.0),
    l_opt_interval=interval(1.0, 1.0),
    rmse=0.0,
)
NONE = Refusal(quantity="N_opt", reason="fewer than 3 budgets", detail="")


def fit(**changed):
    good = records.FitResult(
        metric="loss",
        size="params",
        parabolas=(MINIMUM,) * 5,
        laws={q: law(q) for q in ("N_opt", "D_opt", "L_opt")},
        parametric=NONE,
        held_out=(checked(),),
        excluded=(),
        bootstrap=100,
        seed=0,
    )
    return dataclasses.replace(good, **changed)


def test_a_law_that_nothing_speaks_against_is_put_into_words():
    said = conclusion.said(fit())
    assert "3.2 times the parameters (2.8 to 3.5)" in said
    assert "3.2 times the tokens (2.8 to 3.5)" in said
    assert conclusion.against(fit()) == [] and "extrapolation" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"laws": {"N_opt": law("N_opt", points=3)}}, "rests on 3 budgets"),
        ({"laws": {"N_opt": law("N_opt", top=4e12)}}, "span a factor of 4"),
        ({"laws": {"N_opt": law("N_opt", half=0.3)}}, "interval for parameters is"),
        ({"held_out": (checked(2.0),)}, "did not predict N of the budget"),
        ({"held_out": (NONE,)}, "no budget was held out"),
        ({"parabolas": (MINIMUM,) * 4 + (NONE,)}, "1 of 5 budgets have no minimum"),
        ({"notes": ("lopsided",)}, "the fit has 1 doubt (below)"),
        ({"laws": {"N_opt": law("N_opt", 0.1, 0.15)}}, "parameters do not grow at"),
    ],
)
def test_each_reason_against_a_law_is_said(changed, said):
    (doubt,) = [line for line in conclusion.against(fit(**changed)) if said in line]
    assert doubt not in conclusion.against(fit())
    assert "speaks against" not in conclusion.said(fit(**changed))


def test_without_a_law_nothing_follows():
    none = fit(laws={"N_opt": NONE})
    assert "do not say which size is best" in conclusion.said(none)
    assert conclusion.against(none) == []


def test_runs_that_repeat_their_pictures_often_are_said_to():
    good = fit()
    assert conclusion.against(good, conclusion.REPEATED_OFTEN) == []
    assert "Nothing here speaks against it" in conclusion.said(good)
    (reason,) = conclusion.against(good, 12.34)
    assert "see their pictures up to 12.3 times" in reason
    assert "Nothing here speaks against it" not in conclusion.said(good, 12.34)
