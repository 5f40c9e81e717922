"""Memory of a reservation: runs that come together share huge pages, and what leaves is given back all the same."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foveate.memory.arena import HUGE_PAGE
from foveate.memory.reservation import PAGE, Reservation, Slot

_QUARTER = HUGE_PAGE // 4


def _slots(count: int, begin: int = 0) -> list[Slot]:
    return [Slot(begin=begin + n * _QUARTER, pages=_QUARTER, lead=0) for n in range(count)]


@pytest.mark.parametrize(
    ("first", "last", "huge"),
    [(0, 8, 2), (0, 7, 1), (1, 8, 1), (1, 7, 0), (3, 5, 0), (4, 8, 1), (0, 0, 0)],
)
def test_huge_pages_are_those_that_come_whole(first: int, last: int, huge: int) -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    assert memory.coming(slots[first:last]) == huge * HUGE_PAGE


def test_gaps_are_not_bridged() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    assert memory.coming([*slots[:2], *slots[3:8]]) == HUGE_PAGE
    assert memory.coming(slots[7:3:-1]) == HUGE_PAGE  # in any order


def test_what_leaves_is_given_back_from_huge_pages_too() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    memory.coming(slots[:8])
    for slot in slots[:8]:
        memory.slot(slot)[:] = bytes([7]) * slot.pages
    assert memory.resident() == 2 * HUGE_PAGE
    memory.give_back([slots[1], slots[6]])
    assert memory.resident() == 2 * HUGE_PAGE - 2 * _QUARTER
    for number, slot in enumerate(slots[:8]):
        assert set(memory.slot(slot)) == ({0} if number in (1, 6) else {7})
    memory.give_back(slots[:8])
    assert memory.resident() == 0


def test_a_run_that_does_not_come_after_all_is_given_back() -> None:
    memory, slots = Reservation(2 * HUGE_PAGE), _slots(8)
    memory.coming(slots[:4])
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER  # the whole huge page is resident now, where there are any
    memory.give_back(slots[1:4])
    assert memory.resident() == _QUARTER
    assert set(memory.slot(slots[0])) == {7}


def test_what_always_stays_keeps_its_huge_pages() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE, always=HUGE_PAGE + _QUARTER), _slots(16)
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER
    memory.give_back(slots[4:16])
    assert set(memory.slot(slots[0])) == {7}


def test_pages_of_what_left_go_to_what_comes() -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    for number, slot in enumerate(slots[:4]):
        memory.slot(slot)[:] = bytes([number + 1]) * slot.pages
    for _ in range(20):  # round and round, as layers do
        for gone, new in ((0, 8), (1, 9), (8, 0), (9, 1)):
            memory.release([slots[gone]])
            memory.coming([slots[new]])
            memory.slot(slots[new])[:] = bytes([new + 100]) * _QUARTER
            assert memory.resident() == 4 * _QUARTER
            assert set(memory.slot(slots[new])) == {new + 100}
            assert set(memory.slot(slots[2])) == {3}
            assert set(memory.slot(slots[3])) == {4}


def test_a_slot_takes_its_own_pages_again() -> None:
    memory, slots = Reservation(2 * HUGE_PAGE), _slots(8)
    memory.slot(slots[3])[:] = bytes([7]) * _QUARTER
    memory.release([slots[3]])
    memory.coming([slots[3]])
    assert set(memory.slot(slots[3])) == {7}
    memory.trim()  # it is not released any more
    assert set(memory.slot(slots[3])) == {7}


def test_released_pages_never_add_to_what_comes() -> None:
    memory = Reservation(2 * HUGE_PAGE)
    small, large = Slot(begin=0, pages=PAGE, lead=0), Slot(begin=HUGE_PAGE, pages=4 * PAGE, lead=0)
    others = [Slot(begin=(2 + n) * PAGE, pages=2 * PAGE, lead=0) for n in range(0, 6, 2)]
    for slot in (small, *others):
        memory.slot(slot)[:] = bytes([7]) * slot.pages
    memory.release([small, *others])
    assert memory.resident() == 7 * PAGE
    memory.coming([large])  # of a size that nothing had
    memory.slot(large)[:] = bytes([8]) * large.pages
    assert memory.resident() <= 7 * PAGE
    memory.trim()
    assert memory.resident() == 4 * PAGE
    assert set(memory.slot(large)) == {8}


def test_a_system_that_does_not_move_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    monkeypatch.setattr(memory, "_library", SimpleNamespace(mremap=lambda *_: None))
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER
    memory.release([slots[0]])
    memory.coming([slots[8]])
    memory.slot(slots[8])[:] = bytes([8]) * _QUARTER
    monkeypatch.undo()
    assert memory.resident() == _QUARTER
    assert set(memory.slot(slots[8])) == {8}


def _straddling(count: int) -> list[Slot]:
    """Slots that huge pages do not hold whole numbers of."""
    size = 75 * PAGE
    return [Slot(begin=n * size, pages=size, lead=0) for n in range(count)]


def test_slots_across_huge_pages_move_too_or_are_given_back() -> None:
    slots = _straddling(120)
    memory = Reservation(slots[-1].begin + slots[-1].pages)
    memory.coming(slots[:57])
    for number, slot in enumerate(slots[:57]):
        memory.slot(slot)[:] = bytes([number + 1]) * slot.pages
    for gone in range(40):
        memory.release([slots[gone]])
        memory.coming([slots[60 + gone]])
        memory.slot(slots[60 + gone])[:] = bytes([200 + gone % 50]) * slots[0].pages
    memory.trim()
    assert memory.resident() == 57 * slots[0].pages
    for number, slot in enumerate(slots):
        value = number + 1 if 40 <= number < 57 else 200 + (number - 60) % 50 if 60 <= number < 100 else 0
        assert set(memory.slot(slot)) == {value}, number


@pytest.mark.parametrize("unmapped", [True, False])
def test_a_move_that_fails_halfway_leaves_no_hole(monkeypatch: pytest.MonkeyPatch, unmapped: bool) -> None:
    memory, slots = Reservation(4 * HUGE_PAGE), _slots(16)
    real = memory._library

    def mremap(old: Any, size: Any, same: Any, flags: Any, target: Any) -> int | None:
        if not flags.value & 2:
            return real.mremap(old, size, same, flags, target)  # type: ignore[no-any-return]
        if unmapped:  # as older systems do before they find the source wanting
            assert real.munmap(target, size) == 0
        return ctypes.c_void_p(-1).value

    monkeypatch.setattr(
        memory, "_library", SimpleNamespace(mremap=mremap, munmap=real.munmap, mmap=real.mmap, mincore=real.mincore)
    )
    memory.slot(slots[0])[:] = bytes([7]) * _QUARTER
    memory.release([slots[0]])
    memory.coming([slots[8]])
    memory.slot(slots[8])[:] = bytes([8]) * _QUARTER
    memory.trim()
    assert set(memory.slot(slots[8])) == {8}
    assert set(memory.slot(slots[0])) == {0}
    assert memory.resident() <= 2 * _QUARTER


def test_what_was_moved_away_gets_no_huge_pages_again() -> None:
    memory, slots = Reservation(8 * HUGE_PAGE), _slots(32)
    memory.coming(slots[:16])
    for slot in slots[:16]:
        memory.slot(slot)[:] = bytes([7]) * _QUARTER
    memory.release(slots[:16])
    memory.coming(slots[16:])
    memory.slot(slots[0])[:] = bytes([9]) * _QUARTER  # comes back alone
    assert memory.resident() == 17 * _QUARTER
    flags = _flags_of(memory.whole.data_ptr())
    assert flags is None or "hg" not in flags


def _flags_of(address: int) -> list[str] | None:
    """The flags of the mapping at an address; None where the system does not say."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return None
