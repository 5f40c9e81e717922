"""The controller is pure: bounds by construction, under hypothesis, and single decisions by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import DataError
from foveate.runtime.controller import Decision, Observation, State, step
from foveate.runtime.limits import Limits
from foveate.runtime.policy import Costs, Policy, Setup
from foveate.runtime.readings import Reading

COSTS = Costs(kl=(0.0, 0.01, 0.03, 0.1, 0.4), seconds_per_token=(0.05, 0.04, 0.03, 0.02, 0.015))
TICK = 0.05


def setup(costs: Costs = COSTS, policy: Policy | None = None, floor: int | None = None, **limits: object) -> Setup:
    return Setup(limits=Limits(**limits), costs=costs, policy=policy or Policy(), floor=floor)  # type: ignore[arg-type]


def run(
    known: Setup,
    ticks: int,
    values: Callable[[int, State], dict[str, float | str | None]],
    state: State | None = None,
    passes: Callable[[int], float] = lambda tick: 1.0,
    start: float = 0.0,
    seconds: float = TICK,
) -> tuple[State, list[tuple[float, Decision]]]:
    """Decide so many times; `values(tick, state)` gives each signal a value, a reason, or None for no reading."""
    state = state or State()
    found = []
    for tick in range(ticks):
        now = start + tick * seconds
        readings = {}
        for name, value in values(tick, state).items():
            if value is not None:
                readings[name] = (
                    Reading(reason=value, at=now) if isinstance(value, str) else Reading(value=value, at=now)
                )
        state, decision = step(known, state, Observation(now=now, readings=readings, passes=passes(tick)))
        found.append((now, decision))
    return state, found


def moves(found: Sequence[tuple[float, Decision]]) -> list[tuple[float, int, int]]:
    return [(round(now, 3), d.before, d.index) for now, d in found if d.before != d.index]


def test_a_wait_above_its_limit_lowers_precision_and_its_end_restores_all_of_it() -> None:
    known = setup(queue_wait=0.2)
    state, found = run(known, 1200, lambda t, s: {"queue_wait": 0.3 if 20 <= t < 60 else 0.0})
    falls = [(a, b) for _, a, b in moves(found) if b > a]
    rises = [(a, b) for _, a, b in moves(found) if b < a]
    assert falls[0] == (0, 1)
    assert max(b for _, b in falls) == 4
    assert rises == [(4, 3), (3, 2), (2, 1), (1, 0)]
    assert state.index == 0
    times = [now for now, a, b in moves(found) if b < a]
    assert all(later - before >= Policy().dwell_up - 1e-9 for before, later in itertools.pairwise(times))


def test_a_short_excess_moves_nothing() -> None:
    known = setup(policy=Policy(patience=1.0), queue_wait=0.2)
    _, found = run(known, 400, lambda t, s: {"queue_wait": 0.9 if t % 20 < 15 else 0.0})  # 0.75 s above, 0.25 s below
    assert moves(found) == []


def test_between_the_targets_precision_stays() -> None:
    known = setup(queue_wait=0.2)
    lowered = State(index=2)
    state, found = run(known, 2000, lambda t, s: {"queue_wait": 0.15}, lowered)
    assert moves(found) == []
    assert state.index == 2


@pytest.mark.parametrize(("wait", "index"), [(0.21, 1), (0.39, 1), (0.41, 2), (0.9, 3), (100.0, 4)])
def test_a_greater_excess_asks_for_more_steps(wait: float, index: int) -> None:
    _, found = run(setup(queue_wait=0.2), 10, lambda t, s: {"queue_wait": wait})
    assert moves(found)[0][2] == index


def test_the_greatest_demand_counts() -> None:
    known = setup(queue_wait=0.2, cpu_pressure=0.5)
    _, found = run(known, 10, lambda t, s: {"queue_wait": 0.9, "cpu_pressure": 0.6})
    assert moves(found)[0][2] == 3
    assert "queue_wait" in found[moves_at(found)][1].reason


def moves_at(found: Sequence[tuple[float, Decision]]) -> int:
    return next(i for i, (_, d) in enumerate(found) if d.before != d.index)


def test_one_signal_that_is_not_calm_keeps_precision_down() -> None:
    known = setup(queue_wait=0.2, cpu_pressure=0.5)
    state, _ = run(known, 1000, lambda t, s: {"queue_wait": 0.0, "cpu_pressure": 0.4}, State(index=3))
    assert state.index == 3


def test_a_latency_is_lowered_as_far_as_the_costs_say_and_no_further() -> None:
    known = setup(latency=0.05)
    # whatever the machine does, the pass takes twice as long as at calibration

    def latency(tick: int, state: State) -> dict[str, float | str | None]:
        return {"latency": 2 * COSTS.seconds_per_token[state.index]}

    state, found = run(known, 2000, latency)
    assert [(a, b) for _, a, b in moves(found)] == [(0, 3)]
    assert state.index == 3


def test_the_load_alone_decides_where_it_is_known() -> None:
    known = setup(queue_wait=0.2)

    def cost(index: int, load: float) -> float:
        used = load * COSTS.seconds_per_token[index] / COSTS.seconds_per_token[0]
        return (
            COSTS.kl[index] + known.policy.price * COSTS.kl[known.knee] * used**5 / (1 - used) if used < 1 else math.inf
        )

    state = State()
    for start, load in ((0.0, 1.3), (60.0, 0.3), (120.0, 2.2), (180.0, 0.0)):
        state, found = run(known, 1000, lambda t, s, v=load: {"queue_wait": 0.0, "load": v}, state, start=start)  # type: ignore[misc]
        assert state.index == min(range(len(COSTS)), key=lambda index: cost(index, load))
        assert len({later > before for _, before, later in moves(found)}) == 1  # there and not back
    state, _ = run(known, 100, lambda t, s: {"queue_wait": 0.0, "load": 9.0}, state, start=240.0)
    assert state.index == known.last


def test_a_wait_goes_behind_the_knee_only_where_it_is_far_beyond_its_limit() -> None:
    # from index 2 on a step saves 2 % of the time and loses three times as much
    costs = Costs(kl=(0.0, 0.001, 0.002, 0.006, 0.018), seconds_per_token=(1.0, 0.7, 0.5, 0.49, 0.48))
    known = setup(costs, queue_wait=0.2)
    assert known.knee == 2
    state, _ = run(known, 1200, lambda t, s: {"queue_wait": 0.9})
    assert state.index == 2
    state, _ = run(known, 1200, lambda t, s: {"queue_wait": 1.1}, state, start=100.0)
    assert state.index == 4
    state, _ = run(known, 1200, lambda t, s: {"queue_wait": 0.9}, state, start=200.0)
    assert state.index == 4  # a wait above its limit is no reason to rise
    assert setup(Costs(kl=costs.kl), queue_wait=0.2).knee == 4  # no times are known
    assert setup(replace(costs, seconds_per_token=(1.0, 0.7, 0.5, 0.3, 0.2)), queue_wait=0.2).knee == 4


def test_a_restore_that_was_too_early_doubles_the_hold_and_one_that_lasts_halves_it() -> None:
    # the load fits at index 1, never at 0: every restore fails
    known = setup(queue_wait=0.2)
    state, found = run(known, 1200, lambda t, s: {"queue_wait": 0.3 if s.index == 0 else 0.0}, seconds=0.5)
    rises = [now for now, a, b in moves(found) if b < a]
    gaps = [later - before for before, later in itertools.pairwise(rises)]
    assert all(later > before - 1.5 for before, later in itertools.pairwise(gaps))
    assert gaps[-1] > 55
    assert state.hold == Policy().longest_hold
    assert len(moves(found)) < 45
    state, _ = run(known, 1200, lambda t, s: {"queue_wait": 0.0}, state, start=600.0, seconds=0.5)
    assert state.index == 0
    assert state.hold <= Policy().longest_hold / 2


def test_a_fault_holds_and_then_takes_the_safe_index() -> None:
    known = setup(policy=Policy(safe_index=3, fault_hold=2.0), queue_wait=0.2)
    broken: list[float | str] = ["it died", math.nan, -1.0, math.inf]
    for value in broken:
        state, found = run(known, 100, lambda t, s, v=value: {"queue_wait": 0.0 if t < 20 else v})  # type: ignore[misc]
        assert moves(found) == [(pytest.approx(3.0, abs=0.1), 0, 3)]
        assert any("queue_wait" in note for _, d in found for note in d.notes)
        state, found = run(known, 2000, lambda t, s: {"queue_wait": 0.0}, state, start=5.0)
        assert state.index == 0


def test_a_stale_reading_is_a_fault() -> None:
    known = setup(queue_wait=0.2)
    state = State()
    for tick in range(200):
        reading = Reading(value=0.0, at=min(tick, 40) * TICK)
        state, decision = step(known, state, Observation(now=tick * TICK, readings={"queue_wait": reading}))
    assert decision.index == known.last
    assert "old" in decision.notes[0]


def test_a_sensor_that_never_worked_decides_nothing() -> None:
    state, found = run(setup(power=45, queue_wait=0.2), 400, lambda t, s: {"power": "there is none", "queue_wait": 0.0})
    assert moves(found) == []
    assert "power" not in state.timers


def test_a_suspended_process_starts_its_timers_anew() -> None:
    known = setup(queue_wait=0.2)
    state, _ = run(known, 4, lambda t, s: {"queue_wait": 0.9})
    reading = {"queue_wait": Reading(value=0.9, at=60.0)}
    state, decision = step(known, state, Observation(now=60.0, readings=reading))
    assert decision.index == 0  # 60 s above its limit by the clock, but nobody saw that
    assert "the clock moved by 59.9 s" in decision.notes[0]
    state, found = run(known, 20, lambda t, s: {"queue_wait": 0.9}, state, start=60.05)
    assert moves(found)[0][2] > 0
    state, decision = step(known, state, Observation(now=1.0, readings={}))
    assert "timers start anew" in decision.notes[0]


def test_memory_that_no_move_frees_gates_admission_only() -> None:
    known = setup(memory="1GiB")
    state, found = run(known, 100, lambda t, s: {"memory": 1.1 * 2**30 if t < 50 else 0.97 * 2**30})
    assert moves(found) == []
    assert not found[10][1].admit
    assert not found[-1][1].admit  # some way below the limit, and not before
    state, found = run(known, 5, lambda t, s: {"memory": 0.9 * 2**30}, state, start=5.0)
    assert found[-1][1].admit


def test_memory_that_moves_free_is_freed_as_far_as_the_costs_say() -> None:
    costs = replace(COSTS, resident=(1000, 800, 600, 400, 200))
    known = replace(setup(costs=costs, memory=1500), frees_memory=True)
    state, found = run(known, 400, lambda t, s: {"memory": 900 + costs.resident[s.index]})
    # 1900 at first; 1500 would do, but the aim is a little below it
    assert [(a, b) for _, a, b in moves(found)] == [(0, 3)]
    state, _ = run(known, 2000, lambda t, s: {"memory": 100 + costs.resident[s.index]}, state, start=20.0)
    assert state.index == 0


def test_power_is_integrated_slowly_and_does_not_wind_up() -> None:
    known = setup(power=45)
    watts = (60.0, 55.0, 50.0, 44.0, 40.0)
    state, found = run(known, 480, lambda t, s: {"power": watts[s.index]}, seconds=0.25)
    assert state.index == 3
    assert len(moves(found)) < 12
    # another hour at the limit's edge moves nothing: the deadband
    state, found = run(known, 1200, lambda t, s: {"power": 45.5}, state, start=120.0, seconds=0.5)
    assert moves(found) == []
    assert state.integral <= state.index + 1
    state, found = run(known, 240, lambda t, s: {"power": 20.0}, state, start=720.0, seconds=0.25)
    assert state.index == 0


def test_the_quality_budget_caps_what_pressure_may_take() -> None:
    known = setup(policy=Policy(burst=100.0), queue_wait=0.2, quality=0.05)
    state, found = run(known, 2000, lambda t, s: {"queue_wait": 9.0})
    spent = sum(COSTS.kl[d.index] for _, d in found[:-1])
    assert spent <= 0.05 * len(found) + 0.05 * 100
    assert state.index == 2  # the last that costs at most 0.05
    assert any("quality budget" in d.reason for _, d in found)


def test_the_floor_is_respected() -> None:
    _, found = run(setup(queue_wait=0.2, floor=2), 400, lambda t, s: {"queue_wait": 100.0})
    assert max(d.index for _, d in found) == 2
    _, found = run(setup(queue_wait=0.2, floor=0), 400, lambda t, s: {"queue_wait": 100.0})
    assert moves(found) == []


def test_a_refused_rise_goes_back_and_waits_longer() -> None:
    known = setup(queue_wait=0.2)
    state, found = run(known, 100, lambda t, s: {"queue_wait": 0.0}, State(index=2))
    assert moves(found)[-1][1:] == (2, 1)
    state, _ = run(known, 1, lambda t, s: {"queue_wait": 0.0}, replace(state, now=4.9), start=4.95)
    refused = Observation(now=5.0, readings={"queue_wait": Reading(value=0.0, at=5.0)}, refused=True)
    after, decision = step(known, state, refused)
    assert (decision.before, decision.index) == (2, 2)
    assert after.hold == 2 * Policy().dwell_up


VALUES = st.one_of(
    st.floats(0, 3), st.just(math.nan), st.just(-1.0), st.just(0.0), st.just(0.19), st.none(), st.just("it died")
)


@st.composite
def machines(draw: st.DrawFn) -> tuple[Setup, list[tuple[float, dict[str, float | str | None], float]]]:
    """A setup, and what is read at each moment: (seconds since the last, values, passes)."""
    kl = sorted(draw(st.lists(st.floats(0, 2), min_size=2, max_size=6)))
    limits = {"queue_wait": 0.2, "cpu_pressure": 0.5, "power": 1.0, "memory": 1}
    named = draw(st.sets(st.sampled_from(sorted(limits)), min_size=1))
    quality = draw(st.one_of(st.none(), st.floats(1e-3, 1.0)))
    known = Setup(
        limits=Limits(**{name: limits[name] for name in named}, quality=quality),  # type: ignore[arg-type]
        costs=Costs(kl=tuple(kl), seconds_per_token=tuple(1.0 - 0.1 * i for i in range(len(kl)))),
        policy=Policy(
            patience=draw(st.sampled_from([0.0, 0.3, 1.0])),
            dwell_up=draw(st.sampled_from([0.5, 3.0])),
            burst=draw(st.sampled_from([1.0, 20.0, 1000.0])),
            steps_up=draw(st.integers(1, 3)),
            safe_index=draw(st.one_of(st.none(), st.integers(0, 9))),
        ),
        floor=draw(st.one_of(st.none(), st.integers(0, len(kl) - 1))),
    )
    # runs of one value, since independent values would never last for a dwell
    runs = draw(
        st.lists(st.tuples(st.integers(1, 90), st.fixed_dictionaries(dict.fromkeys(sorted(named), VALUES))), max_size=5)
    )
    steps = [(TICK, values, 1.0) for length, values in runs for _ in range(length)]
    return known, steps


@given(machines())
def test_bounds_hold_whatever_is_read(
    machine: tuple[Setup, list[tuple[float, dict[str, float | str | None], float]]],
) -> None:
    known, steps = machine
    state, now, found, spent = State(), 0.0, [], 0.0
    for charged, (seconds, values, passes) in enumerate(steps, 1):
        now += seconds
        readings = {
            name: Reading(reason=value, at=now) if isinstance(value, str) else Reading(value=value, at=now)
            for name, value in values.items()
            if value is not None
        }
        spent += passes * known.costs.kl[state.index]
        state, decision = step(known, state, Observation(now=now, readings=readings, passes=passes))
        found.append((now, decision))
        assert 0 <= decision.index <= known.last
        assert math.isfinite(state.hold)
        assert known.policy.dwell_up <= state.hold <= known.policy.longest_hold
        if state.credit is not None and known.costs.kl[0] <= known.limits.allowed_kl:
            assert spent <= known.limits.allowed_kl * (charged + known.policy.burst) + 1e-6
    cycle = known.policy.dwell_up + known.policy.dwell_down
    made = moves(found)
    # the first fall after a rise begins a new oscillation
    starts = [now for (now, a, b), (_, p, q) in zip(made[1:], made, strict=False) if b > a and q < p]
    assert all(later - before >= cycle - 2e-3 for before, later in itertools.pairwise(starts))
    for (before, *_), (later, a, b) in itertools.pairwise(made):
        if not (b < a and known.limits.quality is not None):
            least = known.policy.dwell_down if b > a else known.policy.dwell_up
            assert later - before >= least - 2e-3


@given(machines())
def test_precision_returns_in_full_after_any_pressure(
    machine: tuple[Setup, list[tuple[float, dict[str, float | str | None], float]]],
) -> None:
    known, steps = machine
    calm: dict[str, float | str | None] = dict.fromkeys(known.limits.given(), 0.0)
    state, _ = run(known, len(steps), lambda t, s: steps[t][1])
    start = len(steps) * TICK
    # each step waits for the hold, at most
    ticks = int((known.last + 1) * known.policy.longest_hold / 2.0) + 40
    for tick in range(ticks):
        now = start + tick * 2.0
        readings = {name: Reading(value=0.0, at=now) for name in calm}
        state, _ = step(known, state, Observation(now=now, readings=readings))
    assert state.index == 0


@given(machines())
def test_the_same_observations_give_the_same_decisions(
    machine: tuple[Setup, list[tuple[float, dict[str, float | str | None], float]]],
) -> None:
    known, steps = machine
    first = run(known, len(steps), lambda t, s: steps[t][1])
    assert repr(first) == repr(run(known, len(steps), lambda t, s: steps[t][1]))


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match=r"readings .*heat"):
        Observation(now=0.0, readings={"heat": Reading(value=1.0)})
    with pytest.raises(DataError, match="passes"):
        Observation(now=0.0, passes=-1)
    with pytest.raises(DataError, match=r"floor \(=9\) is not an index"):
        setup(floor=9, queue_wait=1)
    with pytest.raises(DataError, match="2 numbers of seconds_per_token for 3 indices"):
        Costs(kl=(0, 1, 2), seconds_per_token=(1.0, 2.0))
    with pytest.raises(DataError, match="dwell_up"):
        Policy(dwell_up=0)
    with pytest.raises(DataError, match="resident"):
        Setup(limits=Limits(memory=1), costs=COSTS, frees_memory=True)
