"""Job and Jobs: the requests that wait or are computed, and which are admitted.

The event loop admits and cancels, and the thread that runs the model starts and ends jobs; one lock is between them.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from foveate.precision.state import Request
from foveate.serve.calls.fields import Call
from foveate.serve.calls.refused import RefusedRequest
from foveate.serve.calls.wish import Given
from foveate.serve.engine.sampling import Chosen, Sampler
from foveate.serve.options import ServerLimits

#: The weight of the newest step in the running mean of the rate of prefill.
_NEWEST = 0.2
#: Retry-After is between these, in seconds.
_SOONEST, _LATEST = 1, 120


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of an answer: `stop` or `length`, or the error that ended it."""

    reason: str = "stop"
    error: str | None = None


@dataclass(kw_only=True, eq=False)
class Job:
    """One request on its way.

    Attributes:
        id: its name, unique in the server.
        call: what it asks for.
        tokens: its prompt.
        max_tokens: the most tokens of its answer.
        request: the precision that its rows ask for; None follows the index in force.
        ends: the tokens that end an answer.
        sampler: chooses its tokens.
        given: the precision that it got.
        events: its tokens, and the end, for the event loop.
        loop: the event loop that waits.
        arrived, started, first, latest: times of the monotonic clock; None before they come.
        answer: the tokens of the answer so far.
    """

    id: str
    call: Call
    tokens: tuple[int, ...]
    max_tokens: int
    request: Request | None
    ends: frozenset[int]
    sampler: Sampler
    loop: asyncio.AbstractEventLoop
    given: Given = field(default_factory=Given)
    events: asyncio.Queue[Chosen | Ended] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    latest: float | None = None
    answer: list[int] = field(default_factory=list)

    @property
    def produced(self) -> int:
        """How many tokens the answer has so far."""
        return len(self.answer)

    def post(self, event: Chosen | Ended) -> None:
        """Hand an event to the event loop, from any thread; nobody waits where the loop has ended."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Jobs:
    """All jobs of a server.

    Args:
        limits: what is admitted.

    Attributes:
        refused: how many were refused since there was no room for them.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self._all: dict[str, Job] = {}
        self._rate: float | None = None
        self.refused = 0

    def get(self, id_: str) -> Job | None:
        """The job of that name, or None if it has ended."""
        return self._all.get(id_)

    def admit(self, job: Job, more_memory: bool, put: Callable[[Job], None]) -> None:
        """Take a job in.

        Args:
            job: the job.
            more_memory: whether memory allows more work.
            put: hands it to the engine.

        Raises:
            RefusedRequest: too much waits (429), and when to come again.
        """
        with self._lock:
            waiting = self._waiting()
            tokens = sum(len(one.tokens) for one in waiting)
            full = len(waiting) >= self._limits.waiting
            # a prompt that is longer than the whole queue is admitted where nothing waits
            full = full or (bool(waiting) and tokens + len(job.tokens) > self._limits.waiting_tokens)
            if full or not more_memory:
                self.refused += 1
                why = f"{len(waiting)} requests with {tokens} tokens wait" if full else "memory is above its limit"
                raise RefusedRequest(
                    f"the server is busy: {why}", status=429, headers={"Retry-After": str(self._retry_after(tokens))}
                )
            if job.id in self._all:
                raise RefusedRequest(f"a request of the name {job.id} is being answered", status=409)
            self._all[job.id] = job
        try:
            put(job)
        except BaseException:
            self.remove(job)
            raise

    def remove(self, job: Job) -> None:
        """Forget a job."""
        with self._lock:
            self._all.pop(job.id, None)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens of prompts in so many seconds."""
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else self._rate + _NEWEST * (rate - self._rate)

    def head_wait(self) -> float:
        """Seconds that the first of the waiting jobs has waited; 0 if none waits."""
        with self._lock:
            first = min((job.arrived for job in self._waiting()), default=None)
        return 0.0 if first is None else time.monotonic() - first

    def counts(self) -> tuple[int, int, int]:
        """Jobs that are computed, jobs that wait, and the tokens of their prompts."""
        with self._lock:
            waiting = self._waiting()
            return len(self._all) - len(waiting), len(waiting), sum(len(job.tokens) for job in waiting)

    def all(self) -> list[Job]:
        """Every job."""
        with self._lock:
            return list(self._all.values())

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of prompts a second, as measured; None before the first prompt."""
        return self._rate

    def _waiting(self) -> list[Job]:
        return [job for job in self._all.values() if job.started is None]

    def _retry_after(self, tokens: int) -> int:
        seconds = tokens / self._rate if self._rate else 1.0
        return min(max(math.ceil(seconds), _SOONEST), _LATEST)
