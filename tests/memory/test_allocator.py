"""Memory that is given back: nested contexts and several threads share the process's thresholds."""

from __future__ import annotations

import ctypes
import threading

import pytest

from foveate.memory import allocator


class _Library:
    """Records what glibc is told."""

    def __init__(self) -> None:
        self.threshold: int | None = None

    def mallopt(self, what: int, value: int) -> None:
        if what == allocator._MMAP_THRESHOLD:
            self.threshold = value

    def malloc_trim(self, pad: int) -> None:
        assert pad == 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    fake = _Library()
    monkeypatch.setattr(allocator, "_glibc", lambda: fake)
    return fake


def test_an_inner_context_leaves_the_outer_one_in_force(library: _Library) -> None:
    with allocator.given_back(True):
        with allocator.given_back(True):
            assert library.threshold == 4 << 20
        with allocator.given_back(False):
            pass
        assert library.threshold == 4 << 20  # what is freed from here on still goes back
    assert library.threshold == 32 << 20


def test_the_last_of_several_threads_sets_the_thresholds_back(library: _Library) -> None:
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with allocator.given_back(True):
            entered.set()
            assert left.wait(60)

    thread = threading.Thread(target=other)
    with allocator.given_back(True):
        thread.start()
        assert entered.wait(60)
    assert library.threshold == 4 << 20
    left.set()
    thread.join()
    assert library.threshold == 32 << 20


def test_an_error_sets_the_thresholds_back(library: _Library) -> None:
    with pytest.raises(RuntimeError), allocator.given_back(True):
        raise RuntimeError
    assert library.threshold == 32 << 20


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with allocator.given_back(True):
        pass
