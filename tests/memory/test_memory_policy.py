"""What is hot: within the limit, nested, and without thrashing however use moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.memory.policy.hot import Item, Seen, Settings, State, decide, goal_of, order_of, start


@st.composite
def _items(draw: st.DrawFn) -> list[Item]:
    """Weights of up to four planes, each of one to three runs that need those of the plane before."""
    items: list[Item] = []
    for _ in range(draw(st.integers(1, 5))):
        below: tuple[int, ...] = ()
        for _ in range(draw(st.integers(1, 4))):
            numbers = []
            for _ in range(draw(st.integers(1, 3))):
                numbers.append(len(items))
                value = draw(st.floats(0, 1e6))
                items.append(Item(size=draw(st.integers(1, 20)), value=value, below=below))
            below = tuple(numbers)
    return items


def _is_closed(numbers: frozenset[int], items: list[Item]) -> bool:
    return all(set(items[n].below) <= numbers for n in numbers)


def _floor(items: list[Item]) -> frozenset[int]:
    return frozenset(n for n, item in enumerate(items) if not item.below)


def _apply(resident: frozenset[int], evict: tuple[int, ...], fetch: tuple[int, ...]) -> frozenset[int]:
    return (resident - set(evict)) | set(fetch)


@given(_items(), st.data())
def test_the_order_is_complete_and_nothing_comes_before_what_it_needs(items: list[Item], data: st.DataObject) -> None:
    order = order_of(items, _floor(items))
    assert sorted(order) == list(range(len(items)))
    place = {n: i for i, n in enumerate(order)}
    assert all(place[other] < place[n] for n in order for other in items[n].below)
    smaller, larger = sorted(data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300))))
    less, more = goal_of(items, order, smaller), goal_of(items, order, larger)
    assert less <= more
    assert _is_closed(more, items)
    assert sum(items[n].size for n in less) <= smaller


@given(_items(), st.data())
def test_a_decision_keeps_to_the_room_and_to_the_floor(items: list[Item], data: st.DataObject) -> None:
    floor = _floor(items)
    least = sum(items[n].size for n in floor)
    resident: frozenset[int] = frozenset()
    state = start(len(items))
    for _ in range(6):
        room = least + data.draw(st.integers(0, 100))
        use = data.draw(st.lists(st.floats(0, 4), min_size=len(items), max_size=len(items)))
        seen = Seen(passes=3, resident=resident, room=room, floor=floor, use=tuple(use))
        state, found = decide(state, seen, items)
        assert set(found.evict) <= resident
        assert not set(found.fetch) & resident
        assert not set(found.evict) & (floor | set(found.fetch))
        # in any moment: what leaves goes first, dependents before what they need, and then what comes in order
        now = set(resident)
        for number in found.evict:
            now.discard(number)
            assert _is_closed(frozenset(now), items)
        for number in found.fetch:
            now.add(number)
            assert _is_closed(frozenset(now), items)
        assert floor <= now
        assert sum(items[n].size for n in now) <= room
        resident = frozenset(now)


@given(_items(), st.data())
def test_exchanges_are_paid_from_the_allowance_however_use_moves(items: list[Item], data: st.DataObject) -> None:
    """In P passes at one limit, at most burst + share * P of the room comes instead of something else (or one run)."""
    floor = _floor(items)
    room = sum(items[n].size for n in floor) + data.draw(st.integers(0, 60))
    settings = Settings(smoothing=1.0, hold=1.0, share=1 / 64, burst=1 / 4)  # nothing else holds it back
    state, seen = start(len(items)), Seen(passes=0, resident=frozenset(), room=room, floor=floor)
    state, found = decide(state, seen, items, settings)
    resident = _apply(frozenset(), found.evict, found.fetch)
    passes = exchanged = 0
    for _ in range(data.draw(st.integers(1, 30))):
        use = tuple(data.draw(st.sampled_from([0.0, 1.0, 100.0])) for _ in items)
        free = room - sum(items[n].size for n in resident)
        state, found = decide(
            state, Seen(passes=1, resident=resident, room=room, floor=floor, use=use), items, settings
        )
        passes += 1
        exchanged += max(sum(items[n].size for n in found.fetch) - free, 0)
        resident = _apply(resident, found.evict, found.fetch)
    most = max(settings.burst * room, max(item.size for item in items))
    assert exchanged <= most + settings.share * room * passes


def test_use_that_alternates_moves_nothing_once_it_is_averaged() -> None:
    items = [Item(size=1, value=1.0), *(Item(size=8, value=10.0, below=(0,)) for _ in range(4))]
    state, resident = start(5), frozenset({0, 1, 2})
    moved = 0
    for number in range(400):
        use = (1.0, 1.0, 1.0, 2.0, 0.5) if number % 2 else (1.0, 1.0, 1.0, 0.0, 1.5)
        seen = Seen(passes=1, resident=resident, room=17, floor=frozenset({0}), use=use)
        state, found = decide(state, seen, items)
        moved += len(found.fetch)
        resident = _apply(resident, found.evict, found.fetch)
    assert moved == 0
    # but a use that stays is followed: 3 is used three times as much as 1 and 2 from now on
    for _ in range(400):
        seen = Seen(passes=1, resident=resident, room=17, floor=frozenset({0}), use=(1.0, 1.0, 1.0, 3.0, 1.0))
        state, found = decide(state, seen, items)
        moved += len(found.fetch)
        resident = _apply(resident, found.evict, found.fetch)
    assert moved == 1
    assert 3 in resident


def test_the_map_in_force_comes_first() -> None:
    items = [Item(size=1, value=1.0), Item(size=4, value=100.0, below=(0,)), Item(size=4, value=1.0, below=(0,))]
    seen = Seen(passes=0, resident=frozenset(), room=5, floor=frozenset({0}), wanted=(1.0, 0.0, 1.0))
    assert decide(start(3), seen, items)[1].goal == {0, 2}
    # what no map reads is kept where there is room, the most worth first
    seen = Seen(passes=0, resident=frozenset(), room=9, floor=frozenset({0}), wanted=(1.0, 0.0, 0.0))
    assert decide(start(3), seen, items)[1].fetch == (0, 1, 2)


def test_what_cannot_be_is_refused() -> None:
    items = [Item(size=10, value=1.0)]
    with pytest.raises(FoveateError, match="the floor needs 10 bytes, and there is room for 9"):
        decide(start(1), Seen(passes=0, resident=frozenset(), room=9, floor=frozenset({0})), items)
    with pytest.raises(FoveateError, match="use or wanted of another number"):
        decide(start(2), Seen(passes=0, resident=frozenset(), room=9, floor=frozenset()), items)
    with pytest.raises(FoveateError, match="must be within 0 to 1"):
        Settings(smoothing=0.0)
    with pytest.raises(FoveateError, match="is not positive"):
        Item(size=0, value=1.0)
    assert State(use=(1.0,), allowance=0.0) == start(1)
