"""Feedback: what estimates are worth at the output, and the factors that are left of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.inputs.feedback import Effect, factors_of, output_effects
from inputs.choosing import data
from tiny import mlp, rows

EFFECTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=2),
    st.builds(lambda ratio, error: Effect(ratio=ratio, error=error), st.floats(-2, 20), st.floats(0, 5)),
    min_size=1,
    max_size=8,
)


@given(EFFECTS)
def test_factors_are_moderate_and_keep_the_order(effects: dict[str, Effect]) -> None:
    factors = factors_of(effects)
    assert set(factors) == set(effects)
    assert all(1 / 16 - 1e-9 <= factor <= 16 + 1e-9 for factor in factors.values())
    exact = {name: replace(effect, error=0.0) for name, effect in effects.items()}
    found = factors_of(exact)
    for one in effects:
        for other in effects:
            if effects[one].ratio < effects[other].ratio:
                assert found[one] <= found[other] + 1e-9


@given(EFFECTS, st.floats(0.01, 100))
def test_what_all_have_in_common_is_no_factor(effects: dict[str, Effect], scale: float) -> None:
    scaled = {name: Effect(ratio=scale * e.ratio, error=scale * e.error) for name, e in effects.items()}
    assert factors_of(scaled) == pytest.approx(factors_of(effects), rel=1e-6)


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=8), st.floats(0.1, 5))
def test_noise_is_no_factor(ratios: list[float], common: float) -> None:
    noisy = {str(i): Effect(ratio=common * ratio, error=10 * common) for i, ratio in enumerate(ratios)}
    assert all(factor == 1 for factor in factors_of(noisy).values())
    alike = {name: Effect(ratio=common, error=0.01 * common * ratios[0]) for name in noisy}
    assert all(factor == 1 for factor in factors_of(alike).values())


def test_a_clear_difference_stays_and_an_unclear_one_is_drawn_to_the_others() -> None:
    factors = factors_of(
        {
            **{str(i): Effect(ratio=1.0, error=0.01) for i in range(6)},
            "clear": Effect(ratio=2.0, error=0.01),
            "unclear": Effect(ratio=2.0, error=2.0),
            "wrong": Effect(ratio=-1.0, error=0.01),
        }
    )
    assert 1.5 < factors["clear"] / factors["0"] <= 2.0
    assert factors["wrong"] < factors["0"]
    assert abs(math.log(factors["unclear"])) < 0.2 * math.log(factors["clear"])


def test_effects_show_estimates_that_are_wrong() -> None:
    model = mlp((96, 64, 48, 10))
    fv.quantize(model, rows(64, 96), objective=fv.Logits(), progress=False)
    options = fv.AdaptOptions(verdict=False)
    with fv.adapt_to_input(model, bits=4.5, batches=data(), options=options, progress=False) as adapted:
        before, state = adapted.adaptation, fv.state_of(model)

        def effects() -> dict[str, Effect]:
            given_now = (adapted.adaptation, adapted.renew, data(), fv.Logits(), False)
            return output_effects(model, *given_now)

        found = effects()
        assert fv.state_of(model) == state
        assert set(found) == {"0:weight", "4:weight"}  # the two maps read the middle one alike
        # the last layer alone makes its outputs: the estimates need no feedback
        assert found["4:weight"].ratio == pytest.approx(1, abs=0.5)
        wrong = {**before.estimator.gradients, "0:weight": 9 * before.estimator.gradients["0:weight"]}
        adapted.renew(replace(before, estimator=replace(before.estimator, gradients=wrong)))
        again = effects()
        # both passes force this weight, and the others decide as before
        assert again["0:weight"].ratio == pytest.approx(found["0:weight"].ratio / 9, rel=1e-4)
        assert again["0:weight"].error == pytest.approx(found["0:weight"].error / 9, rel=1e-4)


def test_feedback_moves_thresholds_and_meets_the_target() -> None:
    model = mlp((96, 64, 48, 10))
    fv.quantize(model, rows(64, 96), objective=fv.Logits(), progress=False)
    before = fv.state_of(model)
    options = fv.AdaptOptions(feedback=True, verdict=False)
    with fv.adapt_to_input(model, bits=4.5, batches=data(), options=options, progress=False) as adapted:
        now = adapted.adaptation
        assert set(now.factors) == {"0:weight", "4:weight"}
        low, high = now.around(adapted.index, len(adapted.frontier) - 1)
        free = replace(now, factors={}).choice(adapted.frontier, low, high)
        refined = now.choice(adapted.frontier, low, high)
        names = [site.name for site in adapted.frontier[low].weight_sites()]
        for name, threshold, plain in zip(names, refined.thresholds, free.thresholds, strict=True):
            assert threshold == pytest.approx(plain / now.factors.get(name, 1.0))
        adapted.tally()
        with torch.no_grad():
            model(torch.cat(data()[:3]))
        assert adapted.tally().bits == pytest.approx(4.5, rel=0.01)
        adapted.refine(data(6), progress=False)  # what came lately
        assert adapted.adaptation.multiplier == adapted.correction.multiplier
    assert fv.state_of(model) == before
