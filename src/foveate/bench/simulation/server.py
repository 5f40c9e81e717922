"""A batched server, simulated one iteration at a time with measured costs.

In an iteration every request in the batch gets one token. Where slots are free, requests that wait join in the order of
their arrival: their prompts are computed in the same iteration, at most `prompt_tokens` of them but always one prompt
whole, and they get their first token at its end. The index of the frontier is read once an iteration.

A server is small and can be copied, so that a search can try several indices from one moment on.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from dataclasses import dataclass

from foveate.bench.simulation.traces import Trace
from foveate.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ServerCosts:
    """What a server's iterations cost at each index of a frontier; index 0 is the best.

    Attributes:
        kl: the expected KL of a token at each index, in nats.
        iteration: for each index, seconds of an iteration with 1, 2, ... requests in the batch.
        prompt_token: seconds of one token of a prompt at each index.
    """

    kl: tuple[float, ...]
    iteration: tuple[tuple[float, ...], ...]
    prompt_token: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.kl) == len(self.iteration) == len(self.prompt_token) > 0:
            raise DataError("costs of a server have as many KLs as iterations and prompt tokens, at least one")
        if len({len(row) for row in self.iteration}) != 1 or not self.iteration[0]:
            raise DataError("costs of a server are of the same batches at each index, at least of one request")
        every = (*self.prompt_token, *(s for row in self.iteration for s in row))
        if any(not (s > 0 and math.isfinite(s)) for s in every) or any(not k >= 0 for k in self.kl):
            raise DataError("costs of a server are positive seconds and KLs of at least 0")

    @property
    def slots(self) -> int:
        """The greatest batch."""
        return len(self.iteration[0])

    def service(self, index: int, prompt: float, generated: float) -> float:
        """Seconds of the server that a request takes in a full batch."""
        return prompt * self.prompt_token[index] + generated * self.iteration[index][-1] / self.slots

    def rate(self, index: int, trace: Trace) -> float:
        """The requests a second that the server can carry at an index, with the mean request of a trace."""
        return 1.0 / self.service(index, trace.mean_prompt, trace.mean_generated)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is promised to each request (a service level objective), and how prompts are batched.

    Attributes:
        first_token: seconds from the arrival to the first token, at most.
        per_token: mean seconds of each token after the first, at most.
        prompt_tokens: tokens of prompts in one iteration, at most, but one prompt in any case.
    """

    first_token: float = 1.0
    per_token: float = 0.2
    prompt_tokens: int = 256


class Server:
    """The state of a simulated server.

    Attributes:
        clock: seconds since the first arrival.
        waiting: the number of the first request that is not in the batch yet.
        kl: the sum of KL over all tokens so far.
        tokens: how many tokens were made.
        met: how many finished requests were served as promised.
        missed: how many requests are known to be served later than promised.
        outcomes: for each finished request whether it was served as promised; None in a copy, which keeps no such list.
    """

    __slots__ = ("_batch", "_costs", "_iterations", "_objective", "_trace", "clock", "kl", "met", "missed", "outcomes",
                 "tokens", "waiting")  # fmt: skip

    def __init__(self, trace: Trace, costs: ServerCosts, objective: Objective) -> None:
        self._trace, self._costs, self._objective = trace, costs, objective
        self._batch: list[tuple[int, int, float]] = []  # (last iteration, request, time of its first token)
        self._iterations = 0
        self.clock, self.kl = 0.0, 0.0
        self.waiting = self.tokens = self.met = self.missed = 0
        self.outcomes: dict[int, bool] | None = {}

    def copy(self) -> Server:
        """A server in the same state, which goes on by itself."""
        other = Server.__new__(Server)
        other._trace, other._costs, other._objective = self._trace, self._costs, self._objective
        other._batch, other._iterations = self._batch.copy(), self._iterations
        other.clock, other.kl, other.waiting, other.tokens = self.clock, self.kl, self.waiting, self.tokens
        other.met, other.missed, other.outcomes = self.met, self.missed, None
        return other

    @property
    def done(self) -> bool:
        """Whether all requests have been served."""
        return not self._batch and self.waiting == len(self._trace)

    @property
    def active(self) -> int:
        """Requests in the batch."""
        return len(self._batch)

    @property
    def queue_wait(self) -> float:
        """Seconds that the first in the queue has waited; 0 if nobody waits."""
        if self.waiting == len(self._trace):
            return 0.0
        return max(self.clock - self._trace.arrivals[self.waiting], 0.0)

    def backlog(self) -> tuple[int, int]:
        """Tokens of answers that the batch still owes, and requests that have arrived and wait."""
        owed = sum(last - self._iterations for last, _, _ in self._batch)
        return owed, max(bisect_right(self._trace.arrivals, self.clock) - self.waiting, 0)

    def iterate(self, index: int) -> None:
        """Compute one iteration at an index; a server without work goes to the next arrival first."""
        trace, costs, objective = self._trace, self._costs, self._objective
        arrivals = trace.arrivals
        if not self._batch and self.waiting < len(arrivals):
            self.clock = max(self.clock, arrivals[self.waiting])
        prompt, joined = 0, self.waiting
        free = costs.slots - len(self._batch)
        while joined < len(arrivals) and joined - self.waiting < free and arrivals[joined] <= self.clock:
            more = trace.prompts[joined]
            if joined > self.waiting and prompt + more > objective.prompt_tokens:
                break
            prompt += more
            joined += 1
        active = len(self._batch)
        if active:
            self.clock += costs.iteration[index][active - 1]
        self.clock += prompt * costs.prompt_token[index]
        self._iterations += 1
        self.kl += costs.kl[index] * (active + joined - self.waiting)
        self.tokens += active + joined - self.waiting
        while self._batch and self._batch[0][0] <= self._iterations:
            self._finish(heapq.heappop(self._batch))
        for request in range(self.waiting, joined):
            self.missed += self.clock - arrivals[request] > objective.first_token
            entry = (self._iterations + trace.generated[request] - 1, request, self.clock)
            if trace.generated[request] == 1:
                self._finish(entry)
            else:
                heapq.heappush(self._batch, entry)
        self.waiting = joined

    def run_until(self, time: float, index: int) -> None:
        """Iterate at one index until the clock has passed a time, or nothing is left that arrives before it."""
        while self.clock < time and not self.done:
            if not self._batch and self._trace.arrivals[self.waiting] >= time:
                self.clock = time
                return
            self.iterate(index)

    def _finish(self, entry: tuple[int, int, float]) -> None:
        _, request, first = entry
        generated, objective = self._trace.generated[request], self._objective
        early = first - self._trace.arrivals[request] <= objective.first_token
        in_time = generated == 1 or (self.clock - first) / (generated - 1) <= objective.per_token
        self.met += early and in_time
        self.missed += early and not in_time  # those whose first token was late are counted already
        if self.outcomes is not None:
            self.outcomes[request] = early and in_time
