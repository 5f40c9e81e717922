"""What the fuzzers of files share: changes to a JSON value, and a watch over what a reader does with the result."""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from foveate.errors import FoveateError

#: Processor time that one reading may take.
_SECONDS = 2.0
_HANGS = 60.0


class NetworkReached(BaseException):
    """A fuzzed file made something ask for a host."""


class Hang(BaseException):
    """A fuzzed file was read for ever."""


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def odd_value(choice: random.Random) -> Any:
    """A value that should not be where it is put."""
    values = [None, True, False, 0, 1, -1, 2, 255, 1 << 31, 1 << 63, -(1 << 63), 10**30, 10**400, 0.5, -0.0, 1e308]
    values += [float("nan"), float("inf"), "", "a", "0:weight", "../x", "a" * 5000, "\x00", "é", [], {}, [[]], [1, 2]]
    values += [{"a": 1}, _nested(50), _nested(300), [0] * 1000, 10**6, 10**8]
    return choice.choice(values)


def _place(value: Any, choice: random.Random) -> tuple[Any, Any]:
    """A container within a value and a key in it; nothing where it is empty. Places near the root are met as often as
    the many deep ones.
    """
    owner, key = None, None
    while isinstance(value, (dict, list)) and value and (owner is None or choice.random() < 0.8):
        owner, key = value, choice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[key]
    return owner, key


def mutated(data: Any, choice: random.Random, most: int = 3) -> Any:
    """A copy with one to `most` changes: a value replaced, removed, doubled, exchanged, or shifted by a little."""
    data = json.loads(json.dumps(data))
    for _ in range(choice.randint(1, most)):
        owner, key = _place(data, choice)
        other, other_key = _place(data, choice)
        if owner is None or other is None:
            return data
        what = choice.randrange(6)
        if what == 0:
            del owner[key]
        elif what == 1:
            owner[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(owner[key])
        elif what == 2 and isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif what == 3 and type(owner[key]) is int:
            owner[key] += choice.choice([-1, 1, 16, -16, 1000, owner[key]])
        elif what == 4 and isinstance(owner, dict):
            owner[choice.choice(["a", "name", key + "x", ""])] = odd_value(choice)
        else:
            owner[key] = odd_value(choice)
    return data


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Stop whatever asks for a host."""

    def reached(*args: Any, **_: Any) -> Any:
        raise NetworkReached(repr(args[:2]))

    before = (socket.getaddrinfo, socket.socket.connect)
    socket.getaddrinfo = reached
    socket.socket.connect = reached  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        socket.getaddrinfo = before[0]
        socket.socket.connect = before[1]  # type: ignore[method-assign]


class Watch:
    """Counts what became of each reading.

    Attributes:
        taken, refused: readings that gave something, and that gave an error of ours.
        faults: all else, by what it was.
        slowest: processor seconds.
    """

    def __init__(self) -> None:
        self.taken = self.refused = 0
        self.faults: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0

    def see(self, read: Callable[[], object], what: str) -> bool:
        """Read once; returns whether it was taken."""
        signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, _HANGS)
        started = time.process_time()
        taken = False
        try:
            read()
            self.taken += 1
            taken = True
        except FoveateError:
            self.refused += 1
        except (Exception, NetworkReached, Hang) as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "/foveate/" in f.filename][-1:]
            where = f"{ours[0].filename.rpartition('/foveate/')[2]}:{ours[0].lineno} in " if ours else ""
            self._fault(f"{type(error).__name__} {str(error)[:200]!r} at {where}{at.filename}:{at.lineno}", what)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.process_time() - started
        self.slowest = max(self.slowest, took)
        if took > _SECONDS:
            self._fault("slow", f"{what} took {took:.1f} s")
        return taken

    def _fault(self, fault: str, what: str) -> None:
        self.faults[fault] += 1
        if self.faults[fault] <= 2:
            print(f"FAULT {fault}: {what[:400]}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        done = self.taken + self.refused + sum(self.faults.values())
        text = f"{done:,} read: {self.taken:,} taken, {self.refused:,} refused, slowest {self.slowest:.2f} s"
        return f"{text}, {sum(self.faults.values())} faults"


def _hang(*_: Any) -> None:
    raise Hang


def ended(watches: dict[str, Watch]) -> int:
    """Print what became of all; the exit code."""
    for name, watch in watches.items():
        print(f"{name}: {watch}")
        for fault, count in watch.faults.most_common():
            print(f"  {count} times {fault}")
    return 1 if any(watch.faults for watch in watches.values()) else 0
