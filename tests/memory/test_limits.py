"""The limit of memory="auto" falls at once, rises late, and later each time that it had to fall again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import FoveateError
from foveate.memory.policy.limits import FIRST_HOLD_S, LONGEST_HOLD_S, AutoLimit, follow


def test_it_falls_at_once_and_rises_after_quiet() -> None:
    state = AutoLimit(limit=1000, margin=100)
    state = follow(state, free=50, taken=800, now_s=1.0)
    assert state.limit == 750
    # enough is free again, but only after five quiet seconds
    for now in (2.0, 5.9):
        assert follow(state, free=1000, taken=750, now_s=now) is state
    state = follow(state, free=1000, taken=750, now_s=6.0)
    assert state.limit == 1650
    # a step of less than a twentieth is not worth it
    assert follow(state, free=160, taken=1650, now_s=100.0) is state
    with pytest.raises(FoveateError, match="must not be negative"):
        AutoLimit(limit=-1, margin=0)


def test_a_rise_that_was_taken_back_doubles_the_wait() -> None:
    state, now, holds = AutoLimit(limit=1000, margin=0), 0.0, []
    for _ in range(10):
        state = follow(state, free=0, taken=500, now_s=now)
        holds.append(state.hold_s)
        while state.limit == 500:
            now += 1.0
            state = follow(state, free=500, taken=500, now_s=now)
        now += 1.0
    assert holds[:5] == [FIRST_HOLD_S, 10.0, 20.0, 40.0, 80.0]
    assert holds[-1] == LONGEST_HOLD_S


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0.1, 20)), min_size=1, max_size=60))
def test_it_is_never_above_what_is_possible(looks: list[tuple[int, float]]) -> None:
    state, now, taken = AutoLimit(limit=1000, margin=50), 0.0, 1000
    rises = 0
    for free, step in looks:
        now += step
        before = state.limit
        state = follow(state, free=free, taken=taken, now_s=now)
        assert state.limit <= max(taken + free - 50, 0)
        rises += state.limit > before
        taken = min(taken, state.limit)
    assert rises <= 1 + now / FIRST_HOLD_S
