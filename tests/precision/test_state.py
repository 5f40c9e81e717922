"""The state of a model's levels: deciders that come, move and leave in any order, and what is composed of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import BudgetError, FloorError
from foveate.kernels.planes.generations import MAX_MAPS
from foveate.precision.adaptation import Adaptation, Estimator
from foveate.precision.frontiers import Frontier
from foveate.precision.maps import PrecisionMap, Site, uniform
from foveate.precision.state import Floor, LevelState, Request, compose, raised_level

SITES = (
    Site("a:weight", "weight", 32, 64, 32),
    Site("b:weight", "weight", 16, 64, 32),
    Site("a:input", "input", 0, 64),
    Site("b:input", "input", 0, 64),
)
NAMES = ("user", "importance", "runtime", "watch", "request")
Change = Callable[[LevelState], LevelState]


def _map(level: int, inputs: int = 8) -> PrecisionMap:
    return uniform(SITES, level, input_level=inputs)


def _chain(length: int) -> Frontier:
    """Maps of 8, 6, 4, 3 and 2 bits, and then 2 bits in the first weight and none in the second."""
    maps = [_map(level) for level in (8, 6, 4, 3, 2)]
    return Frontier((*maps, maps[-1].with_level("b:weight", 0))[:length])


START = LevelState(frontiers={"user": _chain(6)})
ESTIMATOR = Estimator(gradients={"a:weight": torch.ones(32), "b:weight": torch.ones(16)})


def _adaptation(below: int, above: int, multiplier: float = 1.0) -> Adaptation:
    return Adaptation(below=below, above=above, multiplier=multiplier, estimator=ESTIMATOR)


@st.composite
def _moves(draw: st.DrawFn) -> tuple[str, str, Change]:
    """Something that a decider does: (its name, what it does, the change)."""
    name = draw(st.sampled_from(NAMES))
    what = draw(st.sampled_from(("frontier", "index", "floor", "request", "raise", "adapt")))
    number = draw(st.integers(0, 3))
    if what == "frontier":
        return name, what, lambda now: now.with_frontier(name, _chain(4 + number % 3))
    if what == "index":
        return name, what, lambda now: now.with_index(name, number)
    if what == "floor":
        return name, what, lambda now: now.with_floor(name, Floor(index=number))
    if what == "request":
        requests = (Request(tier=number), Request(floor=Floor(index=number)), Request())
        request = draw(st.sampled_from(requests))
        return name, what, lambda now: now.with_request(name, request)
    if what == "adapt":
        adaptation = _adaptation(draw(st.integers(0, 2)), number)
        return name, what, lambda now: now.with_adaptation(name, adaptation)
    return name, what, lambda now: now.with_raises(name, {"a:input": number % 3})


@given(st.lists(_moves(), max_size=12), st.sets(st.sampled_from(NAMES[1:])))
def test_deciders_that_left_leave_what_would_have_been_without_them(
    moves: list[tuple[str, str, Change]], left: set[str]
) -> None:
    state = START
    for _, _, change in moves:
        state = change(state)
    for name in sorted(left):
        state = state.without(name)
    expected = START
    for name, _, change in moves:
        if name not in left:
            expected = change(expected)
    assert state == expected
    assert compose(state) == compose(expected)


@given(st.lists(_moves(), max_size=12))
def test_no_floor_is_undercut_and_all_that_is_read_is_on_the_frontier(moves: list[tuple[str, str, Change]]) -> None:
    state = START
    for _, _, change in moves:
        state = change(state)
        composed = compose(state)
        assert state.index <= min(f.on(state.frontier) for f in (*state.floors.values(), Floor(index=99)))
        assert 1 <= len(composed.maps) <= MAX_MAPS
        assert len(composed.pairs) == 1 + len(state.requests)
        weights = [{n: level for n, level in plan.levels.items() if n.endswith("weight")} for plan in composed.maps]
        for levels in weights:
            assert any(all(plan.levels[n] == level for n, level in levels.items()) for plan in state.frontier)
        assert set(composed.choices) == {pair for pair in composed.pairs if pair[0] != pair[1]}
        for (low, high), (far, near), request in zip(
            composed.pairs, state.ends, (Request(), *state.requests.values()), strict=True
        ):
            assert near <= far <= state.floor
            assert high <= low < len(composed.maps)
            assert near == far or state.adaptation is not None
            if request.tier is not None:
                assert near == far
            if request.floor is not None:
                assert far <= request.floor.on(state.frontier)
            assert composed.encoded[low] == replace(state.frontier.encoded(far), inputs=composed.encoded[low].inputs)
        for encoded, plan in zip(composed.encoded, composed.maps, strict=True):
            assert encoded.inputs == bytes(plan.levels[n] for n in ("a:input", "b:input"))  # type: ignore[arg-type]
            assert len(encoded.weights) == SITES[0].tiles + SITES[1].tiles


def test_the_furthest_index_that_is_demanded_counts_up_to_the_floor() -> None:
    state = START.with_index("a", 1).with_index("b", 4)
    assert state.index == 4
    assert state.with_floor("c", Floor(index=2)).index == 2
    assert state.without("b").index == 1
    assert state.with_frontier("user", _chain(3)).index == 2  # it is shorter


def test_a_floor_in_bits() -> None:
    chain = START.frontier
    assert Floor(bits=chain.bits(2)).on(chain) == 2
    assert Floor(bits=0.1).on(chain) == 5
    with pytest.raises(FloorError, match=r"a floor of 9\d bits cannot be met: the best map of the frontier has \d+\."):
        START.with_floor("x", Floor(bits=99))
    state = START.with_floor("x", Floor(bits=chain.bits(0)))
    with pytest.raises(FloorError):
        compose(state.with_frontier("other", Frontier((_map(2),))))


def test_rows_have_maps_of_their_own() -> None:
    state = START.with_index("runtime", 3).with_request("r", Request(tier=1))
    state = state.with_request("s", Request(floor=Floor(index=2))).with_request("t", Request())
    composed = compose(state)
    assert [plan.levels["a:weight"] for plan in composed.maps] == [6, 4, 3]
    assert composed.pairs == ((2, 2), (0, 0), (1, 1), (2, 2))
    assert composed.plan.levels["a:weight"] == 3
    assert state.classes == {"r": 1, "s": 2, "t": 3}
    # a floor that stands counts for every row
    assert compose(state.with_floor("f", Floor(index=0))).maps == (state.frontier[0],)


def test_inputs_choose_between_two_maps_around_the_index() -> None:
    state = START.with_index("runtime", 2).with_adaptation("inputs", _adaptation(1, 2))
    assert state.ends == ((3, 0),)
    composed = compose(state)
    assert [plan.levels["a:weight"] for plan in composed.maps] == [8, 3]
    assert composed.pairs == ((1, 0),)
    assert composed.plan is state.frontier[0]
    assert compose(state.with_floor("f", Floor(index=2))).pairs == ((1, 0),)
    assert state.with_floor("f", Floor(index=2)).ends == ((2, 0),)
    state = state.with_request("tier", Request(tier=1)).with_request("floor", Request(floor=Floor(index=1)))
    assert state.ends == ((3, 0), (1, 1), (1, 0))
    assert compose(state.without("inputs")).choices == {}
    # what was handed over last is in force, and withdraws
    assert state.with_adaptation("other", _adaptation(0, 0)).ends == ((2, 2), (1, 1), (1, 1))
    assert state.with_adaptation("other", _adaptation(0, 0)).without("other") == state


def test_a_price_is_a_multiple_of_the_slope_of_the_frontier() -> None:
    maps = [replace(_map(level), predicted_loss=loss) for level, loss in ((8, 0.1), (4, 0.5))]
    chain = Frontier(tuple(maps))
    more = {s.name: maps[0].tile_bytes(s) - maps[1].tile_bytes(s) for s in SITES[:2]}
    rows = replace(ESTIMATOR, rows={"b:weight": 4.0})
    choice = Adaptation(below=1, above=0, multiplier=2.0, estimator=rows).choice(chain, 1, 0)
    price = 2 * 0.4 / sum(more.values())
    assert choice.thresholds == pytest.approx([price * more["a:weight"], price * more["b:weight"] / 4])
    unknown = replace(ESTIMATOR, gradients={"a:weight": torch.ones(32)})
    choice = Adaptation(below=1, above=0, multiplier=2.0, estimator=unknown).choice(chain, 1, 0)
    assert choice.thresholds[1] == -1  # not estimated: it reads the higher map
    assert len(choice.samples[1].strips) == 0
    # a frontier without predictions counts costs as they are
    assert _adaptation(1, 0, 3.0).choice(START.frontier, 1, 0).thresholds[0] == pytest.approx(
        3 * 8 * (START.frontier[0].tile_bytes(SITES[0]) - START.frontier[1].tile_bytes(SITES[0])) / (48 * 64)
    )


def test_more_maps_than_a_generation_holds_are_refused() -> None:
    maps = [replace(_map(6), levels={**_map(6).levels, "a:weight": bytes([6] * (4 - i) + [4] * i)}) for i in range(5)]
    maps += [replace(_map(4), levels={**_map(4).levels, "a:weight": bytes([4] * (4 - i) + [3] * i)}) for i in range(4)]
    chain = Frontier(tuple(maps))
    state = LevelState(frontiers={"user": chain})
    for tier in range(1, 8):
        state = state.with_request(f"row {tier}", Request(tier=tier))
    assert len(compose(state).maps) == 8
    with pytest.raises(BudgetError, match="the requests need 9 different maps at once; at most 8"):
        compose(state.with_request("row 8", Request(tier=8)))


def test_raises_suspend_static_ranges() -> None:
    ranges = {"a:input": (-1.0, 1.0)}
    state = START.with_ranges(ranges)
    assert compose(state).ranges == ranges
    raised = state.with_raises("watch", {"a:input": 1})
    assert compose(raised).ranges == {}
    assert compose(raised).plan.levels["a:input"] == 16
    assert compose(raised).plan.levels["b:input"] == 8
    assert compose(raised.with_raises("watch", {"a:input": 0})).ranges == ranges
    assert compose(raised.without("watch")) == compose(state)
    assert [raised_level(_map(4, level), "a:input", 1) for level in (4, 8, 16, 32)] == [8, 16, 16, 32]


def test_two_watches_raise_as_far_as_either() -> None:
    state = LevelState(frontiers={"user": Frontier((_map(4, 4),))})
    state = state.with_raises("one", {"a:input": 2}).with_raises("other", {"a:input": 1, "b:input": 1})
    plan = compose(state).plan
    assert (plan.levels["a:input"], plan.levels["b:input"]) == (16, 8)


def test_states_are_values() -> None:
    state = START.with_index("runtime", 1).with_floor("f", Floor(index=2)).with_raises("w", {"a:input": 1})
    assert copy.deepcopy(state.with_adaptation("i", _adaptation(1, 1))) == state.with_adaptation("i", _adaptation(1, 1))
    assert copy.deepcopy(state) == state == pickle.loads(pickle.dumps(state))
    with pytest.raises(TypeError):
        state.indices["runtime"] = 5  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Floor(), "a floor is exactly one of index"),
        (lambda: Floor(index=1, bits=4), "a floor is exactly one of index"),
        (lambda: Floor(index=-1), r"floor index \(=-1\) is not a whole number from 0 on"),
        (lambda: Floor(bits=float("nan")), r"floor bits \(=nan\) is not a positive finite number"),
        (lambda: Request(tier=1, floor=Floor(index=1)), "a request has a tier or a floor, not both"),
        (lambda: Request(tier=-2), r"tier \(=-2\) is not a whole number"),
        (lambda: START.with_index("x", 6), r"index \(=6\) is not on the frontier, 0..5"),
        (lambda: START.with_index("x", True), r"index \(=True\) is not on the frontier"),
        (lambda: _adaptation(-1, 0), r"below \(=-1\) is not a whole number from 0 on"),
        (lambda: _adaptation(0, 0, -1.0), r"multiplier \(=-1.0\) is not a finite number from 0 on"),
        (lambda: Estimator(gradients={}, strips=0), r"strips \(=0\) is not a whole number from 1 on"),
        (lambda: LevelState(frontiers={}), "a state has at least one frontier"),
    ],
)
def test_what_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        wrong()
