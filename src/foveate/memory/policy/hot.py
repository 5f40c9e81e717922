"""What is hot: which runs are worth their memory. Pure functions of values; nothing here reads a clock or a file.

A run is worth the loss that it saves for each byte, times how often it is used and how much of it the map in force
reads. Runs are taken in that order until memory is full, a run never before those of the planes below it. Since all is
one order, what fits in less memory is a part of what fits in more.

Moving costs time, and a use that alternates could have the policy move the same bytes for ever. Three things bound it.
Use is averaged over many passes. A run that is in memory counts 1.25 times. And bytes that come *instead of* others are
paid from an allowance that grows with each pass: however adversarial the use, no more than the allowance is moved.

Source: the allowance is a token bucket.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from foveate.errors import FoveateError

#: What a run is worth of its value where the map in force reads none of it: it only breaks ties.
UNREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Item:
    """A run as the policy sees it.

    Attributes:
        size: bytes of memory.
        value: the loss that it saves, at least 0, and finite.
        below: the numbers of the runs without which it is of no use.
    """

    size: int
    value: float
    below: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size <= 0 or not (math.isfinite(self.value) and self.value >= 0):
            raise FoveateError(f"size (={self.size}) is not positive, or value (={self.value}) not a number from 0 on")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How eagerly residency follows use.

    Attributes:
        smoothing: the weight of the newest observation in the averages of use, 0 to 1.
        hold: how many times its worth a run counts that is in memory, at least 1.
        share: the share of the room that a pass adds to the allowance.
        burst: the share of the room that the allowance can grow to; at least to the bytes of the largest run.
    """

    smoothing: float = 0.05
    hold: float = 1.25
    share: float = 1 / 1024
    burst: float = 1 / 8

    def __post_init__(self) -> None:
        if not 0 < self.smoothing <= 1 or self.hold < 1 or not 0 < self.share <= self.burst <= 1:
            raise FoveateError(
                f"smoothing (={self.smoothing}), share (={self.share}), burst (={self.burst}) must be within 0 to 1, "
                f"share at most burst; hold (={self.hold}) must be at least 1"
            )


DEFAULT_SETTINGS = Settings()


@dataclass(frozen=True, kw_only=True)
class State:
    """What the policy remembers: the averaged use of each run, and the bytes that it may still exchange."""

    use: tuple[float, ...]
    allowance: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the policy is told.

    Attributes:
        passes: passes since it was last asked.
        use: for each run, how often it was used in a pass, relative to what its value counts on; empty if not counted.
        wanted: for each run, the share of it that the map in force reads, 0 to 1; empty for all of everything.
        resident: the runs in memory, with those below them.
        room: bytes that runs may take.
        floor: runs that must be in memory, with those below them.
    """

    passes: int
    resident: frozenset[int]
    room: int
    floor: frozenset[int]
    use: tuple[float, ...] = ()
    wanted: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Runs to give up, and runs to fetch once they are gone; each in order.

    Attributes:
        evict: what leaves; a run never before those that need it.
        fetch: what comes; a run never before those that it needs.
        goal: what would be in memory if moving cost nothing.
    """

    evict: tuple[int, ...]
    fetch: tuple[int, ...]
    goal: frozenset[int]


def start(count: int) -> State:
    """The state before anything was seen of `count` runs."""
    return State(use=(1.0,) * count, allowance=0.0)


def order_of(items: Sequence[Item], floor: Collection[int] = ()) -> list[int]:
    """All runs, the most worth of each byte first, those of the floor before all others, none before what it needs."""
    dependents: list[list[int]] = [[] for _ in items]
    missing = [len(item.below) for item in items]
    for number, item in enumerate(items):
        for other in item.below:
            dependents[other].append(number)
    floor = frozenset(floor)

    def key(number: int) -> tuple[bool, float, int]:
        return (number not in floor, -items[number].value / items[number].size, number)

    heap = [key(number) for number, count in enumerate(missing) if not count]
    heapq.heapify(heap)
    order = []
    while heap:
        number = heapq.heappop(heap)[2]
        order.append(number)
        for other in dependents[number]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(heap, key(other))
    return order


def goal_of(items: Sequence[Item], order: Sequence[int], room: int) -> frozenset[int]:
    """The longest part of the order, from its beginning, that fits in `room` bytes."""
    taken, left = [], room
    for number in order:
        left -= items[number].size
        if left < 0:
            break
        taken.append(number)
    return frozenset(taken)


def decide(
    state: State, seen: Seen, items: Sequence[Item], settings: Settings = DEFAULT_SETTINGS
) -> tuple[State, Decision]:
    """Decide what leaves memory and what comes.

    What must leave because there is less room leaves at once, and what there is room for comes at once. Only an
    exchange is paid from the allowance.

    Raises:
        FoveateError: the floor does not fit in the room, or the lengths do not agree.
    """
    count = len(items)
    if any(len(values) not in (0, count) for values in (seen.use, seen.wanted)) or len(state.use) != count:
        raise FoveateError(f"there are {count} runs, and use or wanted of another number")
    least = sum(items[n].size for n in seen.floor)
    if least > seen.room:
        raise FoveateError(f"the floor needs {least} bytes, and there is room for {seen.room}")
    use = state.use
    if seen.use and seen.passes:
        keep = (1 - settings.smoothing) ** seen.passes
        use = tuple(keep * old + (1 - keep) * new for old, new in zip(use, seen.use, strict=True))
    # enough for one run of any size, or the largest could never be exchanged
    most = max(settings.burst * seen.room, max((item.size for item in items), default=0))
    allowance = min(state.allowance + settings.share * seen.room * seen.passes, most)
    wanted = seen.wanted or (1.0,) * count
    worth = [
        replace(item, value=item.value * u * max(w, UNREAD) * (settings.hold if n in seen.resident else 1.0))
        for n, (item, u, w) in enumerate(zip(items, use, wanted, strict=True))
    ]
    order = order_of(worth, seen.floor)
    goal = goal_of(items, order, seen.room)
    held = sum(items[n].size for n in seen.resident)
    leaving = iter([n for n in reversed(order) if n in seen.resident and n not in goal])
    evict: list[int] = []
    fetch: list[int] = []
    while held > seen.room:
        evict.append(next(leaving))
        held -= items[evict[-1]].size
    for number in (n for n in order if n in goal and n not in seen.resident):
        instead: list[int] = []
        if held + items[number].size > seen.room:
            # the floor is a promise, and not an exchange that can wait
            price = 0 if number in seen.floor else items[number].size
            if price > allowance:
                break
            allowance -= price
            while held + items[number].size > seen.room:
                instead.append(next(leaving))
                held -= items[instead[-1]].size
        evict += instead
        fetch.append(number)
        held += items[number].size
    return State(use=use, allowance=allowance), Decision(evict=tuple(evict), fetch=tuple(fetch), goal=goal)
