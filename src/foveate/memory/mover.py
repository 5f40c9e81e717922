"""The mover: fetches runs on threads of its own, the most urgent first.

It is given numbers of runs and how urgent each is, and calls a function that does one transfer. A request can be taken
back until its transfer begins. At most as many transfers run as there are threads. Each writes straight to where its
bytes stay, so the mover itself needs no memory.

A transfer that fails is tried again later: after 0.1 s, then twice as long each time, up to 30 s. Nobody waits for it:
the model goes on at the level that it has.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from foveate.errors import FoveateError

#: Seconds until a transfer that failed is tried again: the first time, and at most.
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 30.0


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What the mover has done so far.

    Attributes:
        bytes: bytes of the transfers that succeeded.
        transfers: how many succeeded.
        failures: how many failed.
        busy_s: seconds that transfers took, added up over threads.
    """

    bytes: int = 0
    transfers: int = 0
    failures: int = 0
    busy_s: float = 0.0


@dataclass(order=True)
class _Request:
    due_s: float
    urgency: tuple[float, ...]
    number: int = field(compare=True)
    tries: int = field(default=0, compare=False)


class Mover:
    """Threads that fetch runs. Without `stop` they live as long as the process."""

    def __init__(
        self,
        transfer: Callable[[int], int],
        finished: Callable[[int, Exception | None], None],
        *,
        ended: Callable[[], None] = lambda: None,
        threads: int = 2,
        pause: Callable[[float], float] = lambda seconds: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start.

        Args:
            transfer: fetches the run of a number, and returns its bytes; called on the mover's threads.
            finished: called afterwards with the error or None, on the same thread.
            ended: called when the last thread has ended.
            threads: how many transfers run at a time.
            pause: seconds to rest after a transfer that took so many, so that others get their share of the processor.
            clock: seconds, for retries.
        """
        if threads < 1:
            raise FoveateError(f"threads (={threads}) of the mover must be at least 1")
        self._transfer, self._finished, self._pause, self._clock = transfer, finished, pause, clock
        self._ended, self._alive = ended, threads
        self._changed = threading.Condition()
        self._heap: list[_Request] = []
        self._wanted: dict[int, _Request] = {}
        self._running: set[int] = set()
        self._closed = False
        self._moved = Moved()
        self._threads = [
            threading.Thread(target=self._work, name=f"foveate-mover-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def request(self, urgencies: Mapping[int, tuple[float, ...]]) -> None:
        """Ask for runs, the lowest urgency first. A run that was asked for already gets its new urgency."""
        with self._changed:
            for number, urgency in urgencies.items():
                if number in self._running:
                    continue
                before = self._wanted.get(number)
                due, tries = (before.due_s, before.tries) if before is not None else (0.0, 0)
                self._push(_Request(due, urgency, number, tries))
            self._changed.notify_all()

    def cancel(self, numbers: Iterable[int]) -> set[int]:
        """Take requests back. Returns those that came too late, for their transfers are running."""
        numbers = set(numbers)
        with self._changed:
            for number in numbers:
                self._wanted.pop(number, None)
            return numbers & self._running

    def waiting(self) -> set[int]:
        """The runs that were asked for and are not there, also those on their way."""
        with self._changed:
            return set(self._wanted) | self._running

    def wait(self, numbers: Collection[int], timeout_s: float | None = None) -> bool:
        """Wait until none of these is asked for any more; returns False if that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or not any(n in self._wanted or n in self._running for n in numbers), timeout_s
            )

    def moved(self) -> Moved:
        """What was done so far."""
        with self._changed:
            return self._moved

    def stop(self) -> None:
        """Have the threads end after the transfers that are running, and do not wait for it."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until all threads have ended."""
        for thread in self._threads:
            thread.join()

    def _push(self, request: _Request) -> None:
        self._wanted[request.number] = request
        heapq.heappush(self._heap, request)

    def _next(self) -> _Request | None:
        """The next request, after waiting for one; None once the mover is closed."""
        while not self._closed:
            now, later = self._clock(), None
            while self._heap:
                head = self._heap[0]
                if self._wanted.get(head.number) is not head:  # taken back, or asked for anew
                    heapq.heappop(self._heap)
                elif head.due_s > now:
                    later = head.due_s - now
                    break
                else:
                    heapq.heappop(self._heap)
                    del self._wanted[head.number]
                    self._running.add(head.number)
                    return head
            self._changed.wait(later)
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                request = self._next()
                if request is None:
                    self._alive -= 1
                    last = not self._alive
            if request is None:
                if last:
                    self._ended()
                return
            began = self._clock()
            error: Exception | None = None
            size = 0
            try:
                size = self._transfer(request.number)
            except Exception as problem:  # whatever it is: the model works on without this run, and the report says so
                error = problem
            took = self._clock() - began
            self._finished(request.number, error)
            with self._changed:
                self._running.discard(request.number)
                done = self._moved
                self._moved = Moved(
                    bytes=done.bytes + size,
                    transfers=done.transfers + (error is None),
                    failures=done.failures + (error is not None),
                    busy_s=done.busy_s + took,
                )
                if error is not None and not self._closed and request.number not in self._wanted:
                    delay = min(FIRST_RETRY_S * 2**request.tries, LONGEST_RETRY_S)
                    self._push(_Request(self._clock() + delay, request.urgency, request.number, request.tries + 1))
                self._changed.notify_all()
            rest = self._pause(took)
            if rest > 0:
                time.sleep(rest)
