"""The mover: urgent first, cancellable, and what fails is tried again later and later."""

from __future__ import annotations

import threading

import pytest

from foveate.errors import FoveateError
from foveate.memory.mover import FIRST_RETRY_S, Mover


class _Held:
    """Transfers that wait until they are let go, and say in which order they began."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.ended: list[tuple[int, str | None]] = []
        self.go = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.faults: dict[int, int] = {}

    def transfer(self, number: int) -> int:
        self.began.append(number)
        self.entered.release()
        assert self.go.acquire(timeout=30)
        if self.faults.get(number, 0):
            self.faults[number] -= 1
            raise OSError(5, "Input/output error")
        return 10

    def finished(self, number: int, error: Exception | None) -> None:
        self.ended.append((number, None if error is None else type(error).__name__))


def _mover(held: _Held, **keywords: object) -> Mover:
    return Mover(held.transfer, held.finished, threads=1, **keywords)  # type: ignore[arg-type]


def test_the_most_urgent_comes_first_and_requests_can_be_taken_back() -> None:
    held = _Held()
    mover = _mover(held)
    mover.request({7: (0.0,)})
    assert held.entered.acquire(timeout=30)
    mover.request({1: (3.0,), 2: (2.0,), 3: (1.0,), 4: (2.5,)})
    mover.request({1: (0.5,)})  # more urgent than before
    assert mover.cancel([4, 7]) == {7}  # which is on its way
    assert mover.waiting() == {7, 1, 2, 3}
    assert not mover.wait([3], timeout_s=0.01)
    for _ in range(4):
        held.go.release()
    assert mover.wait([1, 2, 3, 7], timeout_s=30)
    assert held.began == [7, 1, 3, 2]
    assert mover.moved().bytes == 40
    mover.stop()
    mover.join()
    assert mover.wait([99], timeout_s=1)


def test_what_fails_is_tried_again_after_a_while() -> None:
    held = _Held()
    held.faults[1] = 2
    now = [0.0]
    mover = _mover(held, clock=lambda: now[0])
    for _ in range(9):
        held.go.release()
    mover.request({1: (0.0,)})
    assert held.entered.acquire(timeout=30)
    mover.request({2: (5.0,)})
    assert mover.wait([2], timeout_s=30)
    assert held.ended == [(1, "OSError"), (2, None)]  # 2 did not wait for 1
    assert mover.waiting() == {1}
    for delay in (FIRST_RETRY_S, 2 * FIRST_RETRY_S):
        now[0] += 0.9 * delay
        mover.request({})  # a thread looks at the clock
        assert mover.waiting() == {1}
        now[0] += 0.2 * delay
        mover.request({})
        assert held.entered.acquire(timeout=30)
        held.entered.acquire(timeout=0.01)
    assert mover.wait([1], timeout_s=30)
    assert held.ended[2:] == [(1, "OSError"), (1, None)]
    assert (mover.moved().failures, mover.moved().transfers) == (2, 2)
    mover.stop()
    mover.join()


def test_it_ends_with_what_it_was_given() -> None:
    held, ended = _Held(), threading.Event()
    mover = _mover(held, ended=ended.set)
    mover.request({1: (0.0,), 2: (0.0,)})
    assert held.entered.acquire(timeout=30)
    mover.stop()
    held.go.release()
    mover.join()
    assert ended.is_set()
    assert held.began == [1]
    with pytest.raises(FoveateError, match="must be at least 1"):
        Mover(held.transfer, held.finished, threads=0)
