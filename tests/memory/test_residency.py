"""Residency: runs come and go within a limit, faults included, and what the model is told is always true."""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import pytest
import torch

from foveate.errors import BudgetError, CheckpointError
from foveate.formats.levels import NESTED_LEVELS
from foveate.memory.held import Held
from foveate.memory.reservation import PAGE, Reservation, lay_out
from foveate.memory.residency import REST, Residency, _rest
from foveate.memory.runs import Run, Tag

_STRIPS, _UNIT, _FIXED = 8, 512, 1000


class _Disk:
    """A place that can be told to fail, or to give other bytes."""

    name = "disk"

    def __init__(self) -> None:
        self.broken: set[tuple[str, int, int]] = set()
        self.reads = 0
        self.closed = threading.Event()

    @staticmethod
    def content(run: Run) -> bytes:
        seed = hashlib.sha256(f"{run.weight}{run.plane}{run.first}".encode()).digest()
        return (seed * (run.size // 32 + 1))[: run.size]

    def read(self, run: Run, pages: memoryview, lead: int) -> None:
        self.reads += 1
        if (run.weight, run.plane, run.first) in self.broken:
            raise CheckpointError(f"disk is damaged: {run}")
        pages[lead : lead + run.size] = self.content(run)

    def close(self) -> None:
        self.closed.set()


def _held(disk: _Disk, weights: str = "ab") -> Held:
    runs = []
    for weight in weights:
        for plane in range(5):
            for first in range(0, _STRIPS, 4):
                runs.append(
                    Run(
                        weight=weight,
                        plane=plane,
                        first=first,
                        last=first + 4,
                        offset=len(runs) * 4 * _UNIT,
                        size=4 * _UNIT,
                        checksum="",
                        tag=Tag(level=NESTED_LEVELS[plane]),
                    )
                )
    layout = lay_out(runs, {(w, p): _UNIT for w in weights for p in range(5)})
    return Held(
        runs=tuple(runs),
        layout=layout,
        reservation=Reservation(layout.total),
        places=dict.fromkeys(range(5), disk),
        strips=dict.fromkeys(weights, _STRIPS),
        fixed=_FIXED,
    )


def _of(runs: int) -> int:
    """A limit that has room for so many runs."""
    return _FIXED + runs * 4 * _UNIT


@contextmanager
def _residency(disk: _Disk, limit: int) -> Iterator[Residency]:
    held = _held(disk)
    importance = [4.0**-run.tag.level * (2.0 if run.weight == "a" else 1.0) for run in held.runs]
    residency = Residency(held, limit=limit, importance=importance)
    yield residency
    residency.close()
    assert disk.closed.is_set()


def _pass(residency: Residency, count: int = 1) -> None:
    """A pass of a model that checks that what it is told can be read is there."""

    def publish(names: Collection[str]) -> None:
        assert set(names) <= {"a", "b"}

    residency.between_passes(publish, count)
    for number, run in enumerate(residency.held.runs):
        if bool((residency.caps[run.weight][run.first : run.last] >= run.tag.level).any()):
            slot = residency.held.layout.slots[number]
            begin = slot.begin + slot.lead
            found = bytes(residency.held.reservation.whole[begin : begin + run.size].tolist())
            assert found == _Disk.content(run), str(run)


def _fill(residency: Residency) -> None:
    while True:
        _pass(residency)
        if not residency.waiting():
            return
        assert residency.settle(timeout_s=30)


def _levels(residency: Residency) -> dict[str, list[int]]:
    return {name: caps.tolist() for name, caps in residency.caps.items()}


def test_what_fits_comes_by_worth() -> None:
    with _residency(_Disk(), _of(10)) as residency:
        assert _levels(residency) == {"a": [0] * 8, "b": [0] * 8}
        _fill(residency)
        # planes 0 of both, then planes 1 and 2 of a before those of b: it loses twice as much
        assert _levels(residency) == {"a": [4] * 8, "b": [3] * 8}
        report = residency.report()
        assert (report.taken, report.limit, report.fixed, report.stored) == (_of(10), _of(10), _FIXED, 20 * 4 * _UNIT)
        assert (report.waiting, report.fetched, report.evicted) == (0, 10 * 4 * _UNIT, 0)
        residency.resize(_of(20))
        _fill(residency)
        assert _levels(residency) == {"a": [8] * 8, "b": [8] * 8}
        residency.resize(_of(5))
        _pass(residency)
        assert _levels(residency) == {"a": [3] * 4 + [2] * 4, "b": [2] * 8}
        # memory was returned before the pass began; every run has a page of its own here
        assert residency.held.reservation.resident() == 5 * PAGE
        assert residency.report().evicted == 15 * 4 * _UNIT


def test_limits_that_cannot_be_met_change_nothing() -> None:
    disk = _Disk()
    with pytest.raises(BudgetError, match=r"is less than the least possible needs, 8.98 KiB \(9192 bytes\)"):
        Residency(_held(disk), limit=_of(4) - 1, importance=[1.0] * 20)
    with _residency(disk, _of(12)) as residency:
        _fill(residency)
        floor = {"a": torch.tensor([4] * 4 + [2] * 4, dtype=torch.uint8), "b": torch.full((8,), 2, dtype=torch.uint8)}
        residency.resize(_of(7), floor)
        _pass(residency)
        assert residency.needs == _of(6)
        before = _levels(residency)
        with pytest.raises(BudgetError, match="is less than the standing floor needs"):
            residency.resize(_of(6) - 1)
        with pytest.raises(BudgetError, match="is less than the standing floor needs"):
            residency.resize(_of(6), {**floor, "a": torch.full((8,), 8, dtype=torch.uint8)})
        _pass(residency)
        assert _levels(residency) == before
        residency.resize(_of(6))
        _pass(residency)
        assert _levels(residency) == {"a": [4] * 4 + [2] * 4, "b": [2] * 8}


def test_a_full_arena_makes_room_first() -> None:
    """A map that reads b at 8 bits and a at 2, in memory that has room for no more: b comes as a goes."""
    with _residency(_Disk(), _of(12)) as residency:
        _fill(residency)
        assert max(residency.caps["b"]) == 4
        shares = [1.0 if run.weight == "b" or run.plane == 0 else 0.0 for run in residency.held.runs]
        residency.want(lambda: shares)
        for _ in range(200):
            _pass(residency, 64)
            residency.settle(timeout_s=30)
            assert residency.report().taken <= residency.limit
        assert _levels(residency) == {"a": [2] * 8, "b": [8] * 8}


def test_a_read_that_fails_leaves_the_lower_level_and_is_said_once() -> None:
    disk = _Disk()
    disk.broken = {("a", 2, 0), ("b", 2, 4)}
    with _residency(disk, _of(12)) as residency:
        _pass(residency)
        while residency.report().io_errors.get("disk", 0) < 3:
            residency.settle(timeout_s=0.05, numbers=[])
        with pytest.raises(CheckpointError, match="disk is damaged: plane 2 of"):
            residency.settle()
        with pytest.warns(RuntimeWarning, match="the model goes on without it, and reading it is tried again") as said:
            _pass(residency)
        assert len(said) == 1
        _pass(residency)  # a second warning would be an error
        while residency.report().fetched < 10 * 4 * _UNIT:
            residency.settle(timeout_s=0.05, numbers=[])
        _pass(residency)
        assert _levels(residency) == {"a": [3] * 4 + [4] * 4, "b": [4] * 4 + [3] * 4}
        disk.broken = set()
        while residency.waiting():
            residency.settle(timeout_s=0.05, numbers=[])
            _pass(residency)
        assert _levels(residency) == {"a": [4] * 8, "b": [4] * 8}


def test_a_model_that_is_dropped_ends_its_threads_and_closes_its_files() -> None:
    disk = _Disk()
    residency = Residency(_held(disk), limit=_of(20), importance=[1.0] * 20)
    del residency
    gc.collect()
    assert disk.closed.wait(30)


def test_the_mover_rests_only_for_calls_that_do_not_wait_for_it() -> None:
    disk = _Disk()
    with _residency(disk, _of(20)) as residency:
        _fill(residency)
        assert not residency._streams
        _pass(residency)
        assert _rest(weakref.ref(residency), 0.001) == REST * 0.001
        residency._waiters = 1
        assert _rest(weakref.ref(residency), 0.001) == 0
        residency._waiters = 0
        residency._streams = True  # a call will need what comes
        assert _rest(weakref.ref(residency), 0.001) == 0
        residency._streams = False
        residency._passed_s -= 1  # nobody calls
        assert _rest(weakref.ref(residency), 0.001) == 0
