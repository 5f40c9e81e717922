"""The clairvoyant: the best index for each window of time, found with the whole trace at hand.

It minimizes the KL of all tokens plus a price for every request that misses its promise (a Lagrangian). The search is a
beam over windows, on the very simulator that controllers run on. States at the end of a window are compared by the work that
is left and the cost so far: of states with about the same work only the cheapest is kept, and none that is worse in
both. The price that is asked for is found by bisection, so that the clairvoyant misses no more requests than the one it
is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.bench.simulation.policies import Outcome, outcome_of
from foveate.bench.simulation.server import Objective, Server, ServerCosts
from foveate.bench.simulation.traces import Trace


@dataclass(frozen=True, kw_only=True)
class Search:
    """How wide the search is.

    Attributes:
        window: seconds for which an index is kept.
        width: how many states are kept at the end of a window.
        reach: by how many indices neighbouring windows may differ, beside the ends and the cheapest of all.
        rounds: how often the price is bisected.
    """

    window: float = 2.0
    width: int = 6
    reach: int = 2
    rounds: int = 5


@dataclass
class _Node:
    server: Server
    index: int
    cost: float
    switches: int


def clairvoyant(trace: Trace, costs: ServerCosts, objective: Objective, price: float, search: Search) -> Outcome:
    """Serve a trace with the best index for each window, at a price in nats for each request that is missed."""
    start = Server(trace, costs, objective)
    start.outcomes = None
    beam = [_Node(start, 0, 0.0, 0)]
    last = len(costs.kl) - 1
    end = 0.0
    while not all(node.server.done for node in beam):
        # windows without work are passed over
        end = max(end, min(n.server.clock for n in beam)) + search.window
        reached = [n for n in beam if n.server.done or n.server.clock >= end]
        for node in beam:
            if node.server.done or node.server.clock >= end:
                continue
            near = range(max(node.index - search.reach, 0), min(node.index + search.reach, last) + 1)
            for index in sorted({0, last, *near}):
                server = node.server.copy()
                server.run_until(end, index)
                cost = server.kl + price * (server.missed + server.overdue())
                reached.append(_Node(server, index, cost, node.switches + (index != node.index)))
        beam = _kept(reached, costs, trace, search)
    best = min(beam, key=lambda node: node.cost)
    return outcome_of(best.server, len(trace), switches=(0.0,) * best.switches)


def _kept(nodes: list[_Node], costs: ServerCosts, trace: Trace, search: Search) -> list[_Node]:
    """The states that are not worse in both work and cost, at most `width`, spread over the work that is left."""
    generated = trace.mean_generated
    keyed = []
    for node in nodes:
        owed, waits = node.server.backlog()
        # seconds of index 0: what is left, and how far the clock has run past the window
        seconds = (owed + waits * generated) * costs.iteration[0][-1] / costs.slots + node.server.clock
        keyed.append((seconds, node.cost, node))
    keyed.sort(key=lambda entry: entry[:2])
    front: list[_Node] = []
    for _, cost, node in keyed:
        if not front or cost < front[-1].cost - 1e-12:
            front.append(node)
    if len(front) <= search.width:
        return front
    # the cheapest and the least work in any case
    chosen = {round(i * (len(front) - 1) / (search.width - 1)) for i in range(search.width)}
    return [front[i] for i in sorted(chosen)]


def cheapest_at(
    trace: Trace, costs: ServerCosts, objective: Objective, attainment: float, search: Search
) -> tuple[Outcome, float]:
    """The clairvoyant of the least KL that meets the promise for at least a share of all requests, and its price.

    Args:
        trace: what is served.
        costs: what it costs.
        objective: what is promised.
        attainment: the share.
        search: how wide the search is.

    Returns:
        The outcome, and the price of a missed request in nats; of the highest price if none reaches the share.
    """
    per_request = costs.kl[-1] * trace.mean_generated
    low, high = 1e-3 * per_request, 1e3 * per_request
    best, price = clairvoyant(trace, costs, objective, high, search), high
    for _ in range(search.rounds):
        middle = (low * high) ** 0.5
        found = clairvoyant(trace, costs, objective, middle, search)
        if found.attainment >= attainment:
            high = middle
            if best.attainment < attainment or found.kl <= best.kl:
                best, price = found, middle
        else:
            low = middle
    return best, price
