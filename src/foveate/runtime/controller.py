"""The controller, a pure function: (state, observation) -> (state, decision).

Each signal demands an index of the frontier (`foveate.runtime.signals`), and the greatest demand counts. Precision
falls at once, `dwell_down` after the last switch; it rises when every signal permits it, `dwell_up` after the last
switch. A fall soon after a rise means that the rise was too early: the *hold* before the next rise to that index or
beyond it doubles, up to `longest_hold`, and halves after each rise that lasts.

Three bounds hold by construction:

- A rise comes at least `dwell_up` after any switch and a fall at least `dwell_down` after any, so precision goes down
  and up at most once in `dwell_up + dwell_down`. A rise that the quality budget forces comes at once, and the next fall
  waits the longer for it.
- The index is never beyond the floor.
- The expected KL of all passes is never more than `Limits.quality` a pass and the burst together, as long as no
  observation counts more passes than any before it.

A sensor's fault holds the index, and after `fault_hold` takes the safe one. A step of the clock beyond `gap` starts all
timers anew, for the process was suspended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from foveate.errors import DataError
from foveate.runtime.policy import Setup
from foveate.runtime.readings import UNITS, Reading
from foveate.runtime.signals import Demand, Judgement, Timer, demand_of, integrated, judge, timed

#: Signals that are watched whenever they are read, without a limit.
_WITHOUT_LIMIT = ("load",)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is known at one moment.

    Attributes:
        now: the time in seconds, of a clock that does not go back.
        readings: by signal. A signal without a reading is not watched.
        passes: passes (or tokens) computed at the present index since the last observation.
        refused: whether the last rise could not be carried out, for its planes could not be fetched.
    """

    now: float
    readings: Mapping[str, Reading] = field(default_factory=dict)
    passes: float = 0.0
    refused: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.readings) - set(UNITS)
        if unknown:
            raise DataError(f"readings (={sorted(unknown)}) are not of {', '.join(UNITS)}")
        if not (self.passes >= 0 and math.isfinite(self.passes) and math.isfinite(self.now)):
            raise DataError(f"passes (={self.passes}) and now (={self.now}) are not finite, or passes are negative")
        object.__setattr__(self, "readings", MappingProxyType(dict(self.readings)))


@dataclass(frozen=True, kw_only=True)
class State:
    """What the controller remembers.

    Attributes:
        index: the index in force.
        before: the index before the last switch.
        now: the time of the last observation; None before the first.
        switched: the time of the last switch; None before the first.
        restored: the time of the last rise, while nobody knows yet whether it lasts; None otherwise.
        forced: whether the last switch was a rise that the quality budget forced.
        hold: seconds of calm before a rise to `failed` or beyond it.
        failed: the index of the last rise that was too early; None if there was none.
        timers: a timer for each signal that has been seen.
        integral: the integral of power, in indices.
        credit: nats of the quality budget that are left; None before the first observation.
        most_passes: the most passes that any observation counted.
        clamped: whether the quality budget is spent, until half of the burst is saved up again.
        admit: whether new work may be admitted.
    """

    index: int = 0
    before: int = 0
    now: float | None = None
    switched: float | None = None
    restored: float | None = None
    forced: bool = False
    hold: float = 0.0
    failed: int | None = None
    timers: Mapping[str, Timer] = field(default_factory=dict)
    integral: float = 0.0
    credit: float | None = None
    most_passes: float = 1.0
    clamped: bool = False
    admit: bool = True


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be in force from now on, and why.

    Attributes:
        index: the index on the frontier.
        before: the index until now.
        reason: a clause with the value that decided.
        demands: what each signal demanded.
        admit: whether new work may be admitted; False while memory is above its limit.
        credit: nats of the quality budget that are left; infinite without such a limit.
        notes: faults of sensors and jumps of the clock, a clause each.
    """

    index: int
    before: int
    reason: str
    demands: tuple[Demand, ...] = ()
    admit: bool = True
    credit: float = math.inf
    notes: tuple[str, ...] = ()


def step(setup: Setup, state: State, seen: Observation) -> tuple[State, Decision]:
    """Take one observation and decide.

        state, decision = step(setup, state, Observation(now=0.0, readings={"queue_wait": Reading(value=0.9)}))

    Args:
        setup: the limits, costs and constants.
        state: what the last call returned; `State()` at first.
        seen: the observation.

    Returns:
        The next state, and the decision that is to be carried out.
    """
    state, notes = _clocked(setup, state, seen)
    state = _judged_rise(setup, state, seen)
    state, ceiling = _budgeted(setup, state, seen)
    state, demands, faults = _demands(setup, state, seen)
    index, reason = _chosen(setup, state, demands, ceiling, seen.now)
    before = state.index
    state = replace(_switched(setup, state, index, seen.now, forced=before > ceiling), now=seen.now)
    credit = math.inf if state.credit is None else state.credit
    decision = Decision(
        index=index,
        before=before,
        reason=reason,
        demands=demands,
        admit=state.admit,
        credit=credit,
        notes=(*notes, *faults),
    )
    return state, decision


def _clocked(setup: Setup, state: State, seen: Observation) -> tuple[State, tuple[str, ...]]:
    """The state at the time of the observation. After a jump of the clock nothing is known of what was meanwhile."""
    policy = setup.policy
    if not policy.dwell_up <= state.hold <= policy.longest_hold or state.index > setup.last:
        hold = min(max(state.hold, policy.dwell_up), policy.longest_hold)
        state = replace(state, hold=hold, index=min(state.index, setup.last))
    if state.now is None:
        return state, ()
    passed = seen.now - state.now
    if 0 <= passed <= policy.gap:
        return state, ()
    fresh = replace(
        state,
        timers={name: Timer() for name in state.timers},
        switched=None if state.switched is None else seen.now,
        restored=None,
        now=seen.now,
    )
    return fresh, (f"the clock moved by {passed:.1f} s at once: all timers start anew",)


def _judged_rise(setup: Setup, state: State, seen: Observation) -> State:
    """Halve the hold after a rise that lasted; double it after one that could not be carried out."""
    policy = setup.policy
    if seen.refused:
        hold = min(2 * state.hold, policy.longest_hold)
        return replace(state, index=state.before, hold=hold, failed=state.index, restored=None)
    if state.restored is None or seen.now - state.restored < 2 * state.hold:
        return state
    hold = max(state.hold / 2, policy.dwell_up)
    return replace(state, hold=hold, restored=None, failed=None if hold == policy.dwell_up else state.failed)


def _budgeted(setup: Setup, state: State, seen: Observation) -> tuple[State, int]:
    """Charge the passes to the token bucket; also returns the furthest index that the budget allows now."""
    allowed = setup.limits.allowed_kl
    if math.isinf(allowed):
        return state, setup.last
    size = allowed * setup.policy.burst
    credit = size if state.credit is None else state.credit
    credit = min(credit + seen.passes * (allowed - setup.costs.kl[state.index]), size)
    most = max(state.most_passes, seen.passes)
    # enough must be left for one more observation at that index
    paid = [credit + most * (allowed - kl) >= 0 for kl in setup.costs.kl[: setup.last + 1]]
    ceiling = paid.index(False) - 1 if False in paid else setup.last
    ceiling = max(ceiling, min(setup.costs.affordable(allowed), setup.last))
    clamped = credit < size / 2 if state.clamped else ceiling < state.index
    if clamped:
        ceiling = min(setup.costs.affordable(allowed), setup.last)
    return replace(state, credit=credit, most_passes=most, clamped=clamped), ceiling


def _demands(setup: Setup, state: State, seen: Observation) -> tuple[State, tuple[Demand, ...], tuple[str, ...]]:
    """What every signal demands, and the faults of sensors."""
    demands, notes, timers = [], [], dict(state.timers)
    limits = setup.given
    for signal, reading in sorted(seen.readings.items()):
        if signal not in limits and signal not in _WITHOUT_LIMIT:
            continue
        fault = reading.fault(seen.now, setup.policy.stale_after)
        if fault and signal not in timers:
            continue  # it never worked: there is no such sensor, and the manager says so once
        timer = timers.get(signal, Timer())
        if fault:
            timers[signal] = timer = Timer(fault=seen.now if timer.fault is None else timer.fault)
            if signal == "memory":
                state = replace(state, admit=state.admit and not _stays(setup, timer, seen.now))
            demands.append(_of_fault(setup, state, signal, timer, seen.now))
            notes.append(f"{signal}: {fault}")
            continue
        assert reading.value is not None
        if signal == "power":
            seconds = 0.0 if state.now is None else max(seen.now - state.now, 0.0)
            integral = integrated(setup, state.integral, reading.value, state.index, seconds)
            state, judged = replace(state, integral=integral), _of_integral(integral, state.index)
        elif signal == "memory" and not setup.frees_memory:
            state = replace(state, admit=_admits(setup, state, reading.value))
            timers[signal] = Timer()
            continue
        else:
            judged = judge(setup, signal, reading.value, state.index)
        timers[signal] = timer = timed(timer, judged.above, judged.calm, seen.now)
        waits = (seen.now - setup.policy.patience, seen.now - _needed(setup, state, judged.up_to))
        demands.append(demand_of(signal, reading.value, judged, timer, state.index, waits))
        if signal == "memory":
            state = replace(state, admit=_admits(setup, state, reading.value))
    return replace(state, timers=timers), tuple(demands), tuple(notes)


def _of_fault(setup: Setup, state: State, signal: str, timer: Timer, now: float) -> Demand:
    if not _stays(setup, timer, now) or (signal == "memory" and not setup.frees_memory):
        return Demand(signal=signal, index=state.index, reason=f"{signal} is at fault: the index is held")
    # a safe index that is better than the present one is no reason to rise: the others decide that
    index = max(setup.safe, state.index) if setup.policy.safe_index is None else setup.safe
    return Demand(signal=signal, index=index, reason=f"{signal} stays at fault: the safe index")


def _stays(setup: Setup, timer: Timer, now: float) -> bool:
    """Whether a sensor has been at fault for longer than is waited out."""
    return timer.fault is not None and now - timer.fault >= setup.policy.fault_hold


def _of_integral(integral: float, index: int) -> Judgement:
    """A step down for each whole index that was integrated; a step up once a whole one is gone."""
    return Judgement(
        above=integral >= index + 1.0, calm=integral <= index - 1.0, down_to=index + 1, up_to=max(index - 1, 0)
    )


def _admits(setup: Setup, state: State, memory: float) -> bool:
    """Whether work may be admitted: not above the limit, and again only some way below it."""
    limit = setup.given["memory"]
    return memory <= limit * (1.0 if state.admit else 0.95)


def _needed(setup: Setup, state: State, to: int) -> float:
    """Seconds of calm before a rise to an index."""
    return state.hold if state.failed is not None and to <= state.failed else setup.policy.dwell_up


def _chosen(setup: Setup, state: State, demands: tuple[Demand, ...], ceiling: int, now: float) -> tuple[int, str]:
    """The index that is to be in force, and why."""
    index, policy = state.index, setup.policy
    since = math.inf if state.switched is None else now - state.switched
    if index > ceiling:
        return ceiling, "the quality budget is spent"
    if not demands:
        return index, "no signal is watched"
    top = max(demands, key=lambda demand: demand.index)
    wanted, reason = min(top.index, setup.last), top.reason
    if wanted > ceiling:
        wanted, reason = ceiling, f"{reason}, and the quality budget allows index {ceiling}"
    if wanted > index and since < (policy.dwell_up + policy.dwell_down if state.forced else policy.dwell_down):
        return index, f"{reason}, but the last switch is {since:.2f} s ago"
    if wanted < index and since < _needed(setup, state, wanted):
        return index, f"{reason}, but the last switch is {since:.2f} s ago"
    return wanted, reason


def _switched(setup: Setup, state: State, index: int, now: float, *, forced: bool) -> State:
    """The state after the decision."""
    if index == state.index:
        return state
    if index < state.index:
        restored = state.restored if forced else now
        return replace(state, index=index, before=state.index, switched=now, restored=restored, forced=forced)
    # a fall: was the last rise too early?
    early = state.restored is not None
    return replace(
        state,
        index=index,
        before=state.index,
        switched=now,
        restored=None,
        forced=False,
        hold=min(2 * state.hold, setup.policy.longest_hold) if early else state.hold,
        failed=state.index if early else state.failed,
    )
