"""Chains for the same bytes: nested, within every budget, as good as allocate, and only what is stored."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import BudgetError, LevelError
from foveate.importance.chains import Rooms, Thresholds, chain_of, rooms_of, thresholds_chain_of
from foveate.importance.rolling import rescaled
from foveate.precision.encoding import first_rise
from foveate.precision.maps import PrecisionMap
from foveate.precision.profiles import Profile
from frontiers import random_profile
from tiny import generator

WITH_ZERO = fv.Constraints(levels=(0, 2, 3, 4, 6, 8))


def _by(profile: Profile, seed: int) -> dict[str, torch.Tensor]:
    g = generator(seed)
    return {s.name: torch.rand(s.tiles, generator=g, dtype=torch.float64).mul(8).exp() for s in profile.weight_sites()}


def _tile_bytes(plan: PrecisionMap) -> int:
    return sum(plan.tile_bytes(site) for site in plan.weight_sites())


@given(st.integers(0, 10), st.booleans(), st.booleans(), st.integers(1, 9))
def test_maps_are_nested_and_take_no_more_than_the_map_they_stand_for(
    seed: int, by_thresholds: bool, zero: bool, points: int
) -> None:
    profile = random_profile(seed)
    base = fv.frontier(profile, points) if points > 1 else fv.Frontier((profile.uniform(4),))
    rooms = rooms_of(list(base))
    by = _by(profile, seed + 1)
    if by_thresholds:
        rule = Thresholds() if zero else Thresholds(levels=(8, 6, 4, 3, 2), at=(256.0, 16.0, 4.0, 1.0))
        worth = {name: profile.losses[name][:, 0].double() * by[name] for name in by}
        chain = thresholds_chain_of(profile, rooms, WITH_ZERO, rule, worth)
    else:
        chain = chain_of(rescaled(profile, by), rooms, WITH_ZERO if zero else fv.Constraints())
    assert len(chain) == len(base)
    for mine, theirs in zip(chain, base, strict=True):
        assert _tile_bytes(mine) <= _tile_bytes(theirs)
    for better, cheaper in itertools.pairwise(chain):
        assert first_rise(better, cheaper) is None


def test_a_chain_of_one_is_what_allocate_finds() -> None:
    profile = random_profile(4)
    plan = fv.allocate(profile, fv.Budget(bits=3.5))
    chain = chain_of(profile, rooms_of([plan]), fv.Constraints())
    assert chain[0].predicted_loss == pytest.approx(plan.predicted_loss, rel=1e-6)


def test_importance_moves_bits_to_what_is_important() -> None:
    profile = random_profile(2)
    sites = profile.weight_sites()
    by = {s.name: torch.full((s.tiles,), 100.0 if s is sites[1] else 1.0, dtype=torch.float64) for s in sites}
    rooms = rooms_of([fv.allocate(profile, fv.Budget(bits=4.0))])
    before = chain_of(profile, rooms, fv.Constraints())[0]
    after = chain_of(rescaled(profile, by), rooms, fv.Constraints())[0]
    assert after.mean_level(sites[1]) > before.mean_level(sites[1])
    assert after.mean_level(sites[0]) <= before.mean_level(sites[0])


def test_what_is_not_worth_its_bytes_is_zeroed_and_comes_back() -> None:
    profile = random_profile(2)
    sites = profile.weight_sites()
    rooms = rooms_of([fv.allocate(profile, fv.Budget(bits=3.0), WITH_ZERO)])
    low = {s.name: torch.full((s.tiles,), 1e-3 if s is sites[0] else 1.0, dtype=torch.float64) for s in sites}
    zeroed = chain_of(rescaled(profile, low), rooms, WITH_ZERO)[0]
    assert zeroed.counts(sites[0])[0] > 0.5 * sites[0].tiles
    back = chain_of(profile, rooms, WITH_ZERO)[0]
    assert back.counts(sites[0])[0] < zeroed.counts(sites[0])[0]


@pytest.mark.parametrize("by_thresholds", [False, True])
def test_no_level_is_chosen_above_what_is_stored(by_thresholds: bool) -> None:
    profile = random_profile(6)
    g = generator(0)
    levels = torch.tensor([2, 3, 4, 8], dtype=torch.uint8)
    stored = {s.name: levels[torch.randint(0, 4, (s.tiles,), generator=g)] for s in profile.weight_sites()}
    rooms = rooms_of([profile.uniform(8), profile.uniform(4), profile.uniform(2)])
    if by_thresholds:
        worth = {name: profile.losses[name][:, 0].double() for name in stored}
        rule = Thresholds(levels=(8, 4, 2), at=(16.0, 1.0))
        chain = thresholds_chain_of(profile, rooms, fv.Constraints(), rule, worth, stored)
    else:
        chain = chain_of(profile, rooms, fv.Constraints(), stored)
    # a strip of fitted tiles would be held by its least tile; here every tile is a unit
    for plan in chain:
        for site in plan.weight_sites():
            found = plan.levels[site.name]
            tiles = torch.full((site.tiles,), found) if isinstance(found, int) else torch.tensor(list(found))
            assert bool((tiles <= stored[site.name]).all())
    assert chain[0].bits > chain[2].bits


def test_thresholds_without_budgets_are_multiples_of_the_mean() -> None:
    profile = random_profile(1)
    sites = profile.weight_sites()
    worth = {s.name: torch.tensor([20.0, 5.0, 0.5] * s.tiles, dtype=torch.float64)[: s.tiles] for s in sites}
    size = {s.name: s.tile_costs()[5] for s in sites}
    mean = sum(float(worth[s.name].sum()) * size[s.name] for s in sites) / sum(size[s.name] * s.tiles for s in sites)
    rule = Thresholds(levels=(8, 4, 0), at=(10.0 / mean, 1.0 / mean))
    for factor in (1.0, 1e-6):
        by = {name: factor * one for name, one in worth.items()}
        plan = thresholds_chain_of(profile, None, fv.Constraints(), rule, by)[0]
        for site in sites:
            expected = bytes(([8, 4, 0] * site.tiles)[: site.tiles])
            found = plan.levels[site.name]
            assert (bytes([found]) * site.tiles if isinstance(found, int) else found) == expected


def test_inputs_keep_the_levels_of_the_map_that_is_stood_for() -> None:
    profile = random_profile(1)
    base = [
        profile.uniform(8, 16),
        profile.uniform(4, 8),
        replace(profile.uniform(2, 8), levels={**profile.uniform(2, 8).levels, "layer0:input": 16}),
    ]
    rooms = rooms_of(base)
    chain = chain_of(profile, rooms, fv.Constraints())
    assert [plan.levels["layer0:input"] for plan in chain] == [16, 8, 8]
    assert rooms.tile_bytes == tuple(_tile_bytes(plan) for plan in base)


def test_what_cannot_be_is_refused() -> None:
    profile = random_profile(1)
    inputs = {s.name: 8 for s in profile.input_sites()}
    for size in (1, 2):
        rooms = Rooms(tile_bytes=(100,) * size, input_levels=(inputs,) * size)
        with pytest.raises(BudgetError, match="as little as 100 bytes"):
            chain_of(profile, rooms, fv.Constraints())
    worth = {s.name: torch.ones(s.tiles, dtype=torch.float64) for s in profile.weight_sites()}
    with pytest.raises(BudgetError, match="as little as 100 bytes"):
        thresholds_chain_of(profile, rooms, fv.Constraints(), Thresholds(levels=(4, 2), at=(1.0,)), worth)
    with pytest.raises(LevelError, match="at least two that fall"):
        Thresholds(levels=(2, 4), at=(1.0,))
    with pytest.raises(LevelError, match=r"level \(=16\) is exact"):
        Thresholds(levels=(16, 4), at=(1.0,))
    with pytest.raises(BudgetError, match="2 thresholds for 2 levels"):
        Thresholds(levels=(4, 2), at=(2.0, 1.0))
    with pytest.raises(BudgetError, match="positive finite numbers that fall"):
        Thresholds(levels=(4, 2, 0), at=(1.0, 2.0))
