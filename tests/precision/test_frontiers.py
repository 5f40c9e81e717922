"""A frontier is nested, its curves never turn back, and `find` is the inverse of what its maps take."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate as fv
from foveate.errors import BudgetError, LevelError, SiteError
from foveate.precision.encoding import encoded_levels
from foveate.precision.frontiers import Frontier, Point, point_name
from foveate.precision.maps import PrecisionMap, Site, tile_levels
from foveate.precision.monotone import between, ordered
from frontiers import measured, random_profile

frontiers = st.builds(
    lambda seed, maps, points: measured(fv.frontier(random_profile(seed), maps), points, seed),
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.integers(2, 10),
)


@given(chain=frontiers)
def test_maps_are_nested_and_costs_fall(chain: Frontier) -> None:
    for better, cheaper in itertools.pairwise(chain.maps):
        for site in better.sites:
            tiles = max(site.tiles, 1)
            pairs = zip(
                tile_levels(better.levels[site.name], tiles), tile_levels(cheaper.levels[site.name], tiles), strict=True
            )
            assert all(old >= new for old, new in pairs)
    places = [x / 4 for x in range(4 * (len(chain) - 1) + 1)]
    assert all(chain.kl(a) <= chain.kl(b) for a, b in itertools.pairwise(places))
    for curve in (chain.bytes_read, chain.bits, chain.seconds, chain.batch_seconds):
        values = [curve(place) for place in places]
        assert all(a >= b - 1e-12 * a for a, b in itertools.pairwise(values))


@given(chain=frontiers)
def test_find_is_the_inverse_of_what_maps_take(chain: Frontier) -> None:
    for index, plan in enumerate(chain):
        found = chain.find(fv.Budget(bytes=plan.bytes_resident))
        assert found == index or chain[found].bytes_resident == plan.bytes_resident
        assert chain.find(f"{plan.bytes_resident}B") == found
        at_bits = chain.find(fv.Budget(bits=plan.bits))
        assert at_bits <= index
        assert chain[at_bits].bits <= plan.bits + 0.005
        at_seconds = chain.find(fv.Budget(latency=chain.seconds(index)))
        assert at_seconds <= index
        assert chain.seconds(at_seconds) <= chain.seconds(index) * (1 + 1e-9)
        assert not at_seconds or chain.seconds(at_seconds - 1) > chain.seconds(index)
        if chain.kl(index) > 0:
            at_loss = chain.find(fv.Budget(loss=chain.kl(index)))
            assert at_loss >= index
            assert chain.kl(at_loss) <= chain.kl(index) * (1 + 1e-9)
            assert at_loss == len(chain) - 1 or chain.kl(at_loss + 1) > chain.kl(index)
    for point in chain.points:
        assert chain.find(point.name) == point.index


def _chain() -> Frontier:
    return measured(fv.frontier(random_profile(3), 20), 5, 3)


def test_curves_meet_the_points_where_these_are_in_order() -> None:
    chain = _chain()
    loss = [0.001, 0.004, 0.02, 0.1, 0.9]
    seconds = [0.010, 0.008, 0.007, 0.005, 0.002]
    points = [
        replace(p, divergence=d, seconds=s, batch_seconds=10 * s)
        for p, d, s in zip(chain.points, loss, seconds, strict=True)
    ]
    chain = replace(chain, points=points)
    for point in chain.points:
        assert chain.kl(point.index) == pytest.approx(point.divergence)
        assert chain.seconds(point.index) == point.seconds
        assert chain.batch_seconds(point.index) == point.batch_seconds
        assert chain.bytes_read(point.index) == point.bytes_read
        assert chain.bits(point.index) == point.bits
    assert chain.kl(2.25) == pytest.approx(0.75 * chain.kl(2) + 0.25 * chain.kl(3))
    # the shape in between is that of the predicted losses: on logarithmic axes, a line
    first, second = chain.points[1].index, chain.points[2].index
    at = (first + second) // 2
    predicted = [math.log(chain[i].predicted_loss) for i in (first, at, second)]
    share = (predicted[1] - predicted[0]) / (predicted[2] - predicted[0])
    assert math.log(chain.kl(at)) == pytest.approx((1 - share) * math.log(loss[1]) + share * math.log(loss[2]))


def test_names() -> None:
    profile = random_profile(1)
    assert point_name(profile.uniform(8)) == "8"
    assert point_name(profile.uniform(8).with_level("layer0:weight", 2)) == (
        f"{profile.uniform(8).with_level('layer0:weight', 2).bits:.2f}"
    )
    chain = fv.frontier(profile, 30)
    assert chain.find("64") == 0
    for text in ("4.25", "3", "6"):
        index = chain.find(text)
        assert chain[index].bits <= float(text) + 0.005
        assert not index or chain[index - 1].bits > float(text)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fast", r"point \(='fast'\) is not the name of a point \(8.*\), bits such as 4.25"),
        ("1.5", r"no map of the frontier takes 1.50 bits a weight: the least is 2\.\d\d"),
        ("10B", r"no map of the frontier takes 10 B in memory: the least is"),
        ("1us", r"no map of the frontier takes 1 us of time a token: the least is"),
        (fv.Budget(loss=1e-12), r"no map of the frontier loses as little as 1e-12: the best measures"),
        (4.25, r"wanted \(=4.25\) is not a text"),
        ("-1", r"point \(='-1'\) is not the name"),
        ("nan", r"point \(='nan'\) is not the name"),
    ],
)
def test_what_cannot_be_found(wanted: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        _chain().find(wanted)


def test_what_was_not_measured_is_said() -> None:
    chain = _chain().unmeasured()
    for ask in (chain.kl, chain.seconds):
        with pytest.raises(BudgetError, match=r"foveate\.measure_frontier"):
            ask(0)
    untimed = replace(_chain(), points=[replace(p, seconds=None) for p in _chain().points])
    with pytest.raises(BudgetError, match="no times of a token"):
        untimed.find("30ms")
    assert untimed.kl(0) == _chain().kl(0)
    assert "not measured" in repr(chain)
    assert "5 of them measured" in repr(untimed)
    for index in (-1, 20, 2.5e9, True, None):
        with pytest.raises(BudgetError, match="is not on the frontier, which has the indices 0 to 19"):
            chain.bytes_read(index)  # type: ignore[arg-type]


def test_what_is_no_frontier_is_refused() -> None:
    chain = _chain()
    with pytest.raises(LevelError, match=r"not nested: layer\d:weight has a higher level at index 1 than before"):
        Frontier((chain[10], chain[9]))
    with pytest.raises(LevelError, match="1 to 255 maps, not 0"):
        Frontier(())
    with pytest.raises(SiteError, match="of different models"):
        Frontier((chain[0], random_profile(3, shapes=[(64, 300, 128)]).uniform(2)))
    for points, message in (
        (chain.points[1:], "rise from 0 to 19"),
        (chain.points[::-1], "rise from 0 to 19"),
        ([replace(p, name="x") for p in chain.points], "one name"),
        ([replace(p, bytes_read=p.bytes_read + 1) for p in chain.points], "bits or bytes differ"),
        ([replace(p, bits=p.bits * 1.01) for p in chain.points], "bits or bytes differ"),
    ):
        with pytest.raises(LevelError, match=message):
            replace(chain, points=points)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": -1}, r"index \(=-1\) of a point is not one of 0 to 254"),
        ({"index": True}, "index"),
        ({"name": ""}, r"name \(=''\)"),
        ({"name": "a\nb"}, "printable"),
        ({"divergence": math.nan}, r"divergence \(=nan\) of point 8"),
        ({"divergence": -0.1}, "divergence"),
        ({"standard_error": math.inf}, "standard_error"),
        ({"seconds": 0.0}, r"seconds \(=0.0\) of point 8 is not a positive time"),
        ({"batch_seconds": math.inf}, "batch_seconds"),
        ({"bytes_read": 1.5}, "bytes_read"),
    ],
)
def test_what_is_no_point_is_refused(change: dict[str, Any], message: str) -> None:
    point = Point(index=0, name="8", bits=8.25, bytes_read=100, divergence=0.1)
    with pytest.raises(LevelError, match=message):
        replace(point, **change)


def test_levels_are_encoded_in_the_order_of_sites() -> None:
    chain = _chain()
    for index in (0, 7, 19):
        plan, found = chain[index], chain.encoded(index)
        assert found is chain.encoded(index)
        assert found == encoded_levels(plan)
        at = 0
        for site in plan.weight_sites():
            assert found.weights[at : at + site.tiles] == tile_levels(plan.levels[site.name], site.tiles)
            at += site.tiles
        assert at == len(found.weights)
        assert list(found.inputs) == [plan.levels[s.name] for s in plan.sites if s.kind == "input"]
    cache = Site("k:cache", "cache", 2, 16, 32)
    with pytest.raises(LevelError, match="k:cache is a cache"):
        encoded_levels(PrecisionMap((cache,), {"k:cache": 4}))


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=12))
def test_ordered_is_the_nearest_curve_that_never_falls(values: list[float]) -> None:
    found = ordered(values)
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-9)
    assert ordered(found) == pytest.approx(found)
    # the conditions of least squares: no shift of an end of the curve brings it nearer to the values
    gaps = torch.tensor(values, dtype=torch.float64) - torch.tensor(found, dtype=torch.float64)
    assert all(float(gaps[start:].sum()) <= 1e-6 for start in range(len(values)))


@given(
    places=st.lists(st.floats(0.1, 100), min_size=2, max_size=8, unique=True).map(sorted),
    at=st.floats(0, 200),
    ratios=st.booleans(),
)
def test_between_stays_between(places: list[float], at: float, ratios: bool) -> None:
    values = [3.0**i for i in range(len(places))]
    found = between(at, places, values, ratios=ratios)
    assert values[0] <= found <= values[-1]
    for place, value in zip(places, values, strict=True):
        assert between(place, places, values, ratios=ratios) == pytest.approx(value)
        if at <= place:
            assert found <= value * (1 + 1e-12)


@pytest.mark.parametrize("ratios", [False, True])
@pytest.mark.parametrize("most", [1e308, math.inf])
def test_between_places_that_are_very_far_apart(most: float, ratios: bool) -> None:
    places, values = [1e-300, 1.0, most], [1e-300, 1.0, 1e300]
    found = [between(at, places, values, ratios=ratios) for at in (1e-300, 1e-9, 1.0, 1e200, most)]
    assert all(math.isfinite(value) for value in found)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1e300, rel=1e-9)


def test_budgets_of_time_and_energy() -> None:
    assert fv.Budget(latency="30ms").latency == pytest.approx(0.03)
    assert fv.Budget(latency=0.5).latency == 0.5
    with pytest.raises(BudgetError, match=r"energy \(=1.0\) cannot be a budget: neither a sensor nor a model"):
        fv.Budget(energy=1.0)
    with pytest.raises(BudgetError, match=r"time \(='30 parsecs'\) is not a number of seconds like 30ms"):
        fv.Budget(latency="30 parsecs")
    for latency in (0, "0ms", -1.0, math.inf, True):
        with pytest.raises(BudgetError):
            fv.Budget(latency=latency)
    with pytest.raises(BudgetError, match="exactly one of bytes, bits, loss, latency, energy; given: bits, latency"):
        fv.Budget(bits=4, latency="1s")
