"""Streaming: runs that come and go within a pass, for a map that does not fit in memory.

While it streams, the policy is not asked. Some runs stay, and the caller brings the others and drops them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from foveate.memory.policy import hot as policy
from foveate.memory.residency import Residency, Where


class StreamingResidency(Residency):
    """A residency that can stream."""

    def stream(self, keep: frozenset[int], publish: Callable[[Collection[str]], None]) -> None:
        """Begin to stream, once these runs are in memory, and no others. No pass may be running.

        Args:
            keep: the runs that stay, the floor among them.
            publish: that of `between_passes`; called with all weights.

        Raises:
            CheckpointError: one of these runs cannot be read.
        """
        with self._lock:
            self._streams, self._next = True, ()
            self._leaving.clear()
            absent = [n for n in keep if self._where[n] not in (Where.HERE, Where.RESIDENT)]
        self.drop([n for n, where in enumerate(self._where) if where is Where.COMING and n not in keep])
        with self._lock:
            self.held.reservation.trim()
            gone = [n for n, where in enumerate(self._where) if where is not Where.ABSENT and n not in keep]
            for number in gone:
                self._where[number] = Where.ABSENT
            self._renew_and(publish)
            self.held.reservation.give_back([self.held.layout.slots[n] for n in gone])
            self._evicted += sum(self._items[n].size for n in gone)
        self.bring(absent, 0.0)
        self.settle(numbers=absent)
        with self._lock:
            for number in keep:
                if self._where[number] is Where.HERE:
                    self._where[number] = Where.RESIDENT
            self._arrived.clear()
            self._renew_and(publish)

    def best_within(self, needed: frozenset[int], room: int) -> frozenset[int]:
        """The floor, and those of these runs that are worth most and fit with it in so many bytes."""
        order = [n for n in policy.order_of(self._items, self.floor) if n in needed or n in self.floor]
        return policy.goal_of(self._items, order, room) | self.floor

    def stream_no_more(self) -> None:
        """Go back to what the policy says, from the next `between_passes` on."""
        with self._lock:
            self.held.reservation.trim()
        self._streams = False
        self._due = True

    def bring(self, numbers: Collection[int], urgency: float) -> None:
        """Ask for runs, those of the least urgency first."""
        with self._lock:
            self._request(dict.fromkeys((n for n in numbers if self._where[n] is Where.ABSENT), (urgency,)))
            self._mover.request({n: (urgency,) for n in numbers if self._where[n] is Where.COMING})

    def drop(self, numbers: Collection[int]) -> None:
        """Give runs up that nobody reads any more, those that are on their way too. Their memory is for those that are
        brought next.
        """
        running = self._mover.cancel(numbers)
        while not self._mover.wait(running, 1.0):
            self._mover.cancel(running)  # one that failed has been asked for again
        with self._lock:
            here = [n for n in numbers if self._where[n] in (Where.HERE, Where.COMING)]
            for number in here:
                self._where[number] = Where.ABSENT
            self.held.reservation.release([self.held.layout.slots[n] for n in here])

    def readable(self, name: str) -> Tensor:
        """The caps of a weight with all that is in memory, also what is not for long, [NT]."""
        there = (Where.HERE, Where.RESIDENT)
        return self.held.caps(name, {n for n in self.held.of_weight[name] if self._where[n] in there})

    def _renew_and(self, publish: Callable[[Collection[str]], None]) -> None:
        for name in self.held.strips:
            self._renew_caps(name)
        self._stale.clear()
        publish(list(self.held.strips))
