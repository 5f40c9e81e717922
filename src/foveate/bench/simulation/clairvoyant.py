"""The clairvoyant: the best index for each window of time, found with the whole trace at hand.

It minimizes the KL of all tokens plus a price for every request that misses its promise (a Lagrangian), on the very
simulator that controllers run on. It starts from the indices that a controller chose and improves them by rollouts. In
each window some other indices are tried, and each is followed for a horizon of windows under the indices so far. A
sweep over all windows is kept only if it lowers the sum. The price falls while the share of requests that are served as
promised is at least the controller's, and rises while it is not; each sweep starts from the best indices of before.

The search is a heuristic, so the true optimum may be lower. It cannot be worse than the controller that it starts from,
up to where within a window the controller switched.

Source: Bertsekas, Rollout, Policy Iteration, and Distributed Reinforcement Learning, 2020, chapter 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.bench.simulation.policies import Outcome, outcome_of
from foveate.bench.simulation.server import Objective, Server, ServerCosts
from foveate.bench.simulation.traces import Trace


@dataclass(frozen=True, kw_only=True)
class Search:
    """How far the search goes.

    Attributes:
        window: seconds for which an index is kept.
        horizon: windows that an index is followed for.
        moves: by how much an index is changed to be tried.
        sweeps: sweeps over the trace, each at its own price.
    """

    window: float = 2.0
    horizon: int = 10
    moves: tuple[int, ...] = (-2, -1, 1, 2)
    sweeps: int = 8


@dataclass(frozen=True, kw_only=True)
class _Problem:
    trace: Trace
    costs: ServerCosts
    objective: Objective
    search: Search

    def start(self) -> Server:
        server = Server(self.trace, self.costs, self.objective)
        server.outcomes = None
        return server

    def window_of(self, server: Server) -> int:
        """The number of the window that the server's clock is in."""
        return int(server.clock / self.search.window + 1e-9)

    def end_of(self, number: int) -> float:
        return (number + 1) * self.search.window

    def outcome(self, indices: Sequence[int]) -> Outcome:
        """Serve the trace with an index for each window; beyond the last window its index stays."""
        server = self.start()
        while not server.done:
            number = self.window_of(server)
            server.run_until(self.end_of(number), indices[min(number, len(indices) - 1)])
        changes = sum(a != b for a, b in itertools.pairwise(indices))
        return outcome_of(server, len(self.trace), switches=(0.0,) * changes)

    def sweep(self, indices: Sequence[int], price: float) -> list[int]:
        """The indices after each window was improved in turn, the first first."""
        server, found, last = self.start(), list(indices), len(self.costs.kl) - 1
        while not server.done:
            number = self.window_of(server)
            while number >= len(found):
                found.append(found[-1])
            now = found[number]
            tried = sorted({now, *(min(max(now + move, 0), last) for move in self.search.moves)})
            found[number] = min(tried, key=lambda index: (self._rollout(server, found, number, index, price), index))
            server.run_until(self.end_of(number), found[number])
        return found

    def _rollout(self, server: Server, indices: Sequence[int], number: int, index: int, price: float) -> float:
        """The cost at the end of the horizon if a window has another index."""
        ahead = server.copy()
        ahead.run_until(self.end_of(number), index)
        until = number + self.search.horizon
        while not ahead.done and (reached := self.window_of(ahead)) <= until:
            ahead.run_until(self.end_of(reached), indices[min(reached, len(indices) - 1)])
        # who still waits at the end of the horizon counts as missed: else a backlog would be given up as lost
        return ahead.kl + price * (ahead.missed + ahead.backlog()[1])


def clairvoyant(
    trace: Trace, costs: ServerCosts, objective: Objective, start: Sequence[int], attainment: float, search: Search
) -> Outcome:
    """The least KL that was found at which at least a share of all requests are served as promised.

    Args:
        trace: what is served.
        costs: what it costs.
        objective: what is promised.
        start: an index for each window to start from.
        attainment: the share.
        search: how far the search goes.
    """
    problem = _Problem(trace=trace, costs=costs, objective=objective, search=search)
    indices = list(start)
    best: Outcome | None = None
    now = problem.outcome(indices)
    if now.attainment >= attainment:
        best = now
    # what the tokens of one request cost near the end of the frontier
    price = costs.kl[max(len(costs.kl) - 3, 1)] * trace.mean_generated
    for _ in range(search.sweeps):
        tried = problem.sweep(indices, price)
        found = problem.outcome(tried)
        requests = len(trace)
        tokens = sum(trace.generated)

        def total(outcome: Outcome, price: float = price, tokens: int = tokens, requests: int = requests) -> float:
            return outcome.kl * tokens + price * requests * (1 - outcome.attainment)

        if total(found) < total(now):
            indices, now = tried, found
        if now.attainment >= attainment and (best is None or now.kl < best.kl):
            best = now
        price = price / 2 if now.attainment >= attainment else price * 3
    return now if best is None else best
