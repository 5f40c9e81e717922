"""Budgets of latency and frontiers ordered by time, from times as a machine might have them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import BudgetError, SiteError
from foveate.formats.levels import WEIGHT_LEVELS
from foveate.precision.encoding import first_rise
from foveate.precision.profiles import Profile
from foveate.precision.timings import Timings
from frontiers import random_profile


def _timed(seed: int, rest: float = 0.01) -> Profile:
    """A profile whose products take some time a byte, each its own, and not always more at a higher level."""
    profile, choice = random_profile(seed), random.Random(seed)
    products = {}
    for site in profile.weight_sites():
        rate = choice.choice([0.0, 1.0, 5.0]) * 1e-9
        costs = [site.tiles * cost for cost in site.tile_costs()[: len(WEIGHT_LEVELS)]]
        products[site.name] = tuple(rate * cost * choice.uniform(0.7, 1.3) for cost in costs)
    return replace(profile, timings=Timings(machine="m", products=products, rest=rest))


profiles = st.builds(_timed, st.integers(0, 10**6))


def _seconds(profile: Profile, plan: fv.PrecisionMap) -> float:
    assert profile.timings is not None
    return profile.timings.seconds_of(plan)


@given(profile=profiles, share=st.floats(0, 1))
def test_latency_is_never_exceeded_and_loses_least(profile: Profile, share: float) -> None:
    low, high = _seconds(profile, profile.uniform(2)), _seconds(profile, profile.uniform(8))
    limit = low + share * (high - low)
    plan = fv.allocate(profile, fv.Budget(latency=limit))
    assert _seconds(profile, plan) <= limit * (1 + 1e-6)
    for other in (profile.uniform(level) for level in (2, 3, 4, 6, 8)):
        if _seconds(profile, other) <= limit:
            assert plan.predicted_loss <= other.predicted_loss * (1 + 1e-9)


@given(profile=profiles, points=st.integers(2, 30))
def test_a_frontier_ordered_by_time_is_nested_and_its_time_falls(profile: Profile, points: int) -> None:
    chain = fv.frontier(profile, points, timings=profile.timings)
    assert 1 <= len(chain) <= points
    for better, cheaper in itertools.pairwise(chain):
        assert first_rise(better, cheaper) is None
        assert _seconds(profile, cheaper) < _seconds(profile, better)
        assert cheaper.predicted_loss >= better.predicted_loss


def test_the_order_by_time_loses_less_at_equal_time() -> None:
    """One of two equal weights is hardly read: bits there cost bytes and no time."""
    profile = random_profile(5, [(64, 256, 128), (64, 256, 128)])
    read, looked_up = (s.name for s in profile.weight_sites())
    losses = {**profile.losses, looked_up: profile.losses[read]}
    times = tuple(1e-3 * b for b in (0, 2, 3, 4, 6, 8))
    timings = Timings(machine="m", products={read: times, looked_up: (0.0,) * 6}, rest=0.0)
    profile = replace(profile, losses=losses, timings=timings)
    by_time, by_bytes = fv.frontier(profile, 20, timings=timings), fv.frontier(profile, 20)
    for limit in (3e-3, 5e-3, 7e-3):
        best = [
            min(plan.predicted_loss for plan in chain if timings.seconds_of(plan) <= limit)
            for chain in (by_time, by_bytes)
        ]
        assert best[0] < best[1]
    assert {plan.levels[looked_up] for plan in by_time} == {8}


def test_what_latency_needs() -> None:
    profile = random_profile(0)
    with pytest.raises(BudgetError, match=r"the profile has no times: foveate\.measure_timings"):
        fv.allocate(profile, fv.Budget(latency="30ms"))
    timed = _timed(0, rest=0.02)
    with pytest.raises(BudgetError, match=r"no map takes as little as 10 ms: the least is 20.* ms, of which 20 ms are"):
        fv.allocate(timed, fv.Budget(latency="10ms"))
    assert timed.timings is not None
    few = replace(timed, timings=replace(timed.timings, products={}))
    with pytest.raises(SiteError, match="layer0:weight was not timed"):
        fv.allocate(few, fv.Budget(latency="30ms"))
    short = {name: times[:3] for name, times in timed.timings.products.items()}
    some = replace(timed, timings=replace(timed.timings, products=short, levels=(0, 2, 3)))
    with pytest.raises(BudgetError, match=r"level \(=4\) was not timed: the timings have 0, 2, 3"):
        fv.allocate(some, fv.Budget(latency="30ms"))
    with pytest.raises(BudgetError, match="was not timed"):
        fv.frontier(some, 8, timings=some.timings)
    assert fv.allocate(some, fv.Budget(latency="1s"), fv.Constraints(levels=(2, 3))).levels["layer0:weight"] == 3
