"""Ways to choose the index while a simulated server runs: one index always, and the controller of `foveate.runtime`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from foveate.bench.simulation.server import Objective, Server, ServerCosts
from foveate.bench.simulation.traces import Trace
from foveate.runtime.controller import Observation, State, step
from foveate.runtime.limits import Limits
from foveate.runtime.policy import Costs, Policy, Setup
from foveate.runtime.readings import Reading

#: Seconds from one decision to the next, at least; decisions are made between iterations.
_TICK = 0.1
#: Seconds over which the load is averaged.
_LOAD_OVER = 60.0
#: Seconds of a window in which indices are kept.
WINDOW = 2.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of serving a whole trace.

    Attributes:
        attainment: the share of requests that were served as promised.
        kl: mean expected KL of a token, in nats.
        hours: simulated hours.
        switches: the times at which the index was switched.
        met: for each request whether it was served as promised; empty where nobody kept it.
        mean_index: the mean index, over tokens.
        indices: the index at the start of each window of two seconds; empty where nobody kept it.
    """

    attainment: float
    kl: float
    hours: float
    switches: tuple[float, ...] = ()
    met: tuple[bool, ...] = ()
    mean_index: float = math.nan
    indices: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Controlled:
    """How the controller is set for a server.

    Attributes:
        policy: its constants.
        queue_wait: the limit of the first request's wait, in seconds.
        load_over: seconds over which the load is averaged; 0 if the load is not shown to the controller.
        floor: the furthest index that is allowed; None is the last.
    """

    policy: Policy = field(default_factory=Policy)
    queue_wait: float = 0.2
    load_over: float = _LOAD_OVER
    floor: int | None = None


def outcome_of(
    server: Server, requests: int, switches: tuple[float, ...] = (), mean_index: float = math.nan
) -> Outcome:
    """The outcome of a server that is done."""
    kept = server.outcomes or {}
    return Outcome(
        attainment=server.met / requests,
        kl=server.kl / max(server.tokens, 1),
        hours=server.clock / 3600,
        switches=switches,
        met=tuple(kept[request] for request in range(len(kept))),
        mean_index=mean_index,
    )


def run_static(trace: Trace, costs: ServerCosts, objective: Objective, index: int) -> Outcome:
    """Serve a trace at one index."""
    server = Server(trace, costs, objective)
    while not server.done:
        server.iterate(index)
    return outcome_of(server, len(trace), mean_index=float(index))


def run_controlled(trace: Trace, costs: ServerCosts, objective: Objective, set_to: Controlled) -> Outcome:
    """Serve a trace with the controller deciding between iterations, by what a real server knows at that time."""
    server, state = Server(trace, costs, objective), State()
    setup = Setup(
        limits=Limits(queue_wait=set_to.queue_wait),
        costs=_for_controller(costs, trace),
        policy=set_to.policy,
        floor=set_to.floor,
    )
    load = _Load(trace, costs, set_to.load_over)
    switches: list[float] = []
    indices: list[int] = []
    weighted = 0.0
    decided_at, counted = -math.inf, 0
    while not server.done:
        if server.clock - decided_at >= _TICK:
            decided_at = server.clock
            readings = {"queue_wait": Reading(value=server.queue_wait, at=server.clock)}
            if set_to.load_over > 0:
                readings["load"] = Reading(value=load.at(server.clock), at=server.clock)
            seen = Observation(now=server.clock, readings=readings, passes=float(server.tokens - counted))
            counted = server.tokens
            state, decision = step(setup, state, seen)
            if decision.index != decision.before:
                switches.append(server.clock)
        while len(indices) * WINDOW <= server.clock:
            indices.append(state.index)
        tokens = server.tokens
        server.iterate(state.index)
        weighted += state.index * (server.tokens - tokens)
    done = outcome_of(server, len(trace), tuple(switches), weighted / max(server.tokens, 1))
    return replace(done, indices=tuple(indices))


def _for_controller(costs: ServerCosts, trace: Trace) -> Costs:
    """The server's costs as the controller takes them: its time for a token, with the share of the prompt in it."""
    prompt, generated = trace.mean_prompt, trace.mean_generated
    seconds = tuple(costs.service(index, prompt, generated) / generated for index in range(len(costs.kl)))
    return Costs(kl=costs.kl, seconds_per_token=seconds)


class _Load:
    """The work that arrives, in seconds of index 0 a second, averaged over the last seconds.

    The length of an answer is not known when its request arrives; the mean of the trace stands for it.
    """

    def __init__(self, trace: Trace, costs: ServerCosts, over: float) -> None:
        self._trace, self._costs, self._over = trace, costs, over
        self._next, self._sum, self._time = 0, 0.0, 0.0

    def at(self, now: float) -> float:
        arrivals = self._trace.arrivals
        while self._next < len(arrivals) and arrivals[self._next] <= now:
            self._decay(arrivals[self._next])
            work = self._costs.service(0, self._trace.prompts[self._next], self._trace.mean_generated)
            self._sum += work / self._over
            self._next += 1
        self._decay(now)
        return self._sum

    def _decay(self, now: float) -> None:
        self._sum *= math.exp((self._time - now) / self._over)
        self._time = now
