from __future__ import annotations

import itertools

import pytest

import foveate as fv
from foveate.precision.maps import tile_levels
from foveate.runtime.site_control import SiteControl, below, controlled
from tiny import quantized_mlp


@pytest.fixture(scope="module")
def profile() -> fv.Profile:
    return quantized_mlp()[1]


def _levels(plan: fv.PrecisionMap, name: str) -> bytes:
    site = next(s for s in plan.sites if s.name == name)
    return tile_levels(plan.levels[name], site.tiles)


def test_the_chain_below_a_map_starts_with_it_and_is_nested(profile: fv.Profile) -> None:
    current = profile.uniform(8).with_level("0:weight", 4).with_level("2:weight", 6)
    chain = below(current, fv.frontier(profile, 8))
    assert chain[0] is current
    assert len(chain) > 3
    for better, worse in itertools.pairwise(chain):
        assert worse.levels != better.levels
        for site in current.weight_sites():
            pairs = zip(_levels(better, site.name), _levels(worse, site.name), strict=True)
            assert all(b >= w for b, w in pairs)


def test_held_sites_never_move_and_floors_hold(profile: fv.Profile) -> None:
    free = below(profile.uniform(8), fv.frontier(profile, 8))
    chain = controlled(free, SiteControl(hold={"0": 8}, floor={"2": 4}, from_index={"4": 3}))
    assert {chain[i].levels["0:weight"] for i in range(len(chain))} == {8}
    assert min(_levels(chain[len(chain) - 1], "2:weight")) == 4
    last = [plan.levels["4:weight"] for plan in controlled(free, SiteControl(from_index={"4": 3}))]
    assert last[:3] == [8, 8, 8]
    assert last[3:] == [plan.levels["4:weight"] for plan in free][3:] != [8] * (len(free) - 3)
    assert min(_levels(chain[len(chain) - 1], "4:weight")) < 8


def test_a_hold_above_what_the_model_has_is_what_it_has(profile: fv.Profile) -> None:
    chain = controlled(below(profile.uniform(3), fv.frontier(profile, 8)), SiteControl(hold={"*": 8}))
    assert [plan.levels["0:weight"] for plan in chain] == [3]


def test_what_is_refused(profile: fv.Profile) -> None:
    chain = below(profile.uniform(8), fv.frontier(profile, 4))
    with pytest.raises(fv.SiteError, match="matches none"):
        controlled(chain, SiteControl(hold={"nothing": 8}))
    with pytest.raises(fv.LevelError, match=r"level \(=5\)"):
        controlled(chain, SiteControl(floor={"*": 5}))
    with pytest.raises(fv.LevelError, match="not an index"):
        SiteControl(from_index={"*": -1})
    other = quantized_mlp()[1]
    small = fv.Frontier((fv.PrecisionMap(other.sites[:1], {other.sites[0].name: 4}),))
    with pytest.raises(fv.SiteError, match="another model"):
        below(profile.uniform(8), small)
