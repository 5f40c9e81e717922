"""Residency: which runs are in memory, kept within a limit, and changed only between two passes of the model.

    folder's files --mover--> reservation --between two passes--> levels that each strip can be read at

A run goes through four states. It is *absent*; it is *coming* while the mover reads it; it is *here* once its bytes are
in memory and are what was saved; and it is *resident* once the model may read it. The last step, and the way back, are
taken by `between_passes`, when no pass is running. Bytes of all but absent runs count against the limit.

What the model is told are *caps*: for each strip of a weight the highest level that can be read. A strip's cap is the
level of its last plane before the first one that is missing.

Shapes: NT strips of a weight.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from foveate.errors import BudgetError, CheckpointError
from foveate.memory.held import Held
from foveate.memory.mover import Mover
from foveate.memory.policy import hot as policy
from foveate.memory.report import MemoryReport
from foveate.sizes import format_bytes

#: While the model is called, the mover rests this many times as long as each transfer took: calls need the processor.
REST = 8.0
#: Seconds without a call after which the mover does not rest.
_IDLE_S = 0.25
#: Seconds between two looks at what may have failed, while something is waited for.
_LOOK_S = 0.05
#: Passes after which the policy looks at use again.
LOOK_EVERY = 64


class Where(Enum):
    """Where a run is."""

    ABSENT = 0
    COMING = 1
    HERE = 2
    RESIDENT = 3


class Residency:
    """The runs of one model, and the threads that fetch them.

    Attributes:
        held: the runs, and where they have their places.
        limit: bytes that the model may take.
        floor: the runs that never leave.
        caps: for each weight, uint8 [NT]: the highest level of each strip that can be read. Only `between_passes`
            changes it.
    """

    def __init__(
        self,
        held: Held,
        *,
        limit: int,
        importance: Sequence[float],
        settings: policy.Settings = policy.DEFAULT_SETTINGS,
        threads: int = 2,
    ) -> None:
        """Begin with nothing in memory; `settle` brings what fits.

        Args:
            held: the runs, and where they have their places.
            limit: bytes that the model may take, `held.fixed` among them.
            importance: the loss that each run saves.
            settings: of the policy.
            threads: of the mover.

        Raises:
            BudgetError: less than the least possible.
        """
        self.held = held
        self._settings = settings
        self._items = [
            policy.Item(size=run.size, value=value, below=below)
            for run, value, below in zip(held.runs, importance, held.below, strict=True)
        ]
        self._least = frozenset(n for n, run in enumerate(held.runs) if run.plane == 0)
        self.floor = self._least
        self.limit = self._checked(limit, self.floor)
        self._where = [Where.ABSENT] * len(held.runs)
        self._leaving: set[int] = set()
        self._arrived: list[int] = []
        self._unsettled = self._streams = False
        self._passed_s = float("-inf")
        self._waiters = 0
        self._must: frozenset[int] = frozenset()
        self._next: tuple[int, ...] = ()
        self._lock = threading.RLock()
        self._state = policy.start(len(held.runs))
        self._use: tuple[float, ...] = ()
        self._wanted: Callable[[], Sequence[float]] = lambda: ()
        self._due = True
        self._passes = self._passes_looked = 0
        self._io_errors: dict[str, int] = {}
        self._failed: dict[int, str] = {}
        self._unsaid: list[str] = []
        self._fetched = self._evicted = 0
        self.caps = {name: torch.zeros(count, dtype=torch.uint8) for name, count in held.strips.items()}
        self._stale: set[str] = set(held.strips)
        ref = weakref.ref(self)
        self._mover = Mover(
            held.transfer,
            lambda n, error: _came_to(ref, n, error),
            ended=held.close,
            threads=threads,
            pause=lambda took: _rest(ref, took),
        )
        self._finalizer = weakref.finalize(self, self._mover.stop)

    def close(self) -> None:
        """End the mover's threads, and close the files. What is in memory can still be read."""
        self._finalizer()
        self._mover.join()

    @property
    def least(self) -> int:
        """The fewest bytes that the model can take: plane 0 of every weight, and all that is not a plane."""
        return self.held.fixed + sum(self._items[n].size for n in self._least)

    @property
    def needs(self) -> int:
        """The fewest bytes that keep to the standing floor."""
        return self.held.fixed + sum(self._items[n].size for n in self.floor)

    @property
    def room(self) -> int:
        """Bytes that planes may take."""
        return self.limit - self.held.fixed

    def resize(self, limit: int, floor: Mapping[str, Tensor] | None = None) -> None:
        """Set another limit, or another standing floor. What must leave does so in `between_passes`.

        Args:
            limit: bytes that the model may take.
            floor: for each weight the level of each strip that must stay readable, uint8 [NT]; as before if not given.

        Raises:
            BudgetError: less than the standing floor needs; nothing was changed.
        """
        with self._lock:
            kept = self.floor
            if floor is not None:
                runs = enumerate(self.held.runs)
                asked = {n for n, r in runs if bool((floor[r.weight][r.first : r.last] >= r.tag.level).any())}
                kept = self.held.closed(asked | self._least)
            self.limit = self._checked(limit, kept)
            self.floor, self._must = kept, frozenset()
            self._due = True

    def want(self, shares: Callable[[], Sequence[float]]) -> None:
        """Say which share of each run the map in force reads, 0 to 1; `shares` is called when that is needed."""
        with self._lock:
            self._wanted, self._must = shares, frozenset()
            self._due = True

    def require(self, numbers: frozenset[int]) -> bool:
        """Have these runs in memory, whatever else must leave, until another map or limit is given.

        Returns:
            Whether there is room for them beside the floor; if not, nothing changes.
        """
        with self._lock:
            needed = self.held.closed(numbers) | self.floor
            if sum(self._items[n].size for n in needed) > self.room:
                return False
            self._must = needed
            self._due = True
            return True

    def use(self, rates: Sequence[float], passes: int) -> None:
        """Say how often each run was used in the last passes, relative to what its importance counts on."""
        with self._lock:
            self._use = tuple(rates)
            self._passes_looked = self._passes - passes
            self._due = True

    def between_passes(self, publish: Callable[[Collection[str]], None], passes: int = 1) -> None:
        """Take the changes that are due. No pass may be running.

        Args:
            publish: called with the weights whose caps have changed, before any memory is given back: afterwards the
                model must not read above `caps`.
            passes: how many passes have begun since the last call.
        """
        self._passes += passes
        if passes:
            self._passed_s = time.monotonic()
        if self._streams:
            return
        looks = self._due or (self._unsettled and self._passes - self._passes_looked >= LOOK_EVERY)
        if not looks and not self._stale:
            return
        with self._lock:
            if looks:
                self._look()
            going = [n for n in self._leaving if self._where[n] in (Where.HERE, Where.RESIDENT)]
            self._leaving.difference_update(going)
            for number in going:
                self._where[number] = Where.ABSENT
                self._stale.add(self.held.runs[number].weight)
            for number in self._arrived:
                if self._where[number] is Where.HERE:
                    self._where[number] = Where.RESIDENT
            self._arrived.clear()
            changed = [name for name in self._stale if self._renew_caps(name)]
            self._stale.clear()
            publish(changed)
            self.held.reservation.give_back([self.held.layout.slots[n] for n in going])
            self._evicted += sum(self._items[n].size for n in going)
            self._ask()
            unsaid, self._unsaid = self._unsaid, []
        for text in unsaid:
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def arrivals(self) -> bool:
        """Whether `between_passes` has something to do at once."""
        return self._due or bool(self._stale)

    def settle(self, timeout_s: float | None = None, numbers: Collection[int] | None = None) -> bool:
        """Wait until the mover has nothing to do, or until these runs are here; returns False if it takes longer.

        Raises:
            CheckpointError: one of the runs waited for cannot be read.
        """
        pending = self._mover.waiting() if numbers is None else set(numbers)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._waiters += 1
        try:
            while True:
                there = self._mover.wait(pending, _LOOK_S)
                with self._lock:
                    failed = [self._failed[n] for n in pending if n in self._failed]
                if failed:
                    raise CheckpointError(failed[0])
                if there:
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return False
        finally:
            with self._lock:
                self._waiters -= 1

    def missing(self, levels: Mapping[str, Tensor]) -> list[int]:
        """The runs that are not resident and that a map reads; `levels` is the highest level of each strip, [NT]."""
        return [
            n
            for n, run in enumerate(self.held.runs)
            if self._where[n] is not Where.RESIDENT
            and run.weight in levels
            and bool((levels[run.weight][run.first : run.last] >= run.tag.level).any())
        ]

    def waiting(self) -> bool:
        """Whether runs are on their way, or are asked for once there is room."""
        return bool(self._next or self._arrived or self._mover.waiting())

    def goal_caps(self) -> dict[str, Tensor]:
        """The caps once everything that was decided has come and gone, [NT] for each weight."""
        with self._lock:
            there = {n for n, where in enumerate(self._where) if where is not Where.ABSENT} | set(self._next)
            return {name: self.held.caps(name, there - self._leaving) for name in self.held.strips}

    def resident(self) -> frozenset[int]:
        """The runs that the model may read."""
        return frozenset(n for n, where in enumerate(self._where) if where is Where.RESIDENT)

    def report(self, fallback_count: Mapping[str, int] | None = None, wait_s: float = 0.0) -> MemoryReport:
        """What is in memory, and what went wrong."""
        with self._lock:
            present = [n for n, where in enumerate(self._where) if where in (Where.HERE, Where.RESIDENT)]
            coming = [n for n, where in enumerate(self._where) if where is Where.COMING]
            return MemoryReport(
                limit=self.limit,
                fixed=self.held.fixed,
                resident=sum(self._items[n].size for n in present),
                stored=sum(item.size for item in self._items),
                waiting=sum(self._items[n].size for n in {*coming, *self._next}),
                floor=sum(self._items[n].size for n in self.floor),
                passes=self._passes,
                fallback_count=dict(fallback_count or {}),
                io_errors=dict(self._io_errors),
                fetched=self._fetched,
                evicted=self._evicted,
                wait_s=wait_s,
            )

    # What follows is called with the lock held.

    def _checked(self, limit: int, floor: frozenset[int]) -> int:
        least = self.held.fixed + sum(self._items[n].size for n in floor)
        if limit < least:
            what = "the least possible" if floor == self._least else "the standing floor"
            raise BudgetError(
                f"memory (={format_bytes(limit)}) is less than {what} needs, {format_bytes(least)} ({least} bytes)"
            )
        return limit

    def _look(self) -> None:
        """Ask the policy what leaves and what comes."""
        passes, self._passes_looked = self._passes - self._passes_looked, self._passes
        rates, self._use, self._due = self._use, (), False
        present = frozenset(n for n, where in enumerate(self._where) if where is not Where.ABSENT)
        seen = policy.Seen(
            passes=passes,
            use=rates,
            wanted=tuple(self._wanted()),
            resident=present,
            room=self.room,
            floor=self.floor | self._must,
        )
        self._state, decision = policy.decide(self._state, seen, self._items, self._settings)
        self._unsettled = decision.goal != present
        coming = [n for n in decision.evict if self._where[n] is Where.COMING]
        running = self._mover.cancel(coming)
        for number in set(coming) - running:
            self._where[number] = Where.ABSENT
        # a neighbour on the same huge page may have made their memory resident
        self.held.reservation.give_back([self.held.layout.slots[n] for n in set(coming) - running])
        self._leaving = {n for n in decision.evict if self._where[n] is not Where.ABSENT}
        self._next = decision.fetch

    def _renew_caps(self, name: str) -> bool:
        """Compute the caps of a weight; returns whether they changed."""
        caps = self.held.caps(name, {n for n in self.held.of_weight[name] if self._where[n] is Where.RESIDENT})
        if torch.equal(caps, self.caps[name]):
            return False
        self.caps[name] = caps
        return True

    def _ask(self) -> None:
        """Ask the mover for what there is room for by now."""
        held = sum(self._items[n].size for n, where in enumerate(self._where) if where is not Where.ABSENT)
        asked: dict[int, tuple[float, ...]] = {}
        rest = []
        for number in self._next:
            if self._where[number] is not Where.ABSENT or number in asked:
                continue
            if held + self._items[number].size > self.room:
                rest.append(number)
                continue
            held += self._items[number].size
            # by planes, so that all weights gain a level before one gains two, and in the order of layers
            asked[number] = (float(self.held.runs[number].plane), float(number))
        self._next = tuple(rest)
        self._request(asked)

    def _request(self, urgencies: Mapping[int, tuple[float, ...]]) -> None:
        """Ask the mover for runs that are absent."""
        self.held.reservation.coming([self.held.layout.slots[n] for n in urgencies])
        for number in urgencies:
            self._where[number] = Where.COMING
        self._mover.request(urgencies)

    def _came(self, number: int, error: Exception | None) -> None:
        """A transfer has ended; called on the mover's thread, without the lock."""
        run = self.held.runs[number]
        with self._lock:
            if error is None:
                self._where[number] = Where.HERE
                self._failed.pop(number, None)
                self._arrived.append(number)
                self._fetched += run.size
            else:
                self._failed[number] = str(error)
                file = getattr(self.held.places[run.plane], "name", f"plane {run.plane}")
                self._io_errors[file] = self._io_errors.get(file, 0) + 1
                if self._io_errors[file] == 1:
                    self._unsaid.append(f"{error}; the model goes on without it, and reading it is tried again")
            self._stale.add(run.weight)


def _came_to(residency: weakref.ref[Residency], number: int, error: Exception | None) -> None:
    # a weak reference: the mover's threads must not keep a model alive that was dropped
    alive = residency()
    if alive is not None:
        alive._came(number, error)


def _rest(residency: weakref.ref[Residency], took: float) -> float:
    alive = residency()
    # who waits, and who will wait for the next layers, needs the bytes more than the processor
    if alive is None or alive._waiters or alive._streams or time.monotonic() - alive._passed_s > _IDLE_S:
        return 0.0
    return REST * took
