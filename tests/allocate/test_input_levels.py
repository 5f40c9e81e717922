"""Levels of inputs under an average of bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import foveate as fv
from foveate.formats.levels import input_bits_of
from tiny import quantized_llama, quantized_mlp


def _profile() -> fv.Profile:
    return quantized_llama()[1]


def _input_loss(profile: fv.Profile, plan: fv.PrecisionMap) -> float:
    return profile.predict_inputs(plan.levels)


def test_nothing_asked_nothing_changed() -> None:
    profile = _profile()
    plan = fv.allocate(profile, fv.Budget(bits=9))
    assert {plan.levels[s.name] for s in profile.input_sites()} <= {8, 16}


@pytest.mark.parametrize("bits", [4.25, 5.0, 6.0, 8.0, 11.0, 16.0])
def test_the_average_is_kept(bits: float) -> None:
    profile = _profile()
    plan = fv.allocate(profile, fv.Budget(bits=9), fv.Constraints(input_bits=bits))
    assert profile.input_bits(plan) <= bits * (1 + 1e-9)
    assert plan.predicted_loss == pytest.approx(profile.predict(plan))


def test_more_bits_never_lose_more() -> None:
    profile = _profile()
    losses = [
        _input_loss(profile, fv.allocate(profile, fv.Budget(bits=9), fv.Constraints(input_bits=b)))
        for b in (4.25, 5, 6, 7, 8, 12)
    ]
    assert losses == sorted(losses, reverse=True)


def test_few_inputs_are_solved_nearly_as_well_as_by_trying_everything() -> None:
    _, profile = quantized_mlp()
    sites = profile.input_sites()
    read = {s.name: profile.values_read(s) for s in sites}
    for bits in (5.0, 6.0, 7.0, 9.0):
        plan = fv.allocate(profile, fv.Budget(bits=12), fv.Constraints(input_bits=bits))
        best = min(
            sum(
                float(profile.losses[s.name][0, (4, 8, 16).index(level)])
                for s, level in zip(sites, choice, strict=True)
            )
            for choice in itertools.product((4, 8, 16), repeat=len(sites))
            if sum(input_bits_of(level) * read[s.name] for s, level in zip(sites, choice, strict=True))
            <= bits * sum(read.values())
        )
        top = sum(float(profile.losses[s.name][0, 0]) for s in sites)
        # greedy is off by at most the one step that did not fit
        assert _input_loss(profile, plan) <= best + max(float(profile.losses[s.name][0, 0]) for s in sites) < 2 * top


def test_values_read_weigh() -> None:
    _, profile = quantized_mlp()
    first, *others = profile.input_sites()
    heavy = {**profile.statistics, first.name: {**profile.statistics[first.name], "values": torch.tensor([1e6])}}
    plan = fv.allocate(replace(profile, statistics=heavy), fv.Budget(bits=12), fv.Constraints(input_bits=4.5))
    assert plan.levels[first.name] == 4
    assert {plan.levels[s.name] for s in others} == {16}


def test_variance_proxy_needs_no_gradients_and_ranks_by_spread() -> None:
    _, profile = quantized_mlp()
    first, second, third = profile.input_sites()
    spread = {first.name: 1.0, second.name: 100.0, third.name: 0.01}
    same = {
        name: {**kept, "variance": torch.tensor([spread[name]]), "values": torch.tensor([10.0])}
        for name, kept in profile.statistics.items()
        if name in spread
    }
    blind = replace(profile, losses={s.name: profile.losses[s.name] for s in profile.weight_sites()}, statistics=same)
    plan = fv.allocate(fv.variance_proxy(blind), fv.Budget(bits=12), fv.Constraints(input_bits=(4.25 + 4.25 + 8) / 3))
    assert [plan.levels[s.name] for s in (first, second, third)] == [4, 8, 4]


def test_a_loss_budget_counts_inputs() -> None:
    profile = _profile()
    for limit in (profile.predict(profile.uniform(4)), profile.predict(profile.uniform(8)) * 1.001):
        plan = fv.allocate(profile, fv.Budget(loss=limit))
        assert profile.predict(plan) <= limit * (1 + 1e-6)
    least = profile.predict_inputs(profile.uniform(4, 4).levels)
    with pytest.raises(fv.BudgetError, match="inputs at these levels alone lose"):
        fv.allocate(profile, fv.Budget(loss=least / 2), fv.Constraints(input_level=4))


def test_the_frontier_takes_it_too() -> None:
    profile = _profile()
    chain = fv.frontier(profile, 4, fv.Constraints(input_bits=6))
    assert all(profile.input_bits(plan) <= 6 for plan in chain)


def test_what_is_refused() -> None:
    profile = _profile()
    budget = fv.Budget(bits=9)
    with pytest.raises(fv.BudgetError, match=r"no input levels average 4 bits: the least is 4\.25"):
        fv.allocate(profile, budget, fv.Constraints(input_bits=4))
    old = replace(profile, losses={s.name: profile.losses[s.name] for s in profile.weight_sites()}, statistics={})
    with pytest.raises(fv.BudgetError, match="does not say what inputs cost"):
        fv.allocate(old, budget, fv.Constraints(input_bits=6))
    with pytest.raises(fv.BudgetError, match="no statistics of inputs"):
        fv.variance_proxy(old)
    assert fv.allocate(old, budget).levels == fv.allocate(profile, budget).levels


def test_a_guess_adds_nothing_to_the_prediction() -> None:
    profile = _profile()
    plan = fv.allocate(fv.variance_proxy(profile), fv.Budget(bits=8), fv.Constraints(input_bits=6.0))
    assert plan.predicted_loss == pytest.approx(profile.predict(plan.with_level("*:input", 32)), abs=2e-9)


def test_an_argument_of_another_class_is_refused() -> None:
    profile = _profile()
    with pytest.raises(fv.BudgetError, match="is not a Budget"):
        fv.allocate(profile, 4.25)  # type: ignore[arg-type]
    with pytest.raises(fv.BudgetError, match=r"constraints \(=\(2, 4\)\) are not Constraints, such as"):
        fv.allocate(profile, fv.Budget(bits=8), (2, 4))  # type: ignore[arg-type]
    with pytest.raises(fv.BudgetError, match=r"constraints \(=None\) are not Constraints, such as"):
        fv.frontier(profile, 4, None)  # type: ignore[arg-type]
