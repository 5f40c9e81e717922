"""The control unit alone: a pure function, fed by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.inputs.drift import Calibrated, Decision, Observation, State, Tolerance, step

SEEN = Calibrated(deviation=1.0, means=(-0.1, 0.1), variances=(0.8, 1.2), limits=(-4.0, 4.0), batch=1000.0)
TOLERANCE = Tolerance()


def observed(variance: float = 1.0, mean: float = 0.0, values: int = 1000, beyond: float = 0.0) -> Observation:
    return Observation(values, mean, variance, beyond)


def fed(*observations: Observation, state: State | None = None) -> tuple[State, Decision]:
    state, decision = state or State(), Decision(0, 0.0, 0.0)
    for one in observations:
        state, decision = step(TOLERANCE, SEEN, state, one)
    return state, decision


@given(st.lists(st.tuples(st.floats(0.8, 1.2), st.floats(-0.1, 0.1), st.integers(1, 5000)), max_size=40))
def test_what_calibration_saw_never_changes_anything(calls: Iterable[tuple[float, float, int]]) -> None:
    state = State()
    for variance, mean, values in calls:
        state, decision = step(TOLERANCE, SEEN, state, observed(variance, mean, values))
        assert decision.raised == 0


@pytest.mark.parametrize(
    ("now", "raised"),
    [
        (observed(1.2 * 1.2), 0),
        (observed(1.2 * 1.3), 1),
        (observed(1.2 * 3.2), 2),
        (observed(0.8 / 1.3), 1),
        (observed(0.0), 2),
        (observed(mean=0.3), 0),
        (observed(mean=0.4), 1),
        (observed(mean=-2.5), 2),
        (observed(beyond=0.0009), 0),
        (observed(beyond=0.002), 1),
        (observed(beyond=0.02), 2),
        (observed(math.nan), 2),
    ],
)
def test_how_far_decides_how_much(now: Observation, raised: int) -> None:
    assert fed(now)[1].raised == raised


def test_nothing_is_decided_on_less_than_a_batch_of_calibration() -> None:
    few = observed(5.0, values=90)
    state, decision = fed(*[few] * 11)
    assert decision.raised == 0
    assert fed(*[few] * 4, state=state)[1].raised == 2


def test_it_goes_back_only_after_a_while_and_only_well_inside() -> None:
    state, _ = fed(observed(1.2 * 1.4))
    assert state.raised == 1
    # between the thresholds: no reason to raise, none to go back
    state, decision = fed(*[observed(1.2 * 1.2)] * 50, state=state)
    assert decision.raised == 1
    after = 0
    while state.raised:
        state, _ = fed(observed(1.0), state=state)
        after += 1
    assert TOLERANCE.dwell <= after <= 4 * TOLERANCE.dwell


def test_a_return_taken_back_makes_the_next_one_slower() -> None:
    state, waits = State(), []
    for _ in range(6):
        while not state.raised:
            state, _ = fed(observed(3.0), state=state)
        calm = 0
        while state.raised:
            state, _ = fed(observed(1.0), state=state)
            calm += 1
        waits.append(calm)
    assert waits == sorted(waits)
    assert waits[-1] > 4 * waits[0]
    assert waits[-1] <= TOLERANCE.patience + 10 * TOLERANCE.dwell


def test_calls_of_one_token_are_judged_as_calmly_as_long_ones() -> None:
    # a token's variance alone is far outside, their mean is not
    state, raised = State(), 0
    for i in range(400):
        state, decision = step(TOLERANCE, SEEN, state, observed(1.8 if i % 2 else 0.2, values=50))
        raised = max(raised, decision.raised)
    assert raised == 0


def test_a_node_whose_input_never_moved() -> None:
    still = Calibrated(0.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 10.0)
    assert step(TOLERANCE, still, State(), Observation(10, 0.0, 0.0, 0.0))[1].raised == 0
    assert step(TOLERANCE, still, State(), Observation(10, 0.0, 1e-3, 0.9))[1].raised == 2
